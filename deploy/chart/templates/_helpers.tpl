{{/* Settings as TOML: lists of tables and tables are written inline, strings and numbers are the same in TOML and JSON. */}}
{{- define "nvcache.toml" -}}
{{- range $name, $value := . }}
{{ $name }} = {{ include "nvcache.tomlValue" $value }}
{{- end }}
{{- end }}

{{- define "nvcache.tomlValue" -}}
{{- if kindIs "map" . -}}
{ {{- range $index, $name := keys . | sortAlpha }}{{ if $index }}, {{ end }}{{ $name }} = {{ include "nvcache.tomlValue" (index $ $name) }}{{ end -}} }
{{- else if kindIs "slice" . -}}
[ {{- range $index, $value := . }}{{ if $index }}, {{ end }}{{ include "nvcache.tomlValue" $value }}{{ end -}} ]
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{/* The two files. A stripe is nvcache's alone, so it may be filled; a directory is shared, and what it may take is the operator's to say. */}}
{{- define "nvcache.config" -}}
{{- $room := eq .Values.backend "directory" | ternary dict (dict "max_bytes" "1000TB" "min_free" "64GiB") -}}
{{- include "nvcache.toml" (merge (dict) .Values.settings $room (empty .Values.models | ternary dict (dict "models" .Values.models))) | trim }}
{{- end }}

{{- define "nvcache.disksConfig" -}}
{{- include "nvcache.toml" (merge (dict "backend" .Values.backend) .Values.disks.settings) | trim }}
{{- end }}

{{- define "nvcache.labels" -}}
app.kubernetes.io/name: nvcache
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- define "nvcache.image" -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{/* Where pods of both DaemonSets go. */}}
{{- define "nvcache.placement" -}}
priorityClassName: nvcache
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $taint := list }}
{{- with .Values.settings.startup_taint }}
{{- $taint = list (dict "key" . "operator" "Exists") }}
{{- end }}
{{- with concat $taint .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

"""Runs nginx as a Blob Storage account that serves one directory, three times over. It writes nothing, checks no credential, and knows no snapshot.

What clients ask of a large download is there: the listing of a container (one page; `prefix` only), a blob's properties and its bytes by Range or
x-ms-range, If-Match and If-Unmodified-Since (412), the MD5 of a range on request. Header and element names are those of Microsoft's public REST
reference ("List Blobs", "Get Blob", "Get Blob Properties"). In the container `models` lie the same files with different digests: `mirrored/` has
SHA-256 in metadata and Content-MD5, `uploaded/` Content-MD5 only, `plain/` neither.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Self
from xml.sax.saxutils import escape

from tests.support.nginx import Nginx, beginning, quoted

ACCOUNT, CONTAINER = "account", "models"
MIRRORED, UPLOADED, PLAIN = PREFIXES = ("mirrored", "uploaded", "plain")
API = "2025-11-05"

# Only lua sees a request before nginx looks at its Range. What is read here for an MD5 is in the page cache and at most 4 MiB, so it may block.
TRANSLATE = """
    rewrite_by_lua_block {
        local asked = ngx.var.http_x_ms_range or ngx.var.http_range
        if asked then
            ngx.req.set_header("Range", asked)
            ngx.var.md5 = ""
            local first, last = asked:match("^bytes=(%d+)-(%d+)$")
            if first and ngx.var.http_x_ms_range_get_content_md5 == "true" then
                local size = last - first + 1
                if size > 4194304 then return ngx.exit(400) end
                local file = assert(io.open(ngx.var.source, "rb"))
                file:seek("set", tonumber(first))
                ngx.var.md5 = ngx.encode_base64(ngx.md5_bin(file:read(size) or ""))
                file:close()
            end
        end
    }
"""


@dataclass(frozen=True, slots=True)
class Blob:
    """One file as the service describes it."""

    path: str
    source: Path
    size: int
    modified: int  # unix seconds
    md5: str  # base64, as in Content-MD5
    sha256: str

    @classmethod
    def of(cls, source: Path, path: str) -> Blob:
        """Reads the file."""
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            md5 = base64.b64encode(hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()).decode()
        stat = source.stat()
        return cls(path, source, stat.st_size, int(stat.st_mtime), md5, sha256)

    @property
    def etag(self) -> str:
        """The one nginx gives to a file by itself."""
        return f"{self.modified:x}-{self.size:x}"


class NginxBlobs(Nginx):
    """A context manager: `url` is the account's endpoint, `ca_file` the CA with `tls=True`. `work` is a directory of its own."""

    def __init__(self, directory: Path, work: Path, *, tls: bool = False) -> None:
        super().__init__(work, tls=tls)
        self._blobs = [Blob.of(path, path.relative_to(directory).as_posix()) for path in sorted(directory.rglob("*")) if path.is_file()]
        self.url = ""

    def __enter__(self) -> Self:
        for prefix in ("", *PREFIXES):
            listing = self._work / "listing" / prefix / "list.xml"
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text(self._listing([prefix] if prefix else PREFIXES))
        with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=512)) as listener:
            host = f"{'https' if self._tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
            self.url = f"{host}/{ACCOUNT}"
            self._serve(host, self._config(listener.getsockname()[1]), [listener])
        return self

    def requests(self) -> list[tuple[int, str, str]]:
        """What was asked so far: (status, method and path, range asked for or "-")."""
        lines = (line.split(" ", 3) for line in (self._work / "access.log").read_text().splitlines())
        return [(int(status), f"{method} {path}", asked) for status, asked, method, path in lines if path != "/healthz"]

    def _listing(self, prefixes: tuple[str, ...] | list[str]) -> str:
        blobs = "".join(_entry(prefix, blob) for prefix in prefixes for blob in self._blobs)
        service = f'ServiceEndpoint="http://127.0.0.1/{ACCOUNT}/" ContainerName="{CONTAINER}"'
        return f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults {service}><Blobs>{blobs}</Blobs><NextMarker /></EnumerationResults>'

    def _config(self, port: int) -> str:
        return f"""{beginning(self._work, self._tls)}
    log_format plain '$status $asked $request_method $uri';
    access_log {self._work}/access.log plain;
    map $http_x_ms_range $asked {{ "" $http_range; default $http_x_ms_range; }}
    server {{
        listen 127.0.0.1:{port}{" ssl" if self._tls else ""};
        add_header x-ms-version {API} always;
        add_header x-ms-request-id $request_id always;
        location = /healthz {{ return 204; }}
        error_page 412 @changed;
        error_page 416 @too_short;
        location / {{ {_refusal(404, "BlobNotFound")} }}
        location @no_container {{ {_refusal(404, "ContainerNotFound")} }}
        location @changed {{ {_refusal(412, "ConditionNotMet")} }}
        location @too_short {{ {_refusal(416, "InvalidRange")} }}
        location = /{ACCOUNT}/{CONTAINER} {{
            if ($arg_comp != list) {{ return 404; }}
            set_by_lua_block $listed {{ return (ngx.unescape_uri(ngx.var.arg_prefix or ""):gsub("/$", "")) }}
            root {self._work}/listing;
            default_type application/xml;
            try_files /$listed/list.xml @no_container;
        }}
        {"".join(_location(prefix, blob) for prefix in PREFIXES for blob in self._blobs)}
    }}
}}
"""


def _location(prefix: str, blob: Blob) -> str:
    md5 = "" if prefix == PLAIN else blob.md5
    return f"""location = {quoted(f"/{ACCOUNT}/{CONTAINER}/{prefix}/{blob.path}")} {{
            set $source {quoted(str(blob.source))};
            set $md5 "{md5}";
            {TRANSLATE}
            add_header x-ms-version {API} always;
            add_header x-ms-request-id $request_id always;
            add_header x-ms-blob-type BlockBlob;
            add_header x-ms-creation-time "{formatdate(blob.modified, usegmt=True)}";
            add_header x-ms-lease-status unlocked;
            add_header x-ms-lease-state available;
            add_header x-ms-server-encrypted true;
            add_header Content-MD5 $md5;
            {f'add_header x-ms-blob-content-md5 "{md5}";' if md5 else ""}
            {f"add_header x-ms-meta-sha256 {blob.sha256};" if prefix == MIRRORED else ""}
            alias {quoted(str(blob.source))};
        }}
        """


def _entry(prefix: str, blob: Blob) -> str:
    at = formatdate(blob.modified, usegmt=True)
    md5 = "" if prefix == PLAIN else f"<Content-MD5>{blob.md5}</Content-MD5>"
    metadata = f"<Metadata><sha256>{blob.sha256}</sha256></Metadata>" if prefix == MIRRORED else "<Metadata />"
    return (
        f"<Blob><Name>{escape(f'{prefix}/{blob.path}')}</Name><Properties><Creation-Time>{at}</Creation-Time><Last-Modified>{at}</Last-Modified>"
        f"<Etag>{blob.etag}</Etag><Content-Length>{blob.size}</Content-Length><Content-Type>application/octet-stream</Content-Type>{md5}"
        f"<BlobType>BlockBlob</BlobType><AccessTier>Hot</AccessTier><LeaseStatus>unlocked</LeaseStatus><LeaseState>available</LeaseState>"
        f"<ServerEncrypted>true</ServerEncrypted></Properties>{metadata}<OrMetadata /></Blob>"
    )


def _refusal(status: int, code: str) -> str:
    """An error as the service makes it; the header is what clients look at, the body what they fall back to."""
    body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{status}</Message></Error>'
    headers = f"add_header x-ms-version {API} always; add_header x-ms-request-id $request_id always; add_header x-ms-error-code {code} always;"
    return f"{headers} default_type application/xml; return {status} '{body}';"

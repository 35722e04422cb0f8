"""Runs nginx as a Hub and its CDN on two loopback addresses, serving directories. It checks no token and fakes nothing nginx would not do.

The Hub (127.0.0.1) answers model_info and tree with JSON written beforehand, plain files itself, and LFS files with a 302 to the CDN (127.0.0.2):
a URL signed by secure_link that expires. The CDN answers 403 to a wrong signature, 410 to an expired one and 400 to a request that carries
Authorization; Range and If-Range are nginx's own. The CDN may be slowed (`rate`) or throttled (`requests_per_s`, 429 with Retry-After); both may
speak TLS.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.processes import end
from tests.support.tls import Tls, make_tls

LFS_SUFFIXES = (".safetensors", ".bin")
LFS_SIZE = 1 << 20  # larger files are LFS whatever their name
SECRET = "not a secret: signs the URLs of a test"
MODULES = Path("/usr/share/nginx/modules")


@dataclass(frozen=True, slots=True)
class Served:
    """One file as the Hub describes it."""

    path: str
    source: Path
    size: int
    oid: str  # git blob id
    sha256: str | None  # LFS files only

    def tree(self) -> dict[str, object]:
        """Its entry in the answer to `tree`."""
        entry: dict[str, object] = {"type": "file", "path": self.path, "size": self.size, "oid": self.oid}
        if self.sha256:
            entry["lfs"] = _lfs("oid", self.sha256, self.size)
        return entry


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at its one commit."""

    commit: str
    files: tuple[Served, ...]


class Nginx:
    """A nginx's life, for those who give it a configuration. `work` is a directory of its own; `ca_file` the CA with `tls=True`."""

    def __init__(self, work: Path, *, tls: bool) -> None:
        self._work = work
        self._work.mkdir(parents=True, exist_ok=True)
        self._tls: Tls | None = make_tls(work) if tls else None
        self.ca_file = self._tls.cert if self._tls else None  # the certificate is its own CA
        self._process: subprocess.Popen[bytes] | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        end(self._process)
        self._process = None

    @property
    def pid(self) -> int:
        """The process that nginx's workers descend from."""
        assert self._process is not None
        return self._process.pid

    def _serve(self, url: str, config: str, listeners: Sequence[socket.socket]) -> None:
        """Start it on `listeners`, which are ours to close afterwards, and wait until `url` answers."""
        self._process = _launch(self._work, config, listeners)
        for listener in listeners:
            listener.close()
        try:
            _await_answer(url, self._work, self.ca_file)
        except BaseException:
            self.__exit__(None, None, None)
            raise


class NginxHub(Nginx):
    """A context manager: `url` is the Hub's endpoint, `cdn_url` the CDN's, `commits` the commit of each repository, `ca_file` the CA with `tls=True`.

    `work` is a directory of its own for configuration and logs. `rate` limits each connection of the CDN (nginx size, e.g. "20m" a second),
    `requests_per_s` the CDN's requests, `url_life_s` the life of signed URLs in seconds.
    """

    def __init__(
        self,
        repos: Mapping[str, Path],
        work: Path,
        *,
        tls: bool = False,
        rate: str | None = None,
        requests_per_s: int | None = None,
        url_life_s: int = 3600,
    ) -> None:
        super().__init__(work, tls=tls)
        self._rate = rate
        self._requests_per_s = requests_per_s
        self._url_life_s = url_life_s
        self._repos = {name: _describe(directory) for name, directory in repos.items()}
        self.commits = {name: repo.commit for name, repo in self._repos.items()}
        self.url = self.cdn_url = ""

    def __enter__(self) -> Self:
        scheme = "https" if self._tls else "http"
        with contextlib.ExitStack() as stack:
            hub, cdn = (stack.enter_context(socket.create_server((host, 0), backlog=512)) for host in ("127.0.0.1", "127.0.0.2"))
            self.url, self.cdn_url = (f"{scheme}://{host}:{port}" for host, port in (hub.getsockname(), cdn.getsockname()))
            self._write_answers()
            self._serve(self.url, self._config(hub.getsockname()[1], cdn.getsockname()[1]), (hub, cdn))
        return self

    def requests(self) -> list[tuple[str, int, str]]:
        """What was asked so far: (origin "hub" or "cdn", status, request line without query), in the order in which nginx finished."""
        lines = (self._work / "access.log").read_text().splitlines()
        found = (line.split(" ", 2) for line in lines)
        return [(origin, int(status), what) for origin, status, what in found if what != "GET /healthz"]

    def _write_answers(self) -> None:
        """The JSON answers, by URL path; `tree` is asked with a query, which nginx leaves out when it looks for the file."""
        for name, repo in self._repos.items():
            api = self._work / "answers/api/models" / name
            siblings = [
                {"rfilename": f.path, "size": f.size, "blobId": f.oid} | ({"lfs": _lfs("sha256", f.sha256, f.size)} if f.sha256 else {})
                for f in repo.files
            ]
            info = {"_id": repo.commit[:24], "id": name, "modelId": name, "sha": repo.commit, "private": False, "gated": False, "siblings": siblings}
            for revision in ("main", repo.commit):
                _write(api / "revision" / revision, info)
                _write(api / "tree" / revision, [f.tree() for f in repo.files])
            _write(api / "index.json", info)

    def _config(self, hub_port: int, cdn_port: int) -> str:
        ssl_flag = " ssl" if self._tls else ""
        throttle = f"limit_req_zone $server_addr zone=cdn:1m rate={self._requests_per_s}r/s;" if self._requests_per_s else ""
        throttled = "limit_req zone=cdn; limit_req_status 429; error_page 429 @slow;" if self._requests_per_s else ""
        rate = f"limit_rate {self._rate};" if self._rate else ""
        blobs = {f.sha256: f.source for repo in self._repos.values() for f in repo.files if f.sha256}
        return f"""{beginning(self._work, self._tls)}
    log_format plain '$origin $status $request_method $uri';
    access_log {self._work}/access.log plain;
    etag off;
    {throttle}
    server {{
        listen 127.0.0.1:{hub_port}{ssl_flag};
        set $origin hub;
        location = /healthz {{ return 204; }}
        location /api/ {{
            root {self._work}/answers;
            default_type application/json;
            try_files $uri $uri/index.json @no_repository;
        }}
        location / {{ try_files /nothing-here @no_repository; }}
        location @no_repository {{ {_missing("RepoNotFound", "Repository not found")} }}
        location @no_revision {{ {_missing("RevisionNotFound", "Invalid rev id")} }}
        location @no_file {{ {_missing("EntryNotFound", "Entry not found")} }}
        {"".join(self._repository(name, repo) for name, repo in self._repos.items())}
    }}
    server {{
        listen 127.0.0.2:{cdn_port}{ssl_flag};
        set $origin cdn;
        location @slow {{ add_header Retry-After 1 always; return 429; }}
        location / {{ return 404; }}
        {"".join(_blob(sha256, source, throttled + rate) for sha256, source in blobs.items())}
    }}
}}
"""

    def _repository(self, name: str, repo: Repository) -> str:
        locations = [
            f'location "/api/models/{name}/revision/" {{ root {self._work}/answers; default_type application/json; try_files $uri @no_revision; }}\n',
            f'location "/api/models/{name}/tree/" {{ root {self._work}/answers; default_type application/json; try_files $uri @no_revision; }}\n',
            f'location "/{name}/resolve/" {{ try_files /nothing-here @no_file; }}\n',
        ]
        for file in repo.files:
            for revision in ("main", repo.commit):
                uri = quoted(f"/{name}/resolve/{revision}/{file.path}")
                locations.append(f"location = {uri} {{ {self._answer(file, repo.commit)} }}\n")
        return "".join(locations)

    def _answer(self, file: Served, commit: str) -> str:
        common = f"add_header X-Repo-Commit {commit} always; add_header Accept-Ranges bytes;"
        if file.sha256 is None:
            return f"""{common} add_header ETag '"{file.oid}"'; alias {quoted(str(file.source))};"""
        linked = f"""add_header X-Linked-Size {file.size} always; add_header X-Linked-Etag '"{file.sha256}"' always;"""
        signed = f"""
            set_by_lua_block $signed {{
                local expires = ngx.time() + {self._url_life_s}
                local digest = ngx.encode_base64(ngx.md5_bin(expires .. "/lfs/{file.sha256} {SECRET}"), true)
                local signature = digest:gsub("+", "-"):gsub("/", "_")
                return "{self.cdn_url}/lfs/{file.sha256}?expires=" .. expires .. "&signature=" .. signature
            }}"""
        return f"{common} {linked} {signed} return 302 $signed;"


def _launch(work: Path, config: str, listeners: Sequence[socket.socket]) -> subprocess.Popen[bytes]:
    """Start nginx in `work`, with sockets that listen already: nginx takes over those named in NGINX, so no port can be lost to another."""
    for listener in listeners:
        listener.setblocking(False)  # nginx takes it as it is: a worker that loses the race for a connection would hang in accept
    (work / "nginx.conf").write_text(config)
    fds = [listener.fileno() for listener in listeners]
    return subprocess.Popen(
        [shutil.which("nginx") or "/usr/sbin/nginx", "-p", work, "-c", work / "nginx.conf", "-e", work / "error.log"],
        env={"PATH": os.environ["PATH"], "NGINX": "".join(f"{fd};" for fd in fds)},
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _await_answer(url: str, work: Path, ca_file: Path | None) -> None:
    """Wait for `url`/healthz. The socket listens since before nginx ran: this waits in its backlog, or fails when nginx died."""
    context = ssl.create_default_context(cafile=ca_file) if ca_file else None
    handlers = [urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=context)] if context else [])]
    try:
        urllib.request.build_opener(*handlers).open(f"{url}/healthz", timeout=10).close()
    except OSError as error:
        log = work / "error.log"
        raise RuntimeError(f"cannot start nginx: {error}: {log.read_text() if log.exists() else 'no log'}") from error


def beginning(work: Path, tls: Tls | None) -> str:
    """What every configuration begins with, up to the `http` block that is left open. Nothing is kept outside `work`."""
    modules = "\n".join(f"load_module {MODULES / module};" for module in ("ndk_http_module.so", "ngx_http_lua_module.so"))
    return f"""
{modules}
{"user root;" if os.geteuid() == 0 else ""}
daemon off;
pid {work}/nginx.pid;
worker_processes auto;
worker_shutdown_timeout 1s;
events {{ worker_connections 1024; }}
http {{
    client_body_temp_path {work}/body; proxy_temp_path {work}/proxy; fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;
    sendfile on; tcp_nopush on; keepalive_requests 100000; default_type application/octet-stream;
    server_tokens off;
    {f"ssl_certificate {tls.cert}; ssl_certificate_key {tls.key}; ssl_protocols TLSv1.2 TLSv1.3;" if tls else ""}
"""


def _missing(code: str, message: str) -> str:
    return f"""add_header X-Error-Code {code} always; add_header X-Error-Message "{message}" always; return 404;"""


def _blob(sha256: str, source: Path, limits: str) -> str:
    return f"""location = /lfs/{sha256} {{
        if ($http_authorization) {{ return 400; }}
        secure_link $arg_signature,$arg_expires;
        secure_link_md5 "$secure_link_expires$uri {SECRET}";
        if ($secure_link = "") {{ return 403; }}
        if ($secure_link = "0") {{ return 410; }}
        add_header ETag '"{sha256}"';
        {limits}
        alias {quoted(str(source))};
    }}
    """


def _describe(directory: Path) -> Repository:
    files = tuple(_served(directory, path) for path in _walk(directory))
    commit = hashlib.sha1("".join(f"{f.oid} {f.path}\n" for f in files).encode()).hexdigest()
    return Repository(commit, files)


def _walk(directory: Path) -> Iterator[Path]:
    yield from sorted(path for path in directory.rglob("*") if path.is_file())


def _served(directory: Path, source: Path) -> Served:
    size = source.stat().st_size
    path = source.relative_to(directory).as_posix()
    if source.suffix not in LFS_SUFFIXES and size <= LFS_SIZE:
        return Served(path, source, size, _git_blob(source.read_bytes()), None)
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Served(path, source, size, _git_blob(_pointer(sha256, size)), sha256)


def _lfs(key: str, sha256: str, size: int) -> dict[str, object]:
    """The `lfs` object, whose digest is named `sha256` in model_info and `oid` in tree."""
    return {key: sha256, "size": size, "pointerSize": len(_pointer(sha256, size))}


def _pointer(sha256: str, size: int) -> bytes:
    """What git itself holds of an LFS file (git-lfs specification, version 1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def quoted(text: str) -> str:
    """`text` as an nginx string: no variable, no escape."""
    if "$" in text:
        raise ValueError(f"nginx cannot express a '$' in {text!r}")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))

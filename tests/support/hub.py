"""A Hub-shaped HTTP server: repositories on 127.0.0.1, their LFS objects behind signed, expiring URLs of a CDN on 127.0.0.2. It stores nothing.

For tests (faults on demand, every request recorded) and by hand: `python -m tests.support.hub --dir DIR --repo org/name`. Unmodified Hub clients
work against it with `HF_ENDPOINT`. What it answers follows the public Hub: paths, pages by Link header, X-Repo-Commit, X-Linked-Etag, X-Error-Code,
RateLimit.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import hmac
import json
import os
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.support.faults import Fault, Faults, Kind
from tests.support.repo import MIB, Blob, Repo, pointer
from tests.support.serving import LoopbackServer, reset
from tests.support.tls import Tls

__all__ = ["Fault", "Faults", "HubServer", "Kind", "Repo", "Request", "Tls", "main"]

WINDOW_S = 300


@dataclass
class Request:
    """One request as it came, and what was answered. `path` is unquoted and without query; `file` is the repository path, where there is one."""

    method: str
    origin: str
    path: str
    query: str = field(repr=False)
    headers: dict[str, str] = field(repr=False)  # names in lower case
    file: str = ""
    status: int = 0
    sent: int = 0  # body bytes
    due: int = 0  # body bytes that were announced; those that were sent, once it is over

    @property
    def range(self) -> str | None:
        """The Range header."""
        return self.headers.get("range")


class HubServer:
    """Hub and CDN, each a thread that serves one thread a connection. A context manager: serving inside, closed (all threads joined) after.

    `token`: the one valid token; None accepts any. `resolve_cache` answers plain files with a relative 307 first, as the Hub may. `page_size`,
    `url_life_s` and the repositories may be changed while it serves.
    """

    def __init__(
        self,
        repos: Mapping[str, Repo],
        *,
        token: str | None = None,
        faults: Faults | None = None,
        tls: Tls | None = None,
        url_life_s: float = 3600,
        page_size: int = 1000,
        resolve_cache: bool = False,
        port: int = 0,
    ) -> None:
        self.repos, self.token, self.faults = dict(repos), token, faults or Faults()
        self.url_life_s, self.page_size, self.resolve_cache = url_life_s, page_size, resolve_cache
        self.requests: list[Request] = []
        self.most_at_once = 0  # bodies of files under way
        self.revoked: dict[str, int] = {}  # signature → status
        self._secret = secrets.token_bytes(16)
        self._epoch = 0
        scheme = "https" if tls else "http"
        self._servers = [_Server(("127.0.0.1", port), self, "hub", tls), _Server(("127.0.0.2", 0), self, "cdn", tls)]
        self.url = f"{scheme}://127.0.0.1:{self._servers[0].server_port}"
        self.cdn_url = f"{scheme}://127.0.0.2:{self._servers[1].server_port}"

    def __enter__(self) -> HubServer:
        for server in self._servers:
            server.start(server.origin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.faults.clear()
        for server in self._servers:
            server.stop()

    def bytes_sent(self, glob: str = "*") -> int:
        """Body bytes of file content sent so far, for repository paths that match `glob`."""
        return sum(request.sent for request in list(self.requests) if request.file and fnmatchcase(request.file, glob))

    def seen(self, glob: str = "*", *, origin: str | None = None, method: str | None = None) -> list[Request]:
        """The requests so far whose path or repository path matches."""
        return [
            r
            for r in list(self.requests)
            if (origin in (None, r.origin)) and (method in (None, r.method)) and (fnmatchcase(r.path, glob) or fnmatchcase(r.file, glob))
        ]

    def expire_urls(self) -> None:
        """Every URL signed so far is expired from now on."""
        self._epoch += 1

    def drop_connections(self) -> None:
        """Close every open connection, as a restart would."""
        for server in self._servers:
            server.drop_connections()

    def sign(self, path: str) -> str:
        """A CDN URL for an (unquoted) path, good for `url_life_s`."""
        expires = f"{time.time() + self.url_life_s:.3f}"
        signature = self._signature(path, expires, str(self._epoch))
        return f"{self.cdn_url}{quote(path)}?Expires={expires}&Epoch={self._epoch}&Signature={signature}&Key-Pair-Id=TEST"

    def refuses(self, path: str, query: str) -> int | None:
        """The status that a CDN URL is refused with, or None."""
        fields = {name: values[0] for name, values in parse_qs(query).items()}
        signature = fields.get("Signature", "")
        if signature in self.revoked:
            return self.revoked[signature]
        good = hmac.compare_digest(signature, self._signature(path, fields.get("Expires", ""), fields.get("Epoch", "")))
        if not good or float(fields["Expires"]) < time.time() or fields["Epoch"] != str(self._epoch):
            return 403
        return None

    def _signature(self, path: str, expires: str, epoch: str) -> str:
        return hmac.new(self._secret, f"{path}|{expires}|{epoch}".encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


class _Server(LoopbackServer):
    def __init__(self, address: tuple[str, int], hub: HubServer, origin: str, tls: Tls | None) -> None:
        self.hub, self.origin = hub, origin
        super().__init__(address, _Handler, tls)


class _DropError(ConnectionError):
    """The fault ends this connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    request: socket.socket

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.hub = self.server.hub
        self.note = Request(self.command, self.server.origin, unquote(url.path), url.query, {k.lower(): v for k, v in self.headers.items()})
        self.hub.requests.append(self.note)
        self.fault = self.hub.faults.take((self.note.origin, "*"), self.command, self.note.path)
        if self.fault and self._instead(self.fault, None):
            return
        (self._cdn if self.note.origin == "cdn" else self._hub)(url.path)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *_: object) -> None:
        """Requests are recorded, not printed."""

    # --- the Hub

    def _hub(self, path: str) -> None:
        sent = self.headers.get("Authorization")
        if sent is not None and self.hub.token is not None and sent != f"Bearer {self.hub.token}":
            return self._error(401, None, "Invalid credentials in Authorization header")
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) >= 3:
            for length in (2, 1):
                if "/".join(parts[2 : 2 + length]) in self.hub.repos and len(parts) >= 2 + length:
                    return self._api("/".join(parts[2 : 2 + length]), parts[2 + length :])
            return self._error(404 if sent else 401, "RepoNotFound", "Repository not found")
        if parts[:3] == ["api", "resolve-cache", "models"] and len(parts) > 5:
            return self._file("/".join(parts[3:5]), parts[5], "/".join(parts[6:]), cached=True)
        for length in (2, 1):
            if len(parts) > length + 2 and parts[length] == "resolve":
                return self._file("/".join(parts[:length]), parts[length + 1], "/".join(parts[length + 2 :]))
        return self._error(404, None, "Not found")

    def _repo(self, name: str, *, content: bool) -> Repo | None:
        """The repository if the caller may see it (and, for `content`, its files); else the error is answered."""
        known = self.hub.token is not None and self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not known):
            self._error(404 if known else 401, "RepoNotFound", "Repository not found")
        elif content and repo.gated and not (known and repo.granted):
            self._error(403 if known else 401, "GatedRepo", f"Access to model {name} is restricted.")
        else:
            return repo
        return None

    def _api(self, name: str, rest: list[str]) -> None:
        repo = self._repo(name, content=False)
        if repo is None:
            return None
        commit = repo.find(rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        if not rest or rest[0] == "revision":
            return self._json(self._info(name, repo, commit, blobs=query.get("blobs", "").lower() == "true"))
        if rest[0] == "tree":
            return self._tree(repo, commit, prefix="/".join(rest[2:]), recursive=query.get("recursive", "").lower() in ("true", "1"), query=query)
        return self._error(404, None, "Not found")

    def _info(self, name: str, repo: Repo, commit: str, *, blobs: bool) -> dict[str, object]:
        siblings: list[dict[str, object]] = []
        for path, blob in repo.commits[commit].items():
            entry: dict[str, object] = {"rfilename": path}
            if blobs:
                size = repo.listed_size(path, blob)
                entry |= {"size": size, "blobId": blob.git_id}
                if blob.sha256:
                    entry["lfs"] = {"sha256": blob.sha256, "size": size, "pointerSize": len(pointer(blob.sha256, blob.size))}
            siblings.append(entry)
        stamp = "2026-01-01T00:00:00.000Z"
        return {
            "_id": commit[:24],
            "id": name,
            "modelId": name,
            "author": name.partition("/")[0],
            "sha": commit,
            "lastModified": stamp,
            "createdAt": stamp,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }

    def _tree(self, repo: Repo, commit: str, *, prefix: str, recursive: bool, query: dict[str, str]) -> None:
        below = f"{prefix}/" if prefix else ""
        entries: list[dict[str, object]] = []
        folders: set[str] = set()
        for path, blob in repo.commits[commit].items():
            if not path.startswith(below):
                continue
            parents = path[len(below) :].split("/")[:-1]
            for depth in range(1, (len(parents) if recursive else min(1, len(parents))) + 1):
                folder = below + "/".join(parents[:depth])
                if folder not in folders:
                    folders.add(folder)
                    entries.append({"type": "directory", "path": folder, "size": 0, "oid": hashlib.sha1(folder.encode()).hexdigest()})
            if recursive or not parents:
                entries.append(self._entry(repo, path, blob))
        start = int(query.get("cursor", "0"))
        page = entries[start : start + self.hub.page_size]
        headers = {}
        if start + len(page) < len(entries):
            target = f"{self.hub.url}{urlsplit(self.path).path}?recursive={query.get('recursive', 'false')}&cursor={start + len(page)}"
            headers["Link"] = f'<{target}>; rel="next"'
        self._json(page, headers)

    def _entry(self, repo: Repo, path: str, blob: Blob) -> dict[str, object]:
        size = repo.listed_size(path, blob)
        entry: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": blob.git_id}
        if blob.sha256:
            entry["lfs"] = {"oid": blob.sha256, "size": size, "pointerSize": len(pointer(blob.sha256, blob.size))}
        if path in repo.xet:
            entry["xetHash"] = repo.xet[path]
        return entry

    def _file(self, name: str, revision: str, path: str, *, cached: bool = False) -> None:
        repo = self._repo(name, content=True)
        if repo is None:
            return None
        commit = repo.find(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        blob = repo.commits[commit].get(path)
        if blob is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        self.note.file = path
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if blob.sha256:
            target = self.hub.sign(f"/{name}/{blob.sha256}/{path}")
            return self._reply(302, {**headers, "Location": target, "X-Linked-Size": str(blob.size), "X-Linked-Etag": blob.etag}, b"Found")
        if self.hub.resolve_cache and not cached:
            target = f"/api/resolve-cache/models/{quote(name)}/{commit}/{quote(path)}?etag={quote(blob.etag)}"
            return self._reply(307, {**headers, "Location": target, "X-Linked-Size": str(blob.size), "X-Linked-Etag": blob.etag}, b"")
        return self._content(blob, blob.etag, headers)

    # --- the CDN

    def _cdn(self, path: str) -> None:
        if self.headers.get("Authorization") is not None:
            return self._reply(400, {}, b"<Error><Code>InvalidArgument</Code><Message>Only one auth mechanism allowed</Message></Error>")
        refused = self.hub.refuses(unquote(path), urlsplit(self.path).query)
        if refused is not None:
            return self._reply(refused, {}, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        parts = unquote(path).lstrip("/").split("/")
        for length in (2, 1):
            repo, file = self.hub.repos.get("/".join(parts[:length])), "/".join(parts[length + 1 :])
            for tree in repo.commits.values() if repo else ():
                blob = tree.get(file)
                if blob and blob.sha256 == parts[length]:
                    self.note.file = file
                    # as real CDNs do, an ETag of its own that is not the Hub's
                    return self._content(blob, f'"{hashlib.md5(blob.sha256.encode()).hexdigest()}"', {"Accept-Ranges": "bytes"})
        return self._reply(404, {}, b"<Error><Code>NoSuchKey</Code></Error>")

    # --- answers

    def _content(self, blob: Blob, etag: str, headers: dict[str, str]) -> None:
        """The bytes of a file: whole or one range, with If-Range, and with whatever fault is due."""
        fault = self.fault = self.fault or self.hub.faults.take(("bytes",), self.command, self.note.path, self.note.file)
        if fault and self._instead(fault, blob):
            return None
        source: bytes | Path = blob.source
        kind = fault.kind if fault else None
        if kind is Kind.CHANGED:
            whole = source if isinstance(source, bytes) else source.read_bytes()
            source, etag = bytes(byte ^ 0xFF for byte in whole), '"changed"'
        start, stop = 0, blob.size
        wanted = self.note.range
        condition = self.headers.get("If-Range")
        whole_file = wanted is None or (condition is not None and condition != etag) or kind in (Kind.IGNORE_RANGE, Kind.CHUNKED)
        whole_file = whole_file or (fault is not None and fault.whole)
        headers = {**headers, "Content-Type": "application/octet-stream", "ETag": etag}
        if whole_file:
            if kind is Kind.CHUNKED:
                return self._chunked(source, blob.size, {**headers, "ETag": etag.strip('"')})
            return self._reply(200, headers, source, 0, blob.size)
        start, stop = _span(wanted or "", blob.size)
        if start >= stop:
            return self._reply(416, {**headers, "Content-Range": f"bytes */{blob.size}"}, b"")
        if kind is Kind.WRONG_START:
            start, stop = (start + 1, stop + 1) if stop < blob.size else (start - 1, stop - 1)
        total = blob.size + 1 if kind is Kind.WRONG_TOTAL else blob.size
        return self._reply(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{total}"}, source, start, stop - start)

    def _instead(self, fault: Fault, blob: Blob | None) -> bool:
        """Answer what the fault says instead of anything else; False if it only alters the answer."""
        if fault.kind is Kind.STATUS:
            self._reply(fault.status, fault.headers, fault.body)
        elif fault.kind in (Kind.THROTTLE, Kind.BUSY):
            headers = {
                "date": {"Retry-After": formatdate(time.time() + fault.seconds, usegmt=True)},
                "retry-after": {"Retry-After": f"{fault.seconds:.0f}"},
                "ratelimit": {"RateLimit": f'"resolvers";r=0;t={fault.seconds:.0f}', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'},
                "none": {},
            }[fault.style]
            self._reply(429 if fault.kind is Kind.THROTTLE else 503, headers, b"slow down")
        elif fault.kind is Kind.PORTAL:
            page = b"<!DOCTYPE html><html><head><title>Guest network</title></head><body>Please sign in</body></html>"
            self._reply(200, {"Content-Type": "text/html; charset=utf-8"}, page)
        elif fault.kind is Kind.POINTER and blob is not None:
            self._reply(200, {"Content-Type": "text/plain"}, pointer(blob.sha256 or "0" * 64, blob.size))
        elif fault.kind is Kind.GZIP and blob is not None:
            whole = blob.source if isinstance(blob.source, bytes) else blob.source.read_bytes()
            start, stop = _span(self.note.range or "bytes=0-", blob.size)
            self._reply(206, {"Content-Encoding": "gzip", "Content-Range": f"bytes {start}-{stop - 1}/{blob.size}"}, gzip.compress(whole[start:stop]))
        elif fault.kind is Kind.MULTIPART:
            self._reply(206, {"Content-Type": "multipart/byteranges; boundary=b"}, b"--b\r\nContent-Range: bytes 0-0/1\r\n\r\nx\r\n--b--\r\n")
        elif fault.kind is Kind.UNSATISFIABLE:
            self._reply(416, {"Content-Range": f"bytes */{max(0, blob.size - 1) if blob else 0}"}, b"")
        elif fault.kind is Kind.REDIRECT_LOOP:
            self._reply(302, {"Location": self.path}, b"")
        elif fault.kind is Kind.DOWNGRADE:
            self._reply(302, {"Location": f"http://{self.headers['Host']}{self.path}"}, b"")
        else:
            return False
        return True

    def _error(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._reply(status, {**named, "Content-Type": "application/json"}, json.dumps({"error": message}).encode())

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._reply(200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.note.status = status
        self.send_response(status)
        if self.note.origin == "hub":
            left = WINDOW_S - int(time.time()) % WINDOW_S
            headers = {"RateLimit": f'"resolvers";r=2998;t={left}', "RateLimit-Policy": f'"fixed window";"resolvers";q=3000;w={WINDOW_S}', **headers}
        for name, value in headers.items():
            self.send_header(name, value.encode("utf-8", "surrogateescape").decode("latin-1"))
        self.end_headers()

    def _reply(self, status: int, headers: dict[str, str], source: bytes | Path, start: int = 0, length: int | None = None) -> None:
        length = len(source) if length is None and isinstance(source, bytes) else length or 0
        self._head(status, {**headers, "Content-Length": str(length)})
        if self.command == "HEAD":
            return
        if self.note.file and status in (200, 206):
            self.note.due = length
            self.hub.most_at_once = max(self.hub.most_at_once, sum(each.sent < each.due for each in list(self.hub.requests)))
        try:
            self._body(source, start, length)
        except OSError:
            self.close_connection = True
        finally:
            self.note.due = self.note.sent

    def _chunked(self, source: bytes | Path, size: int, headers: dict[str, str]) -> None:
        headers.pop("Accept-Ranges", None)
        self._head(200, {**headers, "Transfer-Encoding": "chunked"})
        try:
            for start in range(0, size, MIB):
                length = min(MIB, size - start)
                self.wfile.write(b"%x\r\n" % length)
                self._send(source, start, length)
                self.wfile.write(b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True

    def _body(self, source: bytes | Path, start: int, length: int) -> None:
        fault = self.fault
        if fault is None or fault.kind not in (Kind.TRUNCATE, Kind.RESET, Kind.FLIP, Kind.STALL, Kind.TRICKLE, Kind.EXPIRE):
            return self._send(source, start, length)
        if fault.kind is Kind.TRICKLE:
            for at in range(start, start + length, max(1, fault.after)):
                self._send(source, at, min(max(1, fault.after), start + length - at))
                if fault.released.wait(fault.seconds):
                    raise _DropError
            return None
        before = min(fault.after, length)
        self._send(source, start, before)
        if fault.kind is Kind.FLIP and before < length:
            self._send(bytes([_byte(source, start + before) ^ 0xFF]), 0, 1)
            return self._send(source, start + before + 1, length - before - 1)
        if fault.kind is Kind.STALL:
            fault.released.wait(fault.seconds)
            return self._send(source, start + before, length - before)
        if fault.kind is Kind.RESET:
            reset(self.request)
        if fault.kind is Kind.EXPIRE:
            self.hub.revoked[parse_qs(self.note.query).get("Signature", [""])[0]] = fault.status
        raise _DropError

    def _send(self, source: bytes | Path, start: int, length: int) -> None:
        """Send `length` bytes of `source`, by sendfile(2) where it is a file and the connection is plain."""
        if isinstance(source, bytes):
            view = memoryview(source)[start : start + length]
            for at in range(0, length, MIB):
                self._count(min(MIB, length - at))  # before: the client may look as soon as it has the bytes
                self.request.sendall(view[at : at + MIB])
            return
        with source.open("rb") as file:
            while length > 0:
                sent = due = min(8 * MIB, length)
                self._count(due)
                if isinstance(self.request, ssl.SSLSocket):
                    file.seek(start)
                    self.request.sendall(file.read(due))
                else:
                    sent = os.sendfile(self.request.fileno(), file.fileno(), start, due)
                if sent == 0:
                    raise _DropError
                start, length = start + sent, length - sent
                self._count(sent - due)

    def _count(self, sent: int) -> None:
        if self.note.file and self.note.status in (200, 206):
            self.note.sent += sent


def _byte(source: bytes | Path, at: int) -> int:
    if isinstance(source, bytes):
        return source[at]
    with source.open("rb") as file:
        file.seek(at)
        return file.read(1)[0]


def _span(header: str, size: int) -> tuple[int, int]:
    """`bytes=a-b` → start and stop (exclusive) inside `size`; an unsatisfiable or unreadable range is empty."""
    first, _, last = header.removeprefix("bytes=").partition("-")
    if not first.isdigit():
        return (max(0, size - int(last)), size) if last.isdigit() else (0, 0)
    return int(first), min(size, int(last) + 1 if last.isdigit() else size)


def main(argv: list[str] | None = None) -> int:
    """Serve directories as repositories until SIGINT or SIGTERM; the first line printed is `HF_ENDPOINT=<url>`."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.hub", description=main.__doc__)
    parser.add_argument("--dir", type=Path, action="append", required=True, help="directory to serve; may be given several times, as often as --repo")
    parser.add_argument("--repo", action="append", required=True, help="org/name it is served as")
    parser.add_argument("--port", type=int, default=0, help="port of the Hub (default: any free one)")
    parser.add_argument("--token", help="the one valid token (default: any)")
    parser.add_argument("--page-size", type=int, default=1000)
    options = parser.parse_args(argv)
    if len(options.dir) != len(options.repo):
        parser.error("give as many --dir as --repo")
    repos = {name: Repo.of_directory(directory) for name, directory in zip(options.repo, options.dir, strict=True)}
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with HubServer(repos, token=options.token, page_size=options.page_size, port=options.port) as hub:
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        for name, repo in repos.items():
            print(f"{name}@{repo.commit}: {len(repo.commits[repo.commit])} files", flush=True)
        stop.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())

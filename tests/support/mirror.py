"""A mirror on loopback: contents at `/blobs/<sha256>`, files at `/files/<org>/<name>/<path>`, faults on demand. It checks nothing."""

from __future__ import annotations

import hashlib
from types import TracebackType
from urllib.parse import unquote, urlsplit

from tests.support import hub
from tests.support.faults import Fault, Faults, Kind
from tests.support.hub import Request
from tests.support.repo import Blob, Repo
from tests.support.serving import LoopbackServer

__all__ = ["Fault", "Kind", "MirrorServer"]


class MirrorServer:
    """Serves the contents of repositories. A context manager. `token`: the one that is asked for; `lies`: SHA-256 → what is sent instead."""

    def __init__(self, repos: dict[str, Repo] | None = None, *, token: str | None = None) -> None:
        self.repos, self.token = dict(repos or {}), token
        self.lies: dict[str, bytes] = {}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.revoked: dict[str, int] = {}
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.by_digest = f"{self.url}/blobs/{{sha256}}"
        self.by_name = f"{self.url}/files/{{model}}/{{path}}"

    def __enter__(self) -> MirrorServer:
        self._server.start("mirror")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.faults.clear()
        self._server.stop()

    def sent(self) -> int:
        """Body bytes of contents sent so far."""
        return sum(request.sent for request in list(self.requests))

    def find(self, path: str) -> Blob | None:
        """What is at a path."""
        kind, _, rest = path.lstrip("/").partition("/")
        for name, repo in self.repos.items():
            tree = repo.commits[repo.commit]
            for file, blob in tree.items():
                if (kind == "blobs" and _sha256(blob) == rest) or (kind == "files" and f"{name}/{file}" == rest):
                    return self._as_told(blob)
        return None

    def _as_told(self, blob: Blob) -> Blob:
        lie = self.lies.get(_sha256(blob))
        return blob if lie is None else Blob(lie, len(lie), blob.git_id, blob.sha256)


class _Server(LoopbackServer):
    def __init__(self, mirror: MirrorServer) -> None:
        self.hub, self.origin = mirror, "mirror"
        super().__init__(("127.0.0.1", 0), _Handler, None)


class _Handler(hub._Handler):
    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        url = urlsplit(self.path)
        mirror: MirrorServer = self.server.hub  # type: ignore[assignment]
        self.hub = mirror  # type: ignore[assignment]
        self.note = Request(self.command, "mirror", unquote(url.path), url.query, {name.lower(): value for name, value in self.headers.items()})
        mirror.requests.append(self.note)
        self.fault = None
        if mirror.token is not None and self.headers.get("Authorization") != f"Bearer {mirror.token}":
            return self._error(401, None, "who are you?")
        blob = mirror.find(self.note.path)
        if blob is None:
            return self._error(404, None, "not here")
        self.note.file = self.note.path
        return self._content(blob, f'"{blob.sha256 or blob.git_id}"', {"Accept-Ranges": "bytes"})

    do_HEAD = do_GET  # noqa: N815 - http.server's name


def _sha256(blob: Blob) -> str:
    if blob.sha256 is not None:
        return blob.sha256
    return hashlib.sha256(blob.source if isinstance(blob.source, bytes) else blob.source.read_bytes()).hexdigest()

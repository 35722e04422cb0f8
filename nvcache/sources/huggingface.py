"""The HuggingFace Hub, or what speaks its protocol (mirrors, proxies), as a source. It fetches no file and writes nothing, least of all HF's cache.

Two calls of the Hub's API are made (https://huggingface.co/docs/hub/api): `/api/models/{id}/revision/{revision}` for the commit, and the paged
`/api/models/{id}/tree/{commit}` for the files. The listing is what is trusted: mirrors invent ETags, but pass on git's and LFS's ids.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from nvcache.core.digest import Algorithm, Digest
from nvcache.core.plan import RemoteFile
from nvcache.core.ref import Ref, is_commit
from nvcache.errors import Code, IntegrityError, RequestError, SourceError
from nvcache.sources.base import HttpRemote, Remote, Resolved, XetRemote
from nvcache.sources.http import Target, Transport

if TYPE_CHECKING:
    from nvcache.sources.hubclient import HubClient

HTTP_LIMIT = 50_000_000_000  # bytes; huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE: larger files are only to be had by Xet
MAX_FILES = 100_000
LIST_S = 120.0
DEFAULT_NAME = "main"  # every Hub repository's default branch


def xet_available() -> bool:
    """Whether the optional package that reads Xet storage is installed."""
    return find_spec("hf_xet") is not None


class HuggingFace:
    """A `Source`. `token` is called anew for each call; its value goes to `endpoint` only. `http_limit`: bytes of the largest file HTTP gives."""

    def __init__(self, endpoint: str, token: Callable[[], str | None], transport: Transport, *, http_limit: int = HTTP_LIMIT) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token = token
        self._transport = transport
        self._http_limit = http_limit

    @property
    def endpoint(self) -> str:
        """The endpoint without user info, for manifests and messages."""
        parts = urlsplit(self._endpoint)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    def resolve(self, ref: Ref) -> Resolved:
        """The commit that the revision (by default `main`) names now; a full commit id is taken at its word."""
        if ref.revision and len(ref.revision) == 40 and is_commit(ref.revision):
            return Resolved(ref, None, self.endpoint)
        name = ref.revision or DEFAULT_NAME
        doing = f"resolve {ref}"
        with self._client(doing) as client:
            info = client.get(f"{self._api(ref)}/revision/{quote(name, safe='')}", doing).content
        commit = info.get("sha") if isinstance(info, dict) else None
        if not isinstance(commit, str) or len(commit) != 40 or not is_commit(commit):
            raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: {self.endpoint} names no commit; it is no Hub")
        return Resolved(ref.at(commit), name, self.endpoint)

    def list(self, resolved: Resolved) -> tuple[RemoteFile, ...]:
        """Every file of the commit, by path. Raises `IntegrityError` (listing-conflict) when a path is listed twice with different content."""
        doing = f"list {resolved.ref}"
        files: dict[str, RemoteFile] = {}
        deadline = time.monotonic() + LIST_S
        url: str | None = f"{self._api(resolved.ref)}/tree/{resolved.ref.revision}?recursive=true&expand=false"
        with self._client(doing) as client:
            while url:
                answer = client.get(url, doing)
                for file in _files(answer.content, doing):
                    if files.setdefault(file.path, file) != file:
                        raise IntegrityError(Code.LISTING_CONFLICT, f"cannot {doing}: {file.path!r} is listed twice, with different content")
                if len(files) > MAX_FILES:
                    raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: it has more than {MAX_FILES:,} files", retryable=False)
                if time.monotonic() > deadline:
                    raise SourceError(Code.SOURCE_STALLED, f"cannot {doing}: {len(files):,} files were listed in {LIST_S:g} s, and there are more")
                url = answer.next_url
        return tuple(files[path] for path in sorted(files))

    def locate(self, resolved: Resolved, file: RemoteFile) -> Remote:
        """The file's `resolve` URL at the commit, which redirects to signed URLs; nothing is asked, except a token for a file only Xet can give.

        Raises `SourceError` (needs-xet) for such a file when it cannot be had.
        """
        doing = f"fetch {file.path} of {resolved.ref}"
        token = self._read_token(doing)
        headers = (("Authorization", f"Bearer {token}"),) if token else ()
        if self.needs_xet(file):
            self.refuse(resolved, file)
            return self._locate_xet(resolved, file, headers, doing)
        url = f"{self._endpoint}/{resolved.ref.location}/resolve/{resolved.ref.revision}/{quote(file.path)}"
        return HttpRemote(url=url, size=file.size, headers=headers, origin=Target.parse(self._endpoint).origin, name=file.path)

    def refuse(self, resolved: Resolved, file: RemoteFile) -> None:
        """Raises `SourceError` (needs-xet) for a file that plain HTTP cannot give, when Xet cannot either."""
        if not self.needs_xet(file):
            return
        why = f"its {file.size:,} bytes are more than the {self._http_limit:,} that the Hub gives over plain HTTP"
        doing = f"fetch {file.path} of {resolved.ref}"
        if file.xet is None:
            raise SourceError(
                Code.NEEDS_XET, f"cannot {doing}: {why}, and it has no Xet hash", hint="a mirror may hide it: fetch from the Hub itself"
            )
        if not xet_available():
            raise SourceError(Code.NEEDS_XET, f"cannot {doing}: {why}, and hf_xet is not installed")

    def needs_xet(self, file: RemoteFile) -> bool:
        """Whether plain HTTP cannot give `file`."""
        return file.size > self._http_limit

    def _locate_xet(self, resolved: Resolved, file: RemoteFile, headers: tuple[tuple[str, str], ...], doing: str) -> XetRemote:
        url = f"{self._api(resolved.ref)}/xet-read-token/{resolved.ref.revision}"
        with self._client(doing) as client:
            grant = client.get(url, doing).content
        try:
            endpoint, token, expiry = str(grant["casUrl"]), str(grant["accessToken"]), int(grant["exp"])
        except (KeyError, TypeError, ValueError):
            raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: {self.endpoint} gives no Xet token") from None
        return XetRemote(file.xet or "", file.size, endpoint, token, expiry, refresh_url=url, refresh_headers=headers, name=file.path)

    def _api(self, ref: Ref) -> str:
        return f"{self._endpoint}/api/models/{ref.location}"

    def _client(self, doing: str) -> HubClient:
        from nvcache.sources.hubclient import HubClient  # the library costs 20 MiB and 0.1 s: loaded by those who ask, not by workers

        return HubClient(self._endpoint, self._read_token(doing), self._transport)

    def _read_token(self, doing: str) -> str | None:
        """The token as it is now. One that no header may hold is refused here, before anything can quote it."""
        token = self._token() or None
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise SourceError(Code.BAD_TOKEN, f"cannot {doing}: the token has characters that no HTTP header may hold")
        return token


def _files(page: Any, doing: str) -> list[RemoteFile]:
    """The files of one page of a tree."""
    try:
        return [_file(entry) for entry in page if entry["type"] == "file"]
    except (KeyError, TypeError, ValueError, AttributeError, RequestError) as error:
        raise SourceError(Code.SOURCE_PROTOCOL, f"cannot {doing}: the listing is not a Hub's: {error!r:.120}") from None


def _file(entry: dict[str, Any]) -> RemoteFile:
    """One entry: LFS files are known by the SHA-256 of their content, others by git's blob id."""
    path, size = entry["path"], entry["size"]
    lfs, xet = entry.get("lfs"), entry.get("xetHash")
    if lfs is None:
        digest = Digest(Algorithm.GIT_SHA1, entry["oid"])
    else:
        digest = Digest(Algorithm.SHA256, lfs["oid"].removeprefix("sha256:"))
        size = lfs.get("size", size)
    if not isinstance(path, str) or not isinstance(size, int) or size < 0:
        raise ValueError(f"file {path!r} of size {size!r}")
    return RemoteFile(path, size, digest.hex, digest, xet if isinstance(xet, str) else None)

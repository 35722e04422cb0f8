"""Reads files of Xet storage by the optional package hf_xet: those over 50 GB, which the Hub gives no other way. It lists nothing and writes no file.

hf_xet asks the CAS which pieces make up a range and streams it in order, checking each piece against its own hash. It takes proxies and CA from the
process's environment only, and keeps small working files in `HF_XET_CACHE`, which has to be writable.
"""

from __future__ import annotations

import threading
from typing import Any

from nvcache.errors import Code, Interrupted, SourceError
from nvcache.sources.base import Reader, ReaderFactory, XetRemote
from nvcache.sources.http import Transport

BUFFER = 64 * 2**20  # bytes a session may hold ahead of its readers; hf_xet's own default is 1.5 GB
TRIES = 3


def xet_readers(remote: XetRemote, transport: Transport) -> ReaderFactory:
    """Readers of one file; they share a session and the token that it keeps fresh. Raises `SourceError` (needs-xet) without hf_xet."""
    session, info = _session(remote, transport)
    headers = dict(remote.refresh_headers)

    def make() -> Reader:
        group = session.new_download_stream_group(
            endpoint=remote.endpoint,
            token=remote.token,
            token_expiry_unix_secs=remote.token_expiry or None,
            token_refresh_url=remote.refresh_url,
            token_refresh_headers=headers or None,
        )
        return XetReader(remote, group, info)

    return make


class XetReader:
    """A `Reader` that opens one stream per read: the CAS is asked for just that range."""

    def __init__(self, remote: XetRemote, group: Any, info: Any) -> None:
        self._remote, self._group, self._info = remote, group, info
        self._aborted = threading.Event()
        self.received = 0

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset`. hf_xet retries inside, within the transport's time limits.

        Raises `SourceError`: source-unreachable, bad-token, file-not-found, source-failed; `Interrupted`.
        """
        at = 0
        try:
            self._check_aborted()
            for piece in self._group.download_stream(self._info, start=offset, end=offset + len(into)):
                if at + len(piece) > len(into):
                    raise self._error(Code.SOURCE_PROTOCOL, "more bytes came than were asked for")
                into[at : at + len(piece)] = piece
                at += len(piece)
                self.received += len(piece)
        except (OSError, RuntimeError, ValueError) as error:
            self._check_aborted()
            raise self._failure(error) from None  # its text names URLs
        self._check_aborted()
        if at < len(into):
            raise self._error(Code.SOURCE_FAILED, f"{at:,} of {len(into):,} bytes came")

    def abort(self) -> None:
        """Make reads raise `Interrupted`; a stream that waits ends at once."""
        self._aborted.set()
        self._group.abort()

    def close(self) -> None:
        """End the transfer."""
        self._group.abort()

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise Interrupted(Code.CANCELLED, f"cannot fetch {self._remote.name} from Xet storage: cancelled")

    def _failure(self, error: Exception) -> SourceError:
        """By the name of hf_xet's class; its own derive from OSError."""
        kind = type(error).__name__
        if kind == "XetAuthenticationError":
            return self._error(Code.BAD_TOKEN, "the storage refuses the token that the Hub gave", retryable=True)
        if kind == "XetObjectNotFoundError":
            return self._error(Code.FILE_NOT_FOUND, "the storage does not have it")
        if isinstance(error, ConnectionError | TimeoutError):
            return self._error(Code.SOURCE_UNREACHABLE, "no answer from the storage")
        return self._error(Code.SOURCE_FAILED, f"hf_xet failed ({kind})")

    def _error(self, code: Code, why: str, *, retryable: bool | None = None) -> SourceError:
        return SourceError(code, f"cannot fetch {self._remote.name} from Xet storage: {why}", retryable=retryable)


def _session(remote: XetRemote, transport: Transport) -> tuple[Any, Any]:
    """A session within our bounds of time and memory, silent and without telemetry, and the file as hf_xet names it."""
    try:
        import hf_xet
    except ImportError as error:
        raise SourceError(Code.NEEDS_XET, f"cannot fetch {remote.name}: {remote.size:,} bytes need hf_xet, which is not installed") from error
    config = hf_xet.XetConfig().with_config(
        {
            "telemetry.enabled": False,
            "client.connect_timeout": f"{transport.connect_timeout:g}s",
            "client.read_timeout": f"{transport.stall_timeout:g}s",
            "client.retry_max_attempts": TRIES,
            "client.retry_max_duration": f"{transport.deadline:g}s",
            "reconstruction.download_buffer_size": BUFFER,
            "reconstruction.download_buffer_perfile_size": BUFFER,
            "reconstruction.download_buffer_limit": BUFFER,
            "reconstruction.min_reconstruction_fetch_size": BUFFER // 4,
            "reconstruction.min_prefetch_buffer": BUFFER // 4,
        }
    )
    try:
        return hf_xet.XetSession(config), hf_xet.XetFileInfo(remote.hash, remote.size)
    except OSError as error:
        raise SourceError(
            Code.SOURCE_FAILED, f"cannot fetch {remote.name}: hf_xet cannot start: {error}", hint="HF_XET_CACHE must name a writable directory"
        ) from error

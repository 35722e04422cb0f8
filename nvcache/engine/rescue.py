"""Fetches files of a known SHA-256 from mirrors, before their source is asked. It vouches for none: workers compare what comes with the digest.

Mirrors are asked one after the other, in the operator's order. One that fails is left alone for a while, by all fills together; one that sent other
bytes, for longest. That it lacks a file is no failure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nvcache.core.plan import Priority, RemoteFile
from nvcache.core.ref import Ref
from nvcache.engine import clock
from nvcache.engine.blocking import DaemonExecutor
from nvcache.engine.messages import FetchTask
from nvcache.engine.process import ProgressCallback
from nvcache.engine.status import Counters
from nvcache.engine.trace import Fetching
from nvcache.engine.workers import Workers
from nvcache.errors import Code, ConfigError, IntegrityError, NvcacheError, SourceError
from nvcache.sources.base import remote_to_dict
from nvcache.sources.mirrors import Mirror

log = logging.getLogger(__name__)
REST_FIRST, REST_MOST = 15.0, 600.0  # seconds a mirror that failed is left alone, doubled with each failure in a row
LONGEST_ASKED = 3600.0  # seconds that a mirror may ask for
LACKS = frozenset({Code.FILE_NOT_FOUND, Code.REPOSITORY_NOT_FOUND, Code.REVISION_NOT_FOUND})
WRONG = frozenset({Code.DIGEST_MISMATCH, Code.SIZE_MISMATCH, Code.POINTER_FILE})


@dataclass(slots=True)
class _Trust:
    """How a mirror did lately: failures in a row, and until when (monotonic) it is left alone."""

    failures: int = 0
    until: float = float("-inf")


@dataclass(frozen=True, slots=True)
class Loan:
    """What came of asking mirrors: the worker's result if one had the file, and those that brought bytes without finishing."""

    result: Mapping[str, Any] | None
    lenders: tuple[Mirror, ...]


class Rescue:
    """The mirrors of one daemon. All methods belong to the event loop."""

    def __init__(self, mirrors: Sequence[Mirror], workers: Workers, net: DaemonExecutor, counters: Counters) -> None:
        self._mirrors = tuple(mirrors)
        self._trust = {mirror: _Trust() for mirror in mirrors}
        self._workers = workers
        self._net = net
        self._counters = counters

    def may_help(self, ref: Ref) -> bool:
        """Whether there is any use in asking for files of that model."""
        return any(mirror.knows(ref) for mirror in self._mirrors)

    async def borrow(
        self,
        task: FetchTask,
        ref: Ref,
        file: RemoteFile,
        *,
        priority: Callable[[], Priority],
        progress: ProgressCallback,
        dropped: Callable[[], int],
        fetching: Fetching,
    ) -> Loan:
        """Have `task` done by the first mirror that can. `dropped` tells what a try that failed had fetched.

        Raises what is not the mirrors' fault: `DiskError`, `SpaceError`, `Interrupted`.
        """
        lenders: list[Mirror] = []
        for mirror in self._mirrors:
            if task.sha256 is None or not mirror.knows(ref) or self._left_alone(mirror):
                continue
            mine = replace(task, source=f"mirror {mirror.name}", lent=True)
            try:
                with fetching.file(mine.source, file.path) as watch:
                    locate = self._locate(mirror, ref, file, task.sha256)
                    result = await self._workers.run(mine, priority=priority, locate=locate, progress=progress, watch=watch)
                    watch.came(result["fetched"], whole=True)
            except (SourceError, IntegrityError, ConfigError) as error:
                if isinstance(error, IntegrityError) and error.code not in WRONG:
                    raise
                if error.code not in LACKS:
                    fetching.trouble(mine.source, str(error.code), 0.0, str(error))
                if fetched := dropped():
                    fetching.came(mine.source, fetched)
                    self._brought(mirror, fetched)
                    lenders.append(mirror)
                self._failed(mirror, error)
                continue
            self._trust[mirror].failures = 0
            self._brought(mirror, result["fetched"])
            self.settle(result, lenders)
            return Loan(result, ())
        return Loan(None, tuple(lenders))

    def settle(self, result: Mapping[str, Any], lenders: Sequence[Mirror]) -> None:
        """A file is proven. If it was so only without what `lenders` had brought, that was wrong."""
        for mirror in lenders if result.get("doubted") else ():
            self._rest(mirror, REST_MOST, "part of what it sent was wrong", Code.DIGEST_MISMATCH)

    def _locate(self, mirror: Mirror, ref: Ref, file: RemoteFile, sha256: str) -> Callable[[], Any]:
        async def locate() -> dict[str, Any]:
            if self._left_alone(mirror):  # since this file began to wait for its turn
                raise SourceError(Code.SOURCE_BUSY, f"cannot fetch {file.path} from mirror {mirror.name}: it is left alone for a while")
            return remote_to_dict(await self._net.call(mirror.locate, ref, file, sha256))

        return locate

    def _left_alone(self, mirror: Mirror) -> bool:
        return clock.monotonic() < self._trust[mirror].until

    def _brought(self, mirror: Mirror, fetched: int) -> None:
        self._counters.mirror_bytes[mirror.name] = self._counters.mirror_bytes.get(mirror.name, 0) + fetched

    def _failed(self, mirror: Mirror, error: NvcacheError) -> None:
        if error.code in LACKS:
            log.debug("mirror %s lacks a file: %s", mirror.name, error)
        elif error.code in WRONG:
            self._rest(mirror, REST_MOST, str(error), error.code)
        elif not self._left_alone(mirror):  # else this is news of the same failure, from a file that was under way
            trust = self._trust[mirror]
            pause = min(REST_MOST, REST_FIRST * 2.0**trust.failures)
            trust.failures = min(trust.failures + 1, 16)
            self._rest(mirror, max(pause, min(error.retry_after_s or 0.0, LONGEST_ASKED)), str(error), error.code)

    def _rest(self, mirror: Mirror, seconds: float, why: str, code: Code) -> None:
        trust = self._trust[mirror]
        trust.until = max(trust.until, clock.monotonic() + seconds)
        failures = self._counters.mirror_failures
        failures[mirror.name, str(code)] = failures.get((mirror.name, str(code)), 0) + 1
        log.warning("mirror %s is left alone for %g s: %s", mirror.name, seconds, why, extra={"facts": {"mirror": mirror.name, "code": code}})

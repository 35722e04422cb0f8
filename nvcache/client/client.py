"""The calls a pod needs: look a model up, make it ready and wait, hold it. It reads no weights; `prefetch` and `load` do.

A look-up never makes a start worse: `resolve` answers within seconds, with the fallback it was given when the daemon has nothing or is not there.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from nvcache.client.leases import Lease, default_holder
from nvcache.client.model import Model
from nvcache.client.transport import ANSWER_SECONDS, Problem, Transport

Fallback = TypeVar("Fallback")
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 1.0
HEARTBEAT_SECONDS = 10.0  # the daemon's promise for event streams
DAEMON_SECONDS = 10.0  # how long one that never answered is waited for
AWAY_SECONDS = 60.0  # how long a wait outlasts a daemon that is being restarted
RETURNING = frozenset({"starting", "stopping", "no-stripe"})  # a daemon that says so will be asked again
log = logging.getLogger(__name__)


class Client:
    """One daemon: `unix:///path.sock` or `http://host:port` (with the token in the file named by NVCACHE_TOKEN_FILE).

    Without a URL: `NVCACHE_URL`, `NVCACHE_SOCKET`, else the default socket. It holds no connection and may be shared by threads.
    """

    def __init__(self, url: str | None = None) -> None:
        self._transport = Transport(url)
        self.url = self._transport.url

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout: float = ANSWER_SECONDS) -> dict[str, Any]:
        """Any call of the API: JSON object in, JSON object out (empty for 204). Raises `Problem`."""
        return self._transport.request(method, path, body, timeout=timeout)

    def model(self, ref: str) -> Model:
        """What the node has of `ref` (a reference, a slug or an entry), ready or not. Raises `Problem`, e.g. unknown-model."""
        return Model.of(self.request("GET", f"/v1/models?{urlencode({'ref': ref})}"))

    def resolve(self, ref: str, default: Fallback | None = None) -> str | Fallback | None:
        """The directory of `ref` if it is ready, else `default`, whatever the reason; the reason is logged. Never raises `Problem`, never waits long.

        `LLM(model=client.resolve("org/name", default="org/name"))` loads from the cache when it can and as without nvcache when it cannot.
        """
        try:
            found = self.model(ref)
        except Problem as problem:
            log.warning("%s is not taken from the cache: %s", ref, problem)
            return default
        if not found.ready:
            log.warning("%s is not taken from the cache: it is %s", ref, found.state)
        elif not Path(str(found.path)).is_dir():
            log.warning("%s is not taken from the cache: %s is not here; mount the store's folder at the same path", ref, found.path)
        else:
            return found.path
        return default

    def ensure(
        self,
        ref: str,
        *,
        wait: bool = True,
        timeout: float | None = None,
        wait_daemon: float = DAEMON_SECONDS,
        on_progress: Callable[[Mapping[str, Any]], None] | None = None,
        **wish: object,
    ) -> Model:
        """Make `ref` ready and return it; `wish` are the API's other fields (revision, include, exclude, alias, pin, priority).

        Waits at most `timeout` seconds (None: as long as the work goes on), also across restarts of the daemon; without `wait` it returns at once,
        with the state as it is. One that never answered may be just starting; it is waited for `wait_daemon` seconds, no more. `on_progress` is told
        the job's progress about once a second. Raises `Problem`: why it failed, timeout, or daemon-unreachable.
        """
        pause = _Pause(ref, self.url, timeout, wait_daemon)
        while True:
            answer = pause.patiently(lambda: self.request("POST", "/v1/models", {"ref": ref, **wish}))
            if not isinstance(answer.get("job"), dict):  # a model names its job, an accepted wish tells it whole
                return Model.of(answer)
            job = Model.of(answer["job"])
            if not wait:
                return job
            self._follow(answer["job"], pause, on_progress)

    def lease(self, ref: str, *, holder: str | None = None, ttl: float | None = None, adopt: bool = False) -> Lease:
        """Hold a ready model while loading it: `with client.lease(ref) as lease: load(lease.path)`.

        It is taken on entering and renewed every third of `ttl` seconds (None: the daemon's default). `holder` names who has it (None:
        `NVCACHE_HOLDER`, the pod, or this process); with `adopt` a live lease of the same holder is taken over. Raises `Problem`: the daemon has no
        such model.
        """
        return self.lease_of(self._entry(ref), holder=holder, ttl=ttl, adopt=adopt)

    def lease_of(self, entry: str, *, holder: str | None = None, ttl: float | None = None, adopt: bool = False) -> Lease:
        """`lease` of an entry or a slug as the daemon writes them; asks nothing before it is taken."""
        return Lease(self._transport, entry, default_holder() if holder is None else holder, ttl, adopt=adopt)

    def events(self, entry: str) -> Iterator[Model]:
        """The model now and at every change, until it is ready, failed or gone, or the daemon stops.

        Raises `Problem` when the daemon cannot be asked or goes silent, and no-stripe when the node's disks go away. Ask again after an end that was
        not the one waited for; asking `model` now and then does as well.
        """
        path = f"/v1/models/{quote(entry, safe='@')}/events"
        connection = self._transport.open("GET", path, timeout=3 * HEARTBEAT_SECONDS, headers={"Accept": "text/event-stream"})
        try:
            with connection.getresponse() as response:  # it holds the socket: the connection's own close is not enough
                if response.status >= 400:
                    raise Problem.of(json.loads(response.read()), response.status)
                kind = b""
                for line in response:
                    if line.startswith(b"event: "):
                        kind = line[7:].strip()
                    elif line.startswith(b"data: "):
                        document = json.loads(line[6:])
                        if kind == b"problem":
                            raise Problem.of(document)
                        yield Model.of(document)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Problem("daemon-unreachable", f"cannot follow {entry} at {self.url}: {error}", retryable=True) from error
        finally:
            connection.close()

    def _entry(self, ref: str) -> str:
        entry = self.model(ref).entry
        if entry is None:
            raise Problem("unknown-model", f"cannot hold {ref}: the daemon does not name an entry")
        return entry

    def _follow(self, job: Mapping[str, Any], pause: _Pause, on_progress: Callable[[Mapping[str, Any]], None] | None) -> None:
        """Return when the job is done or no longer known (a restarted daemon counts its jobs anew); raise what it failed with."""
        while job["state"] != "done":
            if on_progress and job.get("progress"):
                on_progress(job["progress"])
            if job["state"] in ("failed", "cancelled"):
                raise Problem.of(job.get("error") or {"code": "cancelled", "detail": f"cannot make {job['ref']} ready: the job was cancelled"})
            pause.next()
            number = job["id"]
            try:
                job = pause.patiently(lambda: self.request("GET", f"/v1/jobs/{number}"))  # noqa: B023 - called before the name changes
            except Problem as problem:
                if problem.code != "unknown-job":
                    raise
                return


class _Pause:
    """Growing pauses between questions, the caller's time limit, and patience with a daemon that is being restarted."""

    def __init__(self, ref: str, url: str, timeout: float | None, wait_daemon: float) -> None:
        self._ref = ref
        self._url = url
        self._until = None if timeout is None else monotonic() + timeout
        self._patience = wait_daemon
        self._met = False  # whether a daemon ever answered
        self._seconds = FIRST_PAUSE
        self._never = threading.Event()

    def next(self, unmet: Problem | None = None) -> None:
        """Wait a little longer than last time. Raises `Problem` when the caller's time is over: `unmet` if given, else timeout."""
        left = self._seconds if self._until is None else self._until - monotonic()
        if left <= 0:
            raise unmet or Problem("timeout", f"cannot make {self._ref} ready: the time given is over; the daemon goes on", retryable=True)
        self._never.wait(min(self._seconds, left))
        self._seconds = min(self._seconds * 1.5, LONGEST_PAUSE)

    def patiently(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Ask until there is an answer, as long as the daemon may be starting or restarting. Raises `Problem`."""
        began = monotonic()
        while True:
            try:
                answer = ask()
            except Problem as problem:
                self._met = self._met or problem.code in RETURNING
                if problem.code not in RETURNING and problem.code not in ("daemon-unreachable", "timeout"):
                    raise
                unmet = None if self._met else self._unreachable(problem)
                if monotonic() - began >= (AWAY_SECONDS if self._met else self._patience):
                    raise unmet or problem from None
                self.next(unmet)
            else:
                self._met = True
                return answer

    def _unreachable(self, problem: Problem) -> Problem:
        """What takes connections and never answers is no daemon."""
        if problem.code != "timeout":
            return problem
        return Problem("daemon-unreachable", f"cannot reach the nvcache daemon at {self._url}: it does not answer", retryable=True)

"""The worker process: reads tasks from its control socket (standard input), runs each on threads, answers with events. It decides nothing.

It knows the store directory and the sources' readers, no model and no plan. When the control socket ends, its parent is gone and it exits at once;
journals make that safe at any instant.
"""

from __future__ import annotations

import base64
import itertools
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvcache import logs
from nvcache.core.digest import Digest
from nvcache.engine.messages import (
    AdoptTask,
    CheckTask,
    FetchTask,
    SeedTask,
    Task,
    WeightsTask,
    encode,
    error_to_dict,
    task_from_dict,
)
from nvcache.engine.pump import Pump, Pumped
from nvcache.engine.weights import check_files
from nvcache.errors import Code, IntegrityError, Interrupted, NvcacheError
from nvcache.sources.base import ReaderFactory, remote_from_dict
from nvcache.sources.mirrors import impatient
from nvcache.sources.open import open_remote
from nvcache.sources.ranges import Pace, Throttle, Transport, Watchdog
from nvcache.store import ingest, scrub
from nvcache.store.files import aligned_buffer, round_up
from nvcache.store.layout import Layout
from nvcache.store.receipts import Receipt, write_receipt

log = logging.getLogger(__name__)
NICENESS = 10  # answers to pods come first
REPORT_EVERY = 0.25  # seconds
ALIVE_EVERY = 40  # reports


class Worker:
    """One process's tasks. `send` is serialised; every running task can be stopped by its id."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._sending = threading.Lock()
        self._running: dict[int, Callable[[], None]] = {}
        self._cancelled: set[int] = set()
        self._pumps: dict[int, Pump] = {}
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._throttle = Throttle(self._tell_pause)
        self._paces: dict[str, Pace] = {}  # by source
        self._watchdog = Watchdog()

    def run(self) -> None:
        """Serve until the control socket ends; of a daemon that was killed it is reset."""
        with suppress(ConnectionResetError), self._control.makefile("rb") as lines:
            hello = json.loads(lines.readline() or b"{}")
            if not hello:
                return
            logs.setup(**hello["log"])
            self._layout = Layout(Path(hello["root"]))
            self._direct = bool(hello["direct"])
            self._transport = Transport(**hello["transport"])
            threading.Thread(target=self._report, name="report", daemon=True).start()
            for line in lines:
                self._handle(json.loads(line))

    def _handle(self, message: dict[str, Any]) -> None:
        match message["do"]:
            case "task":
                name = f"task-{message['id']}"
                arguments = message["id"], task_from_dict(message), message["log"]
                threading.Thread(target=self._task, args=arguments, name=name, daemon=True).start()
            case "cancel":
                with self._lock:
                    stop = self._running.get(message["id"])
                    self._cancelled.add(message["id"])
                if stop:
                    stop()
            case "pause":
                self._throttle.pause(message["origin"], message["seconds"])
            case "rate":
                self._pace(message["source"]).set(message["bytes_per_second"])

    def _task(self, number: int, task: Task, about: dict[str, str]) -> None:
        with logs.context(**about):
            self._answer(number, task)

    def _answer(self, number: int, task: Task) -> None:
        try:
            result = self._perform(number, task)
        except NvcacheError as error:
            self._send({"id": number, "event": "error", "error": error_to_dict(error)})
        except Exception as error:  # a defect must reach the daemon as one, not end as a silent thread
            log.exception("task failed unexpectedly")
            defect = NvcacheError(Code.INTERNAL, f"cannot finish the task: {type(error).__name__}")
            self._send({"id": number, "event": "error", "error": error_to_dict(defect)})
        else:
            self._send({"id": number, "event": "done", "result": result})
        finally:
            with self._lock:
                self._running.pop(number, None)
                self._cancelled.discard(number)

    def _perform(self, number: int, task: Task) -> dict[str, Any]:
        match task:
            case FetchTask():
                return self._fetch(number, task)
            case AdoptTask():
                return self._adopt(number, task)
            case CheckTask():
                return asdict(self._check(number, Path(task.path), task.size, base64.b64decode(task.chunks), task.chunk_size, task.first))
            case SeedTask():
                return self._seed(number, task)
            case WeightsTask():
                return {"warnings": check_files(task.files)}

    def _fetch(self, number: int, task: FetchTask) -> dict[str, Any]:
        """Fetch, prove, commit.

        What an earlier mirror brought is doubted first when the whole is wrong: it is fetched anew from here, and `doubted` says so.
        """
        transport = impatient(self._transport) if task.lent else self._transport

        def told(error: NvcacheError, pause: float) -> None:
            self._send({"id": number, "event": "trouble", "code": error.code, "pause": pause, "why": str(error)})

        readers = open_remote(remote_from_dict(task.remote), transport, self._throttle, self._watchdog, self._pace(task.source), told)
        blob = ingest.Ingest.open(self._layout, task.key, task.size, direct=self._direct, lent=task.lent)
        try:
            doubtful, doubted = blob.lent_chunks(), False
            pumped = self._pump(number, task, blob, readers, 0)
            if doubtful and not _right(task, pumped):
                for index in doubtful:
                    blob.forget(index)
                doubted = True
                pumped = self._pump(number, task, blob, readers, pumped.fetched)
            self._prove(task, pumped, blob)
            blob.commit(pumped.sha256)
        finally:
            blob.close()
        write_receipt(self._layout, task.key, Receipt(pumped.sha256, pumped.chunks))
        chunks = base64.b64encode(pumped.chunks).decode()
        return {"sha256": pumped.sha256, "chunks": chunks, "fetched": pumped.fetched, "doubted": doubted}

    def _pump(self, number: int, task: FetchTask, blob: ingest.Ingest, readers: ReaderFactory, fetched: int) -> Pumped:
        pump = Pump(blob, readers, task.lanes, also=Digest.parse(task.also).algorithm if task.also else None, fetched=fetched)
        self._stoppable(number, pump.stop)
        with self._reporting(number, pump):
            return pump.run()

    def _pace(self, source: str) -> Pace:
        """What all tasks of `source` in this process keep to: as fast as it goes until the daemon says otherwise."""
        with self._lock:
            return self._paces.setdefault(source, Pace())

    @contextmanager
    def _reporting(self, number: int, pump: Pump) -> Iterator[None]:
        """Tell the daemon how far `pump` is, every `REPORT_EVERY` seconds and at its end, which may be a failure."""
        with self._lock:
            self._pumps[number] = pump
        try:
            yield
        finally:
            with self._lock:
                del self._pumps[number]
            self._progress(number, *pump.progress())

    def _report(self) -> None:
        """Send the progress of every pump, and a sign of life now and then, for ever: the body of a thread of its own."""
        for turn in itertools.count():
            self._ended.wait(REPORT_EVERY)
            with self._lock:
                pumps = list(self._pumps.items())
            for number, pump in pumps:
                self._progress(number, *pump.progress())
            if turn % ALIVE_EVERY == 0:
                self._send({"event": "alive"})

    def _prove(self, task: FetchTask, pumped: Pumped, blob: ingest.Ingest) -> None:
        for want, got in _compared(task, pumped):
            if want != got:
                if task.lent:  # what was here before the mirror came is as good as it was
                    for index in blob.lent_chunks():
                        blob.forget(index)
                else:
                    blob.restart()
                raise IntegrityError(
                    Code.DIGEST_MISMATCH,
                    f"cannot accept {task.name}: it is {got}, the source published {want}",
                    facts={"file": task.name, "expected": want, "actual": got},
                )

    def _adopt(self, number: int, task: AdoptTask) -> dict[str, Any]:
        stopped = self._stop_flag(number)
        found = scrub.digest_blob(
            self._layout.blob(task.sha256),
            task.size,
            stop=stopped.is_set,
            direct=self._direct,
            on_chunk=lambda done: self._progress(number, done, 0),
        )
        if found is None:
            raise Interrupted(Code.CANCELLED, "cannot finish the check: it was cancelled")
        sha256, chunks = found
        if sha256 != task.sha256:
            raise IntegrityError(Code.DIGEST_MISMATCH, f"cannot adopt blob {task.sha256[:12]}: its bytes went bad on the disk")
        return {"sha256": sha256, "chunks": base64.b64encode(chunks).decode(), "fetched": 0}

    def _check(self, number: int, path: Path, size: int, digests: bytes, chunk_size: int, first: int = 0) -> scrub.Checked:
        stopped = self._stop_flag(number)

        def looked_at(index: int, failure: OSError | None) -> None:
            self._progress(number, min(size, (index + 1) * chunk_size), 0)
            if failure is not None:
                self._send({"event": "doubt", "why": f"cannot read {path.name}: {failure.strerror}"})

        with aligned_buffer(round_up(max(1, min(size, chunk_size)))) as memory, memoryview(memory) as buffer:
            found = scrub.check_chunks(
                path,
                size,
                digests,
                first=first,
                chunk_size=chunk_size,
                buffer=buffer,
                stop=stopped.is_set,
                direct=self._direct,
                on_chunk=looked_at,
            )
        if stopped.is_set():
            raise Interrupted(Code.CANCELLED, "cannot finish the check: it was cancelled")
        return found

    def _stop_flag(self, number: int) -> threading.Event:
        stopped = threading.Event()
        self._stoppable(number, stopped.set)
        return stopped

    def _seed(self, number: int, task: SeedTask) -> dict[str, Any]:
        digests = base64.b64decode(task.chunks)
        bad = set(self._check(number, Path(task.source), task.size, digests, task.chunk_size).bad)
        good = {i: int.from_bytes(digests[i * 8 : i * 8 + 8], "little") for i in range(len(digests) // 8) if i not in bad}
        ingest.seed(self._layout, task.key, Path(task.source), task.size, good, chunk_size=task.chunk_size, direct=self._direct)
        return {"bad": sorted(bad)}

    def _stoppable(self, number: int, stop: Callable[[], None]) -> None:
        with self._lock:
            self._running[number] = stop
            late = number in self._cancelled
        if late:
            stop()

    def _progress(self, number: int, stored: int, fetched: int) -> None:
        self._send({"id": number, "event": "progress", "stored": stored, "fetched": fetched})

    def _tell_pause(self, origin: str, seconds: float) -> None:
        self._send({"event": "pause", "origin": origin, "seconds": seconds})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                self._control.sendall(encode(message))
        except OSError:
            os._exit(0)  # the daemon is gone; journals make leaving at once safe


def _compared(task: FetchTask, pumped: Pumped) -> list[tuple[str, str]]:
    """What the file must be and what it is, digest by digest."""
    pairs = ((f"sha256:{task.sha256}" if task.sha256 else None, f"sha256:{pumped.sha256}"), (task.also, str(pumped.also)))
    return [(want, got) for want, got in pairs if want is not None]


def _right(task: FetchTask, pumped: Pumped) -> bool:
    return all(want == got for want, got in _compared(task, pumped))


def transport_to_dict(transport: Transport) -> dict[str, Any]:
    """A transport as plain data for the control pipe; it may hold proxy credentials."""
    return asdict(transport)


def main() -> None:
    """Entry of `python -m nvcache.engine.worker`."""
    logs.setup("info", "json")
    os.nice(NICENESS)
    with socket.socket(fileno=os.dup(0)) as control:
        Worker(control).run()
    os._exit(0)  # threads may sit in a read of a dead disk; nothing waits for them


if __name__ == "__main__":
    main()

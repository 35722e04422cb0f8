"""Reads the engine into the facts that `core.signals` decides by. From memory only; it asks no API server and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nvcache.core.signals import Disks, Facts, Failure, Held, canonical
from nvcache.core.states import JobState, ModelState
from nvcache.engine import clock
from nvcache.engine.engine import Engine
from nvcache.engine.handover import StripeStatus
from nvcache.errors import Code, NvcacheError

GRACE = 60.0  # seconds after the start in which a stripe that nobody spoke of yet, or a store not open yet, is no reason to withdraw anything


class Reader:
    """Looks at one engine, again and again."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._until = clock.monotonic() + GRACE
        self._known = False
        self._fs_uuid: str | None = None

    def read(self) -> Facts | None:
        """The cache as of now. None shortly after the start while it is not known yet: what an earlier daemon told stands until then."""
        engine, told = self._engine, self._engine.stripe()
        state, generation = told["state"], int(str(told["generation"]))
        decided = state is not StripeStatus.MOUNTED and generation > 0
        self._known = self._known or engine.session is not None or decided or clock.monotonic() >= self._until
        if not self._known:
            return None
        if state is StripeStatus.MOUNTED:
            self._fs_uuid = str(told["fs_uuid"])
        room = engine.space()
        return Facts(
            disks=self._disks(told),
            models=tuple(self._models()),
            failures=tuple(self._failures()),
            declared=tuple(dict.fromkeys(canonical(ref) for ref in engine.declared.refs)),
            problems=engine.problems(),
            space=(room.total, room.free, room.used, room.limit),
        )

    def _disks(self, told: Mapping[str, Any]) -> Disks:
        refused = [disk for disk in _dicts(told.get("disks")) if disk.get("verdict") == "refused"]
        return Disks(
            state=str(told["state"]),
            generation=int(told["generation"]),
            code=told["code"],
            case=told.get("case"),
            reason=told["reason"],
            remedy=told.get("remedy") or "",
            words=_words(told),
            refused=tuple(f"{disk.get('node')} (serial {disk.get('serial')}) {disk.get('code')} {disk.get('reason')}" for disk in refused),
            fs_uuid=self._fs_uuid,
            losses=self._engine.counters.stripe_losses,
        )

    def _models(self) -> Iterable[Held]:
        for model in self._engine.models(ModelState.READY):
            refs = dict.fromkeys(canonical(ref) for ref in self._engine.known_as(model.entry))
            yield Held(model.ref, tuple(refs), model.bytes, model.pinned)

    def _failures(self) -> Iterable[Failure]:
        for job in self._engine.jobs():
            if job.state is JobState.FAILED and job.error is not None and job.error.code not in (Code.NO_STRIPE, Code.STOPPING):
                yield Failure(job.ref, str(job.error.code), job.error.message)


def refusal(error: NvcacheError) -> Facts:
    """The facts of a daemon that cannot begin because its store's place is refused."""
    code = error.facts.get("disk_code")
    return Facts(Disks("absent", 0, str(code) if code else None, None, str(error), error.hint), problems=(str(error),))


def _words(told: Mapping[str, Any]) -> str:
    """What is mounted."""
    members = told.get("members")
    disks = f"{len(members)} disk{'' if len(members) == 1 else 's'}" if isinstance(members, list) and members else ""
    if not disks:
        return f"the store is in {told.get('path')}"
    return f"{told.get('backend')} of {disks} with {told.get('filesystem')} at {told.get('mount')}"


def _dicts(value: object) -> Sequence[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []

"""What KAITO finds on a node: each ready model under its name, never anything else, and nothing as soon as it is not ready any more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvcache.core.kaito import LACKS
from nvcache.core.states import ModelState
from nvcache.engine import repair, session
from nvcache.engine.handover import StripeStatus
from nvcache.engine.stripefile import FollowedFile
from nvcache.errors import Code, DiskError, RequestError
from nvcache.store.views import Views
from tests.engine.conftest import Bed, DisksPart, end_of, ready, repo, run, until, weights, wish
from tests.support.faults import Kind

MB = 1_000_000
FILES = {"model.safetensors": weights(1, 2 * MB), "config.json": b"{}", "sub/notes.txt": b"deep"}
NEWER = {"model.safetensors": weights(2, 2 * MB), "config.json": b'{"v": 2}'}


class Place:
    """Where KAITO looks, of one bed."""

    def __init__(self, bed: Bed) -> None:
        self.path = bed.place / "opt" / "models"
        self.path.mkdir(parents=True)
        self.settings: dict[str, Any] = {"kaito_models": self.path}
        self._store = bed.store

    def found(self, name: str) -> dict[str, bytes] | None:
        """What a KAITO pod would load; None when there is no link. A link that leads nowhere, or elsewhere, fails."""
        link = self.path / name
        if not link.is_symlink():
            return None
        assert os.readlink(link) == str(self._store / "kaito" / name)
        assert link.is_dir(), "the link leads nowhere"
        files = [path for path in link.rglob("*") if not path.is_dir()]
        assert not any(path.is_symlink() for path in files)
        return {str(path.relative_to(link)): path.read_bytes() for path in files}

    def link(self, name: str) -> tuple[int, int]:
        """The link itself: another one would have another inode or a later time."""
        facts = (self.path / name).lstat()
        return facts.st_ino, facts.st_ctime_ns

    def names(self) -> list[str]:
        """Everything that is there."""
        return sorted(path.name for path in self.path.iterdir())

    def views(self) -> list[str]:
        """Every view for KAITO."""
        return sorted(path.name for path in (self._store / "kaito").iterdir())


@pytest.fixture
def place(bed: Bed) -> Place:
    """KAITO's directory, empty."""
    return Place(bed)


def lacks(warnings: tuple[str, ...]) -> list[str]:
    """Of a model's warnings those that are about KAITO."""
    return [warning for warning in warnings if warning.startswith(LACKS)]


def test_a_ready_model_is_there_under_its_name_and_stays_when_the_daemon_stops(bed: Bed, place: Place) -> None:
    bed.hub.repos["Acme/M-1.5"] = repo(FILES)

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            status = await ready(engine, "Acme/M-1.5")
            assert place.found("acme-m-1.5") == FILES
            assert (place.path / "acme-m-1.5" / "config.json").samefile(Path(status.path or "") / "config.json"), "it costs no bytes"
            assert lacks(status.warnings) == []
        before = place.link("acme-m-1.5")
        assert place.found("acme-m-1.5") == FILES, "the stripe stays mounted, and so does what lies on it"
        async with bed.engine(**place.settings) as engine:
            assert place.link("acme-m-1.5") == before, "it was not away for a moment"
            await engine.remove("Acme/M-1.5")
            assert (place.names(), place.views()) == ([], [])

    run(test())


def test_a_name_follows_the_revision_that_it_means(bed: Bed, place: Place) -> None:
    bed.hub.repos["acme/m"] = repo(FILES)

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            old = await ready(engine, "acme/m")
            bed.hub.repos["acme/m"].push(NEWER)
            assert place.found("acme-m") == FILES
            new = await ready(engine, "acme/m")
            assert new.revision != old.revision
            assert place.found("acme-m") == NEWER
            assert place.views() == ["acme-m"]
            await ready(engine, f"acme/m@{old.revision}")  # somebody uses the old one by its revision; the name still means the new one
            assert place.found("acme-m") == NEWER
            await engine.remove(new.entry)
            assert place.found("acme-m") == FILES, "the name means what is left"
            assert (await engine.model("acme/m")).revision == old.revision

    run(test())


def test_a_wider_selection_adds_files_below_the_same_link(bed: Bed, place: Place) -> None:
    bed.hub.repos["acme/m"] = repo(FILES)

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            await ready(engine, "acme/m", exclude=("sub/*",))
            before = place.link("acme-m"), (bed.store / "kaito" / "acme-m").stat().st_ino
            assert place.found("acme-m") == {path: data for path, data in FILES.items() if path != "sub/notes.txt"}
            await ready(engine, "acme/m")
            assert place.found("acme-m") == FILES
            assert (place.link("acme-m"), (bed.store / "kaito" / "acme-m").stat().st_ino) == before

    run(test())


def test_a_model_of_another_source_has_the_name_of_its_alias(bed: Bed, place: Place) -> None:
    source = bed.place / "weights"
    source.mkdir()
    (source / "config.json").write_bytes(b"{}")
    (source / "model.safetensors").write_bytes(FILES["model.safetensors"])

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            await ready(engine, f"file://{source}")
            assert place.names() == []
            await ready(engine, f"file://{source}", alias="Acme/Own")
            assert (place.found("acme-own") or {}).keys() == {"config.json", "model.safetensors"}
            await ready(engine, f"file://{source}", alias="acme/other")
            assert (place.names(), place.views()) == (["acme-other"], ["acme-other"])

    run(test())


def test_of_two_models_with_one_name_the_second_is_told_and_waits(bed: Bed, place: Place) -> None:
    bed.hub.repos |= {"acme/m-x": repo(FILES), "acme-m/x": repo(NEWER)}

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            await ready(engine, "acme/m-x")
            second = await ready(engine, "acme-m/x")
            assert second.state is ModelState.READY
            assert lacks(second.warnings) == [f"{LACKS}: acme/m-x has its name there, acme-m-x"]
            assert place.found("acme-m-x") == FILES
        async with bed.engine(**place.settings) as engine:
            assert place.found("acme-m-x") == FILES, "who has it keeps it, also where another would come first by name"
            await engine.remove("acme/m-x")
            assert place.found("acme-m-x") == NEWER
            assert lacks((await engine.model("acme-m/x")).warnings) == []

    run(test())


# -- withdrawal


def rot(path: Path) -> None:
    """Change a byte of a blob on the disk."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(MB)
        byte = file.read(1)
        file.seek(MB)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o444)


def test_bytes_that_went_bad_take_the_link_first_and_the_repair_brings_it_back(bed: Bed, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.hub.repos["acme/m"] = repo(FILES)
    seen: list[object] = []
    real: Callable[..., None] = repair.condemn

    def condemning(*args: Any) -> None:
        seen.append((place.names(), place.views()))
        real(*args)

    monkeypatch.setattr(repair, "condemn", condemning)

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            status = await ready(engine, "acme/m")
            rot(Path(status.path or "") / "model.safetensors")
            bed.hub.faults.add("model.safetensors", Kind.STATUS, status=503, times=None)
            job = await engine.verify("acme/m")
            await until(lambda: engine.models()[0].state, lambda state: state is not ModelState.READY)
            await until(lambda: list(seen), bool)
            assert seen == [([], [])], "no blob is moved while a link leads to it"
            bed.hub.faults.clear()
            await until(lambda: engine.job(job.id), lambda job: job.state.ended)
            await until(lambda: engine.models()[0].state, lambda state: state is ModelState.READY)
            assert place.found("acme-m") == FILES

    run(test())


def test_files_that_are_gone_take_the_link_and_are_put_back(bed: Bed, place: Place) -> None:
    bed.hub.repos["acme/m"] = repo(FILES)

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            await ready(engine, "acme/m")
            (bed.store / "kaito" / "acme-m" / "config.json").unlink()
            while (bed.store / "kaito" / "acme-m").exists() and place.found("acme-m") != FILES:
                await engine.model("acme/m")  # whoever asks has it looked at
                await asyncio.sleep(0.05)
            await until(lambda: (engine.models()[0].state, place.found("acme-m")), lambda now: now == (ModelState.READY, FILES))

    run(test())


def test_a_removal_takes_the_link_before_any_view(bed: Bed, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.hub.repos["acme/m"] = repo(FILES)
    seen: list[tuple[str, list[str]]] = []
    for name in ("withdraw", "withdraw_kaito"):
        real = getattr(Views, name)

        def watched(*args: Any, name: str = name, real: Callable[..., None] = real, **named: Any) -> None:
            seen.append((name, place.names()))
            real(*args, **named)

        monkeypatch.setattr(Views, name, watched)

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            await ready(engine, "acme/m")
            seen.clear()
            await engine.remove("acme/m")
            assert seen == [("withdraw_kaito", []), ("withdraw", [])]

    run(test())


@pytest.mark.parametrize("word", [StripeStatus.WITHDRAWING, StripeStatus.LOST])
def test_a_stripe_that_goes_takes_every_link_with_it_before_that_is_acknowledged(
    bed: Bed, disks: DisksPart, place: Place, word: StripeStatus
) -> None:
    bed.hub.repos |= {"acme/m": repo(FILES), "acme/n": repo(NEWER)}
    (place.path / "baked").mkdir()

    async def test() -> None:
        async with bed.engine(disks.link, **place.settings) as engine:
            disks.mounted(bed.store, "uuid-a")
            await until(engine.problems, lambda problems: not problems)
            await ready(engine, "acme/m")
            await ready(engine, "acme/n")
            assert place.names() == ["acme-m", "acme-n", "baked"]
            disks.say(word, "R01", "nvme1n1 vanished")
            await disks.acknowledged(5.0)
            assert place.names() == ["baked"]
            disks.mounted(bed.store, "uuid-a")
            await until(engine.problems, lambda problems: not problems)
            assert place.found("acme-m") == FILES
            assert place.found("acme-n") == NEWER

    run(test())


def test_links_of_an_earlier_life_go_when_there_is_no_stripe_at_the_start(bed: Bed, disks: DisksPart, place: Place) -> None:
    """The node was powered off: the links are on its own disk, the stripe's contents are gone."""
    (place.path / "acme-gone").symlink_to(bed.store / "kaito" / "acme-gone")
    (place.path / "theirs").symlink_to("/srv/weights")

    async def test() -> None:
        async with bed.engine(disks.link, **place.settings):
            await until(place.names, lambda names: names == ["theirs"])

    run(test())


def test_a_daemon_that_follows_takes_its_links_over(bed: Bed, disks: DisksPart, place: Place) -> None:
    """Before it has heard of the stripe it knows of none; that is no reason to take the links away."""
    bed.hub.repos["acme/m"] = repo(FILES)
    disks.mounted(bed.store, "uuid-a")

    async def test() -> None:
        async with bed.engine(disks.link, **place.settings) as engine:
            await until(engine.problems, lambda problems: not problems)
            await ready(engine, "acme/m")
            before = place.link("acme-m")
        async with bed.engine(FollowedFile(disks.directory), **place.settings) as engine:
            await until(engine.problems, lambda problems: not problems)
            assert place.link("acme-m") == before
            disks.mounted(bed.store, "uuid-b")  # another stripe in its place
            await until(lambda: place.names() and place.link("acme-m"), lambda link: link != before)
            await until(lambda: place.found("acme-m"), lambda found: found == FILES)

    run(test())


def test_at_the_start_what_is_not_ready_any_more_goes_and_what_is_missing_comes(bed: Bed, place: Place) -> None:
    bed.hub.repos |= {"acme/m": repo(FILES), "acme/n": repo(NEWER)}

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            await ready(engine, "acme/m")
            n = await ready(engine, "acme/n")
        (place.path / "acme-m").unlink()
        (place.path / "acme-never").symlink_to(bed.store / "kaito" / "acme-never")
        (bed.store / "kaito" / "acme-left").mkdir()
        (bed.store / "manifests" / f"{n.entry}.json").unlink()
        async with bed.engine(**place.settings):
            assert (place.names(), place.views()) == (["acme-m"], ["acme-m"])
            assert place.found("acme-m") == FILES

    run(test())


def test_without_the_setting_there_are_no_views(bed: Bed, place: Place) -> None:
    bed.hub.repos["acme/m"] = repo(FILES)

    async def test() -> None:
        async with bed.engine() as engine:
            await ready(engine, "acme/m")
            assert place.views() == []
        async with bed.engine(**place.settings):
            assert place.found("acme-m") == FILES
        async with bed.engine():
            assert place.views() == []

    run(test())


# -- what cannot be made


def test_serving_goes_on_without_links_and_they_come_when_they_can(bed: Bed, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MEASURE_EVERY", 0.05)
    bed.hub.repos |= {"acme/m": repo(FILES), "acme/baked": repo(NEWER)}
    place.path.rmdir()

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            status = await ready(engine, "acme/m")
            assert status.state is ModelState.READY
            assert lacks(status.warnings) == [f"{LACKS}: cannot make links in {place.path}: No such file or directory"]
            assert engine.problems() == ()
            (place.path / "acme-baked").mkdir(parents=True)
            (place.path / "acme-baked" / "config.json").write_bytes(b"an operator's own")
            await until(lambda: place.found("acme-m"), lambda found: found == FILES)
            await until(lambda: lacks(engine.models()[0].warnings), lambda warnings: not warnings)
            baked = await ready(engine, "acme/baked")
            assert lacks(baked.warnings) == [f"{LACKS}: something that nvcache did not make is at {place.path}/acme-baked, and is left alone"]
            await engine.remove("acme/baked")
            assert (place.path / "acme-baked" / "config.json").read_bytes() == b"an operator's own"

    run(test())


def test_a_view_that_cannot_be_made_has_no_link(bed: Bed, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk fails when a test wants it to, so that the store's answer has to be given here."""
    monkeypatch.setattr(session, "MEASURE_EVERY", 0.05)
    bed.hub.repos["acme/m"] = repo(FILES)

    def refuse(*_: object, **__: object) -> None:
        raise DiskError(Code.DISK_IO, "cannot publish it: Input/output error")

    async def test() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Views, "publish_kaito", refuse)
            patch.setattr(Views, "withdraw_kaito", refuse)
            async with bed.engine(**place.settings) as engine:
                status = await ready(engine, "acme/m")
                assert lacks(status.warnings) == [f"{LACKS}: cannot publish it: Input/output error"]
                assert place.names() == []
                patch.undo()
                await until(lambda: place.found("acme-m"), lambda found: found == FILES)
                patch.setattr(Views, "withdraw_kaito", refuse)
                bed.hub.repos["acme/m"].push(NEWER)
                newer = await ready(engine, "acme/m")
                assert lacks(newer.warnings) == [f"{LACKS}: cannot publish it: Input/output error"]
                assert place.names() == [], "files of two revisions never lie under one name"
                patch.undo()
                await until(lambda: place.found("acme-m"), lambda found: found == NEWER)

    run(test())


def test_the_links_lead_where_the_node_has_the_store(bed: Bed, place: Place) -> None:
    bed.hub.repos["acme/m"] = repo(FILES)

    async def test() -> None:
        async with bed.engine(**place.settings, kaito_store="/host/store") as engine:
            await ready(engine, "acme/m")
            assert os.readlink(place.path / "acme-m") == "/host/store/kaito/acme-m"
            await engine.remove("acme/m")
            assert place.names() == []

    run(test())


def test_a_fill_that_is_not_done_shows_nothing(bed: Bed, place: Place) -> None:
    bed.hub.repos["acme/m"] = repo(FILES)
    bed.hub.faults.add("model.safetensors", Kind.STATUS, status=404, times=None)

    async def test() -> None:
        async with bed.engine(**place.settings) as engine:
            ended = await end_of(engine, await engine.ensure(wish("acme/m")))  # type: ignore[arg-type]
            assert ended.error is not None
            with pytest.raises(RequestError) as error:
                await engine.remove("acme/never")
            assert error.value.code is Code.UNKNOWN_MODEL
            assert (place.names(), place.views()) == ([], [])

    run(test())

"""Blobs through the engine, from Azurite and a proxy that spoils things: changes half-way, credentials that run out, digests, aliases."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nvcache import logs
from nvcache.core.published import MANIFEST, SUMS, Published
from nvcache.core.states import JobState, ModelState
from nvcache.engine.status import ModelStatus
from nvcache.errors import Code, RequestError
from nvcache.settings import ModelSetting
from tests.engine.conftest import Bed, end_of, ready, repo, run, until, weights, wish
from tests.engine.test_keep import flip
from tests.support.azure_proxy import AzureProxy
from tests.support.azurite import KEY, Azurite
from tests.support.faults import Kind
from tests.support.identity import Identity

BOX = "models"
ONE, TWO = weights(1, 24_000_000), weights(2, 40_000_000)
COMMIT = "c0ffee" * 6 + "c0de"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """Azurite over http, with an empty container."""
    with Azurite(tmp_path_factory.mktemp("azurite")) as azurite:
        azurite.container(BOX)
        yield azurite


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """Azurite over https, which takes tokens."""
    with Azurite(tmp_path_factory.mktemp("secure"), tls=True, oauth=True) as azurite:
        azurite.container(BOX)
        yield azurite


@dataclass
class Box:
    """A model in the container, seen through the proxy; `given` are the settings that lead there."""

    azurite: Azurite
    proxy: AzureProxy
    prefix: str
    given: dict[str, Any]

    @property
    def ref(self) -> str:
        """How it is named."""
        return f"{self.proxy.url}/{BOX}/{self.prefix}"

    def put(self, files: dict[str, bytes], **how: Any) -> None:
        """Put or overwrite blobs; staged in blocks, so without an MD5 if none is asked for."""
        for name, content in files.items():
            self.azurite.upload(BOX, f"{self.prefix}/{name}", content, **how)

    def sums(self, files: dict[str, bytes]) -> None:
        """Put their SHA256SUMS beside them."""
        lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
        self.put({SUMS: "".join(lines).encode()})

    def sent(self, name: str) -> int:
        """Bytes of a blob that were sent."""
        return self.proxy.bytes_sent(f"{BOX}/{self.prefix}/{name}")


@pytest.fixture
def box(plain: Azurite, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Box]:
    """An empty prefix, reached with a connection string from a file."""
    with AzureProxy(plain) as proxy:
        (tmp_path / "connection").write_text(proxy.connection_string)
        yield Box(plain, proxy, request.node.name.replace("[", "-").replace("]", ""), {"az_connection_string_file": tmp_path / "connection"})


def shown(bed: Bed) -> dict[str, bytes]:
    """The files of the only model, by their own path."""
    return {path.split("/", 3)[3]: content for path, content in bed.shown().items() if path.startswith("models/")}


def test_a_fill_is_proven_and_happens_once(bed: Bed, box: Box) -> None:
    """By SHA256SUMS; asking again fetches nothing, and the same content at another prefix is not fetched either."""
    files = {"model-1.safetensors": ONE, "sub/model-2.safetensors": TWO, "config.json": b"{}"}
    box.put(files)
    box.sums(files)
    other = Box(box.azurite, box.proxy, f"{box.prefix}-copy", box.given)
    other.put(files)
    other.sums(files)

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            model = await ready(engine, box.ref)
            assert (model.state, model.unproven) == (ModelState.READY, 0)
            assert shown(bed) == files
            assert box.sent("*.safetensors") == len(ONE) + len(TWO)
            assert isinstance(await engine.ensure(wish(box.ref)), ModelStatus)
            await ready(engine, other.ref)
            assert other.sent("*.safetensors") == 0

    run(test())


def test_what_changes_half_way_is_listed_again(bed: Bed, box: Box, caplog: pytest.LogCaptureFixture) -> None:
    """It is the new bytes that are shown, what did not change is not fetched again, and the log tells."""
    files = {"model-1.safetensors": ONE, "model-2.safetensors": TWO}
    box.put(files)
    new = weights(3, len(TWO) - 1000)

    def overwrite() -> None:
        pause = threading.Event()
        for _ in range(100):  # until the other file is through
            if box.sent("model-1.safetensors") >= len(ONE):
                break
            pause.wait(0.1)
        box.put({"model-2.safetensors": new})

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            fault = box.proxy.faults.add("*/model-2.safetensors", Kind.CALL, after=1_000_000, hook=overwrite)
            await ready(engine, box.ref)
            assert fault.hits == 1
            assert shown(bed) == {**files, "model-2.safetensors": new}
            assert box.sent("model-1.safetensors") == len(ONE)
            assert 412 in {request.status for request in box.proxy.seen("*/model-2.safetensors")}
            assert "is listed again" in caplog.text
            assert len(engine.models()) == 1

    run(test())


@pytest.mark.parametrize("md5", [True, False])
def test_what_stays_is_known_again_without_any_digest(bed: Bed, box: Box, md5: bool) -> None:
    """After the model is ready, and after a restart: a blob is the same while its place and ETag are."""
    box.put({"model-1.safetensors": ONE, "model-2.safetensors": TWO, "README.md": b"old"}, md5=md5)

    async def test() -> None:
        for text in (b"newer", b"newest"):
            async with bed.engine(**box.given) as engine:
                model = await ready(engine, box.ref)
                assert model.unproven == (0 if md5 else 3)
                box.put({"README.md": text}, md5=md5)
                again = await ready(engine, box.ref)
                assert again.revision != model.revision
        assert box.sent("*.safetensors") == len(ONE) + len(TWO)
        assert box.sent("README.md") == len(b"old") + len(b"newer") + len(b"newest")

    run(test())


def test_a_bad_chunk_is_mended_though_the_prefix_has_changed(bed: Bed, box: Box) -> None:
    """The revision cannot be listed any more, but the blob is what it was; one that is not is refused."""
    box.put({"model-1.safetensors": ONE, "model-2.safetensors": TWO})

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            model = await ready(engine, box.ref)
            assert model.path
            box.put({"README.md": b"new"})
            sent = box.sent("*.safetensors")
            flip(Path(model.path) / "model-2.safetensors", 20_000_000)
            job = await end_of(engine, await engine.verify(model.entry))
            assert (job.state, job.repaired_chunks) == (JobState.DONE, 1), job.error
            assert shown(bed) == {"model-1.safetensors": ONE, "model-2.safetensors": TWO}
            assert box.sent("*.safetensors") - sent == 2**24
            box.put({"model-1.safetensors": weights(3, len(ONE))})
            flip(Path(model.path) / "model-1.safetensors", 1)
            job = await end_of(engine, await engine.verify(model.entry))
            assert job.error is not None
            assert job.error.code is Code.SOURCE_CHANGED
            assert (await engine.model(model.entry)).state is ModelState.DEGRADED

    run(test())


def test_a_revision_that_was_overwritten_is_gone(bed: Bed, box: Box) -> None:
    """Whoever names the exact listing gets that or an error, never other bytes."""
    box.put({"model.safetensors": ONE})

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            model = await ready(engine, box.ref)
            pinned = f"{box.ref}@{model.revision}"
            await engine.remove(model.entry)
            box.put({"model.safetensors": weights(3, len(ONE))})
            ended = await end_of(engine, await engine.ensure(wish(pinned)))
            assert ended.error is not None
            assert ended.error.code is Code.REVISION_NOT_FOUND

    run(test())


def test_a_token_that_ends_in_the_middle_is_renewed(bed: Bed, secure: Azurite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones live three seconds and are refused by Azurite itself after that, which is before the fill can be over."""
    with Identity(tmp_path / "identity", tls=secure.tls, lifetime_s=3) as identity, AzureProxy(secure) as proxy:
        for name, value in identity.managed().items():
            monkeypatch.setenv(name, value)
        given = {"az_hosts": (proxy.url.split("/")[2],), "ca_file": secure.ca_file, "az_credential": "identity"}
        box = Box(secure, proxy, "tokens", given)
        files = {"model-1.safetensors": ONE, "model-2.safetensors": TWO}
        box.put(files)
        proxy.bytes_per_s = 12_000_000

        async def test() -> None:
            async with bed.engine(**given) as engine:
                job = await engine.ensure(wish(box.ref))
                await until(lambda: {request.status for request in proxy.seen(origin="bytes")}, lambda statuses: 403 in statuses)
                identity.lifetime_s = 60
                proxy.bytes_per_s = None
                ended = await end_of(engine, job)
                assert ended.state == "done", ended.error
                assert shown(bed) == files
                assert box.sent("*.safetensors") < 1.5 * (len(ONE) + len(TWO))

        run(test())


def test_a_sas_that_rotates_is_read_again(bed: Bed, box: Box, tmp_path: Path) -> None:
    """It expires within a file, its file holds another by then, and what was fetched is kept."""
    box.put({"model.safetensors": TWO})
    file = tmp_path / "sas"
    file.write_text(box.azurite.sas(BOX))

    def rotate() -> None:
        file.write_text(box.azurite.sas(BOX, lasts_s=7200))
        box.proxy.revoke()

    given = {"az_sas_file": file, "az_account": box.azurite.account}
    box.proxy.faults.add("*/model.safetensors", Kind.CALL, after=5_000_000, hook=rotate)

    async def test() -> None:
        async with bed.engine(**given) as engine:
            await ready(engine, box.ref)
            assert shown(bed) == {"model.safetensors": TWO}
            assert 403 in {request.status for request in box.proxy.seen(origin="bytes")}
            assert box.sent("model.safetensors") < 1.5 * len(TWO)

    run(test())


def test_a_sas_that_is_not_renewed_ends_the_fill(bed: Bed, box: Box, tmp_path: Path) -> None:
    """With its cause; when another is there, asking again goes on from what was fetched."""
    box.put({"model.safetensors": TWO})
    file = tmp_path / "sas"
    file.write_text(old := box.azurite.sas(BOX))
    box.proxy.faults.add("*/model.safetensors", Kind.EXPIRE, after=4_000_000)
    box.proxy.bytes_per_s = 30_000_000

    async def test() -> None:
        async with bed.engine(az_sas_file=file, az_account=box.azurite.account) as engine:
            ended = await end_of(engine, await engine.ensure(wish(box.ref)))
            assert ended.error is not None
            assert ended.error.code is Code.BAD_TOKEN
            assert "SAS" in ended.error.message
            assert old not in repr(ended)
            file.write_text(box.azurite.sas(BOX, lasts_s=7200))
            await ready(engine, box.ref)
            assert shown(bed) == {"model.safetensors": TWO}
            assert box.sent("model.safetensors") < 1.5 * len(TWO)

    run(test())


def test_an_alias_is_shown_as_the_hub_shows_it(bed: Bed, box: Box) -> None:
    """Under its name at the listing's first 40 digits, or at the commit that a mirror names."""
    files = {"model.safetensors": ONE, "config.json": b"{}"}
    box.put(files)

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            model = await ready(engine, box.ref, alias="acme/large")
            hub = bed.store / "hub/models--acme--large"
            assert (hub / "refs/main").read_text() == model.revision[:40]
            assert (hub / "snapshots" / model.revision[:40] / "model.safetensors").read_bytes() == ONE
            described = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
            box.put({MANIFEST: Published("hf://acme/large", COMMIT, described).to_json()})
            mirrored = await ready(engine, box.ref, alias="acme/large")
            assert mirrored.unproven == 0
            assert (hub / "refs/main").read_text() == COMMIT
            assert {path.name for path in (hub / "snapshots" / COMMIT).iterdir()} == set(files)
            assert box.sent("model.safetensors") == len(ONE)

    run(test())


def test_pods_keep_the_name_wherever_the_model_is_from(bed: Bed, box: Box) -> None:
    """Who asks for the Hub's name gets what is shown under it, and a new revision takes the name over."""
    box.put({"model.safetensors": ONE})

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            model = await ready(engine, box.ref, alias="acme/large")
            assert (await engine.model("acme/large")).entry == model.entry
            asked = await engine.ensure(wish("acme/large"))
            assert isinstance(asked, ModelStatus)
            assert (asked.entry, asked.fetched_bytes) == (model.entry, 0)
            assert box.ref in (asked.note or "")
            with pytest.raises(RequestError, match="has that name on this node") as caught:
                await engine.ensure(wish("acme/large@v2"))
            assert caught.value.code is Code.ALIAS_CONFLICT
            assert model.entry in (caught.value.hint or "")
            box.put({"README.md": b"new"})
            newer = await ready(engine, box.ref)
            assert newer.hub_id == "acme/large"
            assert (bed.store / "hub/models--acme--large/refs/main").read_text() == newer.revision[:40]
            assert (await engine.model("acme/large")).entry == newer.entry

    run(test())


@pytest.mark.parametrize("here", ["nothing", "the Hub's model"])
def test_a_declared_name_is_not_lost_to_the_first_pod_that_asks(bed: Bed, box: Box, here: str) -> None:
    """Before anything is here, the Hub's name means what is declared; a Hub model that is here already stays what it is."""
    box.put({"model.safetensors": ONE})
    bed.hub.repos["acme/large"] = repo({"model.safetensors": TWO})

    async def test() -> None:
        if here == "the Hub's model":
            async with bed.engine() as engine:
                await ready(engine, "acme/large")
        hubs = len(bed.hub.requests)
        async with bed.engine(models=(ModelSetting(ref=box.ref, alias="acme/large"),), **box.given) as engine:
            model = await ready(engine, "acme/large")
            if here == "nothing":
                assert shown(bed) == {"model.safetensors": ONE}
                assert len(bed.hub.requests) == hubs
            else:
                assert model.ref.startswith("hf://acme/large@")

    run(test())


def test_a_credential_that_ran_out_does_not_take_away_what_is_here(bed: Bed, box: Box, tmp_path: Path) -> None:
    box.put({"model.safetensors": ONE})
    sas = tmp_path / "sas"
    sas.write_text(box.azurite.sas(BOX))
    given = {"az_account": box.azurite.account, "az_sas_file": sas}

    async def test() -> None:
        async with bed.engine(**given) as engine:
            model = await ready(engine, box.ref)
            sas.write_text(box.azurite.sas(BOX, begins_s=-7200, lasts_s=-3600))
            again = await engine.ensure(wish(box.ref))
            assert isinstance(again, ModelStatus)
            assert (again.entry, again.state) == (model.entry, ModelState.READY)
            assert "the last resolved revision is served" in (again.note or "")

    run(test())


def test_a_folder_of_models_is_none(bed: Bed, box: Box) -> None:
    """A prefix that ends too early; but a model in several parts describes them at its top."""
    parts = {f"{name}/{file}": ONE if file.endswith("s") else b"{}" for name in ("a", "b") for file in ("model.safetensors", "config.json")}
    box.put(parts)

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            ended = await end_of(engine, await engine.ensure(wish(box.ref)))
            assert ended.error is not None
            assert "it holds 2 models, 'a', 'b'" in ended.error.message
            assert box.sent("*.safetensors") == 0
            box.put({"model_index.json": b"{}"})
            await ready(engine, box.ref)

    run(test())


@pytest.mark.parametrize(("how", "proven"), [({}, False), ({"md5": True}, True), ({"metadata": None}, True)])
def test_a_digest_may_be_required(bed: Bed, box: Box, how: dict[str, Any], proven: bool) -> None:
    """MD5 and SHA-256 in metadata count; without any, nothing is fetched."""
    if "metadata" in how:
        how = {"metadata": {"sha256": hashlib.sha256(ONE).hexdigest()}}
    box.put({"model.safetensors": ONE}, **how)

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            ended = await end_of(engine, await engine.ensure(wish(box.ref, require_digest=True)))
            if proven:
                assert ended.state == "done", ended.error
                assert (await engine.model(ended.entry or "")).unproven == 0
                return
            assert ended.error is not None
            assert (ended.error.code, box.sent("*")) == (Code.NO_DIGEST, 0)
            assert "model.safetensors" in ended.error.message
            assert (await ready(engine, box.ref)).unproven == 1
            ended = await end_of(engine, await engine.ensure(wish(box.ref, require_digest=True)))
            assert ended.error is not None
            assert ended.error.code is Code.NO_DIGEST

    run(test())


@pytest.mark.parametrize("what", ["digest", "md5"])
def test_wrong_bytes_are_never_shown(bed: Bed, box: Box, what: str) -> None:
    """Against a SHA-256 or an MD5 that the blob does not have."""
    wrong = {"metadata": {"sha256": "0" * 64}} if what == "digest" else {"md5": bytes(16)}
    box.put({"model.safetensors": ONE}, **wrong)

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            ended = await end_of(engine, await engine.ensure(wish(box.ref)))
            assert ended.error is not None
            assert ended.error.code is Code.DIGEST_MISMATCH
            assert bed.shown() == {}

    run(test())


def test_a_byte_spoilt_on_the_way_is_found_without_a_digest(bed: Bed, box: Box) -> None:
    """Where the blob has none, every range comes with its own MD5: the range is asked for again, not the file."""
    box.put({"model.safetensors": ONE})
    box.proxy.faults.add("*/model.safetensors", Kind.FLIP, after=1000)

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            await ready(engine, box.ref)
            assert shown(bed) == {"model.safetensors": ONE}
            assert len(ONE) < box.sent("model.safetensors") <= len(ONE) + 5 * 2**20

    run(test())


def test_a_prefix_without_weights_is_no_model(bed: Bed, box: Box) -> None:
    """A mistyped prefix that holds something else."""
    box.put({"notes.txt": b"x"})

    async def test() -> None:
        async with bed.engine(**box.given) as engine:
            ended = await end_of(engine, await engine.ensure(wish(box.ref)))
            assert ended.error is not None
            assert "no safetensors" in ended.error.message
            await ready(engine, box.ref, include=["*"])

    run(test())


@pytest.mark.usefixtures("as_the_daemon_logs")
def test_no_secret_is_kept_or_told(bed: Bed, box: Box, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Not in the store, nor in the log of any process, nor in what the engine says, when it goes well and when it does not."""
    logs.setup("debug", "json")
    box.put({"model.safetensors": ONE})
    box.proxy.faults.add("*/model.safetensors", Kind.RESET, after=1000)
    file = tmp_path / "sas"
    file.write_text(sas := box.azurite.sas(BOX))
    told: list[object] = []

    async def test() -> None:
        async with bed.engine(az_sas_file=file, az_account=box.azurite.account) as engine:
            told.append(await ready(engine, box.ref))
            told.append(await end_of(engine, await engine.ensure(wish(f"{box.proxy.url}/{BOX}/nothing-here"))))
            box.proxy.revoke()
            told.append(await end_of(engine, await engine.ensure(wish(f"{box.proxy.url}/{BOX}/no-more"))))

    run(test())
    logged = capfd.readouterr().err
    assert "SAS is refused" in logged
    kept = "".join(path.read_text("utf-8", "replace") for path in bed.store.rglob("*") if path.is_file() and path.stat().st_size < 2**20)
    for secret in (sas.partition("sig=")[2].partition("&")[0], KEY, "sig="):
        assert secret not in logged + repr(told) + kept

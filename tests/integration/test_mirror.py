"""`nvcache mirror` as a process, from a Hub-shaped server into Azurite: what is sent and what is not, what readers see meanwhile, what goes wrong."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nvcache.core.mirror import metadata_of
from nvcache.core.published import MANIFEST, Published
from nvcache.core.ref import parse_ref
from nvcache.errors import Code, SourceError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.source import AzureBlob
from nvcache.sources.http import Transport
from tests.support.azure_answers import refusal
from tests.support.azure_proxy import AzureProxy
from tests.support.azurite import ACCOUNT, KEY, Azurite
from tests.support.daemon import DaemonProcess
from tests.support.faults import Fault, Kind
from tests.support.hub import HubServer
from tests.support.identity import MARK, Identity
from tests.support.models import make_llama
from tests.support.repo import MIB, Repo

BLOCK = 16 * MIB
BOX = "models"
NAME = "acme/m"
TOKEN = "hfTokenNeverToBePrinted"
LARGE = os.urandom(5 * BLOCK + 12345)
FILES = {
    "config.json": b'{"a": 1}',
    "empty.txt": b"",
    "model-1.safetensors": LARGE,
    "sub/model-2.safetensors": os.urandom(BLOCK),
    "tokenizer.json": b'{"b": 2}' * 1000,
}
UNTAKEN = {"pytorch_model.bin": b"the same once more", "SHA256SUMS": b"of files that are left out"}


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """Over http, with an empty container."""
    with Azurite(tmp_path_factory.mktemp("azurite")) as azurite:
        azurite.container(BOX)
        yield azurite


@dataclass
class Bed:
    """A Hub with one model, Azurite behind a proxy, and the command that copies from one to the other."""

    azurite: Azurite
    proxy: AzureProxy
    hub: HubServer
    work: Path
    prefix: str
    environment: dict[str, str] = field(default_factory=dict)
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def to(self) -> str:
        """The destination; the connection string says where the account is."""
        return f"az://{ACCOUNT}/{BOX}/{self.prefix}"

    @property
    def repo(self) -> Repo:
        """The model's history."""
        return self.hub.repos[NAME]

    def start(self, *flags: str, ref: str = NAME, to: str | None = None) -> subprocess.Popen[str]:
        """The command, running."""
        command = [sys.executable, "-m", "nvcache", "mirror", ref, to or self.to, *flags]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.work), "HF_ENDPOINT": self.hub.url, **self.environment}
        pipe = subprocess.PIPE
        self.running.append(subprocess.Popen(command, env=environment, cwd=self.work, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True))
        return self.running[-1]

    def mirror(self, *flags: str, code: int = 0, **how: str) -> str:
        """Run the command; what it says. Asserts its exit code."""
        running = self.start(*flags, **how)
        out, err = running.communicate(timeout=120)
        assert running.returncode == code, out + err
        return err if not out else out if "--json" in flags else out + err

    def told(self, *flags: str, **how: Any) -> dict[str, Any]:
        """The one JSON object that it prints."""
        return dict(json.loads(self.mirror("--json", *flags, **how)))

    def blocks(self, glob: str = "*") -> int:
        """Bytes of blocks that arrived so far, those of the manifest apart."""
        sent = self.proxy.seen(f"{BOX}/{self.prefix}/{glob}", method="PUT")
        arrived = [request for request in sent if "comp=block&" in request.query and request.status == 201 and not request.file.endswith(MANIFEST)]
        return sum(int(request.headers["content-length"]) for request in arrived)

    def writes(self) -> int:
        """Requests so far that change something."""
        return len(self.proxy.seen(method="PUT"))

    def blob(self, path: str) -> bytes:
        """What is stored."""
        return self.azurite.blob(BOX, f"{self.prefix}/{path}").download_blob().readall()

    def stored(self) -> dict[str, bytes]:
        """Everything that is stored below the prefix, except the manifest."""
        with self.azurite.service.get_container_client(BOX) as client:
            names = [blob.name.removeprefix(f"{self.prefix}/") for blob in client.list_blobs(name_starts_with=f"{self.prefix}/")]
        return {name: self.blob(name) for name in names if name != MANIFEST}

    def source(self) -> AzureBlob:
        """The destination as readers see it."""
        return AzureBlob(lambda: Access(connection_string=self.azurite.connection_string), Transport())

    def refused(self) -> SourceError:
        """What readers are told instead of a revision."""
        with pytest.raises(SourceError) as caught:
            self.source().resolve(parse_ref(self.to))
        return caught.value

    def push(self, **changes: bytes | None) -> str:
        """Commit the model with other files; None removes one. Returns the commit."""
        files = FILES | UNTAKEN | {path.replace("__", ".").replace("_", "-"): content for path, content in changes.items()}
        return self.repo.push({path: content for path, content in files.items() if content is not None})

    def after(self, count: int, path: str, kind: Kind, **options: Any) -> Fault:
        """A fault of writing a blob that comes after so many requests that go well."""
        at = f"{BOX}/{self.prefix}/{path}"
        self.proxy.faults.add(at, Kind.CALL, times=count, origin="service", method="PUT", hook=list)
        return self.proxy.faults.add(at, kind, origin="service", method="PUT", **options)

    def until(self, done: Callable[[], bool]) -> None:
        """Wait for it."""
        end = time.monotonic() + 60
        while not done():
            assert time.monotonic() < end, "it did not come"
            select.select([], [], [], 0.02)


@pytest.fixture
def bed(azurite: Azurite, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bed]:
    """With a prefix of the test's own, and the account's key."""
    with AzureProxy(azurite) as proxy, HubServer({NAME: Repo(FILES | UNTAKEN)}, token=TOKEN) as hub:
        bed = Bed(azurite, proxy, hub, tmp_path, request.node.name.replace("[", "/").replace("]", ""))
        bed.environment["AZURE_STORAGE_CONNECTION_STRING"] = proxy.connection_string
        try:
            yield bed
        finally:
            for process in bed.running:
                process.kill()
                process.communicate()


def test_a_copy_has_the_hubs_digests_and_the_second_run_moves_nothing(bed: Bed) -> None:
    """The dry run before it changes nothing either."""
    plan = bed.told("--dry-run")
    states = {file["path"]: file["state"] for file in plan["paths"]}
    assert states == dict.fromkeys(FILES, "send") | dict.fromkeys(UNTAKEN, "left out")
    assert (plan["bytes_to_send"], plan["credential"], plan["finished"]) == (sum(map(len, FILES.values())), "key", False)
    assert bed.writes() == 0
    assert "left out" in bed.mirror("--dry-run")

    said = bed.mirror()
    assert bed.stored() == FILES
    assert bed.blocks() == sum(map(len, FILES.values()))
    resolved = bed.source().resolve(parse_ref(bed.to))
    assert resolved.commit == bed.repo.commit
    assert f"{bed.to}@{resolved.ref.revision}" in said
    digests = {file.path: file.sha256 for file in bed.source().list(resolved)}
    assert digests == {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}
    manifest = Published.from_json(bed.blob(MANIFEST))
    assert (manifest.model, manifest.commit) == (f"hf://{NAME}", bed.repo.commit)
    for path, content in FILES.items():
        facts = bed.azurite.blob(BOX, f"{bed.prefix}/{path}").get_blob_properties()
        assert facts.content_settings.content_md5 == hashlib.md5(content).digest()
        assert facts.metadata["sha256"] == digests[path]
        assert facts.content_settings.content_type == ("application/json" if path.endswith(".json") else "application/octet-stream")

    before = bed.writes(), bed.hub.bytes_sent(), bed.proxy.bytes_sent("*.safetensors")
    again = bed.told()
    assert (again["changed"], again["bytes_sent"], again["revision"]) == (False, 0, resolved.ref.revision)
    assert "nothing to do" in bed.mirror()
    assert (bed.writes(), bed.hub.bytes_sent(), bed.proxy.bytes_sent("*.safetensors")) == before


def test_quick_reads_nothing_back(bed: Bed) -> None:
    """And every block is still proven on arrival by its MD5."""
    done = bed.told("--quick", "--lanes", "3")
    assert (done["bytes_read_back"], bed.proxy.bytes_sent("*.safetensors")) == (0, 0)
    assert bed.stored() == FILES
    sent = [request for request in bed.proxy.seen(method="PUT") if "comp=block&" in request.query]
    assert all(len(base64.b64decode(request.headers["content-md5"])) == 16 for request in sent)


def test_what_was_sent_before_a_crash_is_not_sent_again(bed: Bed) -> None:
    """kill -9 in the middle of a file; readers refuse what is there until the next run has finished it."""
    arrived = len(FILES["config.json"]) + 3 * BLOCK
    bed.after(3, "model-1.safetensors", Kind.BUSY, times=None, seconds=300)
    first = bed.start("--lanes", "1")
    bed.until(lambda: bed.blocks() == arrived)
    first.kill()
    first.communicate()
    bed.proxy.faults.clear()
    told = bed.refused()
    assert (told.code, told.retryable) == (Code.SOURCE_BUSY, True)
    assert NAME in str(told)
    states = {file["path"]: file["state"] for file in bed.told("--dry-run")["paths"]}
    assert (states["config.json"], states["model-1.safetensors"], states["tokenizer.json"]) == ("here", "resume", "send")
    assert "in 3 files, 1 of them sent in part before" in bed.mirror("--dry-run")

    fetched = bed.hub.bytes_sent("config.json")
    done = bed.told()
    assert bed.stored() == FILES
    assert bed.blocks() == sum(map(len, FILES.values()))
    assert bed.hub.bytes_sent("config.json") == fetched
    assert done["bytes_resumed"] == 3 * BLOCK
    assert done["bytes_read_back"] == sum(map(len, FILES.values()))
    assert bed.source().resolve(parse_ref(bed.to)).commit == bed.repo.commit


def test_a_copy_that_lacks_only_its_manifest_is_finished(bed: Bed) -> None:
    """Nothing is sent again, but nobody has read it back yet."""
    bed.after(2, MANIFEST, Kind.STATUS, **refusal(403, "AuthorizationPermissionMismatch"))
    assert MANIFEST in bed.mirror(code=4)
    assert (bed.stored(), bed.refused().code) == (FILES, Code.SOURCE_BUSY)
    done = bed.told()
    assert (done["bytes_sent"], done["bytes_read_back"]) == (0, sum(map(len, FILES.values())))
    assert bed.source().resolve(parse_ref(bed.to)).commit == bed.repo.commit


@pytest.mark.parametrize("path", ["model-1.safetensors", "config.json"])
def test_wrong_bytes_of_the_hub_become_no_blob(bed: Bed, path: str) -> None:
    """Whichever digest it publishes; the right ones do when they come."""
    fault = bed.hub.faults.add(path, Kind.FLIP, times=None, after=3)
    said = bed.mirror(code=6)
    assert path in said
    assert "not those it publishes" in said
    assert fault.hits
    assert path not in bed.stored()
    assert bed.refused().code is Code.SOURCE_BUSY
    bed.hub.faults.clear()
    bed.mirror()
    assert bed.stored() == FILES


def test_a_new_commit_takes_the_place_of_the_old(bed: Bed) -> None:
    """Only what differs is sent. What the new one has no more is left alone, and told: readers would count it in."""
    bed.mirror()
    sent = bed.blocks()
    commit = bed.push(config__json=b'{"a": 2}', tokenizer__json=None, new__txt=b"added")
    told = bed.told("--dry-run")
    states = {file["path"]: file["state"] for file in told["paths"] if file["state"] not in ("here", "left out")}
    assert (states, told["foreign"]) == ({"config.json": "replace", "new.txt": "send"}, ["tokenizer.json"])
    assert "tokenizer.json" in bed.mirror()
    assert bed.blocks() - sent == len(b'{"a": 2}added')
    assert (bed.blob("config.json"), bed.blob("tokenizer.json")) == (b'{"a": 2}', FILES["tokenizer.json"])
    assert bed.source().resolve(parse_ref(bed.to)).commit is None
    bed.azurite.delete(BOX, f"{bed.prefix}/tokenizer.json")
    assert bed.source().resolve(parse_ref(bed.to)).commit == commit
    assert bed.told()["foreign"] == []


@pytest.mark.parametrize("manifest", [None, b"{"], ids=["alone", "unreadable"])
def test_what_no_mirror_put_there_is_not_written_over(bed: Bed, manifest: bytes | None) -> None:
    """Unless that is asked for; a run of the same model that goes on or comes later does not need to ask again."""
    theirs = {"config.json": b"tuned", "model-1.safetensors": b"weights", "notes.md": b"of mine"}
    for path, content in {**theirs, **({} if manifest is None else {MANIFEST: manifest})}.items():
        bed.azurite.upload(BOX, f"{bed.prefix}/{path}", content)
    why = f"cannot mirror hf://{NAME} to {bed.to}: it holds 3 files that no mirror of it put there: 'config.json', 'model-1.safetensors' and more"
    assert f"refused: {why}" in bed.mirror("--dry-run", code=2)
    told = bed.told("--dry-run", code=2)["refusal"]
    assert (told["code"], told["detail"]) == ("bad-request", why)
    said = bed.mirror(code=2)
    assert f"nvcache: {why}\nhint: choose an empty prefix, or --replace" in said
    assert "warning:" not in said
    assert (bed.stored(), bed.writes()) == (theirs, 0)

    assert bed.told("--dry-run", "--replace")["refusal"] is None
    fault = bed.proxy.faults.add(
        f"{BOX}/{bed.prefix}/config.json", Kind.STATUS, origin="service", method="PUT", **refusal(403, "AuthorizationPermissionMismatch")
    )
    bed.mirror("--replace", code=4)
    assert fault.hits
    assert bed.blob("config.json") == b"tuned"
    assert "notes.md" in bed.mirror()
    assert bed.stored() == FILES | {"notes.md": b"of mine"}
    bed.push(config__json=b'{"a": 2}')
    assert bed.told()["foreign"] == ["notes.md"]


def test_what_was_changed_by_hand_in_a_finished_copy_is_kept(bed: Bed) -> None:
    """Until somebody says otherwise."""
    bed.mirror()
    bed.azurite.upload(BOX, f"{bed.prefix}/config.json", b"tuned")
    writes = bed.writes()
    assert "it holds a file that no mirror of it put there: 'config.json'\n" in bed.mirror(code=2)
    assert (bed.blob("config.json"), bed.writes()) == (b"tuned", writes)
    bed.mirror("--replace")
    assert bed.stored() == FILES


def test_a_container_of_other_things_is_no_destination(bed: Bed) -> None:
    """With the prefix forgotten, no file of the model is in the way of another, and nothing is sent all the same."""
    box = "others"
    bed.azurite.container(box)
    bed.azurite.upload(box, "theirs/model.safetensors", b"x")
    to = f"az://{ACCOUNT}/{box}"
    assert f"to {to}: it holds a file that no mirror of it put there: 'theirs/model.safetensors'" in bed.mirror(code=2, to=to)
    assert bed.writes() == 0
    assert bed.told("--replace", to=to)["foreign"] == ["theirs/model.safetensors"]


def test_an_old_commit_can_be_asked_for(bed: Bed) -> None:
    """By its id."""
    old = bed.repo.commit
    bed.push(config__json=b"{}")
    assert bed.told(ref=f"{NAME}@{old}")["commit"] == old
    assert bed.stored() == FILES


def test_what_somebody_else_writes_meanwhile_is_told_and_kept(bed: Bed) -> None:
    """Between the listing and the commit of the file."""
    name = f"{bed.prefix}/model-1.safetensors"
    fault = bed.proxy.faults.add(
        f"{BOX}/{name}", Kind.CALL, origin="service", method="PUT", hook=lambda: bed.azurite.upload(BOX, name, b"theirs", md5=None)
    )
    said = bed.mirror(code=5)
    assert fault.hits
    assert "model-1.safetensors" in said
    assert "somebody wrote it" in said
    assert bed.blob("model-1.safetensors") == b"theirs"
    assert bed.refused().code is Code.SOURCE_BUSY
    bed.mirror()
    assert bed.stored() == FILES


@pytest.mark.parametrize("old", [None, b"what was there"])
def test_a_blob_is_written_over_the_one_that_was_seen_or_none(bed: Bed, old: bytes | None) -> None:
    """Also an empty one, which has no blocks that could be missed."""
    name = f"{bed.prefix}/empty.txt"
    if old is not None:
        bed.azurite.upload(BOX, name, old)
    hook = partial(bed.azurite.upload, BOX, name, b"theirs")
    bed.proxy.faults.add(f"{BOX}/{bed.prefix}/config.json", Kind.CALL, origin="service", method="PUT", hook=hook)
    assert "empty.txt" in bed.mirror("--lanes", "1", "--replace", code=5)
    assert bed.blob("empty.txt") == b"theirs"


def test_who_writes_the_same_bytes_is_no_stranger(bed: Bed) -> None:
    """Another run of the same copy; and an answer that was lost looks the same."""
    name = f"{bed.prefix}/config.json"
    metadata = metadata_of(hashlib.sha256(FILES["config.json"]).hexdigest(), None)
    fault = bed.proxy.faults.add(
        f"{BOX}/{name}",
        Kind.CALL,
        origin="service",
        method="PUT",
        hook=lambda: bed.azurite.upload(BOX, name, FILES["config.json"], metadata=metadata, md5=None),
    )
    bed.mirror()
    assert fault.hits
    assert bed.stored() == FILES


def test_a_file_that_is_changed_after_it_was_sent_is_told(bed: Bed) -> None:
    """The manifest is not written over what is not as it was left."""
    name = f"{bed.prefix}/config.json"
    bed.proxy.faults.add(
        f"{BOX}/{bed.prefix}/model-1.safetensors",
        Kind.CALL,
        times=None,
        origin="service",
        method="PUT",
        hook=lambda: bed.azurite.blob(BOX, name).exists() and bed.azurite.upload(BOX, name, b"theirs"),
    )
    said = bed.mirror("--lanes", "1", code=5)
    assert "config.json is not as it was left" in said
    assert bed.refused().code is Code.SOURCE_BUSY


def test_two_at_once_end_with_one_copy(bed: Bed) -> None:
    """Of the same commit: each takes what the other wrote for its own, and the copy is whole."""
    both = [bed.start("--lanes", "2") for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert {process.returncode for process in both} <= {0, 5}, said
    bed.mirror()
    assert bed.stored() == FILES
    assert bed.source().resolve(parse_ref(bed.to)).commit == bed.repo.commit


def test_what_is_read_back_wrong_is_sent_anew(bed: Bed) -> None:
    """It loses what it says of itself, so that neither readers nor the next run believe it."""
    bed.proxy.faults.add(f"{BOX}/{bed.prefix}/model-1.safetensors", Kind.FLIP, times=None, after=5)
    said = bed.mirror(code=6)
    assert "cannot vouch for model-1.safetensors" in said
    assert bed.refused().code is Code.SOURCE_BUSY
    bed.proxy.faults.clear()
    done = bed.told()
    assert done["bytes_sent"] == len(LARGE)
    assert bed.stored() == FILES


@pytest.mark.parametrize("kind", [Kind.BUSY, Kind.THROTTLE])
def test_a_busy_service_is_given_the_time_it_asks_for(bed: Bed, kind: Kind) -> None:
    """While blocks are sent and when they are committed."""
    faults = [bed.proxy.faults.add(f"*/{MANIFEST}", kind, origin="service", method="PUT", seconds=2)]
    faults += [bed.proxy.faults.add("*.safetensors", kind, times=2, origin="service", method="PUT", seconds=1)]
    began = time.monotonic()
    said = bed.mirror("--quick")
    assert [fault.hits for fault in faults] == [1, 2]
    assert time.monotonic() - began > 3
    assert "trying again in" in said
    assert bed.stored() == FILES


def test_a_hub_that_is_busy_is_waited_for(bed: Bed) -> None:
    """As for any fill."""
    fault = bed.hub.faults.add("model-1.safetensors", Kind.BUSY, times=2, seconds=1)
    bed.mirror("--quick")
    assert fault.hits == 2
    assert bed.stored() == FILES


@pytest.mark.parametrize("who", ["hub", "service"])
def test_ctrl_c_ends_it_at_once_and_the_next_run_goes_on(bed: Bed, who: str) -> None:
    """With a Hub that says nothing any more, and with a service that wants nothing for a long time."""
    last = "sub/model-2.safetensors"
    if who == "hub":
        fault = bed.hub.faults.add(last, Kind.STALL, times=None, after=1000, seconds=300)
    else:
        fault = bed.proxy.faults.add(f"{BOX}/{bed.prefix}/{last}", Kind.BUSY, times=None, origin="service", method="PUT", seconds=300)
    running = bed.start("--lanes", "1")
    bed.until(lambda: bed.blocks("model-1*") == len(LARGE) and fault.hits > 0)
    running.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = running.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert running.returncode == 130, err
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    assert "" not in err.splitlines()
    assert out == ""
    bed.hub.faults.clear()
    bed.proxy.faults.clear()
    sent = bed.blocks()
    bed.mirror()
    assert bed.blocks() - sent == len(FILES[last]) + len(FILES["tokenizer.json"])
    assert bed.stored() == FILES


def test_an_account_that_does_not_answer_is_told_soon(bed: Bed) -> None:
    """A mistyped name is no outage."""
    began = time.monotonic()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        to = f"http://127.0.0.1:{taken.getsockname()[1]}/{ACCOUNT}/{BOX}/p"
        assert "Connection refused" in bed.mirror(code=5, to=to)
    assert time.monotonic() - began < 20


def test_a_leased_blob_is_told_apart(bed: Bed) -> None:
    """From one that somebody wrote."""
    bed.azurite.upload(BOX, f"{bed.prefix}/config.json", b"old")
    lease = bed.azurite.blob(BOX, f"{bed.prefix}/config.json").acquire_lease()
    said = bed.mirror("--replace", code=4)
    assert "config.json" in said
    assert "somebody holds a lease on it" in said
    lease.release()
    bed.mirror()
    assert bed.stored() == FILES


def test_another_tools_upload_that_was_not_finished_is_told(bed: Bed) -> None:
    """Its blocks have ids of another length, which Azure does not mix."""
    bed.azurite.blob(BOX, f"{bed.prefix}/config.json").stage_block("short", b"x")
    said = bed.mirror(code=4)
    assert "another tool's upload" in said


@pytest.mark.parametrize(
    ("there", "change", "code", "why"),
    [
        ({}, {"to": f"az://{ACCOUNT}/{BOX}/p@2026-01-31T12:00:00Z"}, 2, "no @revision"),
        ({}, {"to": "hf://acme/other"}, 2, "no place for blobs"),
        ({}, {"ref": f"az://{ACCOUNT}/{BOX}/p"}, 2, "no model of the Hub"),
        ({}, {"to": f"az://{ACCOUNT}/nowhere/p"}, 3, "no such container"),
        ({}, {"ref": f"{NAME}@nowhere"}, 3, "nowhere"),
        ({MANIFEST: Published("hf://acme/other", "c" * 40, {}).to_json()}, {}, 2, "holds hf://acme/other"),
        ({MANIFEST: Published("hf://acme/other", "c" * 40, {}).unfinished_json()}, {}, 2, "holds hf://acme/other"),
        ({"Config.json": b"{}"}, {}, 6, "only in case"),
        ({"config.json/x": b"{}"}, {}, 6, "is also a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(bed: Bed, there: dict[str, bytes], change: dict[str, str], code: int, why: str) -> None:
    for path, content in there.items():
        bed.azurite.upload(BOX, f"{bed.prefix}/{path}", content)
    assert why in bed.mirror(code=code, **change)
    assert bed.writes() == 0


def test_no_secret_is_shown(bed: Bed) -> None:
    """Neither the Hub's token nor a SAS nor the key, whatever goes wrong; not in the process list, not in a blob."""
    sas = bed.azurite.sas(BOX, permission="racwdl")
    signature = sas.partition("sig=")[2].partition("&")[0]
    (bed.work / "sas").write_text(sas)
    del bed.environment["AZURE_STORAGE_CONNECTION_STRING"]
    bed.environment |= {
        "HF_TOKEN": TOKEN,
        "AZURE_STORAGE_ACCOUNT": ACCOUNT,
        "NVCACHE_AZ_SAS_FILE": str(bed.work / "sas"),
        "NVCACHE_LOG_LEVEL": "debug",
    }
    bed.environment["NVCACHE_AZ_HOSTS"] = bed.proxy.url.split("/")[2]
    bed.repo.private = bed.repo.gated = True
    to = f"{bed.proxy.url}/{BOX}/{bed.prefix}"
    bed.proxy.faults.add("*.safetensors", Kind.BUSY, origin="service", method="PUT", seconds=1)
    said = bed.mirror("--dry-run", to=to)
    running = bed.start(to=to)
    bed.until(lambda: bed.blocks() > 0)
    listed = Path(f"/proc/{running.pid}/cmdline").read_text()
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    said += out + err + listed + bed.mirror(to=to)
    bed.proxy.revoke()
    bed.push(config__json=b"other")
    said += bed.mirror(code=4, to=to)
    bed.environment["AZURE_STORAGE_CONNECTION_STRING"] = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint=ftp://nowhere"
    said += bed.mirror(code=2, to=to)
    stored = b"".join(content for path, content in bed.stored().items() if path.endswith(".json")) + bed.blob(MANIFEST)
    for secret in (TOKEN, signature, KEY):
        assert secret not in said
        assert secret.encode() not in stored


def test_a_workload_identity_is_enough(bed: Bed, tmp_path: Path) -> None:
    """No password at all, over https."""
    with Azurite(tmp_path / "secure", tls=True, oauth=True) as secure, Identity(tmp_path / "id", tls=secure.tls) as identity:
        secure.container(BOX)
        del bed.environment["AZURE_STORAGE_CONNECTION_STRING"]
        bed.environment |= {**identity.workload(), "SSL_CERT_FILE": str(secure.ca_file), "NVCACHE_AZ_HOSTS": secure.url.split("/")[2]}
        to = f"{secure.url}/{BOX}/m"
        assert json.loads(bed.mirror("--dry-run", "--json", to=to))["credential"] == "token"
        said = bed.mirror(to=to)
        assert MARK not in said
        assert secure.blob(BOX, "m/model-1.safetensors").download_blob().readall() == LARGE


def test_a_node_fills_from_the_copy_with_the_hubs_digests_and_commit(bed: Bed) -> None:
    """And shows it under the Hub's name and commit."""
    with tempfile.TemporaryDirectory(prefix="nvc-") as place, contextlib.ExitStack() as stack:
        model = Path(place) / "model"
        make_llama(model, 3_000_000, shards=2)
        bed.hub.repos[NAME] = Repo.of_directory(model)
        bed.mirror()
        key = Path(place) / "connection"
        key.write_text(bed.proxy.connection_string)
        daemon = stack.enter_context(DaemonProcess(Path(place), bed.hub.url, max_bytes="1GB", workers=1, az_connection_string_file=key))
        before = bed.hub.bytes_sent()
        done = daemon.cli("warm", bed.to, "--as", NAME, "--require-digest", "--json")
        assert done.returncode == 0, done.stderr
        warmed = json.loads(done.stdout)
        shown = json.loads(daemon.cli("show", warmed["entry"], "--json").stdout)
        assert {file["check"] for file in shown["manifest"]["checks"]} == {"manifest-sha256"}
        commit = Path(warmed["hub_cache"]) / f"models--{NAME.replace('/', '--')}" / "snapshots" / bed.repo.commit
        assert {path.name for path in commit.iterdir()} == {path.name for path in model.iterdir()}
        assert bed.hub.bytes_sent() == before

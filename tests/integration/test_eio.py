"""A disk that cannot read a part of a file (EIO, by the preloaded library): found by a verification, served to nobody, mended from just that part."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest

from nvcache import client
from tests.engine.conftest import repo, weights
from tests.support.daemon import DaemonProcess
from tests.support.faultfs import FaultFs, Kind
from tests.support.faults import Kind as Fault
from tests.support.hub import HubServer

CHUNK = 16 * 2**20
GOOD = weights(1, 2 * CHUNK + 1000)


@pytest.mark.parametrize("bandwidth", [(), ("--bandwidth", "100GB")], ids=["at once", "slowly"])
def test_a_part_that_cannot_be_read(tmp_path: Path, bandwidth: tuple[str, ...]) -> None:
    sha256 = hashlib.sha256(GOOD).hexdigest()
    faults = FaultFs(tmp_path)
    with HubServer({"acme/m": repo({"model.safetensors": GOOD, "config.json": b"{}"})}) as hub:
        daemon = DaemonProcess(tmp_path, hub.url, workers=1)
        daemon.environment |= faults.environment
        with daemon:
            path = Path(daemon.cli("warm", "acme/m").stdout.strip())
            before = hub.bytes_sent("model.safetensors")
            down = hub.faults.add("*", Fault.STATUS, status=503, times=None, origin="*")
            with faults.failing(f"*/{sha256}", errno.EIO, kinds=Kind.READ, span=(CHUNK, 2 * CHUNK)):
                told = daemon.cli("verify", "acme/m", "--json", *bandwidth)
                assert faults.failed
            found = json.loads(told.stdout)
            assert (found["state"], found["bad_files"]) == ("failed", ["model.safetensors"]), told
            assert down.hits
            assert not path.exists()
            assert daemon.cli("path", "acme/m").returncode == 3
            node = client.Client(f"unix://{daemon.socket}")
            assert (node.request("GET", "/readyz")["degraded"], node.model("acme/m").ready) == (1, False)
            faults.fail(f"*/quarantine/{sha256}", errno.EIO, kinds=Kind.READ, span=(CHUNK, 2 * CHUNK))  # it does not get better by a rename
            hub.faults.clear()
            assert daemon.cli("warm", "acme/m", "--timeout", "60").stdout.strip() == str(path)
            faults.lift()
            assert (path / "model.safetensors").read_bytes() == GOOD
            assert hub.bytes_sent("model.safetensors") - before == CHUNK
            assert node.request("GET", "/readyz")["degraded"] == 0
        assert "Traceback" not in daemon.last_words(None)

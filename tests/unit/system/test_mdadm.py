"""mdadm's command lines and their environment. What real mdadm does with them is tried on real disks in tests/node."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvcache.errors import Code, DiskError
from nvcache.system import mdadm
from nvcache.system.run import Tools
from nvcache.system.sysfs import Kernel
from tests.support.recorded import build

NODES = ["/dev/nvme0n1", "/dev/nvme1n1"]


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    (tmp_path / "mdadm").write_text(f'#!/bin/sh\necho "[$MDADM_NO_UDEV] $*" >> {tmp_path}/calls\necho "mdadm: complains" >&2\nexit 1\n')
    (tmp_path / "mdadm").chmod(0o755)
    return Tools(f"{tmp_path}:/usr/bin:/bin")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return build(tmp_path, {})


def test_command_lines(tmp_path: Path, tools: Tools, kernel: Kernel) -> None:
    done = [mdadm.create(tools, kernel, NODES), mdadm.assemble(tools, kernel, "the-uuid", NODES), mdadm.stop(tools, kernel, "/dev/md127")]
    assert [(each.status, each.said) for each in done] == [(1, "mdadm: complains")] * 3  # for the caller's message; sysfs tells whether it worked
    create = "--metadata=1.2 --level=0 --data-offset=1M --chunk=512K --homehost=any --name=nvcache --raid-devices=2"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"[1] --create /dev/md/nvcache {create} {' '.join(NODES)}",
        f"[1] --assemble /dev/md/nvcache --uuid=the-uuid --homehost=any {' '.join(NODES)}",
        "[1] --stop /dev/md127",
    ]


def test_udev_is_left_to_it_where_udev_knows_md(tmp_path: Path, tools: Tools, kernel: Kernel) -> None:
    rules = tmp_path / "proc/1/root/usr/lib/udev/rules.d"
    rules.mkdir(parents=True)
    (rules / "63-md-raid-arrays.rules").touch()
    (tmp_path / "run/udev/control").touch()
    mdadm.stop(tools, kernel, "/dev/md127")
    assert (tmp_path / "calls").read_text() == "[] --stop /dev/md127\n"


def test_a_crash_is_no_answer(tmp_path: Path, tools: Tools, kernel: Kernel) -> None:
    (tmp_path / "mdadm").write_text("#!/bin/sh\nkill -ABRT $$\n")
    with pytest.raises(DiskError, match="signal 6") as found:
        mdadm.create(tools, kernel, NODES)
    assert found.value.code is Code.TOOL_FAILED

"""`backend = directory` inside real mount and PID namespaces: what the kubelet mounts into a container is what tells of the node's disks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from nvcache.core.directory import Ground
from tests.support.disks import mounted

JUDGE = """
import json, sys
from pathlib import Path
from nvcache.core.directory import DirectoryRules, refused_directory
from nvcache.system.directory import directory_facts
from nvcache.system.sysfs import Kernel
facts = directory_facts(Kernel(), Path(sys.argv[1]))
refused = refused_directory(facts, DirectoryRules()) or (None, "")
print(json.dumps({"code": refused[0], "why": refused[1], "sharers": facts.beside.sharers, "unseen": facts.beside.unseen}))
"""

SCRIPT = """
set -e
mount --make-rprivate /
for file in /etc/hosts /etc/resolv.conf /etc/hostname /dev/termination-log; do
    while umount "$file" 2>/dev/null; do :; done
done
while [ "$1" != -- ]; do mount --bind "$1" "$2"; shift 2; done
shift
exec "$@"
"""


def judged(store: Path, binds: dict[str, Path]) -> dict[str, object]:
    """What is said of `store` in a container of its own, whose mounts are the host's but for `binds`."""
    pairs = [str(part) for target, source in binds.items() for part in (source, target)]
    inside = ["sh", "-c", SCRIPT, "sh", *pairs, "--", sys.executable, "-c", JUDGE, str(store)]
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", *inside], capture_output=True, text=True, timeout=60, check=False, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def witnesses(place: Path) -> dict[str, Path]:
    """The files that a kubelet and a container runtime with their directories below `place` make for one container."""
    sources = {"/etc/hosts": place / "kubelet/pods/1/etc-hosts", "/etc/resolv.conf": place / "containerd/sandboxes/1/resolv.conf"}
    for target, source in sources.items():
        source.parent.mkdir(parents=True)
        source.write_bytes(Path(target).read_bytes())
    return sources


def test_a_container_is_told_apart_from_its_node(tmp_path: Path) -> None:
    with mounted("ext4", tmp_path / "disk") as disk:
        target, store = tmp_path / "mnt", tmp_path / "mnt" / "store"
        target.mkdir()
        own, on_os_disk = disk / "nvcache", tmp_path / "var" / "nvcache"
        for each in (own, on_os_disk):
            each.mkdir(parents=True)
        node = witnesses(tmp_path / "var" / "lib")  # this machine's disk plays the node's

        good = judged(store, {**node, str(target): own})
        assert good == {"code": None, "why": "", "sharers": [], "unseen": []}

        wrong = judged(store, {**node, str(target): on_os_disk})
        assert (wrong["code"], wrong["sharers"]) == ("P02", ["kubelet", "container runtime"])
        assert wrong["why"] == f"{store} is on the node's root file system"

        alone = judged(store, {str(target): own})
        assert (alone["code"], alone["unseen"]) == ("P02", ["kubelet", "container runtime"])
        assert "cannot be told" in str(alone["why"])

        forgotten = judged(store, node)
        assert (forgotten["code"], forgotten["why"]) == ("P02", f"{store} {Ground.CONTAINER}")

        shared = judged(store, {**witnesses(disk), "/etc/hosts": node["/etc/hosts"], str(target): own})
        assert (shared["code"], shared["sharers"]) == ("P04", ["container runtime"])

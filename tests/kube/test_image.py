"""The image, built from this checkout and looked at from inside: what it is, what it can do, and what must not be in it."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import nvcache
from tests.support.podman import BUILD_MOUNTS, CHECKOUT, IMAGE, Podman

MIB = 1 << 20
MOST = 230 * MIB  # what we add to a base: disk tools, Python's packages, and a Python of Debian's where the base has none
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
EXTRAS = ("kubernetes", "otel", "xet")
WANTED = [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS for text in PROJECT["optional-dependencies"][extra])]]
LOCK = CHECKOUT / "deploy/image/requirements.lock"
TOOLS = {  # how it tells its version, and the oldest that this project was tried with
    "mdadm --version": (r" v(\S+)", "4.2"),
    "lvm version": (r"LVM version:\s+([\d.]+)", "2.03.16"),
    "mkfs.xfs -V": (r"version (\S+)", "6.1"),
    "mkfs.ext4 -V": (r"mke2fs (\S+)", "1.47"),
    "blkid --version": (r"util-linux ([\d.]+)", "2.38"),
    "mount --version": (r"util-linux ([\d.]+)", "2.38"),
    "udevadm --version": (r"(\d+)", "252"),
    "modprobe --version": (r"version (\d+)", "30"),
}


@pytest.fixture(scope="session")
def sbom(podman: Podman) -> dict[str, Any]:
    """The list of what is in the image, from the image."""
    document: dict[str, Any] = json.loads(podman.run("cat", "/usr/share/sbom/nvcache.cdx.json").stdout)
    return document


def inspect(podman: Podman) -> dict[str, Any]:
    """What the image says of itself."""
    found: dict[str, Any] = json.loads(podman("image", "inspect", IMAGE).stdout)[0]
    return found


def locked() -> dict[str, Version]:
    """The versions of the lock file."""
    return {canonicalize_name(name): Version(version) for name, version in re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(), re.MULTILINE)}


def test_the_lock_file_has_what_the_project_asks_for() -> None:
    """A dependency that was added or raised in pyproject.toml is not forgotten here: run deploy/image/lock.sh (make lock)."""
    versions = locked()
    assert [str(each) for each in WANTED if not each.specifier.contains(versions.get(canonicalize_name(each.name), Version("0")))] == []


def test_every_locked_package_has_hashes() -> None:
    for path in (LOCK, LOCK.with_name("tools.lock")):
        entries = re.split(r"^(?=\w)", path.read_text(), flags=re.MULTILINE)[1:]
        assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []
        assert len(entries) > 20


def test_labels_and_defaults(podman: Podman) -> None:
    config = inspect(podman)["Config"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["title"] == "nvcache"
    assert labels["version"] == nvcache.__version__
    assert labels["licenses"] == PROJECT["license"]
    assert labels["description"] == PROJECT["description"]
    assert labels["base.name"].startswith("localhost/nvcache-test-base")
    assert "revision" in labels
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["nvcache"]


def test_it_is_small(podman: Podman) -> None:
    base = json.loads(podman("image", "inspect", inspect(podman)["Config"]["Labels"]["org.opencontainers.image.base.name"]).stdout)[0]
    assert inspect(podman)["Size"] - base["Size"] < MOST


def test_it_runs_as_an_ordinary_user_on_a_read_only_root(podman: Podman) -> None:
    hardened = ("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges")
    assert podman.run("id", options=hardened).stdout.split() == ["uid=65532(nvcache)", "gid=65532(nvcache)", "groups=65532(nvcache)"]
    assert podman.run("nvcache", "--version", options=hardened).stdout == f"nvcache {nvcache.__version__}\n"


@pytest.mark.parametrize("command", TOOLS)
def test_the_tools_of_nvcache_disks_run(podman: Podman, command: str) -> None:
    pattern, oldest = TOOLS[command]
    said = podman.run("sh", "-c", f"{command} 2>&1", options=("--user=0",)).stdout
    found = re.search(pattern, said)
    assert found, said
    assert Version(found[1]) >= Version(oldest)
    assert found[1] != "4.5", "mdadm 4.5 does not assemble an array whose module is not loaded yet"


def test_nvcache_disks_looks_at_a_node(podman: Podman) -> None:
    """As root with the devices, as in the privileged pod; every tool is found, and this machine's disks are told or refused, not touched."""
    done = podman.run("nvcache", "disks", "--json", options=("--user=0", "--privileged", "--pid=host"), check=False)
    assert done.returncode == 0, done.stderr
    assert "disks" in json.loads(done.stdout)


def test_the_list_has_what_is_there(podman: Podman, sbom: dict[str, Any]) -> None:
    assert sbom["bomFormat"] == "CycloneDX"
    assert sbom["metadata"]["component"]["name"] == "nvcache"
    purls = {part["purl"] for part in sbom["components"] if "purl" in part}
    python = {
        canonicalize_name(part["name"]): Version(part["version"]) for part in sbom["components"] if part.get("purl", "").startswith("pkg:pypi/")
    }
    assert {name: version for name, version in locked().items() if name in python} == {k: v for k, v in python.items() if k != "nvcache"}
    assert {canonicalize_name(each.name) for each in WANTED} <= set(python)
    installed = podman.run("dpkg-query", "-W", "-f=${Package} ${Architecture}\n").stdout.splitlines()
    listed = sorted(re.sub(r"pkg:deb/debian/([^@]+)@[^?]+\?arch=(\S+)", r"\1 \2", purl) for purl in purls if purl.startswith("pkg:deb/"))
    assert [line.replace("+", "%2B") for line in sorted(installed)] == listed


def test_nothing_is_left_of_building_it(podman: Podman) -> None:
    look = f"""
        find / -xdev -name pip -o -xdev -name ensurepip -path '/usr/local/*' -o -xdev -path '{BUILD_MOUNTS}' -o -xdev -name .cache
        find /opt /srv /mnt /media -mindepth 1 -maxdepth 1 ! -path /opt/nvcache
        find /var/cache /var/lib/apt/lists /var/log /tmp /etc/pip.conf /etc/mdadm/mdadm.conf -type f 2>/dev/null || true
        command -v gcc cc make pip pip3 curl || true
    """
    assert podman.run("sh", "-euc", look, options=("--user=0",)).stdout == ""

"""What `doctor` looks at on this machine: each check states facts, a verdict and a remedy. It changes nothing but a probe file it removes again.

The machine is as this shell sees it. Where models come from is as the daemon says: run by systemd or Kubernetes it has an environment of its own.
While none answers, this shell's is told instead. No secret is ever part of a finding.
"""

from __future__ import annotations

import contextlib
import http.client
import mmap
import os
import resource
import ssl
import stat
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from nvcache.cli.disks import remedy, stripe_line
from nvcache.cli.output import size

GOOD_FILE_SYSTEMS = frozenset({"ext4", "xfs"})
POOR_FILE_SYSTEMS = {"tmpfs": "it keeps the weights in memory", "overlay": "it is a container's own layer, slow and lost with the container"}
REMOTE_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "ceph", "lustre"})
LITTLE_SPACE = 20 * 10**9
FEW_FILES = 4096
HUB_WAIT = 3.0  # seconds
SKEW = 60.0  # seconds of clock difference that break signed URLs
SEE_DISKS = "`nvcache disks` shows each disk and why"


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `doctor`."""

    check: str
    verdict: Verdict
    detail: str
    remedy: str = ""


def ok(check: str, detail: str) -> Finding:
    """Nothing to do."""
    return Finding(check, Verdict.OK, detail)


def warn(check: str, detail: str, remedy: str) -> Finding:
    """It works, but not as well or as safely as it could."""
    return Finding(check, Verdict.WARN, detail, remedy)


def fail(check: str, detail: str, remedy: str) -> Finding:
    """It will not work."""
    return Finding(check, Verdict.FAIL, detail, remedy)


def store(root: Path) -> Iterator[Finding]:
    """The store directory: there, writable, on a file system that can do what the store needs, with room, readable by pods."""
    place = _existing(root)
    if place == root and not root.is_dir():
        yield fail("store", f"{root} is not a directory", "name a directory with NVCACHE_STORE")
        return
    writable = os.access(place, os.W_OK | os.X_OK)
    if place != root and not writable:
        yield fail(
            "store", f"{root} does not exist and {place} is not writable by uid {os.geteuid()}", f"make {root} and give it to the daemon's user"
        )
        return
    if place != root:
        yield ok("store", f"{root} does not exist yet; the first `nvcache serve` makes it")
    elif not writable:
        owner = root.stat().st_uid
        yield warn("store", f"{root} belongs to uid {owner}, this is uid {os.geteuid()}", "run the daemon, and doctor, as the store's owner")
    else:
        known = (root / "format.json").exists()
        yield ok("store", f"{root}{'' if known else ' (empty so far)'}")
    yield _file_system(place)
    if writable:
        yield from _abilities(place)
    yield _space(place)
    yield _readable(root)


def _existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there."""
    return next(step for step in (path, *path.parents) if step.exists())


def _file_system(place: Path) -> Finding:
    kind = file_system_of(place)
    if kind in GOOD_FILE_SYSTEMS:
        return ok("file system", kind)
    if kind in REMOTE_FILE_SYSTEMS:
        return fail("file system", f"{kind} is not local", "put the store on a local disk with XFS or ext4")
    return warn("file system", f"{kind}: {POOR_FILE_SYSTEMS.get(kind, 'not tested with nvcache')}", "prefer a local disk with XFS or ext4")


def file_system_of(place: Path) -> str:
    """The type of the file system that holds `place`, from proc(5) mountinfo: the mount with its device; `unknown` when none is seen."""
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            return after.split()[0]
    return "unknown"


def _abilities(place: Path) -> Iterator[Finding]:
    """Hard links and O_DIRECT, tried in a scratch directory."""
    with contextlib.ExitStack() as stack:
        try:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".nvcache-doctor-", dir=place)))
            probe = scratch / "probe"
            probe.write_bytes(b"x")
            probe.chmod(0o444)
            os.link(probe, scratch / "link")
            yield ok("hard links", "work")
        except OSError as error:
            yield fail("hard links", f"do not work in {place}: {error.strerror}", "put the store on a local disk with XFS or ext4")
            return
        try:
            _write_direct(scratch / "direct")
            yield ok("direct I/O", "works")
        except OSError as error:
            yield warn("direct I/O", f"does not work in {place}: {error.strerror}", "fills go through the page cache; prefer XFS or ext4 on a disk")


def _write_direct(path: Path) -> None:
    block = mmap.mmap(-1, mmap.PAGESIZE)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
    try:
        os.write(descriptor, block)
    finally:
        os.close(descriptor)
        block.close()


def _space(place: Path) -> Finding:
    room = os.statvfs(place)
    free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    detail = f"{size(free)} free of {size(total)}"
    if room.f_favail and room.f_files and room.f_favail < 10_000:
        return warn("space", f"{detail}, but only {room.f_favail} inodes", "free inodes on the store's file system")
    return ok("space", detail) if free >= LITTLE_SPACE else warn("space", detail, "free space, or put the store on a larger disk")


def _readable(root: Path) -> Finding:
    """Whether another uid can walk down to the views: the store's own directories are open, those above it often are not."""
    shut = [step for step in reversed((root, *root.parents)) if step.exists() and not step.stat().st_mode & stat.S_IXOTH]
    if not shut:
        return ok("readable by pods", "every directory above the store lets other users pass")
    return warn("readable by pods", f"other users cannot pass {shut[0]}", f"chmod o+x {' '.join(map(str, shut))}, or put the store elsewhere")


def stripe(found: Mapping[str, Any]) -> Iterator[Finding]:
    """The node's own disks as the daemon has them: mounted or not, with the remedy of each code."""
    line, warnings = stripe_line(dict(found)), found.get("warnings") or ()
    if line is None:
        return
    if found.get("state", "mounted") != "mounted":
        yield fail("stripe", line, remedy(found.get("code")) or SEE_DISKS)
        return
    yield ok("stripe", line)
    for text in warnings:
        yield warn("stripe", text, remedy(text.partition(":")[0]) or SEE_DISKS)


def socket(path: Path) -> Finding:
    """The socket file, its mode and whether this user may connect."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return warn("socket", f"{path} does not exist", "start the daemon with `nvcache serve`, or name its socket with NVCACHE_SOCKET")
    except OSError as error:
        return fail("socket", f"{path}: {error.strerror}", f"let uid {os.geteuid()} pass the directories above it")
    mode = stat.S_IMODE(facts.st_mode)
    detail = f"{path} uid {facts.st_uid} gid {facts.st_gid} mode {mode:04o}"
    if not stat.S_ISSOCK(facts.st_mode):
        return fail("socket", f"{path} is not a socket", "remove it, or name another with NVCACHE_SOCKET")
    if not os.access(path, os.W_OK):
        return fail("socket", f"{detail}: uid {os.geteuid()} may not connect", f"join its group ({facts.st_gid}), or run as its owner")
    return warn("socket", f"{detail}: everybody may connect", "give it mode 0660 and a group") if mode & stat.S_IWOTH else ok("socket", detail)


def hub(where: str, ca_file: Path | None, proxies: Mapping[str, str]) -> Iterator[Finding]:
    """The Hub at `where` asked once from this shell, within 3 seconds, name look-up included; the clock against the Hub's."""
    found: list[Finding] = []
    asker = threading.Thread(target=lambda: found.extend(_ask_hub(where, ca_file, proxies)), name="doctor-hub", daemon=True)
    asker.start()
    asker.join(HUB_WAIT)
    yield from list(found) or [warn("hub", f"{where} does not answer within {HUB_WAIT:g} s", "check DNS, HTTPS_PROXY/NO_PROXY and egress rules")]


def token(present: bool) -> Finding:
    """Whether there is a Hub token."""
    return ok("hub token", "set" if present else "none; gated and private models need one (HF_TOKEN or HF_TOKEN_PATH of the daemon)")


def _ask_hub(where: str, ca_file: Path | None, proxies: Mapping[str, str]) -> Iterator[Finding]:
    context = ssl.create_default_context(cafile=str(ca_file)) if ca_file else ssl.create_default_context()
    through = {scheme: url for scheme, url in proxies.items() if scheme in ("http", "https")}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(through or None), urllib.request.HTTPSHandler(context=context))
    request = urllib.request.Request(f"{where.rstrip('/')}/api/models?limit=1", headers={"User-Agent": "nvcache-doctor"})  # noqa: S310 - settings allow http(s) only
    try:
        with opener.open(request, timeout=HUB_WAIT) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        with error:
            date = error.headers.get("Date")  # any answer means that it is there
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        if isinstance(why, ssl.SSLError):
            yield fail("hub", f"{where}: its certificate cannot be trusted", "set SSL_CERT_FILE to the private CA's bundle")
        else:
            yield warn("hub", f"{where} cannot be reached: {why}", "check DNS, HTTPS_PROXY/NO_PROXY and egress rules; what is ready is served")
        return
    yield ok("hub", f"{where} answers")
    if date:
        yield _clock(time.time() - parsedate_to_datetime(date).timestamp())


def _clock(skew: float) -> Finding:
    if abs(skew) <= SKEW:
        return ok("clock", "agrees with the Hub's")
    return warn(
        "clock",
        f"is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the Hub's",
        "synchronise it (chrony, timesyncd); signed URLs depend on it",
    )


def proxy(hosts: Mapping[str, str], exceptions: bool) -> Finding:
    """Which proxies are set, by host."""
    named = ", ".join(f"{scheme} via {host}" for scheme, host in hosts.items())
    return ok("proxies", f"{named}{' with exceptions (NO_PROXY)' if exceptions else ''}" if named else "none")


def xet(present: bool) -> Finding:
    """The optional client for files over 50 GB."""
    if present:
        return ok("hf_xet", "is installed")
    return warn("hf_xet", "is not installed: files over 50 GB on the Hub cannot be had", "pip install 'nvcache[xet]'")


def descriptors() -> Finding:
    """How many files a process may open; the daemon allows itself all of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard >= FEW_FILES:
        return ok("open files", f"up to {hard}")
    return warn("open files", f"only {hard} allowed", f"raise the hard limit to {FEW_FILES}: ulimit -Hn, or LimitNOFILE= in the unit")

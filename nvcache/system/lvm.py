"""Makes, starts and removes the striped LVM volume, and reports what LVM knows. Each command sees the disks it is given and no others.

Nothing waits for udev (its cookies are semaphores that a container may not share); the volume's node is /dev/dm-N, which the kernel makes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence

from nvcache.core.disks import NAME, TAG, VOLUME, PvFacts
from nvcache.core.stripe import VolumeFacts
from nvcache.errors import Code, DiskError
from nvcache.system.run import Finished, Tools, printable

_CONFIG = "activation{udev_sync=0 udev_rules=0} devices{obtain_device_list_from_udev=0} backup{backup=0 archive=0}"
_PVS = "pv_name,pv_uuid,vg_name,vg_uuid,vg_tags,pv_count,vg_missing_pv_count"
_NO_GROUP = "[unknown]"  # a volume marked as in use that no metadata names: making or removing its group was cut short
_LVS = "vg_uuid,lv_name,lv_kernel_major,lv_kernel_minor"


def physical_volumes(tools: Tools, nodes: Sequence[str]) -> Mapping[str, PvFacts]:
    """The physical volumes among `nodes`, by node.

    Raises `DiskError`: tool-missing, tool-failed (also for an answer that makes no sense), tool-stalled.
    """
    by_path = {os.path.realpath(node): node for node in nodes}
    rows = _report(tools, nodes, "pvs", "pv", _PVS)
    named = [(by_path.get(os.path.realpath(row["pv_name"])), row) for row in rows]
    return {node: _pv(row) for node, row in named if node is not None}


def group(tools: Tools, nodes: Sequence[str]) -> VolumeFacts | None:
    """The volume group named nvcache on `nodes`, if there is one. Raises as `physical_volumes`.

    There are several when a disk is back that was away while the group was made anew: then a group with all its volumes, or most of them, is meant.
    """
    named = {node: facts for node, facts in physical_volumes(tools, nodes).items() if facts.vg == NAME}
    if not named:
        return None
    here = Counter(facts.vg_uuid for facts in named.values())
    facts = max(named.values(), key=lambda each: (not each.missing, here[each.vg_uuid], each.vg_uuid))
    found = [node for node in named if named[node].vg_uuid == facts.vg_uuid]
    rows = [row for row in _report(tools, found, "lvs", "lv", _LVS) if row["vg_uuid"] == facts.vg_uuid]
    active = [row for row in rows if row["lv_name"] == VOLUME and _count(row, "lv_kernel_minor") >= 0]
    numbers = [(_count(row, "lv_kernel_major"), _count(row, "lv_kernel_minor")) for row in active]
    return VolumeFacts(
        vg_uuid=facts.vg_uuid,
        tags=facts.tags,
        pv_count=facts.pv_count,
        missing=facts.missing,
        members=tuple(os.path.basename(os.path.realpath(node)) for node in found),  # noqa: PTH119 - of a real path
        volumes=tuple(row["lv_name"] for row in rows),
        name=f"dm-{numbers[0][1]}" if numbers else None,
        node=f"/dev/dm-{numbers[0][1]}" if numbers else None,
        number=f"{numbers[0][0]}:{numbers[0][1]}" if numbers else None,
    )


def create_volumes(tools: Tools, pvs: Sequence[tuple[str, str]]) -> None:
    """Make physical volumes of the nodes given with their UUIDs, chosen by the caller so that one without its group is still known.

    Without `-y`, pvcreate refuses a disk that carries a signature. Raises `DiskError`: tool-missing, tool-failed, tool-stalled.
    """
    nodes = [node for node, _ in pvs]
    for node, uuid in pvs:
        _lvm(tools, nodes, "pvcreate", "--uuid", uuid, "--norestorefile", node)


def create_group(tools: Tools, nodes: Sequence[str], *, stripe_kib: int = 256) -> None:
    """Make a volume striped over the physical volumes at `nodes`, and start it. Raises `DiskError`: tool-missing, tool-failed, tool-stalled."""
    _lvm(tools, nodes, "vgcreate", "--addtag", TAG, "--setautoactivation", "n", NAME, *nodes)
    shape = ("--type", "striped", "-i", str(len(nodes)), "-I", f"{stripe_kib}k", "-l", "100%FREE")
    _lvm(tools, nodes, "lvcreate", "-y", "-W", "y", *shape, "-n", VOLUME, NAME)


def activate(tools: Tools, nodes: Sequence[str]) -> None:
    """Start the volume. Raises `DiskError`: tool-missing, tool-failed, tool-stalled."""
    _lvm(tools, nodes, "vgchange", "-ay", NAME)


def deactivate(tools: Tools, nodes: Sequence[str]) -> None:
    """Stop the volume; fails when it is mounted or open. Raises `DiskError`: tool-missing, tool-failed, tool-stalled."""
    _lvm(tools, nodes, "vgchange", "-an", NAME)


def remove_group(tools: Tools, nodes: Sequence[str]) -> None:
    """Stop and remove the group with its volume; what the disks then still carry is a physical volume in no group.

    Raises `DiskError`: tool-missing, tool-failed, tool-stalled.
    """
    deactivate(tools, nodes)
    there = group(tools, nodes)
    if there is not None and there.missing:
        _lvm(tools, nodes, "vgreduce", "--removemissing", "--force", NAME)
    _lvm(tools, nodes, "vgremove", "-f", NAME)


def parse_report(text: str, kind: str, fields: str) -> list[dict[str, str]]:
    """The rows of one of LVM's JSON reports (lvmreport(7)), each with all of `fields`. Raises `DiskError` (tool-failed) for anything else."""
    names = fields.split(",")
    try:
        rows = [row for part in json.loads(_without_chatter(text))["report"] for row in part.get(kind, [])]
        found = [{name: row[name] for name in names} for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DiskError(Code.TOOL_FAILED, f"cannot understand LVM's report: {type(error).__name__} in {printable(text)!r}") from error
    if not all(isinstance(value, str) for row in found for value in row.values()):
        raise DiskError(Code.TOOL_FAILED, f"cannot understand LVM's report: values that are no text in {printable(text)!r}")
    return found


def _without_chatter(text: str) -> str:
    """The report without what LVM prints into the middle of it when metadata changed or is damaged (lib/metadata), whatever `-q` says."""
    return "\n".join(line for line in text.splitlines() if line.strip() != "Retrying metadata scan.")


def _report(tools: Tools, nodes: Sequence[str], command: str, kind: str, fields: str) -> list[dict[str, str]]:
    if not nodes:
        return []  # an empty --devices would mean all

    # -qq: "Retrying metadata scan" would otherwise stand in the middle of the JSON, where a power cut left the disks' metadata unequal.
    def ask() -> list[dict[str, str]]:
        done = _lvm(tools, nodes, command, "-qq", "--reportformat", "json", "-o", fields, quiet=True)
        return parse_report(done.out, kind, fields)

    try:
        return ask()
    except DiskError as error:
        if error.code is not Code.TOOL_FAILED:
            raise
        return ask()  # a scan that LVM itself began anew in the middle ends well the next time


def _pv(row: Mapping[str, str]) -> PvFacts:
    tags = tuple(tag for tag in row["vg_tags"].split(",") if tag)
    group = "" if row["vg_name"] == _NO_GROUP else row["vg_name"]
    return PvFacts(group, row["vg_uuid"], tags, _count(row, "pv_count"), _count(row, "vg_missing_pv_count"))


def _count(row: Mapping[str, str], field: str) -> int:
    """A number of the report; 0 where LVM leaves it empty (a volume in no group)."""
    text = row[field]
    try:
        return int(text or "0")
    except ValueError as error:
        raise DiskError(Code.TOOL_FAILED, f"cannot understand LVM's report: {field} is {printable(text)!r}") from error


def _lvm(tools: Tools, nodes: Sequence[str], command: str, *args: str, quiet: bool = False) -> Finished:
    return tools.run("lvm", command, "--devices", ",".join(nodes), "--config", _CONFIG, *args, timeout=120, env={"DM_DISABLE_UDEV": "1"}, quiet=quiet)

"""LVM's commands as they are run, and its reports as real LVM wrote them; and whatever else may stand in their place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache.core.disks import PvFacts
from nvcache.core.stripe import VolumeFacts
from nvcache.errors import Code, DiskError
from nvcache.system import lvm
from nvcache.system.run import Tools
from tests.support.recorded import REPORTS

NODES = [f"/dev/nvme{at}n1" for at in range(4)]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["report", "pv", "pv_name", "vg_uuid", "x"]), inner, max_size=3),
    max_leaves=12,
)


def tools(folder: Path, reports: dict[str, str], *, before: str = "") -> Tools:
    """A stand-in for lvm that replays reports and writes down how it was called."""
    for command, text in reports.items():
        (folder / command).write_text(text)
    (folder / "lvm").write_text(f'#!/bin/sh\necho "$DM_DISABLE_UDEV $*" >> {folder}/calls\n{before}\ncat {folder}/$1 2>/dev/null\nexit 0\n')
    (folder / "lvm").chmod(0o755)
    return Tools(f"{folder}:/usr/bin:/bin")


def calls(folder: Path) -> list[str]:
    """The calls, without what every one of them has: only disks that were given, and no udev."""
    common = re.compile(
        r"--devices (\S+) --config activation\{udev_sync=0 udev_rules=0\} devices\{obtain_device_list_from_udev=0\} backup\{backup=0 archive=0\} "
    )
    lines = (folder / "calls").read_text().splitlines()
    given = [common.search(line) for line in lines]
    assert all(line.startswith("1 ") and found and set(found[1].split(",")) <= set(NODES) for line, found in zip(lines, given, strict=True))
    return [common.sub("", line.removeprefix("1 ")) for line in lines]


def uuid_of(report: str) -> str:
    return str(json.loads(REPORTS[report]["pvs"])["report"][0]["pv"][0]["vg_uuid"])


def test_an_active_volume(tmp_path: Path) -> None:
    found = tools(tmp_path, REPORTS["active"])
    uuid = uuid_of("active")
    assert lvm.physical_volumes(found, NODES) == dict.fromkeys(NODES, PvFacts("nvcache", uuid, ("nvcache",), 4, 0))
    names = tuple(f"nvme{at}n1" for at in range(4))
    assert lvm.group(found, NODES) == VolumeFacts(uuid, ("nvcache",), 4, 0, names, ("cache",), "dm-0", "/dev/dm-0", "252:0")
    assert {call.split()[0] for call in calls(tmp_path)} == {"pvs", "lvs"}


def test_a_missing_volume_and_one_that_is_not_active(tmp_path: Path) -> None:
    found = lvm.group(tools(tmp_path, REPORTS["missing"]), NODES)
    assert found is not None
    assert (found.pv_count, found.missing, found.members) == (4, 1, ("nvme1n1", "nvme2n1", "nvme3n1"))
    assert (found.volumes, found.name, found.node, found.number) == (("cache",), None, None, None)


def test_volumes_in_no_group(tmp_path: Path) -> None:
    found = tools(tmp_path, REPORTS["orphans"])
    assert set(lvm.physical_volumes(found, NODES).values()) == {PvFacts("", "", (), 0, 0)}
    assert lvm.group(found, NODES) is None


@pytest.mark.parametrize("report", ["none", "other"])
def test_nothing_of_ours(tmp_path: Path, report: str) -> None:
    assert lvm.group(tools(tmp_path, REPORTS[report]), NODES) is None


def test_no_disks_means_none_not_all(tmp_path: Path) -> None:
    assert lvm.physical_volumes(tools(tmp_path, REPORTS["active"]), []) == {}
    assert not (tmp_path / "calls").exists()


def test_disks_that_were_not_asked_about_are_left_out(tmp_path: Path) -> None:
    assert set(lvm.physical_volumes(tools(tmp_path, REPORTS["active"]), NODES[:2])) == set(NODES[:2])


def test_of_two_groups_of_our_name_the_whole_one_is_meant(tmp_path: Path) -> None:
    doc = json.loads(REPORTS["active"]["pvs"])
    rows = doc["report"][0]["pv"]
    whole = rows[0]["vg_uuid"]
    rows[3] |= {"vg_uuid": "zzz-remnant", "vg_missing_pv_count": "2"}
    found = lvm.group(tools(tmp_path, REPORTS["active"] | {"pvs": json.dumps(doc)}), NODES)
    assert found is not None
    assert (found.vg_uuid, found.members, found.name) == (whole, ("nvme0n1", "nvme1n1", "nvme2n1"), "dm-0")
    lvs = next(line for line in (tmp_path / "calls").read_text().splitlines() if " lvs " in f" {line} ")
    assert f"--devices {','.join(NODES[:3])} " in lvs


def test_a_volume_whose_group_was_cut_short_is_in_none(tmp_path: Path) -> None:
    row = {"pv_name": NODES[0], "pv_uuid": "x", "vg_name": "[unknown]", "vg_uuid": "", "vg_tags": "", "pv_count": "0", "vg_missing_pv_count": "0"}
    found = tools(tmp_path, {"pvs": json.dumps({"report": [{"pv": [row]}]})})
    assert lvm.physical_volumes(found, NODES) == {NODES[0]: PvFacts("", "", (), 0, 0)}
    assert "-qq" in calls(tmp_path)[0]


def test_create(tmp_path: Path) -> None:
    lvm.create_volumes(tools(tmp_path, {}), [(node, f"uuid-{at}") for at, node in enumerate(NODES)])
    lvm.create_group(tools(tmp_path, {}), NODES)
    assert calls(tmp_path) == [
        *(f"pvcreate --uuid uuid-{at} --norestorefile {node}" for at, node in enumerate(NODES)),
        f"vgcreate --addtag nvcache --setautoactivation n nvcache {' '.join(NODES)}",
        "lvcreate -y -W y --type striped -i 4 -I 256k -l 100%FREE -n cache nvcache",
    ]


def test_a_create_that_fails_goes_no_further(tmp_path: Path) -> None:
    refusing = tools(tmp_path, {}, before='case "$*" in *uuid-2*) echo "  aborted by user" >&2; exit 5;; esac')
    with pytest.raises(DiskError, match="exit status 5: aborted by user") as found:
        lvm.create_volumes(refusing, [(node, f"uuid-{at}") for at, node in enumerate(NODES)])
    assert found.value.code is Code.TOOL_FAILED
    assert len(calls(tmp_path)) == 3


def test_start_stop_and_remove(tmp_path: Path) -> None:
    found = tools(tmp_path, REPORTS["active"])
    lvm.activate(found, NODES)
    lvm.deactivate(found, NODES)
    lvm.remove_group(found, NODES)
    changing = [call for call in calls(tmp_path) if not call.startswith(("pvs", "lvs"))]
    assert changing == ["vgchange -ay nvcache", "vgchange -an nvcache", "vgchange -an nvcache", "vgremove -f nvcache"]


def test_missing_members_are_dropped_before_the_group_is_removed(tmp_path: Path) -> None:
    lvm.remove_group(tools(tmp_path, REPORTS["missing"]), NODES)
    assert [call for call in calls(tmp_path) if call.startswith("vg")] == [
        "vgchange -an nvcache",
        "vgreduce --removemissing --force nvcache",
        "vgremove -f nvcache",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"report":[]',
        '{"report":1}',
        '{"report":[{"pv":[{}]}]}',
        '{"report":[{"pv":"x"}]}',
        "[" * 100000,
        "Geräte nicht gefunden",
        "\0",
    ],
)
def test_garbage(tmp_path: Path, text: str) -> None:
    with pytest.raises(DiskError, match="cannot understand LVM's report") as found:
        lvm.physical_volumes(tools(tmp_path, {"pvs": text}), NODES)
    assert found.value.code is Code.TOOL_FAILED
    assert str(found.value).isprintable()


@given(st.text() | _JSON.map(json.dumps) | _JSON.map(lambda rows: json.dumps({"report": [{"pv": rows}]})))
def test_whatever_is_reported(text: str) -> None:
    try:
        rows = lvm.parse_report(text, "pv", "pv_name,vg_uuid")
    except DiskError as error:
        assert error.code is Code.TOOL_FAILED  # noqa: PT017 - either is fine, another exception is not
    else:
        assert all(isinstance(row["pv_name"], str) for row in rows)


@pytest.mark.parametrize("count", ["many", "1.5", "٣x", "9" * 5000])
def test_numbers_that_are_none(tmp_path: Path, count: str) -> None:
    doc = json.loads(REPORTS["active"]["pvs"])
    doc["report"][0]["pv"][0]["pv_count"] = count
    with pytest.raises(DiskError, match="cannot understand LVM's report: pv_count is "):
        lvm.physical_volumes(tools(tmp_path, {"pvs": json.dumps(doc)}), NODES)


def test_chatter_in_the_middle_of_a_report_is_passed_over():
    text = (
        '  {\n      "report": [\n  Retrying metadata scan.\n          {\n              "pv": [ {"pv_name": "/dev/x"} ]\n          }\n      ]\n  }\n'
    )
    assert lvm.parse_report(text, "pv", "pv_name") == [{"pv_name": "/dev/x"}]

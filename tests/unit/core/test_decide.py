"""The decision over a simulated node: every case ends mounted or refused, every crash heals, nothing foreign is ever written to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvcache.core.content import Content, Kind
from nvcache.core.decide import decide, plan_teardown
from nvcache.core.disk_codes import DiskCode
from nvcache.core.disks import MD_NAME, NAME, Blank, Blkid, DiskFacts, Foreign, Holder, Mount, Ours, Probe, PvFacts, Rules, judge
from nvcache.core.stripe import (
    ArrayFacts,
    AssembleArray,
    Case,
    CreateStripe,
    Found,
    Machine,
    MakeFilesystem,
    Release,
    StopArray,
    StripePlan,
    TopFacts,
    VolumeFacts,
)
from tests.support.machine import NOTHING, RULES, Disk, Node

FOREIGN = {
    "ext4": (Probe(Blkid.FOUND, "ext4", None, "data", "1-2"), Content(Kind.EXT4, "1-2", "data"), DiskCode.D09),
    "gpt": (Probe(Blkid.FOUND, None, "gpt"), Content(Kind.UNKNOWN), DiskCode.D09),
    "array": (
        Probe(Blkid.FOUND, "linux_raid_member", None, "host:data", "a-b"),
        Content(Kind.MD, "a-b", "host:data", 0, 4, 1, 0),
        DiskCode.D09,
    ),
    "two signatures": (Probe(Blkid.AMBIVALENT), Content(Kind.UNKNOWN), DiskCode.D10),
    "raw data": (NOTHING, Content(Kind.UNKNOWN), DiskCode.D16),
    "witnesses disagree": (NOTHING, Content(Kind.XFS, "1-2", NAME), DiskCode.D10),
    "claim of another disk": (NOTHING, Content(Kind.CLAIM, label="S9"), DiskCode.D10),
    "claim under a signature": (Probe(Blkid.FOUND, "ext4", None, "data", "1-2"), Content(Kind.CLAIM, label="S1"), DiskCode.D09),
    "uuids disagree": (Probe(Blkid.FOUND, "xfs", None, NAME, "9-9"), Content(Kind.XFS, "1-2", NAME), DiskCode.D10),
    "no answer": (Probe(Blkid.FAILED, why="hangs"), Content(Kind.BLANK), DiskCode.D11),
}
IN_USE: dict[str, tuple[dict[str, object], DiskCode]] = {
    "held": ({"exclusive": False}, DiskCode.D12),
    "partition": ({"partitions": ("nvme1n1p1",)}, DiskCode.D06),
    "mounted": ({"mounts": ("/data",)}, DiskCode.D08),
    "swap": ({"swap": True}, DiskCode.D08),
    "loop": ({"loop": "loop0"}, DiskCode.D08),
    "read-only": ({"read_only": True}, DiskCode.D04),
    "in an array": ({"holders": (Holder("md0", "md", None, "0", ("/mnt/aks",)),)}, DiskCode.D07),
    "unreadable": ({"content": None, "unreadable": "Input/output error"}, DiskCode.D11),
}


def node(count: int = 4) -> Node:
    return Node([Disk(f"S{number}") for number in range(count)])


def run(machine: Node, rules: Rules = RULES, *, steps: int | None = None) -> StripePlan:
    """Carry plans out until there is nothing to do, or until `steps` steps were done: a power cut."""
    left = steps
    for _ in range(20):
        plan = decide(machine.facts(), rules)
        if plan.done or plan.refused or not plan.steps:
            return plan
        for step in plan.steps:
            if left == 0:
                return plan
            machine.apply(step)
            left = None if left is None else left - 1
    raise AssertionError(f"no end: {plan}")


@pytest.mark.parametrize("filesystem", ["xfs", "ext4"])
@pytest.mark.parametrize("backend", ["md", "lvm"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_blank_disks_become_a_mounted_stripe_and_stay_it(count: int, backend: str, filesystem: str) -> None:
    machine, rules = node(count), replace(RULES, backend=backend, filesystem=filesystem)
    first = decide(machine.facts(), rules)
    assert first.case is (Case.C12 if count == 1 else Case.C7)
    assert run(machine, rules).case is Case.C1
    written = list(machine.written)
    again = run(machine, rules)
    assert again.done
    assert again.steps == ()
    assert machine.written == written


@pytest.mark.parametrize("backend", ["md", "lvm"])
@pytest.mark.parametrize("cut", range(9))
def test_a_creation_cut_short_anywhere_is_healed(backend: str, cut: int) -> None:
    machine, rules = node(), replace(RULES, backend=backend)
    run(machine, rules, steps=cut)
    reboot(machine)
    assert run(machine, rules).done


@pytest.mark.parametrize("backend", ["md", "lvm"])
@pytest.mark.parametrize("count", [1, 4])
def test_what_was_being_made_when_the_power_went_is_erased_and_made_anew(count: int, backend: str) -> None:
    machine, rules = node(count), replace(RULES, backend=backend)
    machine.disks[-1].content = Content(Kind.CLAIM, label=machine.disks[-1].serial)
    first = decide(machine.facts(), rules)
    assert (first.case, first.code, [type(step) for step in first.steps]) == (Case.C7, None, [Release])
    plan = run(machine, rules)
    assert plan.done
    assert plan.stripe is not None
    assert len(plan.stripe.members) == count


def test_a_claim_beside_a_whole_stripe_is_left_alone_until_teardown() -> None:
    machine = node()
    run(machine)
    machine.disks.append(Disk("S9", content=Content(Kind.CLAIM, label="S9")))
    assert run(machine).case is Case.C2
    assert "S9" not in machine.written
    for step in plan_teardown(machine.facts(), RULES).steps:
        machine.apply(step)
    assert all(disk.content.kind is Kind.BLANK for disk in machine.disks)


@pytest.mark.parametrize("backend", ["md", "lvm"])
@pytest.mark.parametrize("cut", range(12))
def test_a_rebuild_cut_short_anywhere_is_healed(backend: str, cut: int) -> None:
    machine, rules = node(), replace(RULES, backend=backend)
    run(machine, rules)
    reboot(machine)
    machine.disks[1] = Disk("NEW")
    run(machine, rules, steps=cut)
    reboot(machine)
    plan = run(machine, rules)
    assert plan.done
    assert plan.stripe is not None
    assert len(plan.stripe.members) == 4


@pytest.mark.parametrize("backend", ["md", "lvm"])
@pytest.mark.parametrize("cut", range(9))
def test_a_teardown_cut_short_is_finished_by_another(backend: str, cut: int) -> None:
    machine, rules = node(), replace(RULES, backend=backend)
    run(machine, rules)
    for step in plan_teardown(machine.facts(), rules).steps[:cut]:
        machine.apply(step)
    reboot(machine)
    for step in plan_teardown(machine.facts(), rules).steps:
        machine.apply(step)
    assert all(disk.content.kind is Kind.BLANK for disk in machine.disks)
    assert plan_teardown(machine.facts(), rules).done


@pytest.mark.parametrize("changed", [{"min_disk": 1 << 60}, {"exclude": frozenset({"S1"})}, {"failed": frozenset({"S0", "S1"})}])
def test_a_setting_that_was_changed_since_keeps_no_disk_back(changed: dict[str, object]) -> None:
    machine = node()
    run(machine)
    for step in plan_teardown(machine.facts(), replace(RULES, **changed)).steps:
        machine.apply(step)
    assert all(disk.content.kind is Kind.BLANK for disk in machine.disks)


def test_a_teardown_that_sees_none_of_the_mounted_stripes_disks_is_refused() -> None:
    machine = node()
    run(machine)
    hidden = replace(machine.facts(), disks=tuple(replace(disk, read_only=True) for disk in machine.facts().disks))
    plan = plan_teardown(hidden, RULES)
    assert (plan.code, plan.steps) == (DiskCode.N08, ())
    assert plan.reason.startswith(f"our stripe is mounted at {RULES.mount}, and no disk is seen to belong to it (/dev/")
    assert plan.reason.count("read-only") == len(machine.disks)
    assert plan_teardown(replace(hidden, mounts=(), marker=None), RULES).done


def reboot(machine: Node) -> None:
    machine.active.clear()
    machine.inactive.clear()
    machine.made.clear()
    machine.mounted = None


def test_an_inactive_array_is_stopped_and_assembled_again() -> None:
    machine = node()
    run(machine)
    stripe = next(iter(machine.active))
    reboot(machine)
    machine.inactive[stripe] = "md127"
    assert decide(machine.facts(), RULES).case is Case.C4
    written = list(machine.written)
    assert run(machine).case is Case.C1
    assert machine.written == written


@pytest.mark.parametrize("backend", ["md", "lvm"])
def test_a_missing_member_is_waited_for_then_lost(backend: str) -> None:
    machine, rules = node(), replace(RULES, backend=backend)
    run(machine, rules)
    reboot(machine)
    del machine.disks[2]
    machine.settled = False
    waiting = decide(machine.facts(), rules)
    assert (waiting.case, waiting.waiting, waiting.steps) == (Case.C6, True, ())
    machine.settled = True
    lost = decide(machine.facts(), rules)
    assert (lost.case, lost.code) == (Case.C6, DiskCode.R01)
    refusing = decide(machine.facts(), replace(rules, rebuild=False))
    assert (refusing.code, refusing.steps) == (DiskCode.N01, ())
    assert run(machine, rules).done


@pytest.mark.parametrize("backend", ["md", "lvm"])
@pytest.mark.parametrize("wrong", [{"probe": Probe(Blkid.FAILED, why="hangs")}, {"content": None, "unreadable": "no answer"}])
def test_a_member_of_the_active_stripe_that_cannot_be_read_just_now_is_given_time(backend: str, wrong: dict[str, object]) -> None:
    machine, rules = node(), replace(RULES, backend=backend, require_all=False)
    run(machine, rules)
    machine.disks[2].extra = wrong
    machine.settled = False
    plan = decide(machine.facts(), rules)
    assert plan.steps == ()
    assert plan.waiting or plan.refused
    machine.disks[2].extra = {}
    assert decide(machine.facts(), rules).done


def test_a_failed_disk_is_left_out_and_not_waited_for() -> None:
    machine = node()
    run(machine)
    machine.settled = False
    rules = replace(RULES, failed=frozenset({"S1"}), expected=4)
    plan = decide(machine.facts(), rules)
    assert plan.code is DiskCode.R01
    assert plan.case is Case.C11
    assert "S1" not in {step.member.disk.serial for step in plan.steps if isinstance(step, Release)}
    machine.disks = [disk for disk in machine.disks if disk.serial != "S1"]
    machine.settled = True
    final = run(machine, rules)
    assert final.done
    assert final.stripe is not None
    assert len(final.stripe.members) == 3


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_disk_among_free_ones_stops_everything(name: str) -> None:
    probe, content, code = FOREIGN[name]
    machine = node()
    machine.disks[1].probe, machine.disks[1].content = probe, content
    plan = run(machine)
    assert plan.code is DiskCode.N03
    assert plan.case is Case.C10
    assert "/dev/nvme1n1" in plan.reason
    assert code in plan.reason
    assert machine.written == []
    rest = run(machine, replace(RULES, require_all=False))
    assert rest.done
    assert "S1" not in machine.written


@pytest.mark.parametrize("name", IN_USE)
def test_a_disk_in_use_stops_everything(name: str) -> None:
    extra, code = IN_USE[name]
    machine = node()
    machine.disks[1].extra = extra
    plan = run(machine)
    assert plan.code is DiskCode.N03
    assert code in plan.reason
    assert machine.written == []


@pytest.mark.parametrize("name", [*FOREIGN])
def test_a_foreign_disk_beside_a_whole_stripe_is_only_told(name: str) -> None:
    machine = node()
    run(machine)
    machine.disks.append(Disk("X", probe=FOREIGN[name][0], content=FOREIGN[name][1]))
    plan = run(machine)
    assert plan.case is Case.C2
    assert [code for code, _ in plan.warnings] == [DiskCode.W01]
    assert "X" not in machine.written


def test_remote_and_unknown_disks_are_never_counted() -> None:
    machine = Node([Disk("R", model="MSFT NVMe Accelerator v1.0"), Disk("U", model="Samsung 990 PRO")])
    plan = decide(machine.facts(), RULES)
    assert plan.code is DiskCode.N00
    assert [verdict.code for verdict in plan.verdicts if isinstance(verdict, Foreign)] == [DiskCode.D02, DiskCode.D03]
    assert "ephemeral OS disk" in decide(Node(machine.disks[:1]).facts(), RULES).reason
    allowed = replace(RULES, models=frozenset({"Samsung 990 PRO", "MSFT NVMe Accelerator v1.0"}))
    assert run(machine, allowed).case is Case.C1
    assert machine.written == ["U"]


def test_unequal_and_too_few_disks() -> None:
    machine = node()
    machine.disks[0].size = 2 << 30
    assert decide(machine.facts(), RULES).code is DiskCode.D14
    assert decide(machine.facts(), replace(RULES, allow_unequal=True)).case is Case.C7
    machine = node(3)
    expecting = replace(RULES, expected=4)
    assert decide(machine.facts(), expecting).code is DiskCode.D15
    machine.settled = False
    assert decide(machine.facts(), expecting).waiting
    machine.disks.append(Disk("S3"))
    assert run(machine, expecting).done


def test_what_is_mounted_where_the_stripe_belongs_stops_it() -> None:
    machine = node()
    other = replace(machine.facts(), mounts=(Mount("8:1", RULES.mount, "ext4", options=("rw",)),))
    assert decide(other, RULES).code is DiskCode.N07
    run(machine)
    facts = machine.facts()
    assert decide(replace(facts, mounts=facts.mounts * 2), RULES).code is DiskCode.N07
    assert decide(replace(facts, marker="another"), RULES).code is DiskCode.N09
    assert decide(replace(facts, marker=""), RULES).code is DiskCode.N09
    number = facts.mounts[0].number
    assert decide(replace(facts, mounts=(), elsewhere=((number, "/other"),)), RULES).code is DiskCode.N07
    assert plan_teardown(replace(facts, elsewhere=((number, "/other"),)), RULES).code is DiskCode.N07


def test_a_foreign_file_system_on_our_array_stays() -> None:
    machine = node()
    run(machine)
    facts = machine.facts()
    foreign = tuple(
        (name, replace(top, probe=Probe(Blkid.FOUND, "btrfs", None, "x", "1"), content=Content(Kind.UNKNOWN))) for name, top in facts.tops
    )
    plan = decide(replace(facts, mounts=(), tops=foreign), RULES)
    assert (plan.case, plan.code, plan.steps) == (Case.C8, DiskCode.N02, ())


def test_a_damaged_file_system_of_ours_is_made_anew() -> None:
    machine = node()
    run(machine)
    facts = replace(machine.facts(), mounts=())
    fs = facts.tops[0][1].probe.uuid
    assert decide(facts, RULES).case is Case.C3
    plan = decide(replace(facts, unmountable=frozenset({str(fs)})), RULES)
    assert plan.case is Case.C8
    assert isinstance(plan.steps[0], MakeFilesystem)


def test_names_taken_by_others_stop_everything() -> None:
    machine = node()
    stranger = ArrayFacts("md0", "/dev/md0", "9:0", "clean", "raid1", ("sda1", "sdb1"), 2, "u", MD_NAME)
    assert decide(replace(machine.facts(), arrays=(stranger,)), RULES).code is DiskCode.N05
    raid1 = node()
    raid1.disks[0].content = Content(Kind.MD, "u", MD_NAME, 1, 2, 0, 0)
    raid1.disks[0].probe = Probe(Blkid.FOUND, "linux_raid_member", None, MD_NAME, "u")
    assert decide(raid1.facts(), RULES).code is DiskCode.N05
    group = node()
    group.disks[0].content = Content(Kind.LVM, "p")
    group.disks[0].probe = Probe(Blkid.FOUND, "LVM2_member", None, None, "p")
    group.disks[0].extra = {"pv": PvFacts(NAME, "v", (), 1, 0)}
    assert decide(group.facts(), RULES).code is DiskCode.N05
    machine = node()
    run(machine, replace(RULES, backend="lvm"))
    facts = machine.facts()
    assert facts.volume is not None
    mixed = replace(facts, volume=replace(facts.volume, volumes=("cache", "theirs")))
    assert decide(mixed, RULES).code is DiskCode.N02
    assert plan_teardown(mixed, RULES).steps == ()


def test_of_two_stripes_the_whole_one_wins_and_the_rest_is_not_touched() -> None:
    machine = node()
    run(machine)
    reboot(machine)
    remnant = Content(Kind.MD, "old", MD_NAME, 0, 4, 0, 0)
    machine.disks.append(Disk("OLD", content=remnant, probe=Probe(Blkid.FOUND, "linux_raid_member", None, MD_NAME, "old")))
    plan = decide(machine.facts(), RULES)
    assert plan.case is Case.C9
    assert isinstance(plan.steps[0], AssembleArray)
    before = list(machine.written)
    final = run(machine)
    assert final.case is Case.C2
    assert machine.written == before


def test_one_failed_read_of_blkid_formats_no_good_stripe() -> None:
    """It ends with the status for "nothing is there" then, while the stripe's own bytes still name our file system."""
    machine = node()
    run(machine)
    seen = machine.facts()
    blind = replace(seen, mounts=(), tops=tuple((name, replace(top, probe=NOTHING)) for name, top in seen.tops))
    plan = decide(blind, RULES)
    assert (plan.case, plan.code, plan.steps) == (Case.C8, DiskCode.N08, ())


@pytest.mark.parametrize("probe", [Probe(Blkid.FAILED, why="hangs"), NOTHING])
def test_a_mounted_stripe_is_not_adopted_without_the_uuid_of_its_file_system(probe: Probe) -> None:
    machine = node()
    run(machine)
    seen = machine.facts()
    plan = decide(replace(seen, tops=tuple((name, replace(top, probe=probe)) for name, top in seen.tops)), RULES)
    assert (plan.code, plan.done) == (DiskCode.N08, False)


@pytest.mark.parametrize("backend", ["md", "lvm"])
@pytest.mark.parametrize("changed", [{"exclude": frozenset({"S1"})}, {"min_disk": 1 << 29, "require_all": False}])
def test_a_setting_that_leaves_a_member_out_destroys_no_mounted_stripe(backend: str, changed: dict[str, object]) -> None:
    machine = node()
    run(machine, replace(RULES, backend=backend))
    machine.disks[1].extra["size"] = 1 << 20
    seen = machine.facts()
    if seen.volume is not None:  # LVM is shown only the disks that are left
        seen = replace(seen, volume=replace(seen.volume, missing=1))
    plan = decide(seen, replace(RULES, backend=backend, **changed))  # type: ignore[arg-type]
    assert (plan.code, plan.steps) == (DiskCode.N03, ())
    assert "serial S1" in plan.reason


def test_what_is_mounted_over_our_stripe_is_never_unmounted() -> None:
    machine = node()
    run(machine)
    seen = machine.facts()
    covered = replace(seen, mounts=(*seen.mounts, Mount("8:1", RULES.mount, "ext4")))
    lost = replace(covered, disks=covered.disks[1:])
    for plan in (plan_teardown(covered, RULES), decide(covered, RULES), decide(lost, RULES)):
        assert (plan.code, plan.steps) == (DiskCode.N07, ())


# -- whatever the facts

TEXT = st.sampled_from(["", NAME, MD_NAME, "u1", "u2", "other"])
UUID = st.sampled_from([None, "u1", "u2", "nvcach-0000-0000-0000-0000-0000-000000"])
CONTENT = st.builds(
    Content, st.sampled_from(Kind), UUID, TEXT, st.sampled_from([None, 0, 1]), st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)
)
PROBE = st.builds(
    Probe,
    st.sampled_from(Blkid),
    st.sampled_from([None, "linux_raid_member", "LVM2_member", "xfs", "ext4", "btrfs", "swap"]),
    st.sampled_from([None, None, "gpt"]),
    TEXT,
    UUID,
)
MODEL = st.sampled_from(["Microsoft NVMe Direct Disk v2", "nvme_card3", "MSFT NVMe Accelerator v1.0", "unknown"])


@st.composite
def disks(draw: st.DrawFn) -> DiskFacts:
    number = draw(st.integers(0, 5))
    held = draw(st.booleans())
    return DiskFacts(
        name=f"nvme{number}n1",
        node=f"/dev/nvme{number}n1",
        number=f"259:{number}",
        size=draw(st.sampled_from([0, 1 << 30, 2 << 30])),
        model=draw(MODEL),
        serial=f"S{number}",
        transport=draw(st.sampled_from(["pcie", "pcie", "pcie", "tcp"])),
        read_only=draw(st.booleans()) and draw(st.booleans()),
        partitions=draw(st.sampled_from([(), (), (), ("nvme0n1p1",)])),
        holders=(Holder("md127", draw(st.sampled_from(["md", "dm"])), None, f"{NAME}-cache"),) if held else (),
        mounts=draw(st.sampled_from([(), (), (RULES.mount,), ("/data",)])),
        swap=draw(st.booleans()) and draw(st.booleans()),
        probe=draw(st.one_of(st.none(), PROBE, st.just(NOTHING))),
        content=draw(st.one_of(st.none(), CONTENT, st.just(Content(Kind.BLANK)))),
        exclusive=draw(st.sampled_from([True, True, False, None])),
        pv=draw(st.one_of(st.none(), st.builds(PvFacts, TEXT, TEXT, st.sampled_from([(), (NAME,)]), st.integers(0, 4), st.integers(0, 1)))),
    )


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    found = draw(st.lists(disks(), max_size=5, unique_by=lambda disk: disk.name))
    names = st.sampled_from([disk.name for disk in found] or ["sda"])
    arrays = draw(
        st.lists(
            st.builds(
                ArrayFacts,
                st.just("md127"),
                st.just("/dev/md127"),
                st.just("9:127"),
                st.sampled_from(["clean", "inactive", "broken", "clear", "read-auto"]),
                st.sampled_from(["raid0", "raid1", ""]),
                st.lists(st.one_of(names, st.just("sda1")), max_size=4, unique=True).map(tuple),
                st.integers(0, 4),
                UUID,
                TEXT,
                st.lists(names, max_size=1).map(tuple),
            ),
            max_size=1,
        )
    )
    volume = draw(
        st.one_of(
            st.none(),
            st.builds(
                VolumeFacts,
                TEXT,
                st.sampled_from([(), (NAME,)]),
                st.integers(0, 4),
                st.integers(0, 2),
                st.lists(names, max_size=3).map(tuple),
                st.sampled_from([(), ("cache",), ("cache", "theirs")]),
                st.sampled_from([None, "dm-0"]),
                st.sampled_from([None, "/dev/dm-0"]),
                st.sampled_from([None, "252:0"]),
            ),
        )
    )
    tops = tuple((name, TopFacts(f"/dev/{name}", "9:127", 1, draw(PROBE), draw(st.one_of(st.none(), CONTENT)))) for name in ("md127", "dm-0"))
    mounts = draw(st.lists(st.builds(Mount, st.sampled_from(["9:127", "252:0", "259:0", "8:1"]), st.just(RULES.mount), st.just("xfs")), max_size=2))
    return Machine(
        tuple(found),
        tuple(arrays),
        volume,
        tops,
        tuple(mounts),
        elsewhere=draw(st.sampled_from([(), (("9:127", "/x"),)])),
        marker=draw(st.sampled_from([None, "", "u1"])),
        settled=draw(st.booleans()),
        made=draw(st.sampled_from([frozenset(), frozenset({"u1"})])),
    )


RULESETS = st.builds(
    Rules,
    st.sampled_from(["md", "lvm"]),
    st.sampled_from(["xfs", "ext4"]),
    st.just(frozenset({"unknown"})),
    st.sampled_from([frozenset(), frozenset({"S1"})]),
    st.sampled_from([frozenset(), frozenset({"S2"})]),
    st.just(0),
    st.sampled_from([None, 3]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.just(RULES.mount),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(machines(), RULESETS)
def test_no_plan_ever_writes_to_a_disk_that_is_neither_blank_nor_ours(machine: Machine, rules: Rules) -> None:
    for plan in (decide(machine, rules), plan_teardown(machine, rules)):
        by_name = {disk.name: disk for disk in machine.disks}
        if plan.refused or plan.done:
            assert plan.steps == ()
        for step in plan.steps:
            if isinstance(step, CreateStripe):
                touched = [blank.disk for blank in step.members]
                assert all(_blank(disk) for disk in touched)
            elif isinstance(step, Release):
                touched = [step.member.disk]
                assert _ours(touched[0])
            elif isinstance(step, MakeFilesystem) and isinstance(step.on, Blank):
                touched = [step.on.disk]
                assert _blank(touched[0])
            elif isinstance(step, MakeFilesystem):
                assert isinstance(step.on, Found)
                touched = [member.disk for member in step.on.members]
                assert step.on.complete
                assert all(_ours(disk) for disk in touched)
            elif isinstance(step, StopArray):
                (array,) = [array for array in machine.arrays if array.node == step.node]
                touched = []
                assert any(_ours(by_name[name]) for name in array.members if name in by_name)
            else:
                touched = []
            for disk in touched:
                assert disk.transport == "pcie"
                assert not disk.read_only
                assert not disk.partitions
                assert not disk.swap
                assert set(disk.mounts) <= {rules.mount}
                assert disk.model != "MSFT NVMe Accelerator v1.0"


def _blank(disk: DiskFacts) -> bool:
    """Written anew here, so that the code's own idea of blank is not what it is measured by."""
    empty = disk.probe is not None and disk.probe.result is Blkid.NOTHING and disk.content is not None and disk.content.kind is Kind.BLANK
    return empty and disk.exclusive is True and not disk.holders and not disk.mounts


def _ours(disk: DiskFacts) -> bool:
    probe, content = disk.probe, disk.content
    if probe is None or content is None or probe.result is not Blkid.FOUND or probe.uuid != content.uuid or content.uuid is None or probe.table:
        return False
    if content.kind is Kind.MD:
        return content.label == MD_NAME and content.level == 0 and probe.type == "linux_raid_member"
    if content.kind is Kind.LVM:
        tagged = disk.pv is not None and disk.pv.vg == NAME and NAME in disk.pv.tags
        return probe.type == "LVM2_member" and (tagged or (disk.pv is not None and not disk.pv.vg and content.uuid.startswith("nvcach")))
    return content.kind in (Kind.XFS, Kind.EXT4) and content.label == NAME and probe.type == str(content.kind)


@given(disks(), RULESETS)
def test_blank_and_ours_cannot_be_made_without_evidence(disk: DiskFacts, rules: Rules) -> None:
    verdict = judge(disk, rules)
    if not isinstance(verdict, Blank):
        bad = replace(disk, exclusive=False)
        with pytest.raises(ValueError, match="not proven blank"):
            Blank(bad)
    if not isinstance(verdict, Ours) and not _ours(disk):
        with pytest.raises(ValueError, match="not proven ours"):
            Ours(disk, Kind.MD, "u1", 4)

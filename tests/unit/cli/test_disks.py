"""`nvcache disks` on reports as the engine makes them: what is printed, what is asked, how it exits.

The engine's `Stripe` is the one thing replaced: on the machine that runs these tests it must not be let near the disks.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nvcache.__main__ import cli
from nvcache.cli.disks import disks, on_disks, remedy, stripe_line
from nvcache.core.disk_codes import DISK_CODES, DiskCode
from nvcache.engine import stripe as engine_stripe
from nvcache.engine.stripe import Report
from nvcache.errors import Code, DiskError
from nvcache.settings import TABLES, DiskSettings

COMMANDS = ["ensure", "plan", "status", "teardown", "watch", "wipe"]
MODEL = "Microsoft NVMe Direct Disk v2"


def disk(number, verdict="blank", code=None, reason="blank, by blkid and by its own bytes", **changed):
    name = f"nvme{number}n1"
    facts = {"name": name, "node": f"/dev/{name}", "serial": f"S{number}", "model": MODEL, "size": 3_840_755_982_336}
    return {**facts, "verdict": verdict, "code": code, "reason": reason, **changed}


def tuned(device, setting, was, wanted, **changed):
    return {"device": device, "setting": setting, "was": was, "wanted": wanted, "now": wanted, **changed}


BLANK = Report(
    outcome="Planned",
    case="C7",
    code=None,
    reason="4 blank disks",
    disks=tuple(disk(number) for number in range(4)),
    steps=("make an md RAID0 array of /dev/nvme0n1, /dev/nvme1n1", "then make an xfs file system on it"),
)
MOUNTED = Report(
    outcome="Created",
    case="C1",
    code=None,
    reason="our stripe is mounted at /mnt/x",
    disks=tuple(disk(number, "ours", reason="member of our md stripe") for number in range(4)),
    steps=("make an md RAID0 array of /dev/nvme0n1, /dev/nvme1n1", "mount /dev/md127 (xfs) at /mnt/x"),
    backend="md",
    filesystem="xfs",
    array="/dev/md127",
    members=tuple(f"/dev/nvme{number}n1" for number in range(4)),
    mount="/mnt/x",
    store="/mnt/x/store",
    fs_uuid="0b7c",
    read_ahead=8 << 20,
    tuning=(
        tuned("/dev/md127", "read_ahead", 128 << 10, 8 << 20),
        *(tuned(f"/dev/nvme{number}n1", "scheduler", "bfq", "none") for number in range(4)),
    ),
    seconds=3.21,
)
REFUSED = Report(
    outcome="Refused",
    case="C10",
    code="N03",
    reason="/dev/nvme1n1 (serial S1): D09 contains ext4 (label data)",
    codes=("N03", "D09", "D02"),
    disks=(
        disk(0),
        disk(1, "refused", "D09", "contains ext4 (label data)"),
        disk(2, "not used", "D02", "remote cloud disk (MSFT NVMe Accelerator v1.0), never used", model="MSFT NVMe Accelerator v1.0"),
    ),
)


class FakeStripe:
    """Answers with the report it is given, says one line as it does, and keeps how it was made and asked."""

    report: Report = BLANK
    error: DiskError | None = None

    def __init__(self, settings, *, say):
        self.made.append(settings)
        self._say = say

    def _did(self, *asked, **named):
        self.asked.append((*asked, *named.items()))
        if self.error:
            raise self.error
        self._say("looking at 4 disks")
        return self.report

    def look(self):
        return self._did("look")

    def plan(self):
        return self._did("plan")

    def ensure(self):
        return self._did("ensure")

    def teardown(self):
        return self._did("teardown")

    def plan_teardown(self):
        return self._did("plan_teardown")

    def wipe(self, serials, *, destroy):
        return self._did("wipe", *serials, destroy=destroy)


@pytest.fixture
def stripe(monkeypatch):
    """The fake in place of the engine's, as root sees it; settings from nowhere."""
    for name in [name for name in os.environ if name.startswith("NVCACHE_")]:
        monkeypatch.delenv(name)
    fake = type("Fake", (FakeStripe,), {"made": [], "asked": []})
    monkeypatch.setattr(engine_stripe, "Stripe", fake)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield fake
    root.handlers[:], root.level = before  # the command sends the log to a stderr that ends with the test


def test_the_table_names_every_disk_its_verdict_and_why(stripe, run):
    stripe.report = replace(REFUSED, outcome="Seen")
    ran = run("disks")
    assert ran.code == 0
    header, blank, refused, remote, *rest = ran.out.splitlines()
    assert header.split() == ["DEVICE", "SIZE", "MODEL", "SERIAL", "VERDICT", "CODE", "WHY"]
    assert blank.split()[:3] == ["/dev/nvme0n1", "3.8", "TB"]
    assert "S0" in blank
    assert "blank" in blank
    assert refused.split()[-6:] == ["refused", "D09", "contains", "ext4", "(label", "data)"]
    assert "not used  D02" in remote
    text = "\n".join(rest)
    assert "C10: a disk that should be usable is not" in text
    assert "N03 /dev/nvme1n1 (serial S1)" in text
    for code in ("N03", "D09", "D02"):
        assert DISK_CODES[DiskCode(code)].remedy in text
    assert stripe.asked == [("look",)]


def test_codes_of_disks_that_are_never_used_are_no_news_beside_a_stripe(stripe, run):
    unused = disk(9, "not used", "D03", "model is not on the list")
    stripe.report = replace(MOUNTED, outcome="Seen", disks=(*MOUNTED.disks, unused), codes=("W01", "D03"), warnings=("W01: 1 usable disk",))
    ran = run("disks")
    assert DISK_CODES[DiskCode.W01].remedy in ran.out
    assert DISK_CODES[DiskCode.D03].remedy not in ran.out
    assert "md of 4 disks, /dev/md127, xfs, mounted at /mnt/x" in ran.out
    assert "W01: 1 usable disk" in ran.out


def test_a_node_without_nvme_says_so(stripe, run):
    stripe.report = Report("Seen", "C0", "N00", "no local NVMe disk that may be used", codes=("N00",))
    ran = run("disks")
    assert ran.code == 0
    assert "no NVMe disk at all" in ran.err
    assert "DEVICE" not in ran.out
    assert DISK_CODES[DiskCode.N00].remedy in ran.out


def test_what_a_disk_calls_itself_cannot_steer_the_terminal(stripe, run):
    stripe.report = replace(BLANK, disks=(disk(0, model="x\x1b[2J", serial="a\nb", reason="\x07"),), steps=("erase \x1b[31m",))
    for arguments in (["disks"], ["disks", "plan"]):
        out = run(*arguments).out
        assert not {"\x1b", "\x07"} & set(out)
    assert "\\u001b[2J" in run("disks").out


@pytest.mark.parametrize("arguments", [[], ["plan"], ["ensure"], ["teardown"], ["wipe", "--serial", "S1"]])
def test_json_is_the_whole_report_and_nothing_else(stripe, run, arguments):
    stripe.report = MOUNTED
    ran = run("disks", *arguments, "--json")
    assert json.loads(ran.out) == json.loads(json.dumps(asdict(MOUNTED)))
    assert ran.code == 0
    assert run("disks", "--json", *arguments).out == ran.out


def test_plan_prints_its_steps_in_order_and_does_nothing(stripe, run):
    ran = run("disks", "plan")
    assert ran.code == 0
    assert stripe.asked == [("plan",)]
    assert [line.strip() for line in ran.out.splitlines()[-2:]] == [f"{number}. {step}" for number, step in enumerate(BLANK.steps, 1)]
    assert "C7: every disk is blank" in ran.out
    assert "Planned" in ran.out


def test_ensure_says_what_it_does_on_stderr_and_what_is_there_on_stdout(stripe, run):
    stripe.report = MOUNTED
    ran = run("disks", "ensure")
    assert (ran.code, ran.err) == (0, "nvcache: looking at 4 disks\n")
    assert stripe.asked == [("ensure",)]
    for text in ("Created", "md of 4 disks, /dev/md127, xfs, mounted at /mnt/x", "/mnt/x/store", "3.2 s", "/dev/nvme0n1 /dev/nvme1n1", "8192 KiB"):
        assert text in ran.out


def test_queues_are_shown_in_one_line_a_setting_and_those_apart_that_differ(stripe, run):
    stripe.report = MOUNTED
    assert "scheduler   none\n" in run("disks", "ensure").out
    odd = (*MOUNTED.tuning[:2], tuned("/dev/nvme1n1", "scheduler", "bfq", "none", now="bfq"))
    stripe.report = replace(MOUNTED, tuning=odd, codes=("W04",), warnings=("W04: scheduler of /dev/nvme1n1 is bfq, not none: it is busy",))
    ran = run("disks", "ensure")
    assert (ran.code, ran.out.count("scheduler   none: /dev/nvme0n1; bfq: /dev/nvme1n1\n")) == (0, 1)
    assert "warning     W04: scheduler of /dev/nvme1n1 is bfq" in ran.out
    assert DISK_CODES[DiskCode.W04].remedy in run("disks").out


@pytest.mark.parametrize("outcome", ["Unchanged", "Mounted", "Assembled", "Created", "Rebuilt"])
def test_ensure_exits_0_only_when_mounted_and_ours(stripe, run, outcome):
    stripe.report = replace(MOUNTED, outcome=outcome)
    assert run("disks", "ensure").code == 0
    stripe.report = replace(MOUNTED, outcome=outcome, mount=None, store=None)
    assert run("disks", "ensure").code == 11
    assert run("disks", "ensure", "--json").code == 11


@pytest.mark.parametrize("command", ["ensure", "plan", "teardown"])
def test_a_refusal_shows_the_disks_the_code_and_the_remedy(stripe, run, command):
    stripe.report = REFUSED
    ran = run("disks", command)
    assert ran.code == 11
    assert "contains ext4 (label data)" in ran.out
    *_, told, hint = ran.err.splitlines()
    assert told == f"nvcache: cannot use the disks: N03 {REFUSED.reason}"
    assert hint == f"hint: {DISK_CODES[DiskCode.N03].remedy}"
    asked_json = run("disks", command, "--json")
    assert (asked_json.code, json.loads(asked_json.out)["code"]) == (11, "N03")
    assert told in asked_json.err


def test_a_second_one_at_the_same_time_is_exit_10(stripe, run):
    stripe.report = Report("Refused", None, "D13", "cannot change the disks: the process 71 does so just now", codes=("D13",))
    ran = run("disks", "ensure")
    assert (ran.code, ran.out) == (10, "")
    assert ran.err.splitlines()[-2] == "nvcache: cannot change the disks: the process 71 does so just now"
    assert run("disks", "ensure", "--json").code == 10


def test_an_error_of_the_engine_is_one_json_object_too(stripe, run):
    stripe.error = DiskError(Code.TOOL_MISSING, "cannot run mdadm: it is not installed", hint="apt-get install mdadm")
    ran = run("disks", "ensure", "--json")
    found = json.loads(ran.out)
    assert ran.code == 11
    assert (found["outcome"], found["reason"], found["error"]["code"]) == ("Failed", "cannot run mdadm: it is not installed", "tool-missing")
    plain = run("disks", "ensure")
    assert (plain.code, plain.out) == (11, "")
    assert plain.err.splitlines() == ["nvcache: cannot run mdadm: it is not installed", "hint: apt-get install mdadm"]


def test_wipe_without_the_flag_is_a_dry_run_and_says_so(stripe, run):
    stripe.report = replace(BLANK, steps=("erase ext4 on /dev/nvme1n1 (serial S1)",))
    ran = run("disks", "wipe", "--serial", "S1", "--serial", "S2")
    assert ran.code == 0
    assert stripe.asked == [("wipe", "S1", "S2", ("destroy", False))]
    assert "1. erase ext4 on /dev/nvme1n1 (serial S1)" in ran.out
    assert ran.err.splitlines()[-1] == "nvcache: nothing was erased; add --yes-destroy to do it"


def test_wipe_with_the_flag_erases(stripe, run):
    stripe.report = replace(BLANK, outcome="Wiped", steps=("erase ext4 on /dev/nvme1n1 (serial S1)",))
    ran = run("disks", "wipe", "--serial", "S1", "--yes-destroy")
    assert ran.code == 0
    assert stripe.asked == [("wipe", "S1", ("destroy", True))]
    assert "nothing was erased" not in ran.err


def test_wipe_needs_to_be_told_which_disk(stripe, run):
    assert run("disks", "wipe", "--yes-destroy").code == 2
    assert stripe.asked == []


def test_teardown_can_be_rehearsed(stripe, run):
    assert run("disks", "teardown", "--dry-run").code == 0
    assert stripe.asked == [("plan_teardown",)]
    stripe.report = replace(BLANK, outcome="Removed")
    assert run("disks", "teardown").code == 0
    assert stripe.asked[1:] == [("teardown",)]


@pytest.mark.parametrize("arguments", [["ensure"], ["teardown"], ["watch"], ["wipe", "--serial", "S1", "--yes-destroy"]])
def test_what_changes_disks_needs_root(stripe, run, monkeypatch, arguments):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    ran = run("disks", *arguments)
    assert ran.code == 4
    assert "it needs root, and this is uid 1000" in ran.err
    assert stripe.asked == []


@pytest.mark.parametrize("arguments", [[], ["plan"], ["teardown", "--dry-run"], ["wipe", "--serial", "S1"]])
def test_who_only_looks_without_root_is_told_what_is_missing(stripe, run, monkeypatch, arguments):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    ran = run("disks", *arguments)
    assert ran.code == 0
    assert "without root, what is on the disks cannot be read" in ran.err


def test_the_settings_are_those_of_serve(stripe, run, monkeypatch, tmp_path):
    config = tmp_path / "n.toml"
    config.write_text('backend = "lvm"\nmount = "/mnt/file"\nmin_disk = "1TB"\nworkers = 3\ndisk_exclude = [" S9 "]\n')
    monkeypatch.setenv("NVCACHE_MIN_DISK", "2TB")
    run("disks", "plan", "--config", str(config), "--mount", "/mnt/flag", "--disk-models", "A", "--disk-models", "B")
    (made,) = stripe.made
    assert (made.backend, str(made.mount), made.min_disk) == ("lvm", "/mnt/flag", 2 * 10**12)
    assert (made.disk_models, made.disk_exclude) == (("A", "B"), ("S9",))


def test_an_option_before_the_commands_name_means_the_same(stripe, run):
    run("disks", "--backend", "lvm", "--disk-exclude", "S1", "ensure", "--filesystem", "ext4")
    (made,) = stripe.made
    assert (made.backend, made.disk_exclude, made.filesystem) == ("lvm", ("S1",), "ext4")


def test_without_a_backend_it_is_md(stripe, run):
    run("disks")
    run("disks", "plan")
    assert [made.backend for made in stripe.made] == ["md", "md"]


@pytest.mark.parametrize("command", ["plan", "ensure", "teardown", "watch"])
def test_a_directory_has_no_stripe(stripe, run, command):
    ran = run("disks", command, "--backend", "directory")
    assert ran.code == 2
    assert "backend is directory" in ran.err
    assert stripe.asked == []
    assert run("disks", "--backend", "directory").code == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--min-disk", "12 parsecs"], "min_disk"),
        (["--expected-disks", "0"], "expected_disks"),
        (["--mount", "/"], "mount"),
        (["--store-owner", "nobody"], "store_owner"),
        (["--backend", "zfs"], "--backend"),
        (["--workers", "1"], "--workers"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_looked_at(stripe, run, arguments, why):
    ran = run("disks", "ensure", *arguments)
    assert ran.code == 2
    assert why in ran.err
    assert stripe.made == []


def test_every_command_has_help_and_a_flag_for_every_setting():
    context = click.Context(cli, info_name="nvcache")
    assert disks.list_commands(context) == COMMANDS
    for name in [None, *COMMANDS]:
        command = disks.commands[name] if name else disks
        options = {param.name for param in command.get_params(context) if isinstance(param, click.Option)}
        assert set(DiskSettings.model_fields) - set(TABLES) | {"config", "json_"} <= options
        shown = CliRunner().invoke(cli, ["disks", *([name] if name else []), "--help"])
        assert shown.exit_code == 0
        assert "[default: 100GiB]" in shown.output
    assert "--yes-destroy" in CliRunner().invoke(cli, ["disks", "wipe", "--help"]).output


def test_remedies_are_those_of_the_table_and_none_for_what_is_not_in_it():
    assert remedy("D07") == DISK_CODES[DiskCode.D07].remedy
    assert remedy(None) is None
    assert remedy("Z99") is None


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ({"backend": "directory", "path": "/srv"}, None),
        ({"backend": "directory", "state": "mounted"}, None),
        (
            {"backend": "lvm", "state": "mounted", **{name: asdict(MOUNTED)[name] for name in ("members", "mount", "filesystem")}},
            "lvm of 4 disks, xfs, ",
        ),
        ({"backend": "single", "state": "mounted", "members": ["/dev/nvme0n1"], "mount": "/m", "filesystem": "ext4"}, "1 disk, ext4, mounted at /m"),
        ({"backend": None, "state": "absent", "code": "N03", "reason": "because"}, "absent: N03 because"),
        ({"backend": "directory", "state": "lost", "code": "P06", "reason": "another file system"}, "lost: P06 another file system"),
    ],
)
def test_the_daemons_stripe_in_one_line(found, line):
    shown = stripe_line(found)
    assert shown == line if line is None else (shown or "").startswith(line)


def test_a_stripe_that_is_not_mounted_is_not_said_to_be():
    assert on_disks(asdict(replace(MOUNTED, mount=None))).endswith("xfs, not mounted")


class FakeKeeper:
    """A keeper that publishes two states, one of them twice, and waits to be stopped."""

    def __init__(self, settings, publish, acknowledged, doubted, *, first_generation):
        self._publish, self._first = publish, first_generation
        self._stop = threading.Event()

    def run(self):
        from nvcache.engine.handover import StripeState, StripeStatus

        absent = StripeState(self._first, StripeStatus.ABSENT, code="N00", reason="no disk")
        for state in (absent, absent, replace(absent, generation=self._first + 1, code="N03", reason="a foreign disk")):
            self._publish(state)
        assert self._stop.wait(30)

    def stop(self):
        self._stop.set()


WATCH = """
import os, sys
os.geteuid = lambda: 0
from nvcache.engine import keeper
from tests.unit.cli.test_disks import FakeKeeper
keeper.Keeper = FakeKeeper
from nvcache.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watch_publishes_tells_and_ends_when_told(tmp_path, number):
    home = Path(__file__).parents[3]
    argv = [sys.executable, "-c", WATCH, "disks", "watch", "--json", "--run-directory", str(tmp_path / "run/disks")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home) as process:
        assert process.stdout is not None
        told = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert [(state["state"], state["code"]) for state in told] == [("absent", "N00"), ("absent", "N03")]
    assert told[1]["generation"] == told[0]["generation"] + 1
    assert (process.returncode, out, err) == (0, "", "")
    assert json.loads((tmp_path / "run/disks/stripe.json").read_text())["code"] == "N03"

"""`nvcache disks status`: the one line, the JSON and the exit code that probes go by, from the file alone."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest

from nvcache.core.disk_codes import DISK_CODES, DiskCode
from nvcache.engine import stripe as engine_stripe
from nvcache.engine.handover import StripeState, StripeStatus
from nvcache.engine.stripefile import StripeFiles

DETAILS = {"backend": "md", "filesystem": "xfs", "array": "/dev/md127", "members": ["/dev/nvme0n1", "/dev/nvme1n1"], "mount": "/mnt/x"}
MOUNTED = StripeState(7, StripeStatus.MOUNTED, None, "our stripe is mounted", "uuid-1", "/mnt/x/store", DETAILS)
REFUSED = StripeState(8, StripeStatus.ABSENT, "N03", "/dev/nvme1n1 (serial S1): D09 contains ext4 (label \x1b[2J)")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The run directory. No disk may be looked at: whoever makes a `Stripe` fails, and so does whoever needs root."""
    for name in [name for name in os.environ if name.startswith("NVCACHE_")]:
        monkeypatch.delenv(name)
    monkeypatch.delattr(engine_stripe, "Stripe")
    return tmp_path / "run" / "disks"


def status(run, home, *flags):
    return run("disks", "status", "--run-directory", str(home), *flags)


def test_mounted_is_exit_0_and_one_line(home, run):
    StripeFiles(home).publish(MOUNTED)
    ran = status(run, home)
    assert (ran.code, ran.out, ran.err) == (0, "md of 2 disks, /dev/md127, xfs, mounted at /mnt/x (said just now)\n", "")
    os.utime(home / "stripe.json", (time.time() - 7300,) * 2)
    assert status(run, home).out.endswith("(said 2 h ago)\n")


def test_refused_is_exit_11_with_the_reason_and_the_remedy(home, run):
    StripeFiles(home).publish(REFUSED)
    ran = status(run, home)
    assert ran.code == 11
    assert ran.out == "absent: N03 /dev/nvme1n1 (serial S1): D09 contains ext4 (label \\u001b[2J) (said just now)\n"
    assert ran.err == f"hint: {DISK_CODES[DiskCode.N03].remedy}\n"


@pytest.mark.parametrize("state", [StripeStatus.WITHDRAWING, StripeStatus.LOST])
def test_a_stripe_that_goes_is_not_mounted(home, run, state):
    StripeFiles(home).publish(replace(MOUNTED, state=state, code="R01", reason="/dev/nvme1n1 (serial S1) vanished", store=None))
    ran = status(run, home)
    assert (ran.code, ran.out) == (11, f"{state}: R01 /dev/nvme1n1 (serial S1) vanished (said just now)\n")


def test_json_is_the_word_and_when_it_was_said(home, run):
    StripeFiles(home).publish(MOUNTED)
    os.utime(home / "stripe.json", (1_700_000_000, 1_700_000_000))
    ran = status(run, home, "--json")
    found = json.loads(ran.out)
    assert ran.code == 0
    assert (found["state"], found["generation"], found["store"], found["details"]) == ("mounted", 7, "/mnt/x/store", DETAILS)
    assert found["said"] == "2023-11-14T22:13:20+00:00"


def test_a_time_to_come_is_no_age(home, run):
    StripeFiles(home).publish(MOUNTED)
    os.utime(home / "stripe.json", (time.time() + 3600,) * 2)
    assert status(run, home).out == "md of 2 disks, /dev/md127, xfs, mounted at /mnt/x\n"
    assert json.loads(status(run, home, "--json").out)["said"] is None


def test_no_disks_process_is_exit_9(home, run):
    ran = status(run, home)
    assert (ran.code, ran.out) == (9, "")
    assert ran.err.startswith(f"nvcache: cannot tell the state of the stripe: {home}/stripe.json is not there\nhint: start `nvcache disks watch`")
    found = json.loads(status(run, home, "--json").out)
    assert (found["state"], found["error"]["code"]) == (None, "daemon-unreachable")


@pytest.mark.parametrize(("content", "why"), [(b"torn", "it is not JSON"), (b"{}", "it holds no state of a stripe")])
def test_a_file_of_no_use_is_exit_11_and_says_why(home, run, content, why):
    home.mkdir(parents=True)
    (home / "stripe.json").write_bytes(content)
    ran = status(run, home)
    assert (ran.code, ran.out) == (11, "")
    assert why in ran.err
    assert status(run, home, "--json").code == 11


def test_a_word_that_others_could_have_written_is_not_passed_on(home, run):
    StripeFiles(home).publish(MOUNTED)
    (home / "stripe.json").chmod(0o666)
    ran = status(run, home)
    assert (ran.code, ran.out) == (11, "")
    assert "others may write it" in ran.err


def test_it_needs_no_backend_and_takes_the_run_directory_from_the_file(home, run, tmp_path):
    StripeFiles(home).publish(MOUNTED)
    config = tmp_path / "disks.toml"
    config.write_text(f'backend = "directory"\nrun_directory = "{home}"\n')
    assert run("disks", "status", "--config", str(config)).code == 0

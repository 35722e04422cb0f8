"""The parser itself: help, usage errors, start-up weight, serve's flags, completion, the generated page."""

from __future__ import annotations

import inspect
import socket
import subprocess
import sys
import time

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from nvcache import __version__
from nvcache.__main__ import cli
from nvcache.cli.completion import SHELLS
from nvcache.cli.disks import disks
from nvcache.cli.serve import serve
from nvcache.settings import TABLES, DiskSettings, Settings
from scripts.gen_cli_docs import render
from tests.unit.cli.conftest import REVISION, job, model

COMMANDS = [
    "affinity",
    "completion",
    "config",
    "df",
    "disks",
    "doctor",
    "evict",
    "hold",
    "jobs",
    "leases",
    "ls",
    "mirror",
    "path",
    "pin",
    "rm",
    "serve",
    "show",
    "ui",
    "unpin",
    "verify",
    "warm",
    "why",
]
HEAVY = ("fastapi", "pydantic", "huggingface_hub", "uvicorn", "rich", "asyncio", "nvcache.settings", "nvcache.engine")


def test_every_command_is_there_and_has_help():
    assert cli.list_commands(click.Context(cli)) == COMMANDS
    for name in COMMANDS:
        shown = CliRunner().invoke(cli, [name, "--help"])
        assert shown.exit_code == 0
        assert shown.output.startswith(f"Usage: cli {name} ")


def test_version(run):
    ran = run("--version")
    assert (ran.code, ran.out) == (0, f"nvcache {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["ls", "--nope"],
        ["warm"],
        ["show"],
        ["warm", "a/b", "c/d", "--as", "x/y"],
        ["warm", "a/b", "--timeout", "0"],
        ["warm", "a/b", "c/d", "--env-file", "env"],
        ["warm", "a/b", "--required", "--or-continue"],
        ["warm", "a/b", "--ttl", "60"],
        ["hold"],
        ["warm", "a/b", "--lease", "--ttl", "86401"],
        ["hold", "a/b", "--ttl", "0.5"],
        ["hold", "a/b", "--ttl", "nan"],
        ["warm", "a/b", "--lease", "--ttl", "nan"],
        ["completion", "tcsh"],
    ],
)
def test_usage_errors_are_exit_2_with_a_hint(run, arguments):
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.err.startswith("nvcache: cannot run nvcache")
    assert "--help` shows how" in ran.err.splitlines()[-1]


def test_without_a_command_it_prints_the_help_alone(run):
    ran = run()
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Usage: nvcache ")
    assert "cannot run" not in ran.err
    names = ran.err.partition("REF: ")[2]
    assert all(name in " ".join(names.split()) for name in ("org/name[@revision]", "az://account/container/prefix", "nvcache ls"))


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan", ""])
def test_a_time_that_is_none_is_told_in_words(run, seconds):
    ran = run("warm", "a/b", "--timeout", seconds)
    assert ran.code == 2
    assert f"{seconds!r} is not a number of seconds greater than 0" in ran.err
    assert "0 or more" in run("warm", "a/b", "--wait-daemon", seconds).err


def test_serve_says_its_defaults():
    shown = " ".join(CliRunner().invoke(cli, ["serve", "--help"]).output.split())
    for text in (
        "[default: ~/.cache/nvcache/store; with backend md or lvm MOUNT/store]",
        "disks smaller than this are not used [default: 100GiB]",
        "each worker (each holds one chunk of 16 MiB) [default: 4]",
        "may be repeated [default: hf://*]",
    ):
        assert text in shown


def complete(words, incomplete=""):
    found = ShellComplete(cli, {}, "nvcache", "_NVCACHE_COMPLETE").get_completions(words, incomplete)
    return [item.value for item in found]


def test_models_and_jobs_are_offered(stub):
    again = model(ref="hf://org/two@" + "f" * 40, revision="f" * 40)
    first, second = model(), model(ref=f"hf://org/two@{REVISION}")
    stub.answer("GET /v1/models", {"models": [first, second, again]})
    names = ["org/name", f"org/two@{REVISION[:12]}", "org/two@ffffffffffff"]
    for command in ("show", "path", "rm", "pin", "unpin", "verify", "warm"):
        assert complete([command]) == names
    assert complete(["show"], "org/t") == names[1:]
    assert complete(["show"], "hf://org/n") == ["hf://org/name"]
    assert complete(["rm", "org/name"], "org/n") == ["org/name"]
    stub.answer("GET /v1/jobs", {"jobs": [job(id="j1"), job("done", id="j2", ended_at="2025-01-02T03:05:00Z")]})
    assert complete(["jobs", "--cancel"]) == ["j1"]


def test_nothing_is_offered_when_no_daemon_answers_at_once(stub, monkeypatch, capfd):
    stub.answer("GET /v1/models", {"models": [model()]})
    assert complete(["--socket", "/nowhere.sock", "show"]) == []
    assert complete(["show", "--socket", "/nowhere.sock"]) == []
    assert complete(["show", "--socket", str(stub.socket)]) == ["org/name"]
    monkeypatch.setenv("NVCACHE_URL", "ftp://x")
    assert complete(["show"]) == []
    monkeypatch.delenv("NVCACHE_URL")
    stub.answer("GET /v1/models", {"models": [{}]})
    assert complete(["show"]) == []
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{stub.socket}-silent")
        silent.listen()
        began = time.monotonic()
        assert complete(["--socket", f"{stub.socket}-silent", "show"]) == []
        assert time.monotonic() - began < 8
    assert capfd.readouterr() == ("", "")


def test_a_bad_reference_is_exit_2_and_says_where(stub, run):
    ran = run("rm", "org/na me")
    assert ran.code == 2
    assert "position" in ran.err
    assert stub.asked == []


def test_nothing_heavy_is_imported_for_commands_that_only_ask():
    code = f"import sys, nvcache.__main__; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


def test_serve_has_a_flag_for_every_scalar_setting():
    options = {param.name: param for param in serve.get_params(click.Context(serve)) if isinstance(param, click.Option)}
    shown = {name for name, option in options.items() if "--help" not in option.opts}
    assert shown == set(Settings.model_fields) - set(TABLES) | {"config"}
    assert all(option.help for option in options.values())
    assert options["direct_io"].secondary_opts == ["--no-direct-io"]
    assert isinstance(options["log_level"].type, click.Choice)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--workers", "many"], "workers"),
        (["--max-bytes", "12 parsecs"], "max_bytes"),
        (["--listen", "127.0.0.1:1"], "listen_token_file"),
        (["--config", "/nowhere/nvcache.toml"], "/nowhere/nvcache.toml"),
        (["--hf-endpoint", "ftp://x"], "hf_endpoint"),
    ],
)
def test_serve_refuses_bad_settings_before_it_starts(run, tmp_path, arguments, why):
    ran = run("serve", "--store", str(tmp_path / "store"), *arguments)
    assert ran.code == 2
    assert ran.err.startswith("nvcache: cannot ")
    assert why in ran.err
    assert not (tmp_path / "store").exists()


def test_serve_takes_no_url(run):
    assert run("--url", "unix:///x", "serve").code == 2


def test_the_settings_of_the_disks_come_last():
    names = [param.name for param in serve.get_params(click.Context(serve)) if param.name in Settings.model_fields]
    disks = set(DiskSettings.model_fields) - set(TABLES)
    assert set(names[-len(disks) :]) == disks
    assert names[0] not in DiskSettings.model_fields


def test_a_flag_that_is_not_given_is_not_a_setting():
    context = serve.make_context("serve", ["--no-direct-io", "--allow", "hf://a/*", "--allow", "hf://b/*"])
    given = {name: value for name, value in context.params.items() if value not in (None, ())}
    assert given == {"direct_io": False, "allow": ("hf://a/*", "hf://b/*")}


def test_debug_shows_the_trace_besides_the_message(run):
    ran = run("--debug", "--socket", "/nowhere.sock", "ls")
    assert ran.code == 9
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("hint: ")


@pytest.mark.parametrize("url", ["ftp://x", "unix://relative", "/run/s.sock"])
def test_an_url_of_another_form_is_exit_2(run, url):
    ran = run("--url", url, "ls")
    assert ran.code == 2
    assert "unix:///path.sock" in ran.err


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts(run, shell):
    ran = run("completion", shell)
    assert ran.code == 0
    assert "_NVCACHE_COMPLETE" in ran.out


def test_the_page_names_every_command_option_and_exit_code():
    page = render()
    context = click.Context(cli, info_name="nvcache")
    for name in COMMANDS:
        assert f"\n### nvcache {name}\n" in page
        command = cli.get_command(context, name)
        assert command is not None
        for param in command.get_params(context):
            assert isinstance(param, click.Argument) or "--help" in param.opts or param.opts[0] in page
    for name, command in disks.commands.items():
        part = page.partition(f"\n### nvcache disks {name}\n")[2].partition("\n### ")[0]
        assert inspect.cleandoc(command.help or "") in part
        assert part.endswith("And the options of `nvcache disks`.\n")
        assert "--min-disk" not in part
    assert page.count("`--yes-destroy`") == 1
    assert "| 130 |" in page
    assert "`digest-mismatch`" in page
    assert page.endswith("\n")
    assert not page.endswith("\n\n")

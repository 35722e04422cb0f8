"""The settings seen as a whole: every fault at once, where each value comes from, written so that they can be read back, the file known again."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as holds
from hypothesis import strategies as st

from nvcache.__main__ import main
from nvcache.errors import ConfigError
from nvcache.settings import Given, Settings, load, take
from nvcache.settings.check import Finding, check
from nvcache.settings.file import MOST_BYTES, Document, glance
from nvcache.settings.gather import Kind
from nvcache.settings.load import Fault, judge
from nvcache.settings.write import lines, plain, shown

HOME = {"HOME": "/home/somebody"}
EVERYTHING = """
store = "/srv/nvcache"
max_bytes = "1.5TiB"
stall_timeout = 2.5
allow = ["hf://org/*", "hf://\\"quoted\\"\\\\?/*"]
hf_endpoint = "http://hub.example:8080/mirror"
disk_exclude = ["S1", "S2"]
direct_io = false
[[models]]
ref = "hf://org/name"
revision = "v1"
pin = true
include = ["*.json"]
[[models]]
ref = "file:///srv/a model"
alias = "org/other"
[tuning.md]
read_ahead = "16MiB"
rq_affinity = 2
"""


def given(tmp_path: Path, toml: str | None = "", *, env: dict[str, str] | None = None, **flags: object) -> Given:
    config = tmp_path / "nvcache.toml"
    if toml is not None:
        config.write_text(toml)
    return Given.of(config=config, flags=flags, environ={**HOME, **(env or {})}, uid=1000)


def faults(tmp_path: Path, toml: str, *, env: dict[str, str] | None = None) -> dict[str, Fault]:
    settings, found = judge(given(tmp_path, toml, env=env).gather())
    assert (settings is None) == bool(found)
    assert len({fault.setting for fault in found}) == len(found), "each is told once"
    return {fault.setting: fault for fault in found}


def test_every_fault_is_found_at_once(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        """
        lanes = 0
        min_free = "much"
        read_ahead = "1MiB"
        listen = "0.0.0.0:80"
        kaito_models = "/srv/store/kaito"
        store = "/srv/store"
        [[models]]
        ref = "a/b/c"
        pni = true
        alias = "../x"
        [[models]]
        ref = "a/b"
        [[models]]
        ref = "a/b@v1"
        revision = "v2"
        [tuning.md]
        read_ahead = "2MiB"
        scheduler = 5
        """,
        env={"NVCACHE_WORKERS": "many", "HF_ENDPOINT": "nowhere"},
    )
    assert set(found) == {
        *("lanes", "min_free", "read_ahead", "listen", "kaito_models", "workers", "hf_endpoint"),
        *("models.0.ref", "models.0.pni", "models.0.alias", "models.2", "tuning.md.scheduler"),
    }
    assert (found["workers"].origin.kind, found["workers"].origin.name) == (Kind.ENVIRONMENT, "NVCACHE_WORKERS")
    assert (found["hf_endpoint"].origin.kind, found["hf_endpoint"].origin.name) == (Kind.ECOSYSTEM, "HF_ENDPOINT")
    assert found["models.2"].origin.name == str(tmp_path / "nvcache.toml")


@pytest.mark.parametrize(
    ("toml", "only"),
    [
        ('listen = "0.0.0.0:80"\nlisten_token_file = 5', "listen_token_file"),
        ('listen = "0.0.0.0:80"\nlisten_scope = "none"', "listen_scope"),
        ("kubernetes = true\nnode_name = 5", "node_name"),
        ('backend = "zfs"\nstore = "/elsewhere"', "backend"),
        ('backend = "md"\nstore = "/elsewhere"\nmount = 5', "mount"),
    ],
)
def test_what_is_wrong_only_for_want_of_something_else_is_not_told(tmp_path: Path, toml: str, only: str) -> None:
    assert set(faults(tmp_path, toml)) == {only}


LINES = """# lanes = 1, min_free
allow = [
  "hf://lanes/*",
  "min_free = 3",
  4,
]
lanes = 0
min_free = "much"
[[models]]
ref = "a/b"
[[models]]
pin = true
[[models]]
# ref = "a b"
ref = "a b"
pni = true
[tuning.md]
"read_ahead" = "much"
[tuning]
lvm = { read_ahead = -1 }
"""


def test_each_fault_is_told_with_its_line(tmp_path: Path) -> None:
    found = faults(tmp_path, LINES)
    assert {name: fault.line for name, fault in found.items()} == {
        "allow.2": 2,
        "lanes": 7,
        "min_free": 8,
        "models.1.ref": 11,  # the table that lacks it
        "models.2.ref": 15,
        "models.2.pni": 16,
        "tuning.md.read_ahead": 18,
        "tuning.lvm.read_ahead": 20,
    }
    assert str(found["lanes"]).endswith(": input should be greater than or equal to 1 (at line 7)")


@holds(
    st.lists(st.sampled_from(['x = """', '"""', "y = [", "]", "# lanes", "lanes = 3", "'lanes',", "[t]", "[lanes]", "lanes.z = 1", ""]), max_size=12)
)
def test_a_line_that_is_told_is_the_one(lines: list[str]) -> None:
    """Whatever stands around it: without that line and what follows the file has no such setting, with it and what belongs to it it has."""
    text = "\n".join(lines)
    try:
        document = Document(tomllib.loads(text), text)
    except tomllib.TOMLDecodeError:
        return
    line = document.line("lanes")
    if line is None:
        assert "lanes" not in document.values or 'x = """' in lines or "y = [" in lines, "it is told where nothing hides it"
        return
    assert "lanes" not in tomllib.loads("\n".join(lines[: line - 1]))
    assert "lanes" in lines[line - 1]
    assert "lanes" in document.values


def test_what_is_no_setting_s_name_has_no_line(tmp_path: Path) -> None:
    """Written in a way that hides it, from elsewhere, or of the hundreds that nobody corrects one by one."""
    found = faults(tmp_path, '"lan\\u0065s" = 0\n"a.b" = 1', env={"NVCACHE_WORKERS": "many"})
    assert {name: fault.line for name, fault in found.items()} == {"lanes": None, "a.b": None, "workers": None}
    many = faults(tmp_path, "".join(f"x{number} = 1\n" for number in range(300)))
    assert sum(fault.line is not None for fault in many.values()) == 20


@pytest.mark.parametrize(
    ("content", "why", "hint"),
    [
        (b"lanes = 3\nmax_bytes = 2TB\n", "(at line 2, column 14)", "texts and sizes stand in quotes"),
        (b"allow = " + b"[" * 100_000, "its brackets are nested too deeply", "correct the file"),
        (b"lanes = 3\n\n# caf\xe9\n", "it is not text in UTF-8 (at line 3)", "UTF-8"),
        (b"#" * (1 << 20) + b"\n", "it is larger than 1 MiB", "--config"),
        (None, "No such file or directory", "--config"),
    ],
)
def test_a_file_that_is_none_says_where_and_what_to_do(tmp_path: Path, content: bytes | None, why: str, hint: str) -> None:
    path = tmp_path / "nvcache.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        take(Given.of(config=path, environ={"HOME": str(tmp_path)}))
    assert str(caught.value).startswith(f"cannot read config file {path}: ")
    assert why in str(caught.value)
    assert hint in caught.value.hint


def test_a_default_of_this_machine_that_cannot_be_used_ends_the_search(tmp_path: Path) -> None:
    found = faults(tmp_path, "lanes = 0", env={"XDG_CACHE_HOME": "~nobody-of-that-name"})
    assert set(found) == {"store", "lanes"}
    assert found["store"].origin.kind is Kind.DEFAULT


@pytest.mark.parametrize(
    ("toml", "hint"),
    [
        ('max-bytes = "2TB"', "did you mean max_bytes?"),
        ('[[model]]\nref = "a/b"', "did you mean models?"),
        ("[[models]]\nref = 'a/b'\nrevison = 'x'", "did you mean revision?"),
        ("[tuning.disks]", "did you mean disk?"),
        ("[tuning.md]\nreadahead = 1", "did you mean read_ahead?"),
        ("[[models]]\nref = 'a/b'\nmin_free = 1", "put min_free above the file's first table: what follows a line in brackets belongs to that table"),
        ("xyzzy = 1", "docs/settings.md has every setting"),
        ('[models]\nref = "a/b"', "begin each of them with a line [[models]]"),
        ('allow = "hf://*"', 'write it in brackets: allow = ["…"]'),
        ("[[models]]\nref = 'a/b'\ninclude = '*.json'", 'write it in brackets: include = ["…"]'),
    ],
)
def test_an_unknown_setting_comes_with_what_was_meant(tmp_path: Path, toml: str, hint: str) -> None:
    (fault,) = faults(tmp_path, toml).values()
    assert fault.hint == hint
    with pytest.raises(ConfigError) as caught:
        take(given(tmp_path, toml))
    assert caught.value.hint == hint


def test_the_first_fault_says_how_many_more_there_are(tmp_path: Path) -> None:
    for toml, hint in (
        ("lanes = 0", "correct the setting named in the message"),
        ("lanes = 0\nworkers = -1", "correct the setting named in the message (`nvcache config check` shows 1 more fault)"),
        ("lanes = 0\nworkers = -1\nmax_bytes = 0", "correct the setting named in the message (`nvcache config check` shows 2 more faults)"),
    ):
        with pytest.raises(ConfigError) as caught:
            take(given(tmp_path, toml))
        assert caught.value.hint == hint


def test_the_origin_of_each_value(tmp_path: Path) -> None:
    env = {
        "HF_ENDPOINT": "http://e",
        "SSL_CERT_FILE": "/e",
        "NVCACHE_CA_FILE": "/n",
        "NVCACHE_LANES": "3",
        "NVCACHE_WORKERS": "",
        "HF_TOKEN_PATH": "",
    }
    found = given(tmp_path, "lanes = 2\nmin_free = 1\n[tuning.md]\n", env=env, min_free=2, stall_timeout=None).gather()
    seen = {name: str(found.origin(name)) for name in ("hf_endpoint", "ca_file", "lanes", "min_free", "tuning", "workers", "store", "stall_timeout")}
    assert seen == {
        "hf_endpoint": "HF_ENDPOINT",
        "ca_file": "NVCACHE_CA_FILE",
        "lanes": "NVCACHE_LANES",
        "min_free": "--min-free",
        "tuning": str(tmp_path / "nvcache.toml"),
        "workers": "default",
        "store": "default",
        "stall_timeout": "default",
    }
    assert found.origin("hf_token_path").kind is Kind.DEFAULT


@pytest.mark.parametrize("flags", [{}, {"backend": "md", "store": None, "mount": "/m"}])
def test_what_is_written_reads_back_the_same(tmp_path: Path, flags: dict[str, Any]) -> None:
    toml = EVERYTHING if not flags else EVERYTHING.replace('store = "/srv/nvcache"', "")
    chosen = take(given(tmp_path, toml, **flags))
    for remarks in ({}, dict.fromkeys(Settings.model_fields, "somewhere")):
        again = tmp_path / "again.toml"
        again.write_text("\n".join(lines(chosen, remarks)))
        assert load(config=again, environ=HOME, uid=1000) == chosen
    assert set(plain(chosen)) == set(Settings.model_fields)
    assert json.loads(json.dumps(plain(chosen)))["max_bytes"] == 3 * 2**39


def test_every_setting_is_written_with_its_origin(tmp_path: Path) -> None:
    text = list(lines(take(given(tmp_path)), {name: f"from <{name}>" for name in Settings.model_fields}))
    for name in set(Settings.model_fields) - {"tuning"}:
        assert sum(line.endswith(f"# from <{name}>") for line in text) == 1, name
    assert sum(line.endswith("# from <tuning>") for line in text) == 3


def test_secrets_in_a_url_are_not_shown() -> None:
    assert shown("https://me:hunter2@h/p?sig=s3cr3t#x") == "https://***@h/p?***"
    assert shown("HTTP://h/p and https://u@h2") == "HTTP://h/p and https://***@h2"
    assert shown("hf://org/na?e") == "hf://org/na?e"


def test_files_that_cannot_be_read_are_warnings(tmp_path: Path) -> None:
    (tmp_path / "full").write_text("secret")
    (tmp_path / "empty").write_text("\n")
    os.mkfifo(tmp_path / "pipe")
    toml = f"""
        hf_token_path = "{tmp_path}/full"
        az_key_file = "{tmp_path}/empty"
        az_sas_file = "{tmp_path}/none"
        ca_file = "{tmp_path}"
        listen_token_file = 5
        [[mirrors]]
        url = "http://h/{{sha256}}"
        token_file = "{tmp_path}/pipe"
    """
    found = check(given(tmp_path, toml.replace("listen_token_file = 5", "")))
    assert {finding.setting: (finding.fatal, finding.message.rpartition(": ")[2]) for finding in found} == {
        "az_key_file": (False, "it is empty"),
        "az_sas_file": (False, "No such file or directory"),
        "ca_file": (False, "it is not a file"),
        "mirrors.0.token_file": (False, "it is not a file"),
    }
    assert "secret" not in str(found)
    wrong = check(given(tmp_path, toml))
    assert [finding.setting for finding in wrong if finding.fatal] == ["listen_token_file"]
    assert {finding.setting for finding in wrong} >= {"az_key_file", "az_sas_file", "ca_file"}


def test_a_variable_that_looks_misspelt_is_a_warning(tmp_path: Path) -> None:
    services = {"NVCACHE_SERVICE_HOST": "10.0.0.1", "NVCACHE_PORT": "tcp://10.0.0.1:80", "NVCACHE_PORT_80_TCP_ADDR": "x", "NVCACHE_URL": "unix:///x"}
    assert check(given(tmp_path, env=services)) == ()
    (found,) = check(given(tmp_path, env={"NVCACHE_MAX_BYTE": "1"}))
    assert (found.fatal, found.hint) == (False, "did you mean NVCACHE_MAX_BYTES?")
    unreadable = check(given(tmp_path, "x = ", env={"NVCACHE_MAX_BYTE": "1"}))
    assert [finding.fatal for finding in unreadable] == [True, False]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    for name in [name for name in os.environ if name.startswith("NVCACHE_")] + ["HF_ENDPOINT", "SSL_CERT_FILE"]:
        monkeypatch.delenv(name, raising=False)

    def command(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return command


def test_config_check(tmp_path: Path, run: Any) -> None:
    config = tmp_path / "x.toml"
    config.write_text("worker = 1\nlanes = 0\nhf_token_path = '/nowhere'\n")
    code, out, err = run("config", "check", config)
    assert code == 2
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["FAIL", "FAIL", "WARN"]
    assert f"cannot use setting worker from config file {config}: there is no such setting (at line 1)" in out
    assert "did you mean workers?" in out
    assert err == f"nvcache: {config}: 2 faults and 1 warning\n"
    code, out, _ = run("config", "check", "--json", config)
    told = json.loads(out)
    assert (code, told["ok"], told["file"]) == (2, False, str(config))
    assert [finding["line"] for finding in told["findings"]] == [1, 2, None], "in the order of the file"
    assert told["findings"][0] == {
        "verdict": "fail",
        "setting": "worker",
        "origin": "file",
        "from": str(config),
        "line": 1,
        "message": f"cannot use setting worker from config file {config}: there is no such setting (at line 1)",
        "hint": "did you mean workers?",
    }
    config.write_text("lanes = 1\n")
    assert run("config", "check", config) == (0, "", f"nvcache: {config}: nothing is wrong\n")
    assert run("config", "check", tmp_path / "none")[0] == 2
    code, out, _ = run("config", "check", "--json", tmp_path / "none")
    assert [finding["setting"] for finding in json.loads(out)["findings"]] == [None]


def test_config_show(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "x.toml"
    config.write_text("lanes = 7\n[[models]]\nref = 'a/b'\n")
    monkeypatch.setenv("NVCACHE_CONFIG", str(config))
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    code, out, err = run("config", "show", "--origin", "--workers", "3", "--no-direct-io")
    assert (code, err) == (0, "")
    remarks = {line.partition(" = ")[0]: line.rpartition("  # ")[2] for line in out.splitlines() if "  # " in line}
    assert (remarks["lanes"], remarks["workers"], remarks["direct_io"], remarks["log_level"]) == (
        f"{config}:1",
        "--workers",
        "--direct-io",
        "default",
    )
    assert f"# {config}:2" in next(line for line in out.splitlines() if line.startswith("[[models]]"))
    code, out, _ = run("config", "show", "--json", "--origin")
    told = json.loads(out)
    assert told["lanes"] == {"value": 7, "origin": "file", "from": str(config), "line": 1}
    assert told["listen"] == {"value": None, "origin": "default", "from": None, "line": None}
    assert told.keys() == Settings.model_fields.keys()
    assert json.loads(run("config", "show", "--json")[1])["models"][0]["ref"] == "a/b"
    assert "s3cr3t" not in out
    config.write_text("lanes = 0\n")
    assert run("config", "show")[0] == 2


def test_findings_have_no_value(tmp_path: Path) -> None:
    """A secret in the wrong place is not repeated."""
    found = check(given(tmp_path, 'workers = "s3cr3t"\nhf_endpoint = "https://me:s3cr3t@hub"\nlog_level = "s3cr3t"\ns = "s3cr3t"'))
    assert len([finding for finding in found if isinstance(finding, Finding) and finding.fatal]) == 4
    assert "s3cr3t" not in str(found)


@pytest.mark.parametrize("url", ["https://me:s3cr3t/part@hub", "https://me:1/s3cr3t@hub"])
def test_a_password_with_a_slash_is_not_repeated_either(tmp_path: Path, url: str) -> None:
    mirror = f'[[mirrors]]\nurl = "{url}/{{sha256}}"\n' if ":s3" in url else ""
    found = check(given(tmp_path, f'hf_endpoint = "{url}"\n{mirror}'))
    assert [finding.setting for finding in found if finding.fatal] == ["hf_endpoint", *(["mirrors.0.url"] if mirror else [])]
    assert "s3cr3t" not in str(found)


def test_the_file_is_known_again(tmp_path: Path) -> None:
    """As a mounted ConfigMap changes: a link to a directory is put in place of another."""
    for name, text in (("one", "a"), ("same", "a"), ("two", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.toml").write_text(text)
    data, path = tmp_path / "..data", tmp_path / "x.toml"
    data.symlink_to("one")
    path.symlink_to("..data/x.toml")

    def swap(to: str) -> None:
        (tmp_path / "..tmp").symlink_to(to)
        (tmp_path / "..tmp").replace(data)

    first = glance(path)
    assert glance(path, first) is first
    swap("same")
    same = glance(path, first)
    assert (same.content, same == first) == (first.content, False)
    swap("two")
    assert glance(path, same).content != same.content
    swap("none")
    gone = glance(path, same)
    assert gone == glance(path, gone)
    assert gone.content != same.content
    path.unlink()
    os.mkfifo(path)
    assert glance(path).content == "it is not a file"
    path.unlink()
    path.write_bytes(b"#" * MOST_BYTES)
    fits = glance(path)
    path.write_bytes(b"#" * (MOST_BYTES + 1))
    assert (fits.identity == (), glance(path).identity == ()) == (False, True)

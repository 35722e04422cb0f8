"""Settings: one precedence, sizes as people write them, and every bad value refused by name, place and reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvcache import settings
from nvcache.core.tuning import Tuning
from nvcache.environment import client_url
from nvcache.errors import Code, ConfigError
from nvcache.settings import Settings, child_environment, format_size, hub_token, load, parse_size, proxies

HOME = {"HOME": "/home/somebody"}


def loaded(tmp_path: Path, toml: str = "", *, env: dict[str, str] | None = None, uid: int = 1000, **flags: object) -> Settings:
    config = tmp_path / "nvcache.toml"
    config.write_text(toml)
    return load(config=config, flags=flags, environ={**HOME, **(env or {})}, uid=uid)


def refused(tmp_path: Path, toml: str = "", *, env: dict[str, str] | None = None, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, toml, env=env, **flags)
    assert caught.value.code is Code.BAD_CONFIG
    return str(caught.value)


def test_without_any_setting_a_user_gets_a_store_of_their_own() -> None:
    chosen = load(environ=HOME, uid=1000)
    assert chosen.store == Path("/home/somebody/.cache/nvcache/store")
    assert chosen.socket == Path("/tmp/nvcache-1000/nvcache/nvcache.sock")
    assert (chosen.admin_socket, chosen.listen, chosen.max_bytes) == (None, None, None)
    assert chosen.hf_endpoint == "https://huggingface.co"
    assert load(environ={**HOME, "XDG_CACHE_HOME": "/c", "XDG_RUNTIME_DIR": "/r"}, uid=1000).store == Path("/c/nvcache/store")


def test_root_gets_the_systems_sockets() -> None:
    assert load(environ=HOME, uid=0).admin_socket == Path("/run/nvcache/admin.sock")
    assert load(environ={**HOME, "NVCACHE_ADMIN_SOCKET": "/x/a.sock"}, uid=0).admin_socket == Path("/x/a.sock")
    assert load(environ={**HOME, "NVCACHE_SOCKET": "/x/s.sock"}, uid=0).admin_socket is None


@pytest.mark.parametrize("upto", range(5))
def test_a_flag_beats_the_environment_beats_the_file_beats_the_ecosystem(tmp_path: Path, upto: int) -> None:
    env = [("HF_ENDPOINT", "http://ecosystem"), ("NVCACHE_HF_ENDPOINT", "http://environment")]
    chosen = loaded(
        tmp_path,
        'hf_endpoint = "http://file"' if upto >= 2 else "",
        env=dict([env[0]] * (upto >= 1) + [env[1]] * (upto >= 3)),
        hf_endpoint="http://flag" if upto >= 4 else None,
    )
    assert chosen.hf_endpoint == ["https://huggingface.co", "http://ecosystem", "http://file", "http://environment", "http://flag"][upto]


@pytest.mark.parametrize("name", sorted(set(Settings.model_fields) - set(settings.TABLES)))
def test_every_scalar_setting_is_read_from_the_environment(tmp_path: Path, name: str) -> None:
    values = {"listen_scope": "admin", "log_level": "debug", "log_format": "json", "hf_endpoint": "http://h", "allow": "a, b"}
    values |= {
        "backend": "lvm",
        "filesystem": "ext4",
        "on_lost": "refuse",
        "store_owner": "7:7",
        "az_credential": "identity",
        "mount": "/7",
        "run_directory": "/7",
        "evict_high": "0.97",
        "evict_low": "0.5",
        "scrub_days": "3",
    }
    default = Settings.model_fields[name].default
    value = str(not default).lower() if isinstance(default, bool) else values.get(name, "7")
    needed = {"listen": {"NVCACHE_LISTEN_TOKEN_FILE": "/t"}, "kubernetes": {"NVCACHE_NODE_NAME": "n"}}
    needed["share_blobs"] = {"NVCACHE_LISTEN": "127.0.0.1:80", **needed["listen"]}
    env = {f"NVCACHE_{name.upper()}": value, **needed.get(name, {})}
    chosen, default = loaded(tmp_path, env=env), loaded(tmp_path)
    assert getattr(chosen, name) != getattr(default, name)
    assert loaded(tmp_path, env={f"NVCACHE_{name.upper()}": ""}) == default


@pytest.mark.parametrize("env", [{"NVCACHE_BACKEND": "md"}, {"NVCACHE_BACKEND": "lvm"}, {"NVCACHE_FOLLOW": "1"}])
def test_on_a_stripe_the_store_is_in_its_mount(env: dict[str, str]) -> None:
    assert load(environ={**HOME, **env}).store == Path("/var/lib/nvcache/mnt/store")
    assert load(environ={**HOME, **env, "NVCACHE_MOUNT": "/m"}).store == Path("/m/store")
    assert load(environ={**HOME, **env, "NVCACHE_MOUNT": "/m", "NVCACHE_STORE": "/m/store"}).store == Path("/m/store")


def test_elsewhere_the_mount_does_not_matter() -> None:
    assert load(environ={**HOME, "NVCACHE_MOUNT": "/m"}).store == Path("/home/somebody/.cache/nvcache/store")
    assert load(environ={**HOME, "NVCACHE_BACKEND": "directory", "NVCACHE_STORE": "/mnt/nvme/cache"}).store == Path("/mnt/nvme/cache")


def test_serial_numbers_and_models_are_compared_without_blanks_around(tmp_path: Path) -> None:
    chosen = loaded(tmp_path, 'disk_models = ["My Disk  "]\ndisk_exclude = [" S1"]')
    assert (chosen.disk_models, chosen.disk_exclude) == (("My Disk",), ("S1",))
    assert loaded(tmp_path, env={"NVCACHE_DISK_EXCLUDE": "S1, S2,"}).disk_exclude == ("S1", "S2")


def test_every_setting_is_described() -> None:
    every = (Settings, settings.ModelSetting, settings.TuningSettings, settings.QueueSettings)
    assert [name for model in every for name, field in model.model_fields.items() if not field.description] == []


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    chosen = loaded(
        tmp_path,
        """
        store = "~/models"
        max_bytes = "1.5TiB"
        min_free = 1000
        az_bandwidth = "250MB"
        allow = ["hf://org/*"]
        direct_io = false
        [[models]]
        ref = "org/name"
        revision = "v1"
        pin = true
        [[models]]
        ref = "file:///srv/model"
        alias = "org/other"
        """,
    )
    assert chosen.store == Path("~/models").expanduser()
    assert (chosen.max_bytes, chosen.min_free, chosen.allow, chosen.direct_io) == (3 * 2**39, 1000, ("hf://org/*",), False)
    assert (chosen.az_bandwidth, chosen.hf_bandwidth) == (250_000_000, None)
    assert [(model.ref, model.revision, model.pin, model.alias) for model in chosen.models] == [
        ("org/name", "v1", True, None),
        ("file:///srv/model", None, False, "org/other"),
    ]


@pytest.mark.parametrize(
    ("toml", "env", "message"),
    [
        ("stores = 1", {}, "cannot use setting stores from config file {file}: there is no such setting"),
        ("max_bytes = true", {}, "cannot use setting max_bytes from config file {file}: true is no value of it"),
        ("workers = false", {}, "cannot use setting workers from config file {file}: false is no value of it"),
        ("", {"NVCACHE_MAX_BYTES": "lots"}, "cannot use setting max_bytes from the environment: 'lots' is not a size such as 140GB or 2TiB"),
        ("max_bytes = -1", {}, "cannot use setting max_bytes from config file {file}: input should be greater than 0"),
        ("", {"NVCACHE_WORKERS": "65"}, "cannot use setting workers from the environment: input should be less than or equal to 64"),
        ("", {"NVCACHE_LANES": "0"}, "cannot use setting lanes from the environment: input should be greater than or equal to 1"),
        ("store = 5", {}, "cannot use setting store from config file {file}: "),
        ('store = "~nobody-of-that-name/x"', {}, "cannot use setting store from config file {file}: "),
        ("socket = 5", {}, "cannot use setting socket from config file {file}: "),
        ('log_level = "loud"', {}, "cannot use setting log_level from config file {file}: input should be 'debug', 'info', 'warning' or 'error'"),
        ("", {"NVCACHE_MOUNT": "mnt"}, "cannot use setting mount from the environment: it is not an absolute path below /"),
        ('mount = "/x/.."', {}, "cannot use setting mount from config file {file}: it is not an absolute path below /"),
        ("", {"NVCACHE_STORE_OWNER": "nobody"}, "cannot use setting store_owner from the environment: it is not of the form uid:gid, in numbers"),
        ("expected_disks = 0", {}, "cannot use setting expected_disks from config file {file}: input should be greater than or equal to 1"),
        ('min_disk = "many"', {}, "cannot use setting min_disk from config file {file}: 'many' is not a size such as 140GB or 2TiB"),
        ('backend = "zfs"', {}, "cannot use setting backend from config file {file}: input should be 'directory', 'md' or 'lvm'"),
        (
            'backend = "directory"',
            {"NVCACHE_FOLLOW": "yes"},
            "cannot use setting follow from the environment: with backend directory there is no stripe to follow",
        ),
        (
            'backend = "md"\nmount = "/m"',
            {"NVCACHE_STORE": "/m/other"},
            "cannot use setting store from the environment: with backend md the store is /m/store",
        ),
        (
            'kaito_models = "/etc/kaito"',
            {},
            "cannot use setting kaito_models from config file {file}: it is, holds or lies in a directory of the system",
        ),
        (
            "",
            {"NVCACHE_KAITO_MODELS": "/"},
            "cannot use setting kaito_models from the environment: it is, holds or lies in a directory of the system",
        ),
        (
            'store = "/srv/store"\nkaito_models = "/srv/store/kaito"',
            {},
            "cannot use setting kaito_models from config file {file}: it lies in the store, whose views it is to lead to",
        ),
        ("", {"NVCACHE_LISTEN": "127.0.0.1:80"}, "cannot use setting listen from the environment: to listen on TCP needs listen_token_file"),
        ("", {"HF_ENDPOINT": "huggingface.co"}, "cannot use setting hf_endpoint from the environment: it is not an http(s) URL"),
        ("", {"HF_ENDPOINT": "http://[x"}, "cannot use setting hf_endpoint from the environment: "),
        ('[[models]]\nref = "a/b/c"', {}, "cannot use setting models.0.ref from config file {file}: cannot read model reference 'a/b/c': "),
        ('[[models]]\nref = "a/b@v1"\nrevision = "v2"', {}, "cannot use setting models.0 from config file {file}: cannot read model reference"),
        ('[[models]]\nref = "file:///x"\nalias = "../x"', {}, "cannot use setting models.0.alias from config file {file}: cannot "),
        ('[[models]]\nname = "a/b"', {}, "cannot use setting models.0.ref from config file {file}: field required"),
        ("[tuning.raid5]", {}, "cannot use setting tuning.raid5 from config file {file}: there is no such setting"),
        ("[tuning.md]\nnr_requests = 64", {}, "cannot use setting tuning.md.nr_requests from config file {file}: there is no such setting"),
        ("[tuning]\nmd = 4", {}, "cannot use setting tuning.md from config file {file}: it is not a table"),
        ("tuning = 4", {}, "cannot use setting tuning from config file {file}: it is not a table"),
        ('allow = "hf://*"', {}, "cannot use setting allow from config file {file}: it is not a list"),
        (
            '[tuning.md]\nread_ahead = "much"',
            {},
            "cannot use setting tuning.md.read_ahead from config file {file}: 'much' is not a size such as 140GB or 2TiB",
        ),
        (
            "[tuning.lvm]\nread_ahead = -1",
            {},
            "cannot use setting tuning.lvm.read_ahead from config file {file}: input should be greater than or equal to 0",
        ),
        (
            '[tuning.disk]\nscheduler = "mq deadline"',
            {},
            "cannot use setting tuning.disk.scheduler from config file {file}: it is not the name of a scheduler",
        ),
        ("[tuning.md]\nscheduler = 5", {}, "cannot use setting tuning.md.scheduler from config file {file}: input should be a valid string"),
        ("[tuning.md]\nrq_affinity = 3", {}, "cannot use setting tuning.md.rq_affinity from config file {file}: input should be 0, 1 or 2"),
        (
            'read_ahead = "8MiB"\n[tuning.lvm]\nread_ahead = "8MiB"',
            {},
            "cannot use setting read_ahead from config file {file}: tuning.lvm.read_ahead is there as well",
        ),
        ("store = ", {}, "cannot read config file {file}: "),
    ],
)
def test_a_bad_value_is_refused_by_name_place_and_reason(tmp_path: Path, toml: str, env: dict[str, str], message: str) -> None:
    assert refused(tmp_path, toml, env=env).startswith(message.format(file=tmp_path / "nvcache.toml"))


def test_the_table_of_queue_settings(tmp_path: Path) -> None:
    table = '[tuning.md]\nread_ahead = "16MiB"\nrq_affinity = 2\n[tuning.lvm]\nscheduler = "kyber"\n'
    chosen = loaded(tmp_path, table)
    assert chosen.tuning_of("md") == Tuning(16 << 20, "none", 2)
    assert chosen.tuning_of("lvm") == Tuning(None, "kyber", None)
    assert chosen.tuning_of("disk") == Tuning(None, "none", None)


@pytest.mark.parametrize("given", ["file", "environment", "flag"])
def test_the_short_form_of_the_read_ahead_counts_before_the_table(tmp_path: Path, given: str) -> None:
    """In one file both would contradict each other; a variable or a flag counts before the file as it does for every setting."""
    file = 'read_ahead = "2MiB"' if given == "file" else '[tuning.md]\nread_ahead = "16MiB"'
    env = {"NVCACHE_READ_AHEAD": "2MiB"} if given == "environment" else {}
    chosen = loaded(tmp_path, file, env=env, read_ahead="2MiB" if given == "flag" else None)
    assert [chosen.tuning_of(kind).read_ahead for kind in ("md", "lvm", "disk")] == [2 << 20] * 3


def test_a_bad_flag_is_said_to_come_from_the_command_line(tmp_path: Path) -> None:
    assert refused(tmp_path, "workers = 1", workers="x").startswith("cannot use setting workers from the command line: ")


def test_a_password_in_a_setting_is_refused_and_not_repeated(tmp_path: Path) -> None:
    message = refused(tmp_path, env={"HF_ENDPOINT": "https://somebody:hunter2@hub.example"})
    assert "hf_token_path" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("made", ["missing", "directory", "binary", "endless"])
def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path, made: str) -> None:
    config = tmp_path / "x.toml"
    if made == "directory":
        config.mkdir()
    elif made == "binary":
        config.write_bytes(b"\xff\xfe")
    elif made == "endless":
        config.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"^cannot read config file .*x\.toml: ") as caught:
        load(environ={**HOME, "NVCACHE_CONFIG": str(config)})
    assert caught.value.code is Code.BAD_CONFIG


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("140GB", 140 * 10**9),
        ("140 gb", 140 * 10**9),
        ("2TiB", 2**41),
        ("1.5 GiB", 3 * 2**29),
        ("0.1K", 100),
        ("64M", 64 * 10**6),
        ("7B", 7),
        ("9007199254740993", 2**53 + 1),
        ("1.000000001GB", 10**9 + 1),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e3", "inf", "nan", "1_000", "1,5GB", "1.GB", ".5GB", "5XB", "5IB", "5GBB", "٣GB", "0x10", "5 G i B!"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 140GB or 2TiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (1, "1"), (1000, "1KB"), (2**30 * 100, "100GiB"), (1536, "1536"), (1024000, "1024KB"), (10**15, "1000TB")]
)
def test_sizes_are_written_the_shortest_way(size: int, text: str) -> None:
    assert format_size(size) == text


@given(
    st.integers(0, 2**70) | st.builds(lambda n, base, power: n * base**power, st.integers(0, 5000), st.sampled_from((1000, 1024)), st.integers(0, 4))
)
def test_a_size_that_was_written_reads_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError as error:
        assert "is not a size" in str(error)  # noqa: PT017 - some texts are sizes


def test_the_hub_token_is_read_anew_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    chosen = loaded(tmp_path, f'hf_token_path = "{file}"')
    assert hub_token(chosen, {}) is None
    file.write_text(" first\n")
    assert hub_token(chosen, {}) == "first"
    file.write_text("second\n")
    assert hub_token(chosen, {}) == "second"
    assert hub_token(chosen, {"HF_TOKEN": "third "}) == "third"
    assert hub_token(chosen, {"HF_TOKEN": ""}) == "second"
    file.unlink()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("fourth")
    assert hub_token(loaded(tmp_path), {"HF_HOME": str(tmp_path / "home")}) == "fourth"


def test_proxies_are_read_as_curl_reads_them() -> None:
    env = {"https_proxy": "http://low:1", "HTTPS_PROXY": "http://up:1", "ALL_PROXY": "socks://x", "NO_PROXY": "localhost", "http_proxy": ""}
    assert proxies(env) == {"https": "http://low:1", "all": "socks://x", "no": "localhost"}


def test_a_worker_is_given_no_secret() -> None:
    env = {"PATH": "/bin", "HOME": "/h", "HF_TOKEN": "secret", "HTTPS_PROXY": "http://u:p@x", "AWS_SECRET_ACCESS_KEY": "x", "NVCACHE_STORE": "/s"}
    assert child_environment(env) == {"PATH": "/bin", "HOME": "/h"}


def test_clients_find_the_daemon(tmp_path: Path) -> None:
    assert client_url({"NVCACHE_URL": "http://h:1", "NVCACHE_SOCKET": "/s"}) == "http://h:1"
    assert client_url({"NVCACHE_SOCKET": "/s/n.sock"}) == "unix:///s/n.sock"
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    socket = tmp_path / "nvcache" / "nvcache.sock"
    socket.parent.mkdir()
    socket.touch()
    assert client_url(runtime, uid=1000) == f"unix://{socket}"
    socket.with_name("admin.sock").touch()
    assert client_url(runtime, uid=1000) == f"unix://{tmp_path}/nvcache/admin.sock"


@pytest.mark.parametrize(
    ("flags", "setting"),
    [({"kubernetes": "true"}, "kubernetes"), ({"listen": ":1"}, "listen"), ({"listen": ":1", "listen_scope": "read"}, "listen")],
)
def test_what_needs_another_setting_says_so(tmp_path: Path, flags: dict[str, str], setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot use setting {setting} from the command line: .* needs"):
        loaded(tmp_path, **flags)


def test_metrics_alone_need_no_token(tmp_path: Path) -> None:
    assert loaded(tmp_path, listen="0.0.0.0:9469", listen_scope="metrics").listen_token_file is None


@pytest.mark.parametrize("key", ["bad taint!", "nvcache.io/not-ready=true:NoSchedule", "/x", "a/b/c", f"{'a' * 254}/x", "x" * 64])
def test_what_is_no_key_of_a_taint_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="cannot use setting startup_taint from the command line: it is not the key of a taint"):
        loaded(tmp_path, startup_taint=key)


def test_a_taint_of_the_cluster_autoscaler(tmp_path: Path) -> None:
    key = "startup-taint.cluster-autoscaler.kubernetes.io/nvcache"
    assert loaded(tmp_path, startup_taint=key).startup_taint == key

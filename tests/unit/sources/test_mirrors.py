"""What a mirror's URL may be, and where it leads for a file; what is sent along, and what is not shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvcache.core.plan import RemoteFile
from nvcache.core.ref import parse_ref
from nvcache.errors import Code, ConfigError
from nvcache.settings import load
from nvcache.sources.base import remote_from_dict, remote_to_dict
from nvcache.sources.http import Transport
from nvcache.sources.mirrors import Mirror, impatient

SHA = "ab" * 32
COMMIT = "c" * 40
HUB = parse_ref(f"hf://acme/m.x@{COMMIT}")
BLOBS = parse_ref("az://account/container/prefix")
FILE = RemoteFile("sub dir/w#1?.safetensors", 10, SHA)


def url(template: str) -> str:
    return Mirror("near", template).locate(HUB, FILE, SHA).url


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("http://near:9470/v1/blobs/{sha256}", f"http://near:9470/v1/blobs/{SHA}"),
        (
            "https://acct.blob.core.windows.net/models/{model}/{path}",
            "https://acct.blob.core.windows.net/models/acme/m.x/sub%20dir/w%231%3F.safetensors",
        ),
        ("https://hub.mirror/{model}/resolve/{revision}/{path}", f"https://hub.mirror/acme/m.x/resolve/{COMMIT}/sub%20dir/w%231%3F.safetensors"),
        ("http://[fd00::1]:80/{sha256}?x={model}", f"http://[fd00::1]:80/{SHA}?x=acme/m.x"),
    ],
)
def test_where_a_file_is(template: str, expected: str) -> None:
    assert url(template) == expected


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("http://near/{sha-256}", "there is no {sha-256}"),
        ("http://near/blobs", "needs {sha256}"),
        ("http://near/{model}", "needs {sha256}"),
        ("http://near/{path}", "{path} needs {model}"),
        ("http://near/{sha256", "brace"),
        ("http://near/{sha256}}", "brace"),
        ("http://near/{{sha256}}", "brace"),
        ("http://{model}/{sha256}", "host"),
        ("ftp://near/{sha256}", "http"),
        ("near/{sha256}", "http"),
        ("http:///{sha256}", "http"),
        ("http://user:word@near/{sha256}", "token_file"),
        ("https://acct.blob.core.windows.net/{sha256}?sv=1&sig=abc", "token_file"),
        ("https://near/{sha256}?SIG=", "token_file"),
        ("https://near/{sha256}#part", "#fragment"),
        ("https://near/a b/{sha256}?code=x", "no spaces"),
        ("", "needs {sha256}"),
    ],
)
def test_what_is_no_template(template: str, why: str) -> None:
    with pytest.raises(ValueError, match=why.replace("{", r"\{")):
        Mirror("near", template)


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="port"):
        Mirror("near", "http://near:99999/{sha256}")


def test_names_lead_only_to_models_of_the_hub() -> None:
    """A mirror that is asked by name would be told paths of this node, or find another model's files."""
    assert Mirror("near", "http://near/{sha256}").knows(BLOBS)
    assert not Mirror("near", "http://near/{model}/{path}").knows(BLOBS)
    assert not Mirror("near", "http://near/{sha256}/{model}").knows(parse_ref("file:///srv/secret"))
    assert Mirror("near", "http://near/{model}/{path}").knows(HUB)


@pytest.mark.parametrize(
    ("secret", "headers", "query"),
    [
        ("word\n", (("Authorization", "Bearer word"),), ""),
        ("?sv=2024&sig=x%3D\n", (), "?sv=2024&sig=x%3D"),
        ("sp=r&sv=2024&sig=x%3D", (), "?sp=r&sv=2024&sig=x%3D"),
        ("c2lnPQ.sig==", (("Authorization", "Bearer c2lnPQ.sig=="),), ""),
    ],
)
def test_what_opens_it(tmp_path: Path, secret: str, headers: tuple[tuple[str, str], ...], query: str) -> None:
    """A bearer token is a header, a SAS goes behind the URL; neither is ever shown, and both survive the way to a worker."""
    (tmp_path / "token").write_text(secret)
    remote = Mirror("near", "http://near/{sha256}", tmp_path / "token").locate(HUB, FILE, SHA)
    assert (remote.headers, remote.url) == (headers, f"http://near/{SHA}{query}")
    assert remote.stay
    assert "word" not in repr(remote)
    assert "sig" not in repr(remote)
    assert remote_from_dict(json.loads(json.dumps(remote_to_dict(remote)))) == remote


@pytest.mark.parametrize("secret", ["", "two words", "a\nb", "\x00"])
def test_a_token_that_is_none(tmp_path: Path, secret: str) -> None:
    (tmp_path / "token").write_text(secret)
    with pytest.raises(ConfigError, match="mirror near") as caught:
        Mirror("near", "http://near/{sha256}", tmp_path / "token").locate(HUB, FILE, SHA)
    assert secret == "" or secret not in str(caught.value)


def test_little_patience() -> None:
    """Never more than for sources, and a rate that a read has to keep up whatever the operator's patience."""
    usual, hasty = impatient(Transport()), impatient(Transport(connect_timeout=0.5, stall_timeout=1.0, deadline=3.0))
    assert (usual.connect_timeout, usual.stall_timeout, usual.insists) == (2.0, 5.0, False)
    assert (hasty.connect_timeout, hasty.stall_timeout, hasty.deadline) == (0.5, 1.0, 3.0)
    assert usual.stall_bytes / usual.stall_timeout == hasty.stall_bytes / hasty.stall_timeout == 2**20


def settings_of(tmp_path: Path, text: str) -> object:
    (tmp_path / "n.toml").write_text(text)
    return load(config=tmp_path / "n.toml", environ={"HOME": str(tmp_path)}, uid=1000)


def test_the_tables(tmp_path: Path) -> None:
    """In order, with a name of their own or the host's."""
    settings = load(
        flags={"mirrors": ({"url": "http://near:9470/{sha256}"}, {"url": "http://b/{sha256}", "name": "far", "token_file": "/t"})},
        environ={"HOME": str(tmp_path)},
        uid=1000,
    )
    assert [each.mirror.name for each in settings.mirrors] == ["near:9470", "far"]
    assert settings.mirrors[1].mirror.token_file == Path("/t")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[[mirrors]]\nurl = "http://near/{sha}"', "mirrors.0.url .*there is no {sha}"),
        ('[[mirrors]]\nurl = "http://u:p@near/{sha256}"', "mirrors.0.url .*token_file"),
        ('[[mirrors]]\nurl = "http://near/{sha256}"\n[[mirrors]]\nurl = "http://near/x/{sha256}"', "mirrors .*two are called near; give them names"),
        ('[[mirrors]]\nurl = "http://near/{sha256}"\nname = "a b"', "mirrors.0.name"),
        ('[[mirrors]]\nurl = "http://near/{sha256}"\ntoken_file = "t"', "mirrors.0.token_file .*absolute"),
        ('[[mirrors]]\nurl = "http://near/{sha256}"\ntoken = "t"', "mirrors.0.token .*no such setting"),
        ("[[mirrors]]\nname = 'near'", "mirrors.0.url"),
        ("share_blobs = true", "share_blobs .*to share needs listen"),
        ('share_blobs = true\nlisten = "127.0.0.1:1"\nlisten_scope = "metrics"', "share_blobs .*to share needs listen"),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        settings_of(tmp_path, text)
    assert caught.value.code is Code.BAD_CONFIG
    assert "u:p" not in str(caught.value)

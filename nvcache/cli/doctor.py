"""`nvcache doctor`: checks the set-up and says what to do about what is wrong. It mends nothing."""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import click

from nvcache import __version__
from nvcache.cli import output
from nvcache.cli.daemon import Daemon, Json, connected, daemon
from nvcache.cli.exits import Exit
from nvcache.client import Problem
from nvcache.errors import ConfigError

if TYPE_CHECKING:
    from nvcache.cli.checks import Finding
    from nvcache.settings import Settings


THIS_SHELL = " (this shell)"


@click.command()
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="the daemon's TOML file (NVCACHE_CONFIG)")
@click.option("--json", "json_", is_flag=True, help="the findings as JSON")
@connected
def doctor(*, config: Path | None, json_: bool) -> int:
    """Check the set-up: daemon, store, socket, Hub, limits.

    Each line is OK, WARN or FAIL, with a remedy; exit 1 if anything fails. A model that does not come is often found here.
    """
    findings = list(examine(config, daemon()))
    failed = any(finding.verdict == "fail" for finding in findings)
    if json_:
        output.as_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    else:
        output.table(
            ["", "CHECK", "FOUND", "WHAT TO DO"],
            [(output.state(finding.verdict.upper()), finding.check, finding.detail, finding.remedy) for finding in findings],
        )
    return Exit.INTERNAL if failed else Exit.OK


def examine(config: Path | None, asked: Daemon) -> Iterator[Finding]:
    """All checks, in the order a person would make them."""
    from nvcache import settings
    from nvcache.cli import checks

    yield checks.ok("nvcache", f"{__version__} on Python {platform.python_version()}, {platform.system()} {platform.release()}")
    chosen: Settings | None = None
    try:
        chosen = settings.load(config=config)
    except ConfigError as error:
        yield checks.fail("settings", str(error), error.hint)
    where = urlsplit(asked.url)
    if where.scheme == "unix":
        yield checks.socket(Path(unquote(where.path)))
    found = yield from _daemon(asked)
    striped = chosen is not None and (chosen.follow or chosen.backend in ("md", "lvm"))
    if found is not None:
        yield from checks.stripe(found)
        striped = False
    elif striped:
        yield checks.warn("stripe", "unknown while no daemon answers", checks.SEE_DISKS)
    root = Path(found["path"]) if found and found.get("path") else chosen.store if chosen and not striped else None
    if root:
        yield from checks.store(root)
    yield from _sources(asked, chosen)
    if chosen is not None:
        yield from _azure(chosen)
        if chosen.kaito_models is not None:
            yield from _kaito(chosen.kaito_models, asked)
    yield checks.descriptors()


def _sources(asked: Daemon, chosen: Settings | None) -> Iterator[Finding]:
    """The Hub, its token, proxies and Xet as the daemon says; as this shell would have them, and marked so, when it does not."""
    from nvcache import settings
    from nvcache.cli import checks

    through = settings.proxies()
    try:
        (hub,) = [source for source in asked.get("/v1/sources")["sources"] if source["scheme"] == "hf"]
        mark = ""
    except (Problem, KeyError, ValueError):
        if chosen is None:
            return
        hub = {"endpoint": chosen.hf_endpoint, "token": settings.hub_token(chosen) is not None, "no_proxy": "no" in through}
        hub |= {"proxies": settings.proxy_hosts(through), "xet": importlib.util.find_spec("hf_xet") is not None}
        mark = THIS_SHELL
    for finding in (checks.proxy(hub["proxies"], hub["no_proxy"]), checks.token(hub["token"]), checks.xet(hub["xet"])):
        yield replace(finding, detail=finding.detail + mark)
    for finding in checks.hub(hub["endpoint"], chosen.ca_file if chosen else None, through):
        yield replace(finding, detail=finding.detail + THIS_SHELL) if finding.check == "hub" else finding  # it is asked from here in any case


def _azure(chosen: Settings) -> Iterator[Finding]:
    """Azure's secrets as this shell would have them, and marked so: the daemon tells nobody what it has."""
    from nvcache import settings
    from nvcache.cli import checks, checks_azure

    try:
        access = settings.azure_access(chosen)
    except ConfigError as error:
        yield checks.fail("azure", str(error) + THIS_SHELL, error.hint)
        return
    for finding in checks_azure.secrets(access, time.time()):
        yield replace(finding, detail=finding.detail + THIS_SHELL)


def _kaito(directory: Path, asked: Daemon) -> Iterator[Finding]:
    from nvcache.cli import checks_kaito

    try:
        models = asked.get("/v1/models")["models"]
    except (Problem, KeyError):
        models = []  # what is wrong with the daemon was told above
    yield from checks_kaito.links(directory, models)


def _daemon(asked: Daemon) -> Generator[Finding, None, Json | None]:
    """Whether a daemon answers, is of this version and is ready; returns what its store lies on."""
    from nvcache.cli import checks

    try:
        theirs = asked.get("/version")["version"]
    except Problem as problem:
        yield checks.fail("daemon", problem.detail, problem.hint)
        return None
    if theirs == __version__:
        yield checks.ok("daemon", f"answers at {asked.url}")
    else:
        yield checks.warn("daemon", f"is version {theirs}, this command is {__version__}", "restart the daemon after an upgrade")
    try:
        if withdrawn := asked.get("/readyz").get("degraded"):
            found = f"{output.count(withdrawn, 'model')} withdrawn: bytes went bad or are gone"
            yield checks.warn("models", found, "`nvcache ls` tells which, `nvcache show REF` why it is not mended yet")
    except Problem as problem:
        yield checks.fail("ready", "; ".join(problem.document.get("problems", [])) or problem.detail, problem.hint or "look at the daemon's log")
    try:
        return asked.get("/v1/stripe")
    except Problem:
        return None  # what is wrong with the daemon was told above

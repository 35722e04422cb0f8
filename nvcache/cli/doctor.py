"""`nvcache doctor`: checks the set-up and says what to do about what is wrong. It mends nothing."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import click

from nvcache import __version__
from nvcache.cli import output
from nvcache.cli.daemon import Daemon, connected, daemon
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
    root = (yield from _daemon(asked)) or (chosen.store if chosen else None)
    if root:
        yield from checks.store(root)
    yield from _sources(asked, chosen)
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


def _daemon(asked: Daemon) -> Generator[Finding, None, Path | None]:
    """Whether a daemon answers, is of this version and is ready; returns its store's directory."""
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
        asked.get("/readyz")
        return Path(asked.get("/v1/stripe")["path"])
    except Problem as problem:
        yield checks.fail("ready", "; ".join(problem.document.get("problems", [])) or problem.detail, problem.hint or "look at the daemon's log")
        return None

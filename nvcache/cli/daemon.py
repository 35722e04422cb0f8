"""The daemon as commands see it: requests through `nvcache.client`, references turned into URLs. It starts no daemon and retries nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import click

from nvcache.cli import output
from nvcache.cli.exits import Exit, exit_of, worst
from nvcache.client import Client, Lease, Problem
from nvcache.core.ref import SlugName, parse_name, shortened, shown
from nvcache.environment import client_url, unix_url
from nvcache.errors import FACTS, Code, ConfigError, NvcacheError

LOOK_SECONDS = 5.0  # look-ups are answered from memory
ANSWER_SECONDS = 35.0  # the daemon bounds its answers at 30
SOURCE_SECONDS = 155.0  # and at 150 where it asks the source first
LAST_SECONDS = 0.01  # what a request gets when the time is over

Json = dict[str, Any]
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Connection:
    """Where the daemon is, as far as the command line says; the environment fills in the rest."""

    url: str | None = None
    socket: str | None = None

    def resolve(self) -> str:
        """The URL to ask: `--url`, else `--socket`, else what `environment.client_url` finds."""
        if self.url:
            return self.url
        return unix_url(Path(self.socket)) if self.socket else client_url()


class Daemon:
    """One daemon, asked over its HTTP API. Every call is bounded and raises `client.Problem`."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigError` (bad-config) for a URL of another form."""
        self.url = url
        self._left: Callable[[], float] = lambda: math.inf
        try:
            self._client = Client(url)
        except ValueError as error:
            raise ConfigError(Code.BAD_CONFIG, str(error), hint="write unix:///path.sock or http://host:port") from error

    def within(self, left: Callable[[], float]) -> None:
        """From now on no request waits longer than the seconds that `left` says when it is made."""
        self._left = left

    def get(self, path: str, *, timeout: float = LOOK_SECONDS, **query: str) -> Json:
        """GET `path`, JSON object back."""
        return self._ask("GET", f"{path}?{urlencode(query)}" if query else path, timeout=timeout)

    def post(self, path: str, body: Json | None = None) -> Json:
        """POST `body` to `path`, JSON object back. A dry run asks the source before it answers and is given the time."""
        return self._ask("POST", path, body, timeout=SOURCE_SECONDS if body and body.get("dry_run") else ANSWER_SECONDS)

    def delete(self, path: str) -> Json:
        """DELETE."""
        return self._ask("DELETE", path)

    def model(self, name: str) -> Json:
        """The model that a reference, a slug or an entry names. Raises unknown-model; `RequestError` (bad-reference)."""
        parse_name(name)  # what is no name may hold a secret, and stays out of URLs
        return self.whole(self.get("/v1/models", ref=name), "entry", "state")

    def whole(self, found: Json, *names: str) -> Json:
        """An answer that has these members. Raises `Problem` (daemon-unreachable): what answers here is no nvcache."""
        if lacking := [name for name in names if name not in found]:
            why = f"cannot reach the nvcache daemon at {self.url}: what answers there has no {', '.join(lacking)}, so it is something else"
            raise Problem("daemon-unreachable", why, hint="look what listens there; correct NVCACHE_URL or NVCACHE_SOCKET", retryable=True)
        return found

    def on(self, method: str, name: str, call: str = "", body: Json | None = None) -> Json:
        """A call on the model that `name` names, such as PUT …/pin. Problems name the model as it was typed."""
        entry = self._entry(name)
        try:
            return self._ask(method, f"/v1/models/{quote(entry, safe='@')}{call}", body)
        except Problem as problem:
            problem.detail = problem.detail.replace(entry, name)
            raise

    def lease(self, entry: str, *, ttl: float | None) -> Lease:
        """A lease on an entry, or on a slug whatever its revision, that takes over the live one of the same holder; not taken yet."""
        return self._client.lease_of(entry, ttl=ttl, adopt=True)

    def _ask(self, method: str, path: str, body: Json | None = None, *, timeout: float = ANSWER_SECONDS) -> Json:
        return self._client.request(method, path, body, timeout=max(LAST_SECONDS, min(timeout, self._left())))

    def _entry(self, name: str) -> str:
        """The entry or slug of `name`; asks the daemon only where the revision moves (a branch) or may be short.

        A name without a revision stays without one, so that the daemon can refuse what is ambiguous.
        """
        parsed = parse_name(name)
        if shortened(parsed) is None and (isinstance(parsed, SlugName) or parsed.revision is None or parsed.pinned):
            return parsed.slug if parsed.revision is None else f"{parsed.slug}@{parsed.revision}"
        return str(self.model(name)["entry"])


def each(refs: Sequence[str], act: Callable[[str], Json], show: Callable[[Json], str], *, json_: bool) -> Exit:
    """Do `act` to every one of `refs`, also after an error, and print a line for each; returns the worst exit code."""
    exits = []
    for ref in refs:
        try:
            done = act(ref)
        except (Problem, NvcacheError) as error:
            exits.append(failed(ref, problem_of(error), json_=json_))
            continue
        if json_:
            output.as_json(done, line=True)
        else:
            click.echo(show(done))
    return worst(exits)


def failed(ref: str, problem: Json, *, json_: bool) -> Exit:
    """Tell what went wrong with one of several models; returns its exit code."""
    if json_:
        output.as_json({"ref": shown(ref), "state": "failed", "error": problem}, line=True)
    output.complain(problem["detail"], problem.get("hint"))
    return exit_for(problem)


def problem_of(error: Problem | NvcacheError) -> Json:
    """An error as the problem document a script gets."""
    if isinstance(error, NvcacheError):
        return {"code": str(error.code), "detail": str(error), "hint": error.hint, "retryable": error.retryable}
    known = {"code": error.code, "status": error.status, "detail": error.detail, "hint": error.hint, "retryable": error.retryable}
    return {**error.document, **known}


def problem_from(code: Code, detail: str, hint: str | None = None) -> Json:
    """A problem the command line found itself."""
    return {"code": str(code), "detail": detail, "hint": hint or FACTS[code].hint, "retryable": FACTS[code].retryable}


def exit_for(problem: Json) -> Exit:
    """The exit code of a problem document."""
    return exit_of(str(problem.get("code", "")))


def connected(command: Command) -> Command:
    """Lets `--url` and `--socket` stand after the command's name too; both mean what they mean before it."""
    for option in (
        _option("--socket", "PATH", "the daemon's Unix socket"),
        _option("--url", "URL", "the daemon: unix:///path.sock or http://host:port"),
    ):
        command = option(command)
    return command


def daemon() -> Daemon:
    """The daemon this invocation talks to."""
    return Daemon(click.get_current_context().find_object(Connection).resolve())  # type: ignore[union-attr]


def _option(name: str, metavar: str, text: str) -> Callable[[Command], Command]:
    def keep(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            setattr(context.ensure_object(Connection), name.removeprefix("--"), value)

    return click.option(name, metavar=metavar, help=text, expose_value=False, callback=keep)

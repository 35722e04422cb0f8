"""The daemon as commands see it: requests through `nvcache.client`, references turned into URLs. It starts no daemon and retries nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import click

from nvcache.cli.exits import Exit, exit_of
from nvcache.client import Client, Problem
from nvcache.core.ref import SlugName, parse_name
from nvcache.environment import client_url, unix_url
from nvcache.errors import FACTS, Code, ConfigError, NvcacheError

ANSWER_SECONDS = 35.0  # the daemon bounds its answers at 30
SOURCE_SECONDS = 155.0  # and at 150 where it asks the source first

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
        try:
            self._client = Client(url)
        except ValueError as error:
            raise ConfigError(Code.BAD_CONFIG, str(error), hint="write unix:///path.sock or http://host:port") from error

    def get(self, path: str, **query: str) -> Json:
        """GET `path`, JSON object back."""
        return self._client.request("GET", f"{path}?{urlencode(query)}" if query else path)

    def post(self, path: str, body: Json | None = None) -> Json:
        """POST `body` to `path`, JSON object back. A dry run asks the source before it answers and is given the time."""
        return self._client.request("POST", path, body, timeout=SOURCE_SECONDS if body and body.get("dry_run") else ANSWER_SECONDS)

    def put(self, path: str) -> Json:
        """PUT without a body."""
        return self._client.request("PUT", path, timeout=ANSWER_SECONDS)

    def delete(self, path: str) -> Json:
        """DELETE."""
        return self._client.request("DELETE", path, timeout=ANSWER_SECONDS)

    def model(self, name: str) -> Json:
        """The model that a reference, a slug or an entry names. Raises unknown-model."""
        return self.get("/v1/models", ref=name)

    def place(self, name: str) -> str:
        """The URL path of the model `name` names; asks the daemon only for a moving revision such as a branch.

        A name without a revision stays without one, so that the daemon can refuse what is ambiguous.
        """
        parsed = parse_name(name)
        if isinstance(parsed, SlugName) or parsed.revision is None or parsed.pinned:
            entry = parsed.slug if parsed.revision is None else f"{parsed.slug}@{parsed.revision}"
        else:
            entry = self.model(name)["entry"]
        return f"/v1/models/{quote(entry, safe='@')}"


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

"""What a shell may offer for REF and JOB: the daemon's models and jobs, if it answers at once. It complains of nothing."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import click

from nvcache.cli.daemon import Connection, Daemon, Json
from nvcache.client import Problem
from nvcache.errors import NvcacheError

PATIENCE = 0.3  # seconds a person does not notice after pressing Tab
SHORT = 12  # digits of a revision or a digest where it stands for itself


def refs(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The models on the node as they may be written; with the revision only where several are here."""
    return [name for name in _asked(context, "/v1/models", _names, incomplete) if name.startswith(incomplete)]


def jobs(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The jobs that can be cancelled."""
    return [name for name in _asked(context, "/v1/jobs", _running, incomplete) if name.startswith(incomplete)]


def _asked(context: click.Context, path: str, read: Callable[[Json, str], Iterable[str]], incomplete: str) -> list[str]:
    """What `read` finds in the answer to GET `path`; nothing when there is none in time. On a thread: name look-ups have no time limit."""
    found: list[str] = []

    def ask() -> None:
        try:
            found.extend(read(Daemon(_connection(context).resolve()).get(path, timeout=PATIENCE), incomplete))
        except (Problem, NvcacheError, KeyError, TypeError):
            found.clear()

    asker = threading.Thread(target=ask, name="completion", daemon=True)
    asker.start()
    asker.join(PATIENCE)
    return [] if asker.is_alive() else found


def _connection(context: click.Context) -> Connection:
    """Where the daemon is by the words typed so far: after the command's name, else before it."""
    given = context.find_root().params
    return context.find_object(Connection) or Connection(given.get("url"), given.get("socket"))


def _names(answer: Json, incomplete: str) -> Iterator[str]:
    models = [(model["ref"].rpartition("@")[0], model["revision"]) for model in answer["models"]]
    count = Counter(base for base, _ in models)
    for base, revision in models:
        name = base if incomplete.startswith("hf:") else base.removeprefix("hf://")
        yield name if count[base] == 1 else f"{name}@{revision[:SHORT]}"


def _running(answer: Json, _incomplete: str) -> Iterator[str]:
    return (job["id"] for job in answer["jobs"] if not job["ended_at"])

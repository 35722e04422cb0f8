"""What the daemon says of a model, as an object. It asks nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nvcache.client.transport import Problem


@dataclass(frozen=True)
class Model:
    """One model on the node. `path` and `hub_cache` are None unless `state` is "ready"; `document` is all the daemon said."""

    entry: str | None
    ref: str
    state: str
    revision: str | None = None
    path: str | None = None
    hub_cache: str | None = None
    progress: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def ready(self) -> bool:
        """Whether it can be loaded now."""
        return self.state == "ready" and self.path is not None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Model:
        """From a model's JSON, or a job's (then there is no path yet). Raises `Problem` when it is neither."""
        names = ("revision", "path", "hub_cache", "progress", "error")
        try:
            return cls(document["entry"], document["ref"], document["state"], **{name: document.get(name) for name in names}, document=document)
        except KeyError as error:
            raise Problem("daemon-unreachable", f"cannot read the answer: it has no {error}, so something else than nvcache answers") from error

"""Alters renderings, to show that a policy notices. It judges nothing."""

from __future__ import annotations

import copy
from typing import Any

from tests.support.kubetools import Object

GONE = object()
"""As a value: what is there is taken away."""


def altered(found: list[Object], path: str, value: object) -> list[Object]:
    """A copy with `value` at `path`: `Kind/name` and then keys, with spaces between them.

    An element of a list is named by its `name`, its `mountPath` or its number, `+` adds one; `pod` is where a workload has its pod's spec. Raises
    `KeyError` or `StopIteration` for what is not there: an alteration that alters nothing would show nothing.
    """
    found = copy.deepcopy(found)
    which, *way, last = path.replace(" pod ", " spec template spec ").split(" ")
    at: Any = next((item for item in found if f"{item['kind']}/{item['metadata']['name']}" == which), None)
    if at is None:
        raise KeyError(which)
    for step in way:
        at = _into(at, step)
    if value is GONE:
        del at[_index(at, last)]
    elif last == "+":
        at.append(value)
    else:
        at[_index(at, last)] = value
    return found


def _into(at: Any, step: str) -> Any:
    if isinstance(at, dict):
        return at.setdefault(step, {})
    return at[_index(at, step)]


def _index(at: Any, step: str) -> Any:
    if isinstance(at, dict):
        return step
    if step.isdigit():
        return int(step)
    return next(number for number, one in enumerate(at) if step in (one["name"], one.get("mountPath")))

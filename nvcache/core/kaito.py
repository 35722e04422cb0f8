"""Under which name KAITO looks for a model on a node, and who has a name that two models share. It makes no view and no link.

KAITO, "Bring Your Own Weights": the model's Hub id in lower case, with `-` for `/` and `\\`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

LACKS = "KAITO does not find this model"  # how every warning begins that says so


def kaito_name(hub_id: str) -> str:
    """The one folder name that `org/name` has for KAITO."""
    return hub_id.lower().replace("/", "-").replace("\\", "-")


def share_out(hub_ids: Iterable[str], holders: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """KAITO's name → the Hub id that has it, and each Hub id that goes without → the one that has its name.

    `holders` is who had each name before: he keeps it for as long as he is among `hub_ids`. Else the first in order has it.
    """
    wanting: dict[str, list[str]] = {}
    for hub_id in sorted(hub_ids):
        wanting.setdefault(kaito_name(hub_id), []).append(hub_id)
    given = {name: holder if (holder := holders.get(name)) in among else among[0] for name, among in wanting.items()}
    return given, {hub_id: given[name] for name, among in wanting.items() for hub_id in among if hub_id != given[name]}

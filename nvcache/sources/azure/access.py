"""What is known for reaching Azure: a bag of secrets and choices, made anew at each call. It reads no setting, no file and no environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Access:
    """Credentials as they are now; secrets are kept out of repr.

    `account` is the one that `key` and `sas` are for. `hosts` are hosts outside Azure's own clouds that may be given a SAS or the identity's token:
    whoever names a model must not be able to have them sent elsewhere. `…_from` say in messages where a secret comes from: a setting and its file, or
    a variable.
    """

    connection_string: str | None = field(default=None, repr=False)
    account: str | None = None
    key: str | None = field(default=None, repr=False)
    sas: str | None = field(default=None, repr=False)
    credential: Literal["auto", "identity", "anonymous"] = "auto"
    suffix: str = "core.windows.net"  # az://account is https://account.blob.<suffix>
    hosts: tuple[str, ...] = ()
    connection_string_from: str = "AZURE_STORAGE_CONNECTION_STRING"
    key_from: str = "AZURE_STORAGE_KEY"
    sas_from: str = "AZURE_STORAGE_SAS_TOKEN"

"""What `doctor` says of the secrets for Azure: which are set, from where, for which account, and whether they can be used. It asks nobody.

No secret is ever part of a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from nvcache.cli.checks import Finding, fail, ok, warn
from nvcache.errors import ConfigError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.place import Connection, Key, Sas, connection_of, key_of, sas_of, secret_in
from nvcache.sources.azure_answers import Credential

NAME = "azure"


def secrets(access: Access, now: float) -> Iterator[Finding]:
    """One finding for each secret that is set, and one if none of them is used; nothing where none is set. `now`: unix seconds."""
    if access.connection_string:
        yield _usable(lambda: _connection(access, now))
    account = access.account or ""
    if access.key:
        yield _usable(lambda: _secret(key_of(account, access.key or "", access.key_from), account, now))
    if access.sas:
        yield _usable(lambda: _secret(sas_of(access.sas or "", access.sas_from), account, now))
    if access.credential != "auto" and (access.connection_string or access.key or access.sas):
        yield warn(NAME, f"az_credential is {access.credential}: no key and no SAS is used", "set az_credential to auto, or take the secrets away")


def _usable(look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except ConfigError as error:
        return fail(NAME, str(error), error.hint)


def _connection(access: Access, now: float) -> Finding:
    connection = connection_of(access) or Connection("", "")
    secret = secret_in(connection, access)
    if secret is None:
        what = f"the connection string from {access.connection_string_from} holds neither a key nor a SAS"
        return warn(NAME, f"{what}: for account {connection.account}, the node's identity is asked", "copy it whole, with its AccountKey")
    return _secret(secret, connection.account, now)


def _secret(secret: Key | Sas, account: str, now: float) -> Finding:
    what = f"{'account key' if isinstance(secret, Key) else 'SAS'} from {secret.source}"
    if not account:
        return warn(NAME, f"{what}: not used, az_account does not say for which account", "set NVCACHE_AZ_ACCOUNT or AZURE_STORAGE_ACCOUNT")
    what = f"{what}, for account {account}"
    if isinstance(secret, Key):
        return ok(NAME, what)
    ends = Credential.of(secret.text).ends
    if ends is None:
        return ok(NAME, f"{what}; it does not say until when it is valid")
    until = datetime.fromtimestamp(ends, UTC).isoformat().replace("+00:00", "Z")
    return fail(NAME, f"{what}: expired at {until}", "make a new one") if ends <= now else ok(NAME, f"{what}, valid until {until}")

"""By which right to ask: the secret meant for a place, else the node's identity, else none. It sends nothing there."""

from __future__ import annotations

from nvcache.errors import Code, SourceError
from nvcache.sources.azure.access import Access
from nvcache.sources.azure.identity import Identity, NoTokenError
from nvcache.sources.azure.place import Anonymous, Bearer, Grant, Place, secret_for, trusted


def grant_for(place: Place, access: Access, identity: Identity) -> Grant:
    """What to be authorised by at `place`; the identity is asked for a token if it comes to that.

    Raises `SourceError` (source-forbidden) when it has to be the identity and there is none, or when one that is set up fails just now;
    `ConfigError` for a secret that cannot be one.
    """
    if access.credential == "anonymous":
        return Anonymous()
    tried: tuple[str, ...] = ()
    if access.credential == "auto":
        secret, tried = secret_for(place, access)
        if secret is not None:
            return secret
    if not place.secure:
        return _without(place, access, (*tried, "identity: its token is not sent over plain http"))
    if not trusted(place, access):
        return _without(place, access, (*tried, f"identity: its token is not sent to {place.endpoint}, which is neither Azure's nor in az_hosts"))
    try:
        return Bearer(identity.token())
    except NoTokenError as error:
        return _without(place, access, (*tried, error.tried), failing=error.failing)


def _without(place: Place, access: Access, tried: tuple[str, ...], *, failing: bool = False) -> Anonymous:
    """To go on anonymously, unless an identity is wanted, or is set up and fails: asking without it would be refused for a wrong reason."""
    why = "; ".join(tried)
    if access.credential == "identity" or failing:
        hint = "check the identity of the node or pod: AZURE_CLIENT_ID, AZURE_TENANT_ID, AZURE_FEDERATED_TOKEN_FILE; az_credential names another way"
        raise SourceError(Code.SOURCE_FORBIDDEN, f"cannot get a token for {place.endpoint}: {why}", hint=hint, retryable=failing)
    return Anonymous(why)

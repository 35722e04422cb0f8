"""The node's identity in Microsoft Entra ID: a token for Blob Storage, or why there is none. It chooses no account and sends the token nowhere.

azure-identity's DefaultAzureCredential asks, in its order, the environment (a service principal), workload identity (AKS), managed identity and the
Azure CLI; what it can do besides is for people's desktops and is left out. It reads its own variables (AZURE_CLIENT_ID, AZURE_AUTHORITY_HOST, …),
keeps tokens, and renews them before they expire.
"""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from nvcache.logs import mask
from nvcache.sources.http import Transport

if TYPE_CHECKING:
    from azure.core.credentials import TokenCredential

SCOPE = "https://storage.azure.com/.default"  # every cloud's storage takes it
ANSWER_S = 30.0
QUIET_S = 60.0  # after a refusal nothing is asked for so long: looking for an identity that is not there takes seconds
NAMES = {
    "EnvironmentCredential": "environment",
    "WorkloadIdentityCredential": "workload identity",
    "ManagedIdentityCredential": "managed identity",
    "AzureCliCredential": "Azure CLI",
}
_VARIABLES = {"tenant_id": "AZURE_TENANT_ID", "client_id": "AZURE_CLIENT_ID", "token_file_path": "AZURE_FEDERATED_TOKEN_FILE"}
_LIMITS = {"connection_timeout": 4, "read_timeout": 4, "retry_total": 1, "process_timeout": 4}  # seconds, tries


class NoTokenError(Exception):
    """No token. `tried` names each way in order and why not; `failing` if one that is set up does not work just now."""

    def __init__(self, tried: str, *, failing: bool) -> None:
        super().__init__(tried)
        self.tried = tried
        self.failing = failing


class Identity:
    """Tokens of the node's identity, for the life of the process. Thread-safe; `credential` takes the place of the default chain."""

    def __init__(self, transport: Transport, credential: TokenCredential | None = None) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._credential = credential
        self._known = False
        self._asking: Future[str] | None = None
        self._until = 0.0  # when (monotonic) nobody waits any longer for what is being asked
        self._refused: tuple[float, NoTokenError] | None = None  # until when (monotonic), and what to say

    def token(self) -> str:
        """A token that is valid now and for some minutes. Takes `ANSWER_S` at most. Raises `NoTokenError`."""
        with self._lock:
            if self._refused is not None and time.monotonic() < self._refused[0]:
                raise NoTokenError(self._refused[1].tried, failing=self._refused[1].failing)
            if self._asking is None:
                self._asking, self._until = Future(), time.monotonic() + ANSWER_S
                threading.Thread(target=self._ask, args=(self._asking,), name="identity", daemon=True).start()
            asking, left = self._asking, max(0.0, self._until - time.monotonic())
        try:
            return asking.result(left)
        except TimeoutError:
            raise NoTokenError(f"identity: no answer in {ANSWER_S:g} s", failing=True) from None

    def _ask(self, asking: Future[str]) -> None:
        """The body of a thread, one at a time: the library waits as long as a server asks it to, and for every byte of an answer."""
        from azure.core.exceptions import AzureError  # here and below: the libraries are loaded by those who ask, not by workers

        token, failure = "", None
        try:
            token = self._chain().get_token(SCOPE).token
        except AzureError as error:
            tried, whole = explained(error.message)
            failure = NoTokenError(tried, failing=self._known or not whole)  # the library's text is long, and quotes what servers said
        except BaseException as error:  # noqa: BLE001 - a defect, carried to who waits
            asking.set_exception(error)
        with self._lock:
            self._asking = None
            self._known = self._known or bool(token)
            self._refused = (time.monotonic() + (1.0 if failure.failing else QUIET_S), failure) if failure else None
        if failure is not None:
            asking.set_exception(failure)
        elif not asking.done():
            asking.set_result(token)

    def _chain(self) -> TokenCredential:
        if self._credential is None:
            from azure.identity import DefaultAzureCredential

            self._credential = DefaultAzureCredential(
                exclude_shared_token_cache_credential=True,
                exclude_visual_studio_code_credential=True,
                exclude_powershell_credential=True,
                exclude_developer_cli_credential=True,
                exclude_broker_credential=True,
                connection_verify=self._transport.ca_file or True,
                **_LIMITS,
            )
        return self._credential


def explained(message: str) -> tuple[str, bool]:
    """What the library says of each way, shortened, and whether all of them were tried: it stops at one that is set up and does not work."""
    found = re.findall(r"^\t(\w+): (.+)$", message, re.MULTILINE)
    if not found:
        return f"identity: {_short(message)}", False
    return "; ".join(f"{NAMES.get(name, name)}: {_short(why)}" for name, why in found), found[-1][0] == list(NAMES)[-1]


def _short(text: str) -> str:
    """One line without the library's addresses of help pages. Names of arguments become those of the variables they are read from."""
    if missing := re.findall(r"'(tenant_id|client_id|token_file_path)'", text):
        return f"{', '.join(_VARIABLES[name] for name in missing)} not set"
    line = text.strip().partition("\n")[0]
    line = re.sub(r"^\w+ authentication unavailable\.? *|(See|Visit|Please|To mitigate) .*https?://\S+.*$", "", line)
    return mask(line).strip(" ,.")[:160] or "unavailable"

"""The few calls to the Kubernetes API server, each bounded, and one error for whatever goes wrong. It decides nothing and retries nothing.

The client is made anew after a failure: so a rotated CA or another address is read. A rotated token is read when the server refuses the old one
(lightkube's `BearerTokenFileAuth`). Proxies of the environment are for the models' sources; the API server is asked directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
import yaml
from lightkube import ApiError, AsyncClient, KubeConfig
from lightkube.core.exceptions import ConfigError
from lightkube.generic_resource import create_global_resource, create_namespaced_resource
from lightkube.types import PatchType

from nvcache.core import retry
from nvcache.core.signals import CONDITION, Change, Condition, News, NodeFacts
from nvcache.engine import clock

WHY = 500  # characters of a reason
CALL_SECONDS = 10.0  # for one call, whatever the server does
COMPONENT = "nvcache"  # who we are in events and managedFields
EVENTS_NAMESPACE = "default"  # where events about what is in no namespace belong (kube-apiserver validates it)
PASSING = frozenset({401, 408, 409, 425, 429})  # and 5xx: may go better next time; any other refusal is about rights or the request
# What lightkube and msgspec raise for an object of another form, or of a thousand brackets.
FORM = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)
Node = create_global_resource("", "v1", "Node", "nodes")  # generic: what this version of the client does not know is kept as it is
Event = create_namespaced_resource("", "v1", "Event", "events")


class CallFailed(Exception):  # noqa: N818 - the name says it
    """A call failed. `status` is the HTTP status, None without an answer; `asked_s` what the server asked to wait."""

    def __init__(self, why: str, status: int | None = None, asked_s: float | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.asked_s = asked_s

    @property
    def passing(self) -> bool:
        """Whether trying again may help without anybody doing something."""
        return self.status is None or self.status in PASSING or self.status >= 500


class ApiServer:
    """The API server as configured for a pod (its service account), else by KUBECONFIG. Calls raise `CallFailed`; one at a time."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._client: AsyncClient | None = None

    async def node(self) -> NodeFacts:
        """The Node as it is now."""
        return NodeFacts.of(await self._call("get", Node, self._node))

    async def write_metadata(self, change: Change) -> NodeFacts:
        """Set and remove labels and annotations (RFC 7386: null removes); it cannot conflict, since it names nobody else's keys."""
        metadata = {"labels": dict(change.labels), "annotations": dict(change.annotations)}
        return NodeFacts.of(await self._call("patch", Node, self._node, {"metadata": metadata}, patch_type=PatchType.MERGE))

    async def write_condition(self, condition: Condition) -> NodeFacts:
        """Set our condition with a heartbeat of now; a strategic patch merges conditions by their type."""
        shown = {"type": CONDITION, "status": condition.status, "reason": condition.reason, "message": condition.message}
        times = {"lastTransitionTime": condition.since, "lastHeartbeatTime": clock.stamp()}
        status = {"conditions": [shown | times]}
        return NodeFacts.of(await self._call("patch", Node.Status, self._node, {"status": status}, patch_type=PatchType.STRATEGIC))

    async def write_taints(self, taints: Sequence[Mapping[str, Any]], version: str) -> NodeFacts:
        """Replace the list of taints of the Node as it was at `version`; 409 when it has changed since."""
        patch = {"metadata": {"resourceVersion": version}, "spec": {"taints": list(taints)}}
        return NodeFacts.of(await self._call("patch", Node, self._node, patch, patch_type=PatchType.MERGE))

    async def send(self, news: News, name: str, uid: str) -> None:
        """Create an event about the Node. One that is there under its name is as good as sent."""
        now = clock.stamp()
        event = {
            "metadata": {"name": name, "namespace": EVENTS_NAMESPACE},
            "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": self._node, "uid": uid},
            "reason": news.reason,
            "message": news.message,
            "type": "Warning" if news.warning else "Normal",
            "source": {"component": COMPONENT, "host": self._node},
            "reportingComponent": COMPONENT,
            "reportingInstance": self._node,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._call("create", Event.from_dict(event), namespace=EVENTS_NAMESPACE)
        except CallFailed as failure:
            if failure.status != 409:
                raise

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _call(self, verb: str, *arguments: Any, **options: Any) -> Any:
        client = self._client = self._client or _client()
        try:
            async with asyncio.timeout(CALL_SECONDS):
                return await getattr(client, verb)(*arguments, **options)
        except httpx2.HTTPStatusError as error:
            failure = _refused(error)
        except (TimeoutError, httpx2.TimeoutException):
            failure = CallFailed(f"no answer in {CALL_SECONDS:g} s")
        except (httpx2.HTTPError, httpx2.InvalidURL, ConfigError, OSError) as error:  # ConfigError: the token's file is gone
            failure = CallFailed(str(error)[:WHY] or type(error).__name__)
        except FORM as error:
            failure = CallFailed(f"its answer is not that of a Kubernetes API server ({type(error).__name__})")
        if failure.status in (None, 401):
            await self.close()
        raise failure


def _client() -> AsyncClient:
    """A client by the service account of the pod, else by KUBECONFIG."""
    try:
        config = KubeConfig.from_env().get()
        return AsyncClient(config, timeout=httpx2.Timeout(CALL_SECONDS), field_manager=COMPONENT, trust_env=False)
    except yaml.YAMLError as error:  # whose words would show a piece of the file
        raise CallFailed("this is no pod with a service account, and KUBECONFIG cannot be used: it is no YAML") from error
    except (ConfigError, OSError, httpx2.InvalidURL, *FORM) as error:
        why = f"this is no pod with a service account, and KUBECONFIG cannot be used: {type(error).__name__} {error}"
        raise CallFailed(why[:WHY]) from error


def _refused(error: httpx2.HTTPStatusError) -> CallFailed:
    """What the server said, and how long it asks to wait."""
    answer = error.response
    said = f": {error.status.message}" if isinstance(error, ApiError) and error.status.message else ""
    asked = retry.asked_to_wait(answer.headers, clock.unix())
    return CallFailed(f"{answer.status_code} {answer.reason_phrase}{said}"[:WHY], answer.status_code, asked)

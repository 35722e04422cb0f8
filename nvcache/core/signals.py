"""What a Kubernetes Node should show of this cache: labels, annotations, a condition, one taint less, news. It asks no API server and no clock.

Everything of ours on a Node begins with `nvcache.io/`; other people's labels, annotations, conditions and taints are never in a change. A label's key
ends in a hash because a model's name may be longer than the 63 characters of a key and has a slash in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvcache.core.names import UNPRINTABLE
from nvcache.core.ref import Ref, Scheme, is_commit, is_short
from nvcache.errors import Code, RequestError

PREFIX = "nvcache.io/"
MODEL_LABEL = f"{PREFIX}model."
READY = "ready"  # the value of every model's label
MODELS, CACHE = f"{PREFIX}models", f"{PREFIX}cache"  # annotations
CONDITION = "NvcacheStripe"
DEFAULT_BRANCH = "main"  # what a Hub reference without a revision stands for
MODEL_LABELS = 128  # on one Node at most; schedulers and kubelets keep every label of every Node in memory
MODELS_BYTES = 32 * 1024  # of the annotation with the list; all annotations of an object together may have 256 KiB
WORDS = 1024  # characters of a condition's and an event's message; events.k8s.io allows no more
CACHE_STEP = 0.01  # of the total: a smaller change of the cache's bytes is not worth a write of its own
R01 = "R01"  # `core.disk_codes`: made anew


# -- names


def model_hash(ref: Ref) -> str:
    """The first 10 hex digits of the SHA-256 of the reference's canonical text; the Hub's default branch counts as no revision."""
    return hashlib.sha256(canonical(ref).encode()).hexdigest()[:10]


def label_of(ref: Ref) -> str:
    """The key of the label that a Node has while it has this model ready."""
    return f"{MODEL_LABEL}{model_hash(ref)}"


def canonical(ref: Ref) -> str:
    """The text that is hashed: `hf://org/name`, `hf://org/name@<commit>`, `az://…`."""
    return str(ref.at(None) if ref.scheme is Scheme.HF and ref.revision == DEFAULT_BRANCH else ref)


def check_selectable(ref: Ref) -> None:
    """Raises `RequestError` (bad-reference) for a shortened commit: which model it begins depends on the node, so no label can stand for it."""
    if ref.revision is not None and is_short(ref.revision) and not is_commit(ref.revision):
        why = f"cannot select nodes by {ref}: it is the beginning of a commit, and a label stands for a full one"
        raise RequestError(Code.BAD_REFERENCE, why, hint="write all 40 digits of the commit, a branch, a tag, or no revision")


# -- facts


@dataclass(frozen=True, slots=True)
class Held:
    """A model that is ready. `refs` are all the canonical texts that mean it on this node just now, `ref` the one with its exact revision."""

    ref: str
    refs: tuple[str, ...]
    bytes: int
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """A model that could not be made ready."""

    ref: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Disks:
    """What the store lies on. `refused` are disks that should be usable and are not, each in words; `fs_uuid` is the last mounted one's."""

    state: str  # of `engine.handover.StripeStatus`
    generation: int
    code: str | None = None
    case: str | None = None
    reason: str = ""
    remedy: str = ""
    words: str = ""  # what is mounted, for people
    refused: tuple[str, ...] = ()
    fs_uuid: str | None = None
    losses: int = 0

    @property
    def mounted(self) -> bool:
        """Whether there is a store to open."""
        return self.state == "mounted"


@dataclass(frozen=True, slots=True)
class Facts:
    """This node's cache as of now. `problems` say why models cannot be asked for; `space` is total, free, used and limit in bytes."""

    disks: Disks
    models: tuple[Held, ...] = ()
    failures: tuple[Failure, ...] = ()
    declared: tuple[str, ...] = ()  # canonical texts
    problems: tuple[str, ...] = ()
    space: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def warm(self) -> bool:
        """Whether the node answers and every declared model is ready."""
        here = {ref for model in self.models for ref in model.refs}
        return not self.problems and here.issuperset(self.declared)


@dataclass(frozen=True, slots=True)
class Condition:
    """A Node's condition, without its heartbeat. `since` is its lastTransitionTime."""

    status: str
    reason: str
    message: str
    since: str = ""

    def same(self, other: Condition | None) -> bool:
        """Whether both say the same."""
        return other is not None and (self.status, self.reason, self.message) == (other.status, other.reason, other.message)


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the Node has now. `taints` are whole, as the API server showed them, so that they can be written back unharmed."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    taints: tuple[Mapping[str, Any], ...] = ()
    condition: Condition | None = None
    version: str = ""
    uid: str = ""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> NodeFacts:
        """From a v1 Node as JSON; what is not of its form counts as not there."""
        metadata, spec, status = (_mapping(raw.get(name)) for name in ("metadata", "spec", "status"))
        ours = [each for each in _mappings(status.get("conditions")) if each.get("type") == CONDITION]
        said = ours[0] if ours else {}  # a time that nobody set is null
        condition = Condition(*(str(said.get(name) or "") for name in ("status", "reason", "message", "lastTransitionTime"))) if ours else None
        return cls(
            labels={str(key): str(value) for key, value in _mapping(metadata.get("labels")).items()},
            annotations={str(key): str(value) for key, value in _mapping(metadata.get("annotations")).items()},
            taints=tuple(_mappings(spec.get("taints"))),
            condition=condition,
            version=str(metadata.get("resourceVersion", "")),
            uid=str(metadata.get("uid", "")),
        )


# -- what the Node should show


@dataclass(frozen=True, slots=True)
class Change:
    """What to write, each part empty when there is nothing. None as a value means: remove this key. `taints` is the whole new list."""

    labels: Mapping[str, str | None]
    annotations: Mapping[str, str]
    condition: Condition | None = None
    taints: tuple[Mapping[str, Any], ...] | None = None

    def __bool__(self) -> bool:
        return bool(self.labels or self.annotations or self.condition is not None or self.taints is not None)


def change(facts: Facts, node: NodeFacts, startup_taint: str, now: str, *, heartbeat: bool = False) -> Change:
    """The least to write so that `node` shows `facts`; the condition in any case with `heartbeat`.

    `now` (RFC 3339) is when a condition whose status changes did so.
    """
    wanted, shown = labels(facts, node), {key: value for key, value in node.labels.items() if key.startswith(MODEL_LABEL)}
    notes = {name: text for name, text in (_models(facts), _cache(facts, node)) if node.annotations.get(name) != text}
    told = condition(facts)
    since = node.condition.since if node.condition is not None and node.condition.status == told.status else ""
    left = tuple(taint for taint in node.taints if taint.get("key") != startup_taint)
    return Change(
        labels={**{key: READY for key in wanted if shown.get(key) != READY}, **{key: None for key in shown if key not in wanted}},
        annotations=notes,
        condition=None if told.same(node.condition) and not heartbeat else Condition(told.status, told.reason, told.message, since or now),
        taints=left if facts.warm and len(left) < len(node.taints) else None,
    )


def labels(facts: Facts, node: NodeFacts) -> set[str]:
    """The keys of the labels that the Node should have, at most `MODEL_LABELS`: pinned models first, then those it has already, then by name."""
    ranked = sorted(
        ((not model.pinned, key not in node.labels, ref, key) for model in facts.models for ref in model.refs for key in (_key(ref),)),
    )
    return set(list(dict.fromkeys(key for *_, key in ranked))[:MODEL_LABELS])


def left_out(facts: Facts) -> int:
    """How many labels there would be room for no more."""
    return max(0, len({ref for model in facts.models for ref in model.refs}) - MODEL_LABELS)


def condition(facts: Facts) -> Condition:
    """The condition `NvcacheStripe`: True while models can be asked for, else False and why. The reason is a code, a case or a word."""
    disks = facts.disks
    refused = [f"not used: {'; '.join(disks.refused)}"] if disks.refused else []
    if not disks.mounted:
        text = [" ".join(part for part in (disks.code, disks.reason) if part) or f"the stripe is {disks.state}", *refused]
        remedy = [f"what to do: {disks.remedy}"] if disks.remedy else []
        return Condition("False", reason_word(disks.code or disks.state), sentence([*text, *remedy]))
    if facts.problems:
        return Condition("False", "StoreNotServed", sentence([*facts.problems, *refused]))
    told = [disks.words, " ".join(part for part in (disks.code, disks.reason) if part) if disks.code else "", *refused]
    return Condition("True", reason_word(disks.code or disks.case or "Directory"), sentence(told))


def reason_word(text: str) -> str:
    """`text` as a condition's reason: a CamelCase word of letters and digits that begins with a letter (`metav1.Condition`)."""
    word = "".join(part[:1].upper() + part[1:] for part in re.split(r"[^A-Za-z0-9]+", text))[:128]
    return word if word[:1].isalpha() else f"Code{word}"


def sentence(parts: Iterable[str]) -> str:
    """The parts that say something as one line of at most `WORDS` characters, safe to show."""
    text = re.sub(f"[{UNPRINTABLE}]+", " ", "; ".join(part for part in parts if part))
    return text if len(text) <= WORDS else f"{text[: WORDS - 1]}…"


# -- news


@dataclass(frozen=True, slots=True)
class News:
    """An event to send about the Node. Two with the same `key` are the same news; `by_pods`: whoever may ask for models can cause any number."""

    key: str
    reason: str
    message: str
    warning: bool = True
    by_pods: bool = False


def news(before: Facts | None, now: Facts, told: Condition | None) -> list[News]:
    """What happened between two looks. At the first look, what the Node's condition `told` already is no news."""
    found = [] if before is None and condition(now).same(told) else [*_of_disks(before.disks if before else None, now.disks)]
    known = {(each.ref, each.code) for each in before.failures} if before else set()
    fresh = [each for each in now.failures if (each.ref, each.code) not in known]
    return [
        *found,
        *(
            News(f"failed {each.ref} {each.code}", "ModelFailed", sentence([f"{each.ref}: {each.message} ({each.code})"]), by_pods=True)
            for each in fresh
        ),
    ]


def _of_disks(before: Disks | None, now: Disks) -> Iterable[News]:
    why = " ".join(part for part in (now.code, now.reason) if part)
    if now.state == "lost" or (before is not None and now.losses > before.losses):
        yield News(f"lost {now.generation}", "CacheLost", sentence([f"the cache's contents are lost: {why or 'no reason is known'}"]))
    remade = now.code == R01 or (before is not None and before.fs_uuid is not None and before.fs_uuid != now.fs_uuid)
    if now.mounted and remade and (before is None or not before.mounted or before.fs_uuid != now.fs_uuid):
        text = sentence([f"an empty cache is mounted: {why or now.words}", "its models are fetched again"])
        yield News(f"rebuilt {now.generation}", "CacheRebuilt", text, warning=False)
    refusal = (now.code, now.reason, now.refused)
    if (now.refused or (now.state == "absent" and now.code)) and (before is None or (before.code, before.reason, before.refused) != refusal):
        told = [why] if not now.mounted else []
        yield News(f"refused {refusal}", "DisksRefused", sentence([*told, *now.refused]))


# -- parts


def _key(ref: str) -> str:
    return f"{MODEL_LABEL}{hashlib.sha256(ref.encode()).hexdigest()[:10]}"


def _models(facts: Facts) -> tuple[str, str]:
    """The list of ready models, as many as there is room for, by name."""
    listed: list[str] = []
    room = MODELS_BYTES - 2
    for model in sorted(facts.models, key=lambda model: model.ref):
        text = json.dumps({"ref": model.ref, "bytes": model.bytes, "hashes": [_key(ref).removeprefix(MODEL_LABEL) for ref in sorted(model.refs)]})
        room -= len(text) + 1
        if room < 0:
            break
        listed.append(text)
    return MODELS, f"[{','.join(listed)}]"


def _cache(facts: Facts, node: NodeFacts) -> tuple[str, str]:
    """The cache's bytes; as the Node has them already while they changed by little."""
    now = dict(zip(("total", "free", "used", "limit"), facts.space, strict=True))
    there = node.annotations.get(CACHE, "")
    try:
        before = _mapping(json.loads(there))
    except (ValueError, RecursionError):
        before = {}
    step = CACHE_STEP * now["total"]
    exact = all(type(before.get(name)) is int and before[name] == now[name] for name in ("total", "limit"))
    close = exact and all(type(before.get(name)) is int and abs(before[name] - now[name]) < step for name in ("free", "used"))
    return CACHE, there if close and before.keys() == now.keys() else json.dumps(now)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: object) -> Sequence[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []

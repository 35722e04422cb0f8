"""What a Node should show, decided from facts: it settles, it touches nobody else's, it stays in bounds. And how a pod asks for it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nvcache.__main__ import main
from nvcache.core import signals
from nvcache.core.ref import parse_ref
from nvcache.core.signals import CACHE, MODEL_LABEL, MODELS, WORDS, Change, Condition, Disks, Facts, Failure, Held, NodeFacts
from nvcache.kubernetes.outbox import AGAIN, BURST, EVERY, REMEMBERED, WAITING, Outbox
from nvcache.settings import Settings

TAINT = Settings.model_fields["startup_taint"].default
NOW = "2026-01-01T00:00:00Z"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# metav1.Condition in k8s.io/apimachinery: +kubebuilder:validation:Pattern
REASON = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
STATES = ["absent", "mounted", "withdrawing", "lost"]

words = st.text(max_size=40)
refs = st.integers(0, 12).map(lambda number: f"hf://org/model-{number}")
held = st.builds(
    lambda ref, size, pinned: Held(f"{ref}@{COMMIT}", (ref, f"{ref}@{COMMIT}"), size, pinned), refs, st.integers(0, 10**13), st.booleans()
)
disks = st.builds(
    Disks,
    state=st.sampled_from(STATES),
    generation=st.integers(0, 3),
    code=st.sampled_from([None, "N03", "R01", "P02"]),
    case=st.sampled_from([None, "C1", "C10"]),
    reason=words,
    remedy=words,
    words=words,
    refused=st.lists(st.text(max_size=400), max_size=5).map(tuple),
    fs_uuid=st.sampled_from([None, "a", "b"]),
    losses=st.integers(0, 2),
)
facts = st.builds(
    Facts,
    disks=disks,
    models=st.lists(held, max_size=8, unique_by=lambda model: model.ref).map(tuple),
    failures=st.lists(st.builds(Failure, refs, st.sampled_from(["gated", "full"]), words), max_size=3).map(tuple),
    declared=st.lists(refs, max_size=2).map(tuple),
    problems=st.lists(words, max_size=2).map(tuple),
    space=st.tuples(*[st.integers(0, 10**14)] * 4),
)
theirs = st.dictionaries(st.sampled_from(["kubernetes.io/hostname", "nvcache.io/zone", "zone"]), words, max_size=3)
nodes = st.builds(
    NodeFacts,
    labels=st.builds(lambda own, other: {**other, **{signals.label_of(parse_ref(ref)): value for ref, value in own}},
                     st.lists(st.tuples(refs, st.sampled_from(["ready", "no"])), max_size=8), theirs),
    annotations=st.builds(lambda own, other: {**own, **other}, st.dictionaries(st.sampled_from([MODELS, CACHE]), words), theirs),
    taints=st.lists(st.fixed_dictionaries({"key": st.sampled_from([TAINT, "sku", "nvcache.io/x"]), "effect": st.just("NoSchedule")}),
                    max_size=4).map(tuple),
    condition=st.none() | st.builds(Condition, st.sampled_from(["True", "False"]), words, words, st.just(NOW)),
)  # fmt: skip


def applied(node: NodeFacts, change: Change) -> NodeFacts:
    """The Node after the change, as the API server merges it."""
    labels = {key: value for key, value in {**node.labels, **change.labels}.items() if value is not None}
    taints = node.taints if change.taints is None else change.taints
    return NodeFacts(labels, {**node.annotations, **change.annotations}, taints, change.condition or node.condition)


@given(facts, nodes)
def test_once_written_there_is_nothing_left_to_write(facts: Facts, node: NodeFacts) -> None:
    after = applied(node, signals.change(facts, node, TAINT, NOW))
    assert not signals.change(facts, after, TAINT, "2027-01-01T00:00:00Z")


@given(facts, nodes)
def test_nothing_of_others_is_in_a_change(facts: Facts, node: NodeFacts) -> None:
    change = signals.change(facts, node, TAINT, NOW)
    assert all(key.startswith(MODEL_LABEL) for key in change.labels)
    assert change.annotations.keys() <= {MODELS, CACHE}
    if change.taints is not None:
        assert list(change.taints) == [taint for taint in node.taints if taint["key"] != TAINT]


@given(facts, nodes)
def test_the_labels_are_of_ready_models_and_bounded_and_pinned_models_come_first(facts: Facts, node: NodeFacts) -> None:
    with patch.object(signals, "MODEL_LABELS", few := 5):
        after = applied(node, signals.change(facts, node, TAINT, NOW))
        left_out = signals.left_out(facts)
        assert not signals.change(facts, after, TAINT, NOW).labels, "what has a place keeps it"
    shown = {key for key in after.labels if key.startswith(MODEL_LABEL)}
    ready = {f"{MODEL_LABEL}{hashlib.sha256(ref.encode()).hexdigest()[:10]}": model for model in facts.models for ref in model.refs}
    assert shown <= ready.keys()
    assert len(shown) == min(few, len(ready))
    assert left_out == len(ready) - len(shown)
    pinned = {key for key, model in ready.items() if model.pinned}
    assert pinned <= shown or shown <= pinned


@given(facts)
def test_what_is_shown_is_short_and_of_its_form(facts: Facts) -> None:
    empty = NodeFacts({}, {})
    with patch.object(signals, "MODELS_BYTES", 500):
        change = signals.change(facts, empty, TAINT, NOW)
    told = [signals.condition(facts), *signals.news(None, facts, None)]
    assert all(REASON.fullmatch(each.reason) and len(each.reason) <= 128 for each in told)
    assert all(len(each.message) <= WORDS and not re.search(r"[\x00-\x1f\x7f]", each.message) for each in told)
    assert len(change.annotations[MODELS].encode()) <= 500
    listed = json.loads(change.annotations[MODELS])
    assert [each["ref"] for each in listed] == sorted(model.ref for model in facts.models)[: len(listed)]
    assert json.loads(change.annotations[CACHE]) == dict(zip(("total", "free", "used", "limit"), facts.space, strict=True))


@given(facts)
def test_the_same_again_is_no_news(facts: Facts) -> None:
    same = [each for each in signals.news(facts, facts, None) if each.reason != "CacheLost"]
    assert not same
    lost = signals.news(facts, facts, None)
    assert {each.key for each in lost} <= {each.key for each in signals.news(None, facts, None)}, "the outbox knows it"
    told = [each for each in signals.news(None, facts, signals.condition(facts)) if each.reason != "ModelFailed"]
    assert not told, "an earlier daemon told it"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | words, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=8
)
strange = st.dictionaries(st.sampled_from(["metadata", "spec", "status", "labels", "annotations", "taints", "conditions"]), json_values)


@given(strange | st.dictionaries(st.sampled_from(["metadata", "spec", "status"]), strange), facts)
def test_no_answer_of_a_server_is_too_strange(raw: dict[str, Any], facts: Facts) -> None:
    signals.change(facts, NodeFacts.of(raw), TAINT, NOW)


READY = Facts(Disks("mounted", 1, case="C1", words="md of 8 disks"), (Held("hf://a/b@c", ("hf://a/b",), 10),), declared=("hf://a/b",))
TAINTED = NodeFacts({}, {}, ({"key": TAINT, "effect": "NoSchedule"}, {"key": "sku", "effect": "NoSchedule"}))


@pytest.mark.parametrize(
    ("facts", "removed"),
    [
        (READY, True),
        (replace(READY, declared=()), True),
        (replace(READY, declared=("hf://a/b", "hf://c/d")), False),
        (replace(READY, problems=("the disk does not answer",)), False),
    ],
)
def test_the_taint_stays_until_every_declared_model_is_ready(facts: Facts, removed: bool) -> None:
    assert signals.change(facts, TAINTED, TAINT, NOW).taints == (TAINTED.taints[1:] if removed else None)


def test_the_time_of_the_transition_is_that_of_the_status_not_of_the_words() -> None:
    before = Condition("True", "C1", "another word", "2020-01-01T00:00:00Z")
    node = NodeFacts({}, {}, condition=before)
    told = signals.change(READY, node, TAINT, NOW).condition
    assert told is not None
    assert told.since == before.since
    down = signals.change(replace(READY, disks=Disks("absent", 2, "N00", reason="no disk")), node, TAINT, NOW).condition
    assert down is not None
    assert (down.status, down.since) == ("False", NOW)
    same = NodeFacts({}, {}, condition=replace(signals.condition(READY), since=before.since))
    assert signals.change(READY, same, TAINT, NOW).condition is None
    beat = signals.change(READY, same, TAINT, NOW, heartbeat=True).condition
    assert beat == same.condition


def test_a_condition_whose_times_nobody_set_gets_one() -> None:
    """As after `kubectl patch --subresource=status` by hand: the API server shows such a time as null, and takes no text that is none."""
    told = signals.condition(READY)
    by_hand = {"type": signals.CONDITION, "status": told.status, "reason": None, "lastHeartbeatTime": None, "lastTransitionTime": None}
    wanted = signals.change(READY, NodeFacts.of({"status": {"conditions": [by_hand]}}), TAINT, NOW).condition
    assert wanted is not None
    assert wanted.since == NOW


def test_bytes_that_changed_by_little_are_no_reason_to_write() -> None:
    full = replace(READY, space=(1000, 500, 400, 900))
    node = applied(NodeFacts({}, {}), signals.change(full, NodeFacts({}, {}), TAINT, NOW))
    assert not signals.change(replace(full, space=(1000, 495, 405, 900)), node, TAINT, NOW)
    for space in ((1000, 490, 410, 900), (1001, 500, 400, 900), (1000, 500, 400, 901)):
        assert signals.change(replace(full, space=space), node, TAINT, NOW).annotations.keys() == {CACHE}


# -- news


MOUNTED = Disks("mounted", 5, fs_uuid="a")


@pytest.mark.parametrize(
    ("before", "now", "reasons"),
    [
        (None, MOUNTED, []),
        (None, replace(MOUNTED, code="R01", reason="cache lost: A1 missing"), ["CacheRebuilt"]),
        (MOUNTED, replace(MOUNTED, state="withdrawing", code="R01", generation=6), []),
        (replace(MOUNTED, state="withdrawing"), replace(MOUNTED, state="lost", generation=7), ["CacheLost"]),
        (replace(MOUNTED, state="lost"), replace(MOUNTED, generation=8, fs_uuid="b"), ["CacheRebuilt"]),
        (MOUNTED, replace(MOUNTED, generation=9, fs_uuid="b", losses=1), ["CacheLost", "CacheRebuilt"]),
        (MOUNTED, replace(MOUNTED, refused=("nvme1n1 D09",)), ["DisksRefused"]),
        (None, Disks("absent", 1, "N03", reason="a disk is refused"), ["DisksRefused"]),
        (None, Disks("absent", 1, None, reason="stripe.json is not there"), []),
        (MOUNTED, Disks("absent", 2, "P06", reason="another file system is there", fs_uuid="a"), ["DisksRefused"]),
    ],
)
def test_news_of_the_disks(before: Disks | None, now: Disks, reasons: list[str]) -> None:
    found = signals.news(Facts(before) if before else None, Facts(now), None)
    assert [each.reason for each in found] == reasons
    assert all(each.warning is (each.reason != "CacheRebuilt") for each in found)


def test_a_model_that_fails_again_for_the_same_reason_is_no_news() -> None:
    first = replace(READY, failures=(Failure("hf://x/y", "gated", "cannot read hf://x/y: no access"),))
    assert [each.reason for each in signals.news(READY, first, None)] == ["ModelFailed"]
    assert signals.news(first, replace(first, failures=(*first.failures, Failure("hf://x/y", "gated", "other words"))), None) == []


# -- the outbox


def news(number: int) -> signals.News:
    return signals.News(f"key {number}", "ModelFailed", "message")


def drained(box: Outbox, now: float) -> int:
    """How many may be sent now."""
    count = 0
    while box.next(now) is not None:
        box.sent()
        count += 1
    return count


def test_the_same_news_waits_an_hour_and_many_are_thinned_out() -> None:
    box = Outbox("node")
    box.put([news(1), news(1)], 0)
    assert drained(box, 0) == 1
    box.put([news(1)], AGAIN - 1)
    assert drained(box, AGAIN - 1) == 0
    box.put([news(1)], AGAIN)
    assert drained(box, AGAIN) == 1
    box.put([news(number) for number in range(100)], 2 * AGAIN)
    assert drained(box, 2 * AGAIN) == BURST
    assert drained(box, 2 * AGAIN + EVERY) == 1
    assert drained(box, 10 * AGAIN) == BURST
    assert drained(box, 20 * AGAIN) == BURST
    assert drained(box, 30 * AGAIN) == WAITING - 3 * BURST - 1


def test_pods_that_make_models_fail_hold_up_no_news_of_the_node() -> None:
    before, now = replace(READY, failures=()), replace(READY, disks=replace(READY.disks, losses=READY.disks.losses + 1))
    box = Outbox("node")
    floods = [replace(before, failures=tuple(Failure(f"hf://x/{flood}-{number}", "gated", "no") for number in range(200))) for flood in range(20)]
    box.put(signals.news(before, floods[0], None), 0)
    box.put(signals.news(before, now, None), 0)
    for flood in floods[1:]:
        box.put(signals.news(before, flood, None), 0)
    first = box.next(0)
    assert first is not None
    assert first.reason == "CacheLost"
    assert drained(box, 0) == BURST
    assert len(box._told) <= REMEMBERED


def test_nothing_is_sent_before_the_server_wants_it() -> None:
    box = Outbox("node")
    box.put([news(1)], 0)
    box.hold(50)
    assert drained(box, 49) == 0
    assert drained(box, 50) == 1


@given(st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,250}[a-z0-9])?", fullmatch=True))
def test_an_events_name_is_of_its_form_and_says_what_it_says(node: str) -> None:
    box = Outbox(node)
    assert len(box.name(news(1))) <= 253
    assert box.name(news(1)) == box.name(news(1)) != box.name(news(2))


# -- names, and how a pod asks


def test_the_hash_is_that_of_the_canonical_text() -> None:
    digest = hashlib.sha256(b"hf://meta-llama/Llama-3.1-8B").hexdigest()[:10]
    for text in ("meta-llama/Llama-3.1-8B", "hf://meta-llama/Llama-3.1-8B", "hf://meta-llama/Llama-3.1-8B@main"):
        assert signals.model_hash(parse_ref(text)) == digest
    assert signals.label_of(parse_ref("meta-llama/Llama-3.1-8B")) == f"nvcache.io/model.{digest}"
    exact = hashlib.sha256(f"hf://a/b@{COMMIT}".encode()).hexdigest()[:10]
    assert signals.model_hash(parse_ref(f"a/b@{COMMIT}")) == exact
    assert (
        len({signals.model_hash(parse_ref(f"{ref}{at}")) for ref in ("a/b", "az://account/container", "file:///a/b") for at in ("", f"@{'0' * 64}")})
        == 6
    )


def test_affinity_prints_what_a_pod_takes(capsys: pytest.CaptureFixture[str]) -> None:
    label = signals.label_of(parse_ref("a/b"))
    assert main(["affinity", "a/b"]) == 0
    stanza = yaml.safe_load(capsys.readouterr().out)
    assert main(["affinity", "a/b@main", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == stanza
    term = stanza["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term == [{"matchExpressions": [{"key": label, "operator": "In", "values": ["ready"]}]}]
    assert main(["affinity", "a/b", "--label"]) == 0
    assert capsys.readouterr().out == f"{label}=ready\n"


@pytest.mark.parametrize("arguments", [["a/b@0123abc"], ["../x"], ["hf--a--b"], ["a/b", "--json", "--label"], []])
def test_affinity_says_what_it_cannot_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["affinity", *arguments]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("nvcache: cannot ")

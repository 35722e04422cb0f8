"""What somebody sees, hears and can do without a mouse: a node with something in every state, in a real browser."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from nvcache.cli.bridge import Bridge
from tests.support import page_node
from tests.support.browser import Tab, keep_screenshot
from tests.support.stub_daemon import StubDaemon, problem

HOSTILE = """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>"""
ONE_LOOK = 7  # calls
BACKWARDS = "a\u202etxt.exe"

# WCAG 2.2, 1.4.3: the contrast of every text with what lies behind it; text that is not shown does not count.
CONTRASTS = """
() => {
  const channel = (c) => { const s = c / 255; return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; };
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = parts(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const low = [];
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const parent = text.parentElement;
    if (!text.data.trim() || !parent.checkVisibility()) continue;
    const [a, b] = [light(parts(getComputedStyle(parent).color)), light(behind(parent))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) low.push(`${contrast.toFixed(2)} ${text.data.trim()}`);
  }
  return low;
}
"""


@pytest.fixture
def shown(bridge: Bridge, open_tab: Callable[..., Tab]) -> Callable[..., Tab]:
    """Opens the page by the link of the bridge, and waits until it shows the node."""

    def opened(**options: Any) -> Tab:
        tab = open_tab(**options)
        tab.open(bridge.link)
        expect(tab.page.locator("#link")).to_have_text("Live, asked every 2 s")
        expect(tab.page.locator("#models > li")).to_have_count(len(page_node.models()))
        return tab

    return opened


def row(tab: Tab, name: str) -> Any:
    """The row of a model."""
    return tab.page.locator("#models > li").filter(has=tab.page.get_by_role("heading", name=name))


def test_everything_is_there(shown: Callable[..., Tab], tmp_path: Path) -> None:
    tab = shown()
    page = tab.page
    expect(page.locator("#sum")).to_have_text("2 of 7 models ready · 2 in trouble · 7.3 GB/s")
    llama = row(tab, "meta-llama/Llama-3.3-70B-Instruct")
    bar = page.get_by_role("img", name=re.compile(r"Used 636.6.GB, Promised to fills 95.0.GB, Quarantined 3.4.GB, Free 1.2.TB, Limit 1.9.TB"))
    expect(bar).to_be_visible()
    space = page.get_by_role("region", name="Space")
    disks = page.get_by_role("region", name="Disks")
    for where, words in (
        (row(tab, "Qwen/Qwen3-32B"), ("fetching", "42% · 29.9 GB of 70.2 GB · 1.2 GB/s · 33 s left", "12 of 30 files")),
        (llama, ("ready", "141.0 GB in 30 files", "verified 3 h ago", "used 7 min ago", "2 leases", "pinned")),
        (row(tab, "mistralai/Mistral-Small-24B"), ("failed", "no route to huggingface.co", "look at its proxy")),
        (row(tab, "openai/gpt-oss-20b"), ("degraded", "2 chunks of model-00001-of-00003.safetensors went bad")),
        (row(tab, "Qwen/Qwen3-0.6B"), ("verified 2 d ago", "in use", "the source was down")),
        (space, ("Above 1.8 TB the models used longest ago make way, down to 1.7 TB.", "and 384.0 GB stay free for others")),
        (disks, ("W01: an allowed disk is not in the stripe", "mounted", "md", "xfs", "/dev/nvme0n1, /dev/nvme1n1")),
        (disks.locator("li").filter(has_text="nvme2n1").last, ("refused", "D07: it holds an ext4 file system")),
    ):
        for word in words:
            expect(where).to_contain_text(word)
    assert row(tab, "Qwen/Qwen3-32B").locator("progress").get_attribute("aria-label")
    expect(page.locator("#jobs > li")).to_have_count(2)
    page.get_by_text("2 jobs ended in the last hour").click()
    expect(page.locator("#ended li").filter(has_text="Mistral")).to_contain_text("failed")
    llama.get_by_text("Details").click()
    expect(llama).to_contain_text("default/vllm-llama-0 · ends in 8 min")
    expect(llama).to_contain_text("/var/lib/nvcache/mnt/store/hub as meta-llama/Llama-3.3-70B-Instruct")
    assert page.title() == "2/7 ready · nvcache"
    inside = page.locator("#bar").bounding_box() or {}
    high, low = (page.locator(mark).bounding_box() or {} for mark in ("#high", "#low"))
    for mark, share in ((high, 0.95), (low, 0.90)):
        assert mark["x"] + mark["width"] / 2 == pytest.approx(inside["x"] + share * inside["width"], abs=1)
    keep_screenshot(page, "page", tmp_path)
    tab.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_holds_it_all(shown: Callable[..., Tab], tmp_path: Path, scheme: str) -> None:
    tab = shown(width=320, height=640, color_scheme=scheme)
    tab.page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    expect(tab.page.get_by_text("HF_HUB_CACHE").first).to_be_visible()
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 320
    outside = tab.page.evaluate(
        "[...document.querySelectorAll('body *:not(.unseen)')].filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > 320)"
        ".map((e) => e.outerHTML)"
    )
    assert outside == []
    keep_screenshot(tab.page, f"page-narrow-{scheme}", tmp_path)
    assert tab.page.evaluate(CONTRASTS) == []
    tab.check()


def test_letters_twice_as_large_still_fit(shown: Callable[..., Tab]) -> None:
    tab = shown(width=640)
    tab.page.evaluate("document.documentElement.style.fontSize = '200%'; document.body.style.fontSize = '30px'")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 640


def test_the_keyboard_alone_reaches_and_opens_everything(shown: Callable[..., Tab]) -> None:
    tab = shown(width=320)
    page = tab.page
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focus = page.evaluate(
            """(() => { const e = document.activeElement, style = getComputedStyle(e);
            return e === document.body ? null : [e.tagName, e.textContent, style.outlineStyle, style.outlineWidth]; })()"""
        )
        if focus is None:
            break
        reached.append(focus)
    assert [text for tag, text, *_ in reached if tag == "A"] == ["Space", "Models", "Jobs", "Disks"]
    assert sum(tag == "SUMMARY" for tag, *_ in reached) == len(page_node.models()) + 1
    assert {(style, width) for _, _, style, width in reached} == {("solid", "2px")}, "what has the focus shows it"

    page.get_by_role("link", name="Models").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # into the first model
    page.keyboard.press("Enter")
    first = page.locator("#models > li").first
    expect(first.get_by_text("Reference")).to_be_visible()
    page.keyboard.press("Space")
    expect(first.get_by_text("Reference")).not_to_be_visible()


def test_what_has_the_focus_keeps_it_while_rows_come_and_go(shown: Callable[..., Tab], stub: StubDaemon) -> None:
    tab = shown()
    summary = row(tab, "Qwen/Qwen3-32B").locator("summary")
    summary.focus()
    tab.page.keyboard.press("Enter")
    models = [model for model in page_node.models() if "gemma" not in model["ref"]]
    done = [page_node.model("Qwen/Qwen3-32B") if "Qwen3-32B" in model["ref"] else model for model in models]
    stub.answer("GET /v1/models", {"models": [*done, page_node.model("a/new-one", "queued")]})
    expect(row(tab, "a/new-one")).to_have_count(1)
    expect(row(tab, "gemma")).to_have_count(0)
    expect(row(tab, "Qwen/Qwen3-32B").locator(".state")).to_have_text("ready")
    expect(summary).to_be_focused()
    expect(row(tab, "Qwen/Qwen3-32B").get_by_text("HF_HUB_CACHE")).to_be_visible()
    expect(tab.page.locator("[aria-live=polite]")).to_have_text("Qwen/Qwen3-32B: ready")
    tab.check()


def test_a_reader_that_does_not_see_it_gets_names_and_order(shown: Callable[..., Tab]) -> None:
    page = shown().page
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("[...document.querySelectorAll('h1')].length") == 1
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].filter((h) => h.checkVisibility()).map((h) => Number(h.tagName[1]))")
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    for role in ("banner", "main", "contentinfo", "navigation"):
        expect(page.get_by_role(role)).to_have_count(1)  # type: ignore[arg-type]
    for name in ("Space", "Models", "Jobs", "Disks"):
        expect(page.get_by_role("region", name=name)).to_be_visible()
    for bar in page.get_by_role("progressbar").all():
        assert bar.get_attribute("aria-label")
    assert page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id).filter((id, i, all) => all.indexOf(id) !== i)") == []
    unnamed = "[...document.querySelectorAll('button, input:not([hidden]), a, summary')].filter((e) => !(e.textContent.trim() || e.labels?.length))"
    assert page.evaluate(f"{unnamed}.map((e) => e.outerHTML)") == []


def test_names_and_words_of_strangers_stay_words(bridge: Bridge, stub: StubDaemon, open_tab: Callable[..., Tab]) -> None:
    error = problem("source-failed", HOSTILE, hint=HOSTILE)
    found = page_node.model(HOSTILE, warnings=[HOSTILE, BACKWARDS], note=HOSTILE, path=HOSTILE, hub_id=HOSTILE, leases=1)
    stub.answer("GET /v1/models", {"models": [found, page_node.model(f"{HOSTILE}2", "failed", error=error)]})
    stub.answer("GET /v1/leases", {"leases": [{**page_node.leases()[0], "entry": found["entry"], "holder": HOSTILE}]})
    stub.answer("GET /v1/jobs", {"jobs": [page_node.job(HOSTILE, HOSTILE, HOSTILE, error=error, note=HOSTILE, bad_files=[HOSTILE])]})
    disk = {"name": HOSTILE, "serial": HOSTILE, "model": HOSTILE, "size": 1, "verdict": HOSTILE, "code": HOSTILE, "reason": HOSTILE}
    words = dict.fromkeys(("backend", "state", "code", "reason", "path", "health", "filesystem", "array", "mount"), HOSTILE)
    stub.answer("GET /v1/stripe", {**page_node.STRIPE, **words, "disks": [disk], "warnings": [HOSTILE], "members": [HOSTILE]})
    stub.answer("GET /readyz", (503, {"ready": False, "problems": [HOSTILE]}))
    stub.answer("GET /version", {"version": HOSTILE, "api": "v1"})
    tab = open_tab()
    tab.open(bridge.link)
    expect(tab.page.locator("#models > li")).to_have_count(2)
    tab.page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    expect(tab.page.get_by_role("region", name="Not ready")).to_contain_text(HOSTILE)
    expect(tab.page.locator("#disks > li")).to_contain_text(HOSTILE)
    expect(tab.page.locator("#jobs > li")).to_contain_text(HOSTILE)
    expect(row(tab, HOSTILE).first).to_contain_text(HOSTILE)
    expect(tab.page.get_by_text("a\ufffdtxt.exe")).to_be_visible()
    assert tab.page.title() == "not ready · nvcache"
    assert tab.page.evaluate("document.querySelectorAll('img, main script, iframe, [onerror], [style]:not(#gauge span)').length") == 0
    tab.check()


def test_a_full_cache_says_what_is_in_the_way(bridge: Bridge, stub: StubDaemon, open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    room = {"used": 1750 * page_node.GB, "reserved": 95 * page_node.GB, "free": 400 * page_node.GB}
    stub.answer("GET /v1/space", {**page_node.SPACE, **room})
    error = problem("full", "cannot make room for hf://a/b just now: held are c/d (141.0 GB: pinned, leased)", hint="end a lease")
    stub.answer("GET /v1/models", {"models": [page_node.model("c/d", pinned=True, leases=1), page_node.model("a/b", "failed", error=error)]})
    tab = open_tab()
    tab.open(bridge.link)
    space = tab.page.get_by_role("region", name="Space")
    expect(space).to_contain_text("It is above that now.")
    expect(space.get_by_role("img", name=re.compile("Lacking on the disk 75.0.GB"))).to_be_visible()
    expect(row(tab, "a/b")).to_contain_text("held are c/d (141.0 GB: pinned, leased)")
    expect(row(tab, "a/b")).to_contain_text("end a lease")
    keep_screenshot(tab.page, "page-full", tmp_path)
    assert tab.page.evaluate(CONTRASTS) == []
    tab.check()


def test_a_node_that_lost_its_disks_says_which(bridge: Bridge, stub: StubDaemon, open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    why = "/dev/nvme1n1 (serial S64FNE0R101) vanished"
    lost = {"name": "nvme1n1", "serial": "S64FNE0R101", "model": "", "size": None, "verdict": "refused", "code": "D18", "reason": why}
    disks = [lost if disk["name"] == "nvme1n1" else disk for disk in page_node.STRIPE["disks"]]
    stub.answer("GET /v1/stripe", {**page_node.STRIPE, "state": "lost", "code": "R01", "reason": why, "disks": disks, "path": None, "health": why})
    stub.answer("GET /v1/space", dict.fromkeys(page_node.SPACE, 0))
    stub.answer("GET /readyz", (503, {"ready": False, "problems": [f"R01: {why}"]}))
    for call in ("models", "jobs", "leases"):
        stub.answer(f"GET /v1/{call}", {call: []})
    tab = open_tab()
    tab.open(bridge.link)
    expect(tab.page.get_by_role("region", name="Not ready")).to_contain_text(why)
    expect(tab.page.get_by_role("region", name="Space")).to_contain_text("There is no store just now.")
    for shape in ("#gauge", "#marks"):
        expect(tab.page.locator(shape)).to_be_hidden()
    assert tab.page.title() == "not ready · nvcache"
    expect(tab.page.locator("#sum")).to_have_text("")
    expect(tab.page.get_by_text("None can be shown while the node is not ready.")).to_be_visible()
    expect(tab.page.locator("#disks > li").first).to_contain_text("D18")
    keep_screenshot(tab.page, "page-lost", tmp_path)
    tab.check()


def test_what_an_older_daemon_does_not_tell_is_left_out(bridge: Bridge, stub: StubDaemon, open_tab: Callable[..., Tab]) -> None:
    stub.answer("GET /v1/space", {name: value for name, value in page_node.SPACE.items() if name not in ("min_free", "high_mark", "low_mark")})
    tab = open_tab()
    tab.open(bridge.link)
    expect(tab.page.get_by_role("img", name=re.compile("Free 1.2.TB"))).to_be_visible()
    for mark in ("#high", "#low", "#marks"):
        expect(tab.page.locator(mark)).to_be_hidden()
    tab.check()


def test_a_wide_window_is_not_filled_with_one_line(shown: Callable[..., Tab], tmp_path: Path) -> None:
    """Lines as long as a wide screen cannot be read."""
    tab = shown(width=1920, color_scheme="dark")
    assert (tab.page.locator("main").bounding_box() or {})["width"] <= 1000
    assert tab.page.evaluate(CONTRASTS) == []
    keep_screenshot(tab.page, "page-wide-dark", tmp_path)


def test_an_empty_node_says_what_to_do(bridge: Bridge, stub: StubDaemon, open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    for call, members in (("models", {"models": []}), ("jobs", {"jobs": []}), ("leases", {"leases": []})):
        stub.answer(f"GET /v1/{call}", members)
    stub.answer("GET /v1/stripe", {**page_node.STRIPE, "backend": "directory", "code": None, "reason": "", "disks": [], "warnings": []})
    tab = open_tab()
    tab.open(bridge.link)
    expect(tab.page.get_by_text("No model is here yet")).to_be_visible()
    expect(tab.page.get_by_text("Nothing is under way")).to_be_visible()
    expect(tab.page.get_by_text("The store is a directory that nvcache was given.")).to_be_visible()
    keep_screenshot(tab.page, "page-empty", tmp_path)
    tab.check()


def test_what_one_call_refuses_is_said_in_its_place(bridge: Bridge, stub: StubDaemon, open_tab: Callable[..., Tab]) -> None:
    stub.answer("GET /v1/space", (503, problem("no-stripe", "cannot tell the room: the node has no stripe (N03)")))
    stub.answer("GET /v1/leases", (403, problem("not-allowed")))
    tab = open_tab()
    tab.open(bridge.link)
    expect(tab.page.get_by_role("region", name="Space")).to_contain_text("the node has no stripe (N03)")
    expect(tab.page.locator("#models > li")).to_have_count(len(page_node.models()))
    expect(tab.page.locator("#away")).to_be_hidden()


def test_a_page_that_nobody_looks_at_asks_nothing(bridge: Bridge, stub: StubDaemon, open_tab: Callable[..., Tab]) -> None:
    page = open_tab().page
    page.clock.install()
    page.goto(bridge.link)
    expect(page.locator("#models > li")).to_have_count(len(page_node.models()))
    page.evaluate("Object.defineProperty(document, 'hidden', { get: () => window.away, configurable: true }); window.away = true")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    before = len(stub.asked)
    page.clock.run_for("10:00")
    assert len(stub.asked) - before <= ONE_LOOK, "one may have been under way"
    stub.answer("GET /v1/models", {"models": []})
    page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.get_by_text("No model is here yet")).to_be_visible()

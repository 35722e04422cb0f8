"""The page over a real daemon: what happens there is seen at once, a token lets in, and a daemon that is away is said to be away and found again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from playwright.sync_api import expect

from nvcache.cli.bridge import Bridge
from nvcache.engine.handover import LocalStripe, StripeState, StripeStatus
from nvcache.settings import load
from tests.api.conftest import TOKEN, make_model
from tests.api.harness import Daemon, UnixConnection, ask
from tests.support import page_node
from tests.support.browser import Tab
from tests.support.daemon import DaemonProcess
from tests.support.faults import Kind
from tests.support.hub import HubServer
from tests.support.repo import Repo
from tests.support.stub_daemon import StubDaemon

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
BEYOND_MS = 40_000  # more than the longest pause between two tries, with its chance
WITHIN_MS = 20_000  # less than that
MIB = 1 << 20


@pytest.fixture
def remote(place: Path) -> Iterator[Daemon]:
    """A daemon that listens on TCP, with a token that may look."""
    (place / "token").write_text(TOKEN + "\n")
    flags = {"store": place / "store", "socket": place / "nvcache.sock", "workers": 1, "lanes": 1, "listen": "127.0.0.1:0"}
    with Daemon(load(flags={**flags, "listen_token_file": place / "token"}, environ={"HOME": str(place)})) as running:
        yield running


def test_with_the_token_it_shows_what_happens_as_it_happens(remote: Daemon, place: Path, open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    page = tab.page
    tab.open(f"{remote.listeners[-1].url}/")
    field = page.get_by_label("Bearer token of this daemon")
    expect(field).to_be_focused()
    expect(page.get_by_role("region", name="Models")).to_be_hidden()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The daemon does not know this token.")).to_be_visible()
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#link")).to_have_text("Live")
    expect(page.get_by_text("No model is here yet")).to_be_visible()
    expect(field).to_be_hidden()

    model = remote.ready(f"file://{make_model(place / 'origin' / 'tiny')}")
    row = page.locator("#models > li")
    expect(row.locator(".state")).to_have_text("ready")
    expect(row).to_contain_text("origin/tiny")
    remote.ask("PUT", f"/v1/models/{model['entry']}/pin")
    expect(row).to_contain_text("pinned")
    remote.ask("DELETE", f"/v1/models/{model['entry']}/pin")
    remote.ask("DELETE", f"/v1/models/{model['entry']}")
    expect(row).to_have_count(0)
    expect(page.locator("#link")).to_have_text("Live")

    assert TOKEN not in page.url
    assert tab.context.cookies() == []
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0
    tab.check()


def test_a_reader_who_may_not_list_leases_sees_all_the_rest(remote: Daemon, place: Path, open_tab: Callable[..., Tab]) -> None:
    model = remote.ready(f"file://{make_model(place / 'origin' / 'tiny')}")
    remote.ask("POST", f"/v1/models/{model['entry']}/leases", {"holder": "somebody"})
    tab = open_tab()
    tab.open(f"{remote.listeners[-1].url}/")
    tab.page.get_by_label("Bearer token of this daemon").fill(TOKEN)
    tab.page.keyboard.press("Enter")
    row = tab.page.locator("#models > li")
    expect(row).to_contain_text("1 lease")
    row.get_by_text("Details").click()
    expect(row).to_contain_text("Reference")
    expect(row).not_to_contain_text("Held by")
    expect(tab.page.locator("#away")).to_be_hidden()


def test_the_bridge_has_the_token_and_the_browser_has_not(
    remote: Daemon, place: Path, open_tab: Callable[..., Tab], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCACHE_TOKEN_FILE", str(place / "token"))
    tab = open_tab()
    with Bridge(remote.listeners[-1].url) as bridge:
        tab.open(bridge.link)
        expect(tab.page.locator("#link")).to_have_text("Live")
        (place / "token").write_text("another")
        (place / "old").write_text(TOKEN)
        monkeypatch.setenv("NVCACHE_TOKEN_FILE", str(place / "old"))
        tab.page.reload()
        expect(tab.page.locator("#away")).to_contain_text("the bearer token is missing or wrong")
        expect(tab.page.locator("#door")).to_be_hidden()


def test_a_node_without_its_stripe_says_so_and_comes_back(place: Path, open_tab: Callable[..., Tab]) -> None:
    stripe = LocalStripe()
    settings = load(flags={"store": place / "store", "socket": place / "nvcache.sock", "workers": 1, "lanes": 1}, environ={"HOME": str(place)})
    stripe.publish(StripeState(1, StripeStatus.ABSENT, "N03", "no disk may be used", details=page_node.STRIPE))
    tab = open_tab()
    page = tab.page
    region = {name: page.get_by_role("region", name=name) for name in ("Models", "Space", "Disks", "Not ready")}
    with Daemon(settings, stripe) as daemon, Bridge(f"unix://{settings.socket}") as bridge:
        tab.open(bridge.link)
        expect(region["Disks"]).to_contain_text("N03: no disk may be used")
        expect(region["Disks"].locator(".sheet .state")).to_have_text("absent")
        expect(region["Not ready"]).to_contain_text("no disk may be used")
        expect(region["Models"].get_by_text("None can be shown while the node is not ready")).to_be_visible()
        expect(region["Space"].get_by_text("There is no store just now")).to_be_visible()
        expect(page.locator("#bar")).to_be_hidden()
        expect(page.get_by_text("No model is here yet")).to_be_hidden()
        expect(page.locator("#away")).to_be_hidden()

        (place / "disk").mkdir()
        stripe.publish(StripeState(2, StripeStatus.MOUNTED, fs_uuid="a", store=str(place / "disk"), details=page_node.STRIPE))
        expect(page.get_by_text("No model is here yet")).to_be_visible()
        expect(region["Not ready"]).to_be_hidden()
        expect(page.locator("#link")).to_have_text("Live")
        daemon.ready(f"file://{make_model(place / 'origin' / 'tiny')}")
        expect(page.locator("#models > li .state")).to_have_text("ready")

        stripe.publish(StripeState(3, StripeStatus.WITHDRAWING, "R01", "/dev/nvme1n1 vanished", details=page_node.STRIPE))
        expect(region["Not ready"]).to_contain_text("/dev/nvme1n1 vanished")
        expect(page.locator("#models > li")).to_have_count(0)
        expect(page.locator("#away")).to_be_hidden()
        tab.check()


def flip(path: Path, at: int) -> None:
    """Damage one byte behind the daemon's back."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_fill_and_a_repair_are_seen_while_they_go_on(place: Path, open_tab: Callable[..., Tab]) -> None:
    """Over the socket, from a real Hub that stops half way each time until it has been looked at."""
    content = bytes(range(256)) * (40 * MIB // 256)
    with HubServer({"acme/one": Repo({"model.bin": content})}) as hub, DaemonProcess(place, hub.url, workers=1, stall_timeout=300) as daemon:
        stall = hub.faults.add("*model.bin", Kind.STALL, times=None, after=20 * MIB, seconds=600)
        with Bridge(f"unix://{daemon.socket}") as bridge:
            tab = open_tab()
            tab.open(bridge.link)
            page = tab.page
            row, used = page.locator("#models > li"), page.locator("#shares > div", has_text="Used").locator("dd")
            expect(page.get_by_text("No model is here yet")).to_be_visible()
            ask(UnixConnection(daemon.socket), "POST", "/v1/models", {"ref": "acme/one"})
            expect(row.locator(".state")).to_have_text("fetching")
            expect(row.locator(".going")).to_contain_text(re.compile(r"(\d|[1-9]\d)% · \d+\.\d.MB of 41\.9.MB"))
            expect(row.locator("progress")).to_be_visible()
            expect(page.locator("#jobs > li")).to_contain_text("fill acme/one")
            hub.faults.clear()
            expect(row.locator(".state")).to_have_text("ready")
            expect(row).to_contain_text("verified just now")
            expect(used).to_have_text(re.compile(r"41\.9.MB"))
            expect(page.get_by_text("1 job ended in the last hour")).to_be_visible()

            hub.faults.add("*model.bin", Kind.STALL, times=None, seconds=600)
            (blob,) = daemon.store.glob("blobs/sha256/*/*")
            flip(blob, 17 * MIB)
            entry = ask(UnixConnection(daemon.socket), "GET", "/v1/models").json["models"][0]["entry"]
            ask(UnixConnection(daemon.socket), "POST", f"/v1/models/{entry}/verify")
            expect(row.locator(".state")).to_have_text(re.compile("degraded|fetching"))  # until its repair has begun, and then
            expect(page.locator("#sum")).to_contain_text("0 of 1 model ready")
            expect(page.locator("#jobs > li")).to_contain_text("acme/one")
            hub.faults.clear()
            expect(row.locator(".state")).to_have_text("ready")
            expect(page.locator("#jobs > li")).to_have_count(0)
            tab.check()
        assert stall.hits


def test_a_daemon_that_dies_is_said_to_be_away_and_found_again(place: Path, open_tab: Callable[..., Tab]) -> None:
    reference = f"file://{make_model(place / 'origin' / 'tiny')}"
    with DaemonProcess(place, "http://127.0.0.1:9", workers=1, lanes=1) as daemon, Bridge(f"unix://{daemon.socket}") as bridge:
        assert daemon.cli("warm", reference).returncode == 0
        tab = open_tab()
        tab.open(bridge.link)
        page = tab.page
        expect(page.locator("#models > li .state")).to_have_text("ready")
        expect(page.locator("#link")).to_have_text("Live")
        assert page.url == f"http://127.0.0.1:{bridge.server_port}/", "the secret of the link is not left in sight"
        daemon.kill()
        expect(page.locator("#away-title")).to_have_text(re.compile(r"Daemon away since \d\d:\d\d:\d\d\."))
        expect(page.locator("#away")).to_contain_text("cannot reach the nvcache daemon")
        expect(page.get_by_role("alert").filter(has_text="away")).to_be_visible()
        expect(page.locator("#models > li")).to_contain_text("origin/tiny")
        daemon.start()
        page.get_by_role("button", name="Try now").click()
        expect(page.locator("#away")).to_be_hidden()
        expect(page.locator("#link")).to_have_text("Live")
        page.reload()
        expect(page.locator("#models > li .state")).to_have_text("ready")
        tab.check()


def test_a_daemon_that_stays_away_is_asked_less_and_less(bridge: Bridge, stub: StubDaemon, open_tab: Callable[..., Tab]) -> None:
    page = open_tab().page
    page.clock.install(time=NOON)
    page.clock.pause_at(NOON + timedelta(seconds=1))  # from here time passes when the test says so
    page.goto(bridge.link)
    expect(page.locator("#link")).to_have_text("Live, asked every 2 s")
    tries = []
    page.route("**/version", lambda route: (tries.append(1), route.abort()))
    for count in range(1, 9):
        with page.expect_event("requestfailed", lambda request: request.url.endswith("/version")):
            page.clock.fast_forward(BEYOND_MS)
        page.evaluate("fetch('icon.svg').then(() => null)")  # by then the page knows, and the next pause has begun
        expect(page.locator("#away-hint")).to_contain_text("nvcache ui")
        assert len(tries) == count
    page.clock.fast_forward(WITHIN_MS)
    page.evaluate("fetch('icon.svg').then(() => null)")
    assert len(tries) == 8
    page.unroute("**/version")
    page.clock.fast_forward(BEYOND_MS)
    expect(page.locator("#away")).to_be_hidden()

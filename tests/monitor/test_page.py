"""The status page in a real browser: shows what there is, runs nothing that a message brought, asks nobody else."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from importlib import resources
from typing import Any

import msgspec
import pytest
from lab.browser import Browser

from contentfilter import monitor
from contentfilter.bus.messages import BackendStatus, CanaryResult, InFlight, Status, WorkerStatus
from contentfilter.model import Scanner
from contentfilter.monitor.history import History
from contentfilter.monitor.http import Application
from contentfilter.monitor.http_server import HttpServer
from contentfilter.monitor.page import PATHS, make_pages
from contentfilter.policy.overrides import Bypass
from contentfilter.tables.keeper import TableState

HTML = resources.files(monitor).joinpath("page.html").read_text()
MAIL: dict[str, Any] = {
    "id": "a" * 16, "origin": "stranger", "uid": 1, "remote": "192.0.2.7", "user": "", "sender": "s@x.example",
    "recipients": ("r@y.example", "q@y.example"), "recipient_count": 2, "size": 12_345, "scans": (),
    "decision": "queue", "reason": "none", "rule": "clean", "submissions": 1, "quarantined": 0, "attempt": 0, "ms": 7,
}  # fmt: skip
WORKER = WorkerStatus(0, 4711, "ready", 2, 90.0, 0.1, 0.002, 1, (InFlight("b" * 16, "clamd", 4.0),), {}, 5_000_000)
LOADED = "document.querySelector('#contact').textContent.startsWith('as of')"
LOST = "document.querySelector('#contact').textContent.includes('No connection to the daemon since')"
HOSTILE = (
    "<script>window.hit = 1</script>",
    "</script><img src=x onerror='window.hit = 1'><svg onload=window.hit=1>",
    "\"'><a href='javascript:window.hit=1' style='position:fixed'>${window.hit = 1}`",
    "right\u202eto left\u2066, \x1b[2J, \x00, \ud7ff\u2028 line",
    "&lt;b&gt; &amp; <b>bold</b>",
)


class Log:
    def exception(self, event: str, **fields: object) -> None:
        raise AssertionError((event, fields))


class Site:
    """The page over a history and a status that tests make up, in a thread with a loop of its own."""

    def __init__(self) -> None:
        self.history = History()
        self.unready: tuple[str, ...] = ()
        self.status: dict[str, Any] = {"state": "ready", "workers": (WORKER,)}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server: HttpServer | None = None
        self.start()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def start(self, port: int = 0) -> None:
        pages = make_pages(self.look, self.history)
        self._server = HttpServer(Application(pages, Log(), private=PATHS))  # type: ignore[arg-type]
        self.address = self._do(self._server.start("127.0.0.1", port))

    def stop(self) -> None:
        assert self._server is not None
        self._do(self._server.close())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def look(self) -> tuple[Status, tuple[str, ...]]:
        plain = Status("0.1", 4700, "ready", 2, 7_000.0, "/run/queue.sock", 0, 0, (), (), wanted=1,
                       tables=TableState("files", True, 3, 4, 1.0, ""))  # fmt: skip
        window = self.history.window(900, time.monotonic())
        return msgspec.structs.replace(plain, window=window, **self.status), self.unready

    def happened(self, number: int = 1, account: dict[str, Any] | None = None, **fields: Any) -> None:
        for _ in range(number):
            line = MAIL | {"id": f"{time.monotonic_ns():016x}"} | fields
            self.history.event(line, msgspec.json.encode(account) if account else b"", time.monotonic())

    def answer(self, path: str, *lines: str) -> tuple[str, bytes]:
        """Head and body."""
        host, _, port = self.address.rpartition(":")
        with socket.create_connection((host, int(port)), 30) as client:
            client.sendall(
                "\r\n".join((f"GET {path} HTTP/1.1", *(lines or ("Host: 127.0.0.1",)), "", "")).encode("latin-1")
            )
            head, _, body = b"".join(iter(lambda: client.recv(65_536), b"")).partition(b"\r\n\r\n")
        return head.decode(), body


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


def visit(browser: Browser, site: Site) -> None:
    browser.open(f"http://{site.address}/")
    browser.wait(LOADED)


def again(browser: Browser, site: Site) -> None:
    """What the page does every few seconds, now."""
    site.stop()  # a new one has made nothing yet
    site.start(int(site.address.rpartition(":")[2]))
    browser.evaluate("poll()")


# What is served


def test_the_page_is_one_file_that_names_no_other_host() -> None:
    assert set(re.findall(r"""\b(?:https?:)?//[\w.-]+[^\s"'`)]*""", HTML)) == {"http://www.w3.org/2000/svg"}  # a name
    assert not re.search(r"""\b(?:src|srcset|action|poster)\s*=|@import|url\(|\bimport\b""", HTML)
    assert re.findall(r'href="([^"]*)"', HTML) == ["data:,"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|DOMParser", HTML)
    assert not re.search(r"<[^>]*\s(?:on\w+|style)\s*=", HTML.partition("<script>")[0])


def test_the_policy_allows_the_inline_parts_and_nothing_else(site: Site) -> None:
    head, body = site.answer("/")
    header = {name.title(): value for name, value in (line.split(": ", 1) for line in head.split("\r\n")[1:])}
    policy = dict(part.strip().partition(" ")[::2] for part in header["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind])
    assert (header["X-Content-Type-Options"], header["Referrer-Policy"]) == ("nosniff", "no-referrer")
    assert header["Cache-Control"] == "no-store"
    assert header["Content-Type"] == "text/html; charset=utf-8"
    assert body.decode() == HTML
    head, _ = site.answer("/status.json")
    assert "content-type: application/json\r\n" in head
    assert "cross-origin-resource-policy: same-origin" in head
    assert "access-control" not in head


@pytest.mark.parametrize("host", ["127.0.0.1:9464", "127.0.0.1", "[::1]:9464", "10.1.2.3", "localhost", "LocalHost.:1"])
def test_an_address_or_localhost_is_answered(site: Site, host: str) -> None:
    assert site.answer("/status.json", f"Host: {host}")[0].startswith("HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "lines",
    [
        ("Host: evil.example",),
        ("Host: 127.0.0.1.evil.example:9464",),
        ("Host: localhost.evil.example",),
        ("Host: [localhost]",),
        ("Host: evil.example@127.0.0.1",),
        ("Host: 127.0.0.1@evil.example",),
        ("Host: [::1].evil.example",),
        ("Host: 127.0.0.1:80.evil.example",),
        ("Host: 127.0.0.1", "Host: evil.example"),
        ("Host: ",),
        ("Accept: */*",),
    ],
)
def test_a_name_of_somebody_else_is_not(site: Site, lines: tuple[str, ...]) -> None:
    site.happened()
    status = 421 if [line.startswith("Host: ") for line in lines] == [True] else 400  # RFC 9112, section 3.2
    for path in PATHS:
        head, body = site.answer(path, *lines)
        assert head.startswith(f"HTTP/1.1 {status} ")
        assert b"example" not in body


def test_the_data_is_made_once_a_second_however_many_ask(site: Site) -> None:
    first = site.answer("/status.json")[1]
    site.happened()
    assert site.answer("/status.json")[1] == first
    again_made = time.monotonic() + 20
    while site.answer("/status.json")[1] == first:
        assert time.monotonic() < again_made
        time.sleep(0.05)


def test_a_broken_account_leaves_the_rest_whole(site: Site) -> None:
    site.history.event(MAIL, b'{"story": 5}', time.monotonic())
    site.history.event(MAIL, b"\xff</script>", time.monotonic())
    data = json.loads(site.answer("/status.json")[1])
    assert [decision["story"] for decision in data["recent"]] == [[], []]
    assert data["recent"][0]["sender"] == "s@x.example"
    assert abs(data["recent"][0]["time"] - time.time()) < 60
    assert len(data["minutes"]["unchecked"]) == len(data["minutes"]["times"]["clamd"]) == 180


# What is shown


def test_before_any_mail_it_says_so(browser: Browser, site: Site) -> None:
    visit(browser, site)
    text = browser.text()
    for said in (
        "Ready; no mail in the last 15 minutes",
        "No decision since the daemon was started.",
        "Nothing was rejected, deferred or left unchecked.",
        "No backend is configured or known yet.",
    ):
        assert said in text
    assert browser.evaluate("document.querySelector('#flow').textContent").endswith("no message in this time")
    assert browser.console == []


def test_numbers_backends_workers_and_orders_are_told(browser: Browser, site: Site) -> None:
    site.happened(3)
    site.happened(2, decision="reject", reason="virus", rule="clamd: Eicar")
    scans = ({"scanner": "clamd", "status": "clean", "ms": 20}, {"scanner": "spamd", "status": "unchecked",
             "cause": "timeout", "ms": 0})  # fmt: skip
    site.happened(4, scans=scans)
    sick = BackendStatus("clamd", "tcp:10.0.0.5:3310", "failing", "timeout", "no answer", time.time() - 60,
                         meanwhile={"stranger": "defer"}, limit=4)  # fmt: skip
    site.status |= {"backends": (sick, BackendStatus("spamd", "tcp:127.0.0.1:783", "well"))}
    bypass = Bypass(
        scanner=Scanner.SPAMD, since=time.time() - 60, until=time.time() + 600, reason="it eats all memory", by="root"
    )
    site.status["bypasses"] = (bypass,)
    visit(browser, site)
    sums = dict(
        browser.evaluate(
            "[...document.querySelectorAll('#sums div')].map(d => [...d.children].map(c => c.textContent))"
        )
    )
    assert (sums["messages"], sums["queued"], sums["refused"], sums["unchecked"]) == ("9", "7", "2", "4")
    assert "clamd tcp:10.0.0.5:3310 has been failing since" in browser.text("#state")
    assert "✖ Mail is deferred: no clamd answers" in browser.text("#state")
    assert "spamd is bypassed until" in browser.text("#state")
    assert "it eats all memory" in browser.text("#orders")
    assert "4 checks were left out" in browser.text("#state")
    assert "✖ failing" in browser.text("#backends")
    assert "stranger: defer" in browser.text("#backends")
    assert "● well" in browser.text("#backends")
    assert "clamd: Eicar" in browser.text("#reasons")
    assert "4711" in browser.text("#workers")
    assert f"clamd {'b' * 16}, 4 s" in browser.text("#workers")
    assert browser.evaluate("document.querySelectorAll('#flow rect.reject').length") == 1
    assert browser.evaluate("document.querySelectorAll('#flow rect.unchecked').length") == 1
    assert browser.evaluate("document.querySelectorAll('#times path').length") == 4  # two each: whole message, clamd
    assert browser.evaluate("[...document.querySelectorAll('th')].every(th => th.scope)")
    assert browser.console == []


@pytest.mark.parametrize(
    ("failing", "bypassed", "meanwhile", "said"),
    [
        (("a",), (), "defer", "▲ Mail is flowing, but a backend is failing"),
        (("a", "b"), (), "pass", "▲ Mail is flowing, but is not checked by clamd"),
        (("a", "b"), (), "defer", "✖ Mail is deferred: no clamd answers"),
        ((), (Scanner.SPAMD,), "pass", "▲ Mail is flowing, but is not checked by spamd"),
        ((), (), "defer", "● Ready; no mail in the last 15 minutes"),
    ],
)
def test_one_line_says_what_becomes_of_mail(
    browser: Browser, site: Site, failing: tuple[str, ...], bypassed: tuple[Scanner, ...], meanwhile: str, said: str
) -> None:
    states = {name: "failing" if name in failing else "well" for name in ("a", "b")}
    site.status["backends"] = tuple(
        BackendStatus("clamd", name, state, meanwhile={"stranger": meanwhile, "local": "pass"})
        for name, state in states.items()
    )
    now = time.time()
    site.status["bypasses"] = tuple(
        Bypass(scanner=scanner, since=now, until=now + 60, reason="", by="root") for scanner in bypassed
    )
    visit(browser, site)
    assert browser.text("#state strong") == said


def test_a_canary_that_is_not_caught_is_told(browser: Browser, site: Site) -> None:
    site.status["canary"] = (
        CanaryResult("clean", "passed", True, "it passed", 0.01, time.time(), time.time()),
        CanaryResult("eicar", "passed", False, "clamd did not see it", 0.01, time.time()),
    )
    visit(browser, site)
    assert browser.text("#state strong") == "✖ A canary sample did not get the expected result"
    assert "the canary's eicar: clamd did not see it" in browser.text("#state")
    assert "none yet" in browser.text("#canary")


def test_trouble_comes_first(browser: Browser, site: Site) -> None:
    site.unready = ("0 of 1 workers accept mail",)
    visit(browser, site)
    assert browser.text("#state").startswith("✖ Not ready")
    assert "0 of 1 workers accept mail" in browser.text("#state")
    assert browser.evaluate("document.title") == "✖ contentfilter"


def test_a_decision_opens_to_its_story_by_keyboard_and_stays_open(browser: Browser, site: Site) -> None:
    site.happened(account={"story": [["decision", "queue: it goes on"]], "message_id": "<m@x>", "text": ""})
    visit(browser, site)
    assert "it goes on" not in browser.text("#recent")
    browser.evaluate("document.querySelector('summary').focus()")
    browser.press("Enter")
    browser.wait("document.querySelector('#recent').innerText.includes('queue: it goes on')")
    site.happened()
    again(browser, site)
    browser.wait("document.querySelector('#held').textContent.startsWith('1 newer')")
    assert browser.evaluate("document.activeElement === document.querySelector('details[open] summary')")
    browser.press("Enter")
    browser.wait("document.querySelectorAll('details').length === 2")
    assert browser.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_the_arrow_keys_tell_minutes(browser: Browser, site: Site) -> None:
    site.happened(5)
    visit(browser, site)
    browser.evaluate("document.querySelector('#flow').focus()")
    browser.press("ArrowRight")
    told = browser.text("#pointed")
    browser.press("ArrowLeft")
    assert browser.text("#pointed") != told
    assert "5 queued" in told + browser.text("#pointed")  # the minute may just have changed


def test_nothing_moves_while_it_is_updated(browser: Browser, site: Site) -> None:
    site.happened(60)
    visit(browser, site)
    browser.evaluate("""{window.moved = []; new PerformanceObserver(list => moved.push(...list.getEntries()
        .map(e => e.value))).observe({type: "layout-shift"})}""")
    site.happened(60)
    again(browser, site)
    browser.wait("document.querySelector('#sums dd').textContent === '120'")
    browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert sum(browser.evaluate("window.moved")) < 0.01


def test_a_daemon_that_is_gone_is_told_and_one_that_comes_back_too(browser: Browser, site: Site) -> None:
    site.happened(7)
    visit(browser, site)
    site.stop()
    browser.evaluate("poll()")
    browser.wait(LOST)
    assert browser.evaluate("document.title") == "✖ contentfilter: no connection"
    assert "this is the state of that time" in browser.text("#contact")
    assert "7" in browser.text("#sums")
    site.start(int(site.address.rpartition(":")[2]))
    browser.evaluate("poll()")
    browser.wait(LOADED)


# What is hostile


def test_what_a_message_brings_is_text_whatever_it_is(browser: Browser, site: Site) -> None:
    for evil in HOSTILE:
        story = [[evil, evil], ["decision", evil]]
        site.happened(account={"story": story, "text": evil, "message_id": evil}, sender=evil, recipients=(evil,),
                      rule=evil, remote=evil, user=evil, decision="reject")  # fmt: skip
    busy = (InFlight(HOSTILE[0], HOSTILE[1], 1.0),)
    site.status |= {
        "backends": (BackendStatus(HOSTILE[0], HOSTILE[1], "failing", HOSTILE[2], HOSTILE[3], 1.0),),
        "problems": HOSTILE,
        "workers": (msgspec.structs.replace(WORKER, in_flight=busy),),
    }
    site.unready = HOSTILE
    visit(browser, site)
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    for evil in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[4]):
        assert browser.evaluate(f"document.querySelector('#recent').textContent.includes({json.dumps(evil)})")
        assert browser.evaluate(f"document.querySelector('#state').textContent.includes({json.dumps(evil)})")
    shown = browser.evaluate("document.body.textContent")
    assert "right\\u{202e}to left\\u{2066}, \\u{1b}[2J, \\u{0}" in shown
    assert not re.search(r"[\x00\x1b\u202e\u2066\u2028]", shown)
    assert browser.evaluate("document.querySelectorAll('script, img, a, b, [style], [onerror]').length") == 1  # our own
    assert browser.evaluate("typeof window.hit") == "undefined"
    assert browser.console == []  # the policy had nothing to refuse
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_browser_would_refuse_what_slipped_in(browser: Browser, site: Site) -> None:
    visit(browser, site)
    browser.evaluate("""for (const attempt of [
        node => { node.innerHTML = "<img src=x onerror='window.hit = 1'>" },
        node => { node.setAttribute("onclick", "window.hit = 1"); node.click() },
        node => { const s = document.createElement("script"); s.textContent = "window.hit = 1"; node.append(s) },
        node => { node.setAttribute("style", "top: 9px"); window.hit = node.style.top ? 1 : window.hit },
        node => { const i = document.createElement("img"); i.src = "/live"; node.append(i) },
        node => { const f = document.createElement("iframe"); f.src = "/live"; node.append(f) },
    ]) { const node = document.createElement("div"); document.body.append(node); try { attempt(node) } catch {} }""")
    markup = (
        "(() => { try { document.createElement('b').innerHTML = 'x'; return 'set' } catch { return 'refused' } })()"
    )
    assert browser.evaluate(markup) == "refused"
    assert browser.evaluate("fetch('http://127.0.0.1:1/').then(() => 1, () => 0)") == 0
    assert browser.evaluate("typeof window.hit") == "undefined"
    assert len([line for line in browser.console if "Content Security Policy" in line]) >= 4


def test_nobody_else_is_asked(browser: Browser, site: Site) -> None:
    site.happened(3)
    visit(browser, site)
    again(browser, site)
    browser.wait(f"performance.getEntriesByType('resource').length >= 2 && {LOADED}")
    assert set(browser.requests) == {f"http://{site.address}{path}" for path in PATHS}


# How it looks


@pytest.mark.parametrize(("dark", "page", "card", "bar"), [(False, "#f4f5f7", "#ffffff", "#2f74c0"),
                                                           (True, "#0f1318", "#181d24", "#4f9be8")])  # fmt: skip
@pytest.mark.parametrize("width", [1200, 390])
def test_light_and_dark_wide_and_narrow(
    browser: Browser, site: Site, dark: bool, page: str, card: str, bar: str, width: int
) -> None:
    site.happened(60, sender="very-long-address-of-a-mailing-list-" * 6 + "@x.example")
    browser.look(dark=dark, width=width)
    visit(browser, site)
    colours = browser.colours(browser.screenshot())
    total = sum(colours.values())
    assert total == width * 900
    assert 0.02 < colours[page] / total < 0.5
    assert 0.4 < colours[card] / total < 0.95
    assert colours[bar] > 50
    assert len(colours) > 50  # letters have edges
    assert not {"#ffffff", "#0f1318"} - {page, card} & set(colours), "a part does not follow the scheme"
    assert browser.evaluate("document.documentElement.scrollWidth") == width, "it must not scroll sideways"


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_everything_stands_out_enough_to_be_read() -> None:
    schemes = re.findall(r":root \{(.*?)\}", HTML, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        found = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        found = {
            name: value if len(value) == 7 else "#" + "".join(c * 2 for c in value[1:]) for name, value in found.items()
        }
        for ground in ("page", "card"):
            for name in ("text", "soft", "good", "warn", "bad"):
                assert contrast(found[name], found[ground]) >= 4.5, (name, ground)
            for name in ("queue", "reject", "defer", "drop", "unchecked", "focus"):
                assert contrast(found[name], found[ground]) >= 3.0, (name, ground)

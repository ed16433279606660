"""The status page of a real daemon in a real browser, after real messages through the real hook."""

import socket

from e2e.mails import PLAIN, SPAM, VIRUS
from lab.browser import Browser
from lab.clamd import Clamd
from lab.scrape import HTTP, address, get
from lab.spamd import Spamd

PAGE = {"http": HTTP["http"] | {"page": "on"}}
VIRUS_ONLY = b"virus-only@mixed.example"


def test_it_is_off_unless_switched_on(make_system) -> None:
    where = address(make_system(settings=HTTP).daemon)
    assert [get(where, path)[0] for path in ("/", "/status.json", "/live")] == [404, 404, 200]


def test_decisions_of_real_messages_are_shown_with_their_story(
    make_system, browser: Browser, clamd: Clamd, spamd: Spamd
) -> None:
    system = make_system(clamd=clamd, spamd=spamd, settings=PAGE)
    where = address(system.daemon)
    browser.open(f"http://{where}/")
    browser.wait("document.querySelector('#held').textContent.includes('No decision since')")
    answers = [system.deliver(message).text for message in (PLAIN, SPAM, VIRUS)]
    browser.wait("document.querySelectorAll('details').length === 3")  # it asks again by itself
    virus = browser.text("details")  # the newest is on top
    assert "refused" in virus
    assert "clamd: " in virus
    browser.evaluate("document.querySelector('summary').click()")
    story = browser.text("details[open] dl")
    assert answers[2].startswith("D")
    assert answers[2][1:] in story
    assert "reject: the message is refused permanently; rule: clamd: " in story
    assert system.daemon.wait_for("mail.done", 3)[2]["id"] in story
    assert browser.text("#sums").replace("\n", " ").startswith("messages 3 ")
    assert browser.evaluate("document.querySelectorAll('#flow rect.reject').length") == 1
    assert "● well" in browser.text("#backends")
    assert clamd.backend in browser.text("#backends")
    assert spamd.backend in browser.text("#backends")
    assert str(system.daemon.workers()[0]) in browser.text("#workers")
    assert set(browser.requests) == {f"http://{where}/", f"http://{where}/status.json"}
    assert browser.console == []


def test_a_sick_backend_is_answers_and_so_is_a_dead_daemon(make_system, browser: Browser) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        sick = f"tcp:127.0.0.1:{nobody.getsockname()[1]}"
    system = make_system(settings=PAGE | {"clamd": {"backends": [sick]}})
    where = address(system.daemon)
    browser.open(f"http://{where}/")
    assert system.deliver(PLAIN, VIRUS_ONLY).status != 0
    browser.wait(f"document.querySelector('#state').innerText.includes('clamd {sick} has been failing since')")
    browser.wait("document.querySelector('#state').innerText.includes('1 message was deferred in the last 15 minutes')")
    assert "Mail is deferred: no clamd answers" in browser.text("#state")
    assert "clamd: down" in browser.text("#reasons")
    assert "stranger: defer" in browser.text("#backends")
    system.daemon.stop()
    browser.wait("document.querySelector('#contact').textContent.includes('No connection to the daemon since')")


def test_numbers_are_for_everybody_and_messages_are_not(make_system) -> None:
    """Under a name of somebody else's, /metrics answers as before and the page does not."""
    system = make_system(settings=PAGE)
    system.deliver(PLAIN)
    system.daemon.wait_for("mail.done")
    where = address(system.daemon)
    for host, page in (("rebound.example", 421), ("localhost", 200), (where, 200)):
        assert get(where, "/metrics", Host=host)[0] == 200
        assert [get(where, path, Host=host)[0] for path in ("/", "/status.json")] == [page, page]

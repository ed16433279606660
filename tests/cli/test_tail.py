"""``contentfilter tail``: the lines of events with any contents, and the choice of events."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.bus.messages import Event
from contentfilter.cli.tail import LINE_MAX, as_json_line, as_text, matching, summary
from contentfilter.verdict.record import MailDetail

FIELDS: dict[str, Any] = {
    "id": "1k7tr2fnsi7a1nlq", "origin": "stranger", "remote": "192.0.2.7", "sender": "joe@example.net",
    "recipients": ["first@a.example", "second@b.example"], "recipient_count": 3, "decision": "reject",
    "rule": "clamd: Eicar", "ms": 12.345,
}  # fmt: skip
MORE = MailDetail((("message", "small"), ("decision", "reject")), "go away", "<x@y>", ("third@c.example",))
EVENT = Event("mail.done", FIELDS, msgspec.json.encode(MORE))
EVIL = "\x1b]0;x\x07\r\n\x9b31m\u202e\x7f" * 2000
ANY = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_a_decision_is_one_line_with_what_one_looks_for() -> None:
    line = summary(EVENT, 0.0)
    assert line.endswith(
        "reject stranger      joe@example.net -> first@a.example +2  clamd: Eicar  12 ms  [1k7tr2fnsi7a1nlq]"
    )


def test_nothing_in_an_event_drives_the_terminal_or_makes_a_line_long() -> None:
    fields = dict.fromkeys(FIELDS, EVIL) | {"recipients": [EVIL], "decision": "queue" + EVIL}
    account = msgspec.json.encode(MailDetail(((EVIL, EVIL),) * 3, EVIL, EVIL, (EVIL,)))
    for event in (Event("mail.done", fields, account), Event("x" + EVIL, {EVIL: EVIL}, account)):
        shown = list(as_text(event, 0.0, True))
        assert all(line.isprintable() and len(line) <= LINE_MAX for line in shown)
        (line,) = as_json_line(event, 0.0, True)
        assert line.isascii()
        assert line.isprintable()
        assert len(line) < 400_000
        assert json.loads(line)["time"] == 0.0


@given(st.dictionaries(st.sampled_from([*FIELDS, "other"]), ANY), st.binary(max_size=20))
def test_whatever_an_event_holds_it_is_printed(fields: dict[str, Any], account: bytes) -> None:
    for event in (Event("mail.done", fields, account), Event("mail.done", FIELDS | fields, account)):
        assert all(line.isprintable() for line in as_text(event, 0.0, True))
        (line,) = as_json_line(event, 0.0, True)
        assert json.loads(line)["event"] == "mail.done"
        assert isinstance(matching(recipient="x", sender="y", rule="z", decisions=("queue",))(event), bool)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"decisions": ("queue", "reject")},
        {"origins": ("stranger",)},
        {"sender": "joe@example.net"},
        {"recipient": "@b.example"},
        {"recipient": "third@c.example"},  # it is in the account only
        {"rule": "eicar"},
        {"remote": "192.0.2.*"},
        {"incident": "1k7tr2"},
        {"incident": "[1k7tr2fnsi7a1nlq]"},
        {"events": ("mail.*",)},
        {"decisions": ("reject",), "sender": "joe", "events": ("mail.done", "x")},
    ],
)
def test_what_is_asked_for_matches(wanted: dict[str, Any]) -> None:
    assert matching(**wanted)(EVENT)


@pytest.mark.parametrize(
    "wanted",
    [
        {"decisions": ("queue",)},
        {"origins": ("relay", "local")},
        {"sender": "oe@example.net"},
        {"recipient": "@example.net"},
        {"rule": "spamd"},
        {"remote": "192.0.2"},
        {"incident": "7tr2"},
        {"events": ("mail.report",)},
        {"decisions": ("reject",), "sender": "jack"},
    ],
)
def test_what_is_not_asked_for_does_not(wanted: dict[str, Any]) -> None:
    assert not matching(**wanted)(EVENT)


def test_an_event_without_the_field_is_not_meant() -> None:
    report = Event("mail.report", {"id": "1k7tr2fnsi7a1nlq", "results": ["0+"]})
    assert matching(incident="1k7")(report)
    for wanted in ({"sender": "*"}, {"recipient": "*"}, {"decisions": ("queue",)}, {"rule": "*"}):
        assert not matching(**wanted)(report)  # type: ignore[arg-type]

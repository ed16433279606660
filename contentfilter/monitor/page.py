"""Status page for a browser: one self-contained file, and the JSON that it polls every few seconds.

It shows addresses and traces of messages, so it is private (monitor.http). Content of messages is data: it goes into
the JSON, and the page's script displays it as text. The content security policy allows nothing but the file itself.
"""

import base64
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import msgspec

from contentfilter.monitor.history import MINUTES, History, Minute, RecentDecision
from contentfilter.monitor.http import Page, Response

PATHS = ("/", "/status.json")
FRESH = 1.0  # seconds
RECENT = 50
"""Decisions that are shown."""
SHOWN = ("id", "sender", "recipients", "recipient_count", "remote", "user", "size", "decision", "rule", "ms")
"""Fields of the log line that the page shows."""

Look = Callable[[], tuple[Any, Sequence[str]]]
"""Status (bus.messages.Status) of the daemon, and the reasons why it is not ready."""

_PRIVATE = {"Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


class _Detail(msgspec.Struct):
    """The parts of verdict.record.MailDetail that the page shows."""

    story: tuple[tuple[str, str], ...] = ()
    text: str = ""
    message_id: str = ""


_DETAIL = msgspec.json.Decoder(_Detail)


def load_page() -> Response:
    """The page, with the hashes of its style and script in its policy (CSP 3)."""
    body = resources.files(__package__).joinpath("page.html").read_bytes()
    sources: dict[str, list[str]] = {"style": [], "script": []}
    for kind, text in _INLINE.findall(body):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        sources[kind.decode()].append(f"'sha256-{digest}'")
    policy = (
        f"default-src 'none'; script-src {' '.join(sources['script'])}; style-src {' '.join(sources['style'])}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return Response(body, "text/html; charset=utf-8", header=_PRIVATE | {"Content-Security-Policy": policy})


def make_pages(look: Look, history: History) -> dict[str, Page]:
    """The pages of PATHS. The JSON is made at most once a second, whatever the number of clients."""
    whole = load_page()
    made, last = 0.0, whole

    async def page(accept: str) -> Response:
        return whole

    async def data(accept: str) -> Response:
        nonlocal made, last
        now = time.monotonic()
        if last is whole or not 0 <= now - made < FRESH:
            made, last = now, make_data(*look(), history, now, time.time())
        return last

    return dict(zip(PATHS, (page, data), strict=True))


def make_data(status: Any, unready: Sequence[str], history: History, now: float, clock: float) -> Response:
    """The JSON. ``now`` is time.monotonic(), ``clock`` time.time(): moments are in seconds since 1970."""
    data = {
        "clock": clock,
        "status": status,
        "unready": unready,
        "minutes": _columns(history.minutes(MINUTES, now), clock - now),
        "recent": [_decision(entry, clock - now) for entry in history.recent(RECENT)],
    }
    return Response(msgspec.json.encode(data), "application/json", header=_PRIVATE)


def _columns(minutes: Sequence[Minute], offset: float) -> dict[str, Any]:
    """One list for each line of the charts, and the start of the first minute."""
    first = minutes[-1]
    return {
        "start": minutes[0].start + offset,
        "decisions": {name: [minute.decisions[name] for minute in minutes] for name in first.decisions},
        "unchecked": [minute.unchecked for minute in minutes],
        "times": {
            "whole message": [(minute.p50, minute.p95) for minute in minutes],
            **{name: [minute.scanners[name] for minute in minutes] for name in first.scanners},
        },
    }


def _decision(entry: RecentDecision, offset: float) -> dict[str, Any]:
    try:
        detail = _DETAIL.decode(entry.account) if entry.account else _Detail()
    except (msgspec.DecodeError, UnicodeDecodeError):
        detail = _Detail()
    fields = {name: entry.fields.get(name) for name in SHOWN}
    return fields | {"time": entry.at + offset} | msgspec.structs.asdict(detail)

"""The status page for a browser: one file with nothing from elsewhere, and the JSON that it asks for every few seconds.

It shows addresses and stories of messages, so it is private (monitor.http). What a message brought is data: it
goes into the JSON, and the page's script puts it on the screen as text. The browser is told to run and load
nothing but what stands in the file.
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
"""The daemon at a glance (service.frames.Status), and what keeps it from being ready."""

_PRIVATE = {"Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


class _Account(msgspec.Struct):
    """What is needed of verdict.record.Account."""

    story: tuple[tuple[str, str], ...] = ()
    text: str = ""
    message_id: str = ""


_ACCOUNT = msgspec.json.Decoder(_Account)


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
    """The pages of PATHS. The JSON is made at most once a second, however many look."""
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
    """The JSON. ``now`` is time.monotonic(), ``clock`` time.time(): moments are told in seconds since 1970."""
    data = {
        "clock": clock,
        "status": status,
        "unready": unready,
        "minutes": _columns(history.minutes(MINUTES, now), clock - now),
        "recent": [_decision(entry, clock - now) for entry in history.recent(RECENT)],
    }
    return Response(msgspec.json.encode(data), "application/json", header=_PRIVATE)


def _columns(minutes: Sequence[Minute], offset: float) -> dict[str, Any]:
    """One list for each line of the charts; the first moment stands for all."""
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
        account = _ACCOUNT.decode(entry.account) if entry.account else _Account()
    except (msgspec.DecodeError, UnicodeDecodeError):
        account = _Account()
    fields = {name: entry.fields.get(name) for name in SHOWN}
    return fields | {"time": entry.at + offset} | msgspec.structs.asdict(account)

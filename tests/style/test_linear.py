"""Every pattern and every parser that sees foreign bytes takes time in proportion to them, and bounded memory.

Patterns are found in the source. One that is not listed here fails: list it with inputs that could make it backtrack
(``prefix``, what is repeated, ``suffix``), or among those that read only the administrator's files. Time is CPU time,
which other jobs of the machine hardly change, and the inputs grow until they show how it grows.
"""

import ast
import collections
import functools
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from style.tree import PACKAGE

from contentfilter.bus import messages
from contentfilter.errors import EnvelopeError, RemoteProtocolError
from contentfilter.scanners.content import LOOK, digest, volatile_spans
from contentfilter.scanners.signatures.engine import LONGEST_NAME
from contentfilter.wire import clamd, envelope, hook, spamd

MEBIBYTE = 1 << 20
START = 1 << 10
SHORT = 1 << 16
BOUND = 1.0  # CPU seconds for a mebibyte; measured: at most 0.1
FASTER = 10.0  # times as long, at most, for four times the input; quadratic work takes 16 times
NOISE = 0.25  # CPU seconds below which nothing is compared: page faults, other jobs of the machine

Pumps = tuple[bytes, ...]  # before|repeated|behind
LINES: Pumps = (b"|a|", b"| |x", b"|\n|x", b"|\r|x", b"|\n |x")

FOREIGN: Mapping[str, Pumps] = {
    "doors.canary._TOKEN": (b"1:|a|:", b"1:clean:|0|"),
    "monitor.http._HOST": (b"|a|!", b"[|:|!", b"a:|0|!"),
    "policy.addresses.PLAIN_KEYS": (b"|a|!", b"|a@b.c\n|!", b"a@|b.|!", b"@|a-|!"),
    "policy.addresses._DOMAIN": (b"|a|@", b"|a.|@", b"[|:|@"),
    "policy.addresses._INVISIBLE_ENDS": ("|\u200b|x".encode(), "x|\u200b|".encode(), "x|\u00a0|x".encode()),
    "policy.addresses._INVISIBLE_INSIDE": (b"|a|", "|a\u200b|".encode()),
    "policy.addresses._NO_LOCAL": (b"|a|", b"|a |"),
    "policy.addresses._STRANGE": (b"|a|",),
    "policy.options._NUMBER": (b"|1|x", b"1.|1|x"),
    "scanners.content._CLIENT": (b"|a|", b"a (|a|", b"a (HELO |a|", b"a (|a@|"),
    "scanners.content._DATE": (b"|1 |", b"Mon, 1 Jan 2024 00:00:00 -0000 (|A|"),
    "scanners.content._FIRST": (b"Received-SPF:|\n |", b"Received: from |a\n\t|"),
    "scanners.signatures.compatible._LINE": LINES,
    "scanners.signatures.decoders._LINE": LINES,
    "scanners.signatures.decoders._PADDING": (b"|=|x", b"|a=|"),
    "scanners.signatures.engine._FIELD": (b"|a|", b"a| |x", b"|a |"),
    "scanners.signatures.engine._NAME": (b"|a|!", b"|a!|!"),
    "scanners.signatures.lines.BASE64_LINE": (b"|A|!", b"AAAA| |!"),
    "scanners.signatures.lines._BASE64_LINES": (b"|A|!", b"|AAAA\n|!", b"AAAA\n| |!", b"AAAA|\n|!"),
    "scanners.signatures.decoders._YENC_ESCAPE": (b"|=a|", b"|=|"),
    "scanners.signatures.mime._BEGIN": LINES,
    "scanners.signatures.mime._BLANK_LINE": LINES,
    "scanners.signatures.mime._CONTENT_TYPE": (b"Content-Type:|a|", b"Content-Type:|\n |x", b"|Content-Type:\n|"),
    "scanners.signatures.mime._ENCODED": (b"Content-Transfer-Encoding:| |x", b"|Content-Transfer-Encoding: 7bit\n|"),
    "scanners.signatures.mime._FIELD_LINE": (b"|a|", b"a| |x"),
    "scanners.signatures.mime._FIRM_BOUNDARY": (b"boundary=|a|!", b'boundary="|a|', b"|boundary=|"),
    "scanners.signatures.mime._MULTIPART": (
        b"| |x",
        b"multipart/|a|",
        b"multipart/a|;a=b|!",
        b"multipart/a;| |x",
        b"multipart/a|;|",
        b'multipart/a;a="|b|',
    ),
    "scanners.signatures.mime._RFC822": (b"| |x", b"message/rfc822| |x"),
    "scanners.signatures.mime._STRICT_HEADER": (b"|a:\n|!", b"a:|\n b|!", b"a:\n\n|\n|!", b"|a|", b"a:\n| |"),
    "scanners.signatures.smime._CONTENT": (
        b"|\x06|",
        b"|\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01\xa0|",
    ),
    "scanners.signatures.mime._BLANK": LINES,
    "scanners.signatures.mime._BOUNDARY": (
        b"boundary| |",
        b"|boundary|",
        b"|boundary= |",
        b"boundary*|0|",
        b'boundary="|a|',
        b'boundary="|\\|',
        b"boundary=|\n|",
        b'|boundary="|',
    ),
    "scanners.signatures.lines._HEADER": (b"|a|", b"a| |", b"|a:\n|!", b"a:\n| |", b"a:|\r|"),
    "scanners.signatures.mime._LINE": LINES,
    "scanners.signatures.lines._REST": LINES,
    "scanners.signatures.mime._VALUE": LINES,
    "store.release_token._TOKEN": (
        b"X-ContentFilter-Released: |a|",
        b"|X-ContentFilter-Released: a; by=|",
        b"|Received: (qmail 1 invoked by uid 1)\n|",
        b"|Delivered-To: a\n|",
    ),
    "store.sidecar._FIELD": (b"Subject| |x", b"Subject:|\n |x", b"|Subject|", b"|\nSubject:|"),
    "store.sidecar._INCIDENT": (b"|a|!",),
    "store.sidecar._SHA256": (b"|a|!",),
    "verdict.encoded_words._BETWEEN": (b"?=| |x", b"|?= |"),
    "verdict.headers._FIELD": (b"a| |x", b"a:|\n |x", b"|a|", b"|a:\n|"),
    "verdict.headers._FLAG": LINES,
    "verdict.headers._MESSAGE_ID": (b"Message-ID| |x", b"Message-ID:|\r|x", b"Message-ID:\n| |"),
    "verdict.headers._OURS": (
        b"|\0|",
        b"X|\0|x",
        b"X-Spam-|a|",
        b"X-Spam-a|\n |",
        b"|\r\0|X",
        b"|X-Spam-\n|",
        b"|X-Spam-a b|",
        b"|\rX-Spam-a|",
        b"X-Spam-a|\n\0|",
    ),
    "verdict.headers._REQUIRED": (b" required=|1|", b"| required=|"),
    "verdict.headers._STATUS": (b"X-Spam-Status:| |x", b"X-Spam-Status: Yes|a|", b"|X-Spam-Status:|"),
    "verdict.headers._SUBJECT": (b"Subject| |x", b"Subject:|\n |x", b"|Subject|", b"|\nSubject:|"),
    "verdict.encoded_words._WORD": (b"|=?a?q?|", b"=?a?q?|a|?", b"|=?|", b"=?|a|"),
    "wire.clamd._CLEAN": (b"|1|", b"fd[|1|]"),
    "wire.clamd._EXTENDED": (b"(|a|", b"|(|", b"(" + b"a" * 32 + b":|1|", b"|(" + b"a" * 128 + b"|"),
    "wire.clamd._LINE_END": (b"|a|",),
    "wire.clamd._PREFIX": (b"|1|", b"fd[|1|]"),
    "wire.clamd._VERSION": (b"|a|\0", b"a/1/Mon Jan| |", b"a/|1|"),
    "wire.spamd._HEADER": (b"a:| |\n", b"|a|", b"a:|x |"),
    "wire.spamd._LENGTH": (b"|1|x",),
    "wire.spamd._LF": (b"|a|",),
    "wire.spamd._SPAM": (b"true| |", b"true ; |1|", b"true ; 1| |", b"true ; 1.|1|"),
    "wire.spamd._STATUS": (b"SPAMD/1.1| |x", b"SPAMD/1.1 0| |", b"SPAMD/|1|"),
    "worker.crashes._RECEIVED": (b"|Received:\n|x", b"Received:|\n |x", b"|Received:|"),
}
"""By module and name."""

LIMITS = {
    "scanners.signatures.engine._NAME": LONGEST_NAME,
    "scanners.content": LOOK,
    "wire.clamd": clamd.ANSWER_LIMIT,
    "wire.spamd": spamd.LINE_LIMIT,
}
"""Bytes that a pattern, or those of a module, ever see, where that is less than a mebibyte."""

OURS = frozenset({"admin", "cli", "config", "endpoint", "qmail", "monitor.page"})
"""Modules and folders whose patterns read files of the administrator, of the kernel or of the package, or arguments."""

INLINE = {
    "store.release_token.sign": "the name of the person who releases",
    "verdict.headers._tag_subjects": "one for each configured tag, on single subjects",
}
"""Functions elsewhere that use a pattern without a name."""


def uses() -> Iterator[tuple[str, str]]:
    """(module, name of the pattern, or of the function around it) for each use of ``re`` with a pattern."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for name, node in within(ast.parse(path.read_text()), ""):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "re":
                yield module, name


def within(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """Each node below, with the function or the assignment that it is in."""
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = child.name
        elif isinstance(child, ast.Assign) and not name and isinstance(child.targets[0], ast.Name):
            inner = child.targets[0].id
        yield inner, child
        yield from within(child, inner)


def is_ours(module: str) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in OURS)


def test_every_pattern_is_listed() -> None:
    found = {f"{module}.{name}" for module, name in uses() if not is_ours(module)}
    assert found == {*FOREIGN, *INLINE}


@functools.cache
def methods(module: str, name: str) -> frozenset[str]:
    """Methods that are called of a pattern, in its module or, if it is public, anywhere; search if there is none."""
    places = [PACKAGE / f"{module.replace('.', '/')}.py"] if name.startswith("_") else PACKAGE.rglob("*.py")
    text = "\n".join(path.read_text() for path in places)
    calls = re.findall(rf"\b{name}\.(match|fullmatch|search|sub|finditer|findall|split)\(", text)
    return frozenset(calls) or frozenset({"search"})


def cost(act: Callable[[bytes], object], data: bytes) -> float:
    """CPU seconds, the best of three."""
    best = float("inf")
    for _ in range(3):
        began = time.thread_time()
        act(data)
        best = min(best, time.thread_time() - began)
        if best < NOISE:
            break
    return best


def grows_linearly(act: Callable[[bytes], object], pump: bytes, end: int = MEBIBYTE) -> None:
    """From a kibibyte to ``end``; stops where it has become too much."""
    before, repeated, behind = pump.split(b"|")
    size, last = min(START, end), NOISE
    while size <= end:
        now = cost(act, before + repeated * (size // len(repeated)) + behind)
        assert now < max(FASTER * last, NOISE), f"{size} bytes of {pump!r}: {now:.3f} s after {last:.3f} s"
        size, last = 4 * size, max(now, NOISE / FASTER)
    assert now < BOUND * end / MEBIBYTE + NOISE


@pytest.mark.parametrize("name", FOREIGN)
def test_a_pattern_is_linear(name: str) -> None:
    """With the methods that are used of it, on what is listed, and on each of its own characters."""
    module, _, attribute = name.rpartition(".")
    pattern: re.Pattern[Any] = getattr(importlib.import_module(f"contentfilter.{module}"), attribute)
    text = isinstance(pattern.pattern, str)
    letters = pattern.pattern.encode() if text else pattern.pattern
    own = {bytes((byte,)) for byte in letters if byte not in b"\\[](){}|^$"}
    end = LIMITS.get(name, LIMITS.get(module, MEBIBYTE))

    def use(data: bytes) -> None:
        given = data.decode("latin-1") if text else data
        for method in methods(module, attribute):
            if method == "sub":
                pattern.sub(given[:0], given)
            elif method == "finditer":
                collections.deque(pattern.finditer(given), 0)
            else:
                getattr(pattern, method)(given)

    for pump in FOREIGN[name]:
        grows_linearly(use, pump, end)
    for one in sorted(own):
        grows_linearly(use, b"|%b|\x01" % one, min(end, SHORT))


def reads(make: Callable[[], Any], size: int) -> Callable[[bytes], None]:
    """Feed a reader in pieces, and tell it the end."""

    def act(data: bytes) -> None:
        reader = make()
        with suppress(RemoteProtocolError):
            for at in range(0, len(data), size):
                if reader.feed(data[at : at + size]) is not None:
                    return
            reader.end()

    return act


def tolerant(parse: Callable[[bytes], object]) -> Callable[[bytes], None]:
    def act(data: bytes) -> None:
        with suppress(RemoteProtocolError, EnvelopeError):
            parse(data)

    return act


BODY = b"SPAMD/1.1 0 OK\r\nSpam: True ; 1 / 2\r\nContent-length: 2000000\r\n\r\n"
PARSERS: Mapping[str, tuple[Callable[[bytes], object], Pumps]] = {
    "clamd's answer": (reads(clamd.scan_reader, 65_536), (b"|a|", b"| FOUND|\0", b"|(| FOUND\0")),
    "clamd's answer, byte by byte": (reads(clamd.scan_reader, 1), (b"|a|", b"fd[1]: |x| FOUND\0")),
    "clamd's version": (reads(clamd.version_reader, 65_536), (b"|a|\0", b"a/1/| |\0")),
    "spamd's head": (
        reads(lambda: spamd.ResponseReader("HEADERS", MEBIBYTE), 65_536),
        (b"SPAMD/1.1 0 OK\r\n|a: \r\n|", b"SPAMD/1.1 0 OK\r\na:| |\r\n"),
    ),
    "spamd's head, byte by byte": (
        reads(lambda: spamd.ResponseReader("HEADERS", MEBIBYTE), 1),
        (b"SPAMD/1.1 0| |", b"SPAMD/1.1 0 OK\r\n|a:\n|"),
    ),
    "spamd's body": (
        reads(lambda: spamd.ResponseReader("PROCESS", 2 * MEBIBYTE), 4096),
        (BODY + b"|a|", BODY + b"|\n|"),
    ),
    "an envelope": (tolerant(envelope.parse), (b"Fa\0|T\0|\0", b"Fa\0|Ta@b\0|\0", b"F|a|\0\0", b"|\0|")),
    "the hook's request": (tolerant(hook.decode_request), (b"|a|", b"|\0|", b"|A=b\0|")),
    "a message of the bus": (
        tolerant(lambda data: messages.decode(data, messages.REPORTS)),
        (messages.VERSION + b"|\x91|", messages.VERSION + b"|\x81\xa1a|", messages.VERSION + b"|\xc6\xff|"),
    ),
    "volatile parts of Received": (
        lambda data: digest(data, volatile_spans(data)),
        (b"Received: from |a|", b"Received: from a|\n |; 1"),
    ),
}


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_is_linear(name: str) -> None:
    act, pumps = PARSERS[name]
    for pump in pumps:
        grows_linearly(act, pump)


# Memory

FACTORS = {"an envelope": 45.0}
"""Bytes of memory for a byte of input, where it is more than FACTOR."""
FACTOR = 12.0
FIXED = 1_000_000  # bytes, whatever the input is
CHILD = """
import sys, tracemalloc
sys.path.insert(0, sys.argv[2])
from style.test_linear import PARSERS
act, pumps = PARSERS[sys.argv[1]]
worst = 0.0
for pump in pumps:
    before, repeated, behind = pump.split(b"|")
    data = before + repeated * ((1 << 20) // len(repeated)) + behind
    act(data[:1000])
    tracemalloc.start()
    act(data)
    worst = max(worst, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
print(worst)
"""


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_takes_memory_in_proportion(name: str) -> None:
    """The most at a time, in a process of its own, so that no cache is warm."""
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, name, str(tests)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < FACTORS.get(name, FACTOR) * MEBIBYTE + FIXED

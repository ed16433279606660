"""A token is valid once, for exactly its message, its recipients and the lines that qmail itself puts above it."""

import hashlib
import mmap
import multiprocessing
import os
import stat
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfilter.store import release_token
from contentfilter.store.release_token import TOKEN_WITHIN, ReleaseToken, UsedTokens, has_token, sign, verify

SECRET = bytes(range(32))
NOW = 1_800_000_000.0
MAIL = b"Subject: kept\nX-ContentFilter: forged\n\n\0body\xff without line end"
TO = (b"a@here.example", b"b@here.example")
NONCE = "0123456789abcdef" * 2


def token(
    data: bytes = MAIL, secret: bytes = SECRET, expires: float = NOW + 10, by: str = "root", to: tuple[bytes, ...] = TO
) -> bytes:
    return sign(secret, "0a1b2c", by, int(expires), hashlib.sha256(data).hexdigest(), to, NONCE)


def released(data, secret: bytes = SECRET, now: float = NOW, to: tuple[bytes, ...] = TO) -> str | None:
    found = verify(data, secret, now, to)
    return found.incident if found else None


def test_without_a_secret_nothing_was_released():
    """A worker that cannot read the key has an empty one; anybody can sign with that."""
    assert released(token(secret=b"") + MAIL, b"") is None


def test_a_token_is_one_header_line_that_names_incident_user_and_end():
    line = token(by="ann")
    assert line.startswith(
        b"X-ContentFilter-Released: 0a1b2c; by=ann; expires=1800000010; nonce=%s; sha256=" % NONCE.encode()
    )
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert len(line) < 998


BIG = bytes(range(256)) * 12_000


@pytest.mark.parametrize(
    "data",
    [MAIL, b"", b"\n", b"\nno header", b"Subject: x", b"A: b\r\n\r\nc", BIG],
    ids=["mail", "empty", "newline", "body", "header", "crlf", "binary"],
)
def test_a_token_is_known_whatever_the_message_looks_like(data):
    assert released(token(data) + data) == "0a1b2c"


def test_a_token_is_known_in_a_mapped_file():
    with tempfile.TemporaryFile() as file:
        file.write(token() + MAIL)
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            assert released(data) == "0a1b2c"


QMAIL = (
    b"Delivered-To: a@here.example\n"
    b"Received: (qmail 12 invoked by uid 500); 9 Jan 2027 08:15:00 -0000\n"
    b"Received: (qmail 1 invoked by alias); 29 Jan 2027 08:15:00 -0000\n"
)


@pytest.mark.parametrize("hops", [1, 50])
def test_what_qmail_puts_in_front_does_not_matter(hops):
    assert released(QMAIL * hops + token() + MAIL) == "0a1b2c"


@pytest.mark.parametrize(
    "line",
    [
        b"Subject: urgent\n",
        b"X-ContentFilter-Released: x\n",
        b"X-Anything: 1\n",
        b" folded\n",
        b"\n",
        b"\r\n",
        b"\r",
        b"\0",
        b"Received: (qmail 1 invoked from network); 9 Jan 2027 08:15:00 -0000\n",
        b"Received: from x (HELO y) (192.0.2.1)\n  by z with SMTP; 9 Jan 2027 08:15:00 -0000\n",
        b"Received: (qmail 1 invoked by uid 0); 9 Jan\r 2027\n",
        b"Received: (qmail 1 invoked by uid 0); 9 Jan\n\t2027\n",
        b"Received: (qmail 1 invoked by uid 0) Subject: x; 9 Jan 2027 08:15:00 -0000\n",
        b"Delivered-To: a\rSubject: b\n",
        b"Delivered-To: a\n b\n",
        b"Delivered-To: \n",
        b"Delivered-To : a\n",
        b"delivered-to: a\n",
    ],
)
@pytest.mark.parametrize("front", [b"", QMAIL], ids=["first", "below qmail's"])
def test_any_other_line_above_makes_it_ordinary_mail(line, front):
    assert released(front + line + token() + MAIL) is None
    assert released(line + front + token() + MAIL) is None


@pytest.mark.parametrize(
    "to",
    [(), TO[:1], TO[1:], (*TO, b"c@here.example"), (b"c@here.example",), (TO[0], b"c@here.example"), (b"\0".join(TO),)],
    ids=["none", "first", "second", "more", "other", "exchanged", "joined"],
)
def test_other_recipients_make_it_ordinary_mail(to):
    assert released(token() + MAIL, to=to) is None


def test_order_repetition_and_case_of_recipients_do_not_matter():
    assert released(token() + MAIL, to=(b"B@HERE.example", *TO)) == "0a1b2c"


@given(st.integers(0, len(token() + MAIL) - 1), st.integers(1, 255))
def test_no_byte_of_it_can_be_changed(at, difference):
    data = bytearray(token() + MAIL)
    data[at] ^= difference
    assert released(data) is None


@pytest.mark.parametrize(
    "data",
    [
        token() + MAIL + b"\n",
        token() + MAIL[:-1],
        token() + b"X-More: 1\n" + MAIL,
        token(expires=NOW - 1) + MAIL,
        token(secret=bytes(32)) + MAIL,
        token()[:-1] + b"\r\n" + MAIL,
        b" " + token() + MAIL,
        b"X" + token() + MAIL,
        b"\n" + token() + MAIL,  # in the body
        b"\r\n" + token() + MAIL,
        b"A: b\n\n" + token() + MAIL,
        b"A: b\n\r\n" + token() + MAIL,
        token() + token() + MAIL,  # only the first one counts
        token().replace(b"mac=", b"mac= ") + MAIL,
        token().lower() + MAIL,
        token().replace(NONCE.encode(), b"f" * 32) + MAIL,
        token().replace(b"by=root", b"by=ann") + MAIL,
        token().replace(b"0a1b2c", b"0a1b2d") + MAIL,
        token(b"another message") + MAIL,
        token() + MAIL.replace(b"kept", b"kepT"),
        b"X-ContentFilter-Released: \n" + token() + MAIL,
        MAIL,
        b"",
    ],
)
def test_anything_else_is_no_release(data):
    assert released(data) is None


def test_a_token_ends_at_its_time():
    data = token(expires=NOW + 10) + MAIL
    assert released(data, now=NOW + 10) == "0a1b2c"
    assert released(data, now=NOW + 11) is None


def test_a_forger_costs_neither_a_hash_nor_a_long_search(monkeypatch):
    """The body is hashed only behind a MAC that is right; the header is searched only to its limit."""
    body = bytes(8 << 20)
    forged = token(body, secret=bytes(32))
    limit = time.process_time() + 1.0
    beyond = b"A: b\n" * (TOKEN_WITHIN // 5 + 1) + token(body) + body
    fronts = (QMAIL * 400, b"Delivered-To: " * 5000, b"Received: (qmail 1 invoked by " * 2000)
    long = [front + forged for front in fronts]
    monkeypatch.setattr(hashlib, "sha256", lambda *_: pytest.fail("hashed"))
    assert released(forged * 20 + body) is None
    assert released(beyond) is None
    for start in long:
        assert released(start + body) is None
    assert time.process_time() < limit


def test_only_mail_that_begins_as_a_released_message_is_looked_at():
    assert has_token(QMAIL + token(secret=bytes(32)) + MAIL)
    assert not has_token(b"Subject: x\n" + token() + MAIL)


def test_a_user_name_cannot_break_the_line():
    line = sign(SECRET, "a", "x\ny; mac=z\0é", 1, "0" * 64, TO)
    assert line.count(b"\n") == 1
    assert b"by=x_y__mac_z__;" in line


# Used tokens


def a_token(nonce: str = NONCE, expires: float = NOW + 10) -> ReleaseToken:
    return ReleaseToken("0a1b2c", int(expires), nonce)


def test_a_token_is_used_once_also_by_another_process_and_after_a_restart(tmp_path):
    assert UsedTokens(tmp_path).use(a_token(), NOW)
    used = UsedTokens(tmp_path)
    assert not used.use(a_token(), NOW)
    assert used.use(a_token("f" * 32), NOW)


def test_its_use_is_durable_before_the_message_passes(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(release_token, "sync_directory", lambda path: synced.append((path, os.listdir(path))))
    UsedTokens(tmp_path).use(a_token(), NOW)
    assert (tmp_path / "released", [f"{int(NOW + 10)}-{NONCE}"]) in synced
    assert stat.S_IMODE((tmp_path / "released").stat().st_mode) == 0o700


def use_all(state: Path, nonces: list[str], results) -> None:
    used = UsedTokens(state)
    results.put(sum(used.use(a_token(nonce), NOW) for nonce in nonces))


def test_of_simultaneous_uses_one_counts(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    nonces = [f"{number:032x}" for number in range(50)]
    workers = [context.Process(target=use_all, args=(tmp_path, nonces, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sum(results.get(timeout=5) for _ in workers) == len(nonces)


def test_expired_tokens_are_forgotten_with_a_day_to_spare(tmp_path):
    used = UsedTokens(tmp_path)
    used.use(a_token(), NOW)
    for later, names in ((3600.0, 1), (86_400.0 + 11, 0)):
        used.use(a_token(f"{names:032x}", NOW + 10 * 86_400), NOW + later)
        assert len([name for name in os.listdir(tmp_path / "released") if NONCE in name]) == names


def test_the_store_is_bounded_and_a_full_one_accepts_no_token(tmp_path, monkeypatch):
    monkeypatch.setattr(release_token, "USED_MAX", 3)
    used = UsedTokens(tmp_path)
    assert [used.use(a_token(f"{number:032x}"), NOW) for number in range(5)] == [True, True, True, False, False]
    assert not UsedTokens(tmp_path).use(a_token("f" * 32), NOW)
    assert used.use(a_token("e" * 32, NOW + 10 * 86_400), NOW + 86_400 + 11)


@pytest.mark.parametrize("step", ["mkdir", "open", "fsync"])
def test_a_use_that_cannot_be_stored_is_an_error(tmp_path, monkeypatch, step):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        UsedTokens(tmp_path).use(a_token(), NOW)

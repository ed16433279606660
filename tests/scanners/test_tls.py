"""spamd over TLS, a real one with certificates of an authority made here: what is accepted, and how a refusal reads."""

import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import peers
from lab.peers import Peer, read_spamd
from lab.process import free_port
from lab.spamd import GTUBE, Spamd
from lab.tls import Authority, Pair

from contentfilter import settings
from contentfilter.deadline import Deadline
from contentfilter.endpoint import Address
from contentfilter.errors import BackendError, Cause, ConfigError
from contentfilter.model import ScanStatus, Want
from contentfilter.scanners import tls
from contentfilter.scanners.spamd import SpamdScanner
from contentfilter.scanners.stream import ClosedError, UnreachableError

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("nothing_left")]

LETTER = b"From: a@example.org\r\nSubject: hello\r\n\r\nnothing in here\r\n"
SPAM = b"From: a@example.org\r\nSubject: buy\r\n\r\n" + GTUBE + b"\r\n"


@dataclass(frozen=True)
class Places:
    """One spamd behind three TLS ports."""

    directory: Path
    ours: Authority
    client: Pair
    open: str
    asking: str  # wants a certificate of ours
    plain: str


@pytest.fixture(scope="module")
def places(lab_directory: Path) -> Iterator[Places]:
    """Two spamds, as --ssl-verify holds for all ports of one."""
    directory = lab_directory / "tls"
    ours = Authority(directory)
    server = ours.issue("server", "IP:127.0.0.1,DNS:localhost")
    served = (f"--server-cert={server.cert}", f"--server-key={server.key}")
    ports = free_port(), free_port()
    asking = (f"--listen=ssl:127.0.0.1:{ports[1]}", "--ssl-verify", f"--ssl-ca-file={ours.ca}")
    directory.chmod(0o755)
    with (
        Spamd(lab_directory / "tls0", options=(f"--listen=ssl:127.0.0.1:{ports[0]}", *served)) as first,
        Spamd(lab_directory / "tls1", options=(*asking, *served), children=1),
    ):
        backends = [f"tls:127.0.0.1:{port}" for port in ports]
        yield Places(directory, ours, ours.issue("client"), *backends, first.tcp_backend)


def scanner(backend: str, **changes: object) -> SpamdScanner:
    return SpamdScanner(settings.SpamdSettings(backends=(backend,), **changes), 2)  # type: ignore[arg-type]


async def refusal(backend: str, message, content: bytes = LETTER, **changes: object) -> BackendError:
    with pytest.raises(BackendError) as caught:
        await scanner(backend, **changes).scan(message(content), Deadline.after(5))
    return caught.value


@pytest.mark.parametrize("compress", [False, True])
async def test_a_verdict_and_the_rewritten_message_come_over_tls(places: Places, message, compress: bool) -> None:
    one = scanner(places.open, tls_ca=places.ours.ca, compress=compress)
    await one.probe(Address.parse(places.open), Deadline.after(5))
    assert (await one.scan(message(LETTER), Deadline.after(30))).status is ScanStatus.CLEAN
    found = await one.scan(message(SPAM), Deadline.after(30), want=Want.PROCESS)
    assert (found.status, found.backend) == (ScanStatus.FOUND, places.open)
    assert GTUBE in found.rewritten
    large = message(LETTER + b"0123456789abcde\n" * 20_000)  # many TLS records, and no last line end
    assert (await one.scan(large, Deadline.after(30), want=Want.HEADERS)).status is ScanStatus.CLEAN
    unfinished = message(LETTER + b"a last line without an end")
    assert (await one.scan(unfinished, Deadline.after(30))).status is ScanStatus.CLEAN


async def test_no_answer_is_lost_to_a_reset(places: Places, message) -> None:
    """spamd does not read our farewell, unless the last line lacks its end; its close would reset the connection."""
    one = scanner(places.open, tls_ca=places.ours.ca)
    for ending in (b"", b"an end that is none"):
        for _ in range(10):
            assert (await one.scan(message(LETTER + ending), Deadline.after(30))).status is ScanStatus.CLEAN


async def test_a_name_in_the_address_is_verified_too(places: Places, message) -> None:
    named = places.open.replace("127.0.0.1", "localhost")
    assert (await scanner(named, tls_ca=places.ours.ca).scan(message(LETTER), Deadline.after(30))).status


async def test_our_own_certificate_is_shown_where_spamd_asks_for_one(places: Places, message) -> None:
    known = {"tls_ca": places.ours.ca, "tls_cert": places.client.cert, "tls_key": places.client.key}
    assert (await scanner(places.asking, **known).scan(message(LETTER), Deadline.after(30))).status is ScanStatus.CLEAN
    error = await refusal(places.asking, message, tls_ca=places.ours.ca)
    assert error.cause is Cause.DOWN


@pytest.mark.parametrize("authorities", ["another", ""], ids=["another authority", "the system's"])
async def test_a_certificate_of_somebody_else_is_refused(places: Places, message, authorities: str) -> None:
    ca = Authority(places.directory, authorities).ca if authorities else ""
    error = await refusal(places.open, message, tls_ca=ca)
    assert (error.cause, type(error)) == (Cause.DOWN, UnreachableError)
    assert "certificate verify failed" in error.detail


async def test_a_certificate_for_another_name_is_refused(places: Places, message) -> None:
    error = await refusal(places.open, message, tls_ca=places.ours.ca, tls_name="scan.example.org")
    assert "certificate verify failed" in error.detail
    assert "scan.example.org" in error.detail


def served(pair: Pair, answer: bytes, *, farewell: bool = True) -> peers.Talk:
    """A spamd behind TLS, by script. Without farewell the connection is cut."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)

    def talk(peer: Peer, sock: peers.socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            peer.seen.append(peer.read(secure))
            secure.sendall(answer)
            if farewell:
                secure.unwrap()

    return talk


def tls_backend(peer: Peer) -> str:
    return peer.backend.replace("tcp:", "tls:")


async def test_an_expired_certificate_is_refused(places: Places, message) -> None:
    old = places.ours.issue("old", expired=True)
    with Peer(None, served(old, b""), read_spamd) as peer:
        error = await refusal(tls_backend(peer), message, tls_ca=places.ours.ca)
    assert "certificate verify failed: certificate has expired" in error.detail
    assert peer.seen == []  # no byte of the message went there


async def test_an_answer_that_is_cut_is_no_verdict(places: Places, message) -> None:
    pair, unfinished = places.ours.issue("cutting"), LETTER + b"so that it reads to our end"
    cut = b"SPAMD/1.1 0 EX_OK\r\nSpam: False ; 0.0 / 5.0\r\n"
    with Peer(None, served(pair, cut, farewell=False), read_spamd) as peer:
        error = await refusal(tls_backend(peer), message, unfinished, tls_ca=places.ours.ca)
        assert error.cause is Cause.BAD_REPLY
    with Peer(None, served(pair, b"", farewell=False), read_spamd) as peer:
        error = await refusal(tls_backend(peer), message, unfinished, tls_ca=places.ours.ca)
        assert isinstance(error, ClosedError)


async def test_a_spamd_without_tls_is_told_apart(places: Places, message) -> None:
    error = await refusal(places.plain.replace("tcp:", "tls:"), message, tls_ca=places.ours.ca)
    assert (error.cause, type(error)) == (Cause.DOWN, UnreachableError)
    assert "does it speak TLS there?" in error.detail


async def test_a_peer_that_never_shakes_hands_costs_the_time_to_connect(places: Places, message) -> None:
    with Peer(None, peers.says_and_stays(b""), lambda sock: b"") as peer:
        error = await refusal(tls_backend(peer), message, tls_ca=places.ours.ca, connect_timeout=0.1)
    assert (error.cause, type(error)) == (Cause.TIMEOUT, UnreachableError)


async def test_the_context_is_made_once_for_all_connections(places: Places, message, monkeypatch) -> None:
    made: list[settings.SpamdSettings] = []
    make = tls.client
    monkeypatch.setattr(tls, "client", lambda config: made.append(config) or make(config))
    one = scanner(places.open, tls_ca=places.ours.ca)
    for _ in range(3):
        await one.scan(message(LETTER), Deadline.after(30))
    assert len(made) == 1
    scanner(places.plain, tls_ca="/nowhere")  # nobody needs it
    assert len(made) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tls_ca": "missing"}, r"\[spamd\] tls_ca: .*missing: No such file"),
        ({"tls_ca": "empty"}, r"\[spamd\] tls_ca: .*empty: there is no certificate in it"),
        ({"tls_cert": "client.crt", "tls_key": "server.key"}, "certificate and key do not belong together"),
        ({"tls_cert": "client.crt"}, "not PEM, or without the key"),
        ({"tls_cert": "client.crt", "tls_key": "locked.key"}, "the key has a password"),
    ],
)
async def test_files_that_cannot_be_used_are_named(places: Places, changes: dict[str, str], words: str) -> None:
    (places.directory / "empty").touch()
    locked = places.directory / "locked.key"
    places.ours._run("pkey", "-in", places.client.key, "-aes256", "-passout", "pass:x", "-out", str(locked))
    config = settings.SpamdSettings(**{key: str(places.directory / name) for key, name in changes.items()})
    threads = threading.active_count()
    with pytest.raises(ConfigError, match=words):
        tls.client(config)
    assert threading.active_count() == threads

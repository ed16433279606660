"""The HTTP server: correct answers, and bounds that keep one client from disturbing another or the supervisor."""

import asyncio
import re
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from contentfilter.endpoint import parse_listen
from contentfilter.monitor import http_server
from contentfilter.monitor.http import Application, Response
from contentfilter.monitor.http_server import HEAD_MAX, HttpServer

BIG = b"x" * 20_000_000
START = b"GET /hello HTTP/1.1\r\nHost: x\r\n"
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


class Log:
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def exception(self, event: str, **fields: object) -> None:
        self.events.append(event)


async def hello(accept: str) -> Response:
    return Response(f"hello {accept}".encode())


async def broken(accept: str) -> Response:
    raise RuntimeError("a defect")


async def big(accept: str) -> Response:
    return Response(BIG)


PAGES = {"/hello": hello, "/broken": broken, "/big": big}


class Running:
    """A server, and its clients."""

    def __init__(self) -> None:
        self.log = Log()
        self.server = HttpServer(Application(PAGES, self.log))  # type: ignore[arg-type]

    async def start(self) -> None:
        host, _, port = (await self.server.start("127.0.0.1", 0)).rpartition(":")
        self.where = host, int(port)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.where)

    async def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, header and body of the whole answer."""
        reader, writer = await self.connect()
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        return parsed(answer)


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("ascii").split("\r\n")
    header = {name.title(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert status.startswith("HTTP/1.1 ")
    assert header["Connection"] == "close"
    return int(status.split(" ")[1]), header, body


@pytest_asyncio.fixture
async def running() -> AsyncIterator[Running]:
    running = Running()
    await running.start()
    yield running
    await running.server.close()


@pytest.mark.asyncio
async def test_a_page_is_served(running: Running) -> None:
    status, header, body = await running.ask(b"GET /hello HTTP/1.1\r\nHost: x\r\nAccept: a/b\r\naccept:  c/d \r\n\r\n")
    assert (status, body) == (200, b"hello a/b,c/d")
    assert header["Content-Length"] == str(len(body))
    assert header["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.asyncio
async def test_head_is_get_without_the_body(running: Running) -> None:
    _, full, _ = await running.ask(b"GET /hello HTTP/1.0\r\n\r\n")
    status, header, body = await running.ask(b"HEAD /hello HTTP/1.0\r\n\r\n")
    assert (status, body) == (200, b"")
    assert header["Content-Length"] == full["Content-Length"]


@pytest.mark.asyncio
async def test_a_query_is_not_a_part_of_the_page(running: Running) -> None:
    assert (await running.ask(b"GET /hello?a=b HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200


@pytest.mark.asyncio
async def test_a_page_may_add_fields_and_private_pages_answer_under_own_names_only() -> None:
    async def own(accept: str) -> Response:
        return Response(b"x", header={"X-Own": "yes"})

    running = Running()
    application = Application({"/own": own, "/open": own}, running.log, private=("/own",), names=("Mail.example",))  # type: ignore[arg-type]
    running.server = HttpServer(application)
    await running.start()
    try:
        hosts = ((b"mail.EXAMPLE:9464", 200), (b"other.example", 421), (b"[::1]:1", 200), (b"a\xffb", 421), (b"", 421))
        for host, expected in hosts:
            status, header, body = await running.ask(b"GET /own HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
            assert (status, header.get("X-Own")) == (expected, "yes" if expected == 200 else None)
            assert (body == b"x") == (expected == 200)
        assert (await running.ask(b"GET /own HTTP/1.0\r\n\r\n"))[0] == 421
        assert (await running.ask(b"GET /open HTTP/1.1\r\nHost: other.example\r\n\r\n"))[0] == 200
    finally:
        await running.server.close()


@pytest.mark.parametrize(
    ("request_line", "expected"),
    [
        (b"GET /nothing HTTP/1.1", 404),
        (b"GET /hello/ HTTP/1.1", 404),
        (b"GET /../hello HTTP/1.1", 404),
        (b"GET /%68ello HTTP/1.1", 404),
        (b"GET //hello HTTP/1.1", 404),
        (b"POST /hello HTTP/1.1\r\nContent-Length: 5", 405),
        (b"DELETE /hello HTTP/1.1", 405),
        (b"OPTIONS /hello HTTP/1.1", 405),
        (b"get /hello HTTP/1.1", 405),
        (b"GET /" + b"a" * 1100 + b" HTTP/1.1", 404),
        (b"GET /hello HTTP/1.1\r\nUpgrade: websocket\r\nConnection: upgrade", 200),
        (b"GET /hello", 400),
        (b"GET  /hello HTTP/1.1", 400),
        (b"GET hello HTTP/1.1", 400),
        (b"GET http://127.0.0.1/hello HTTP/1.1", 400),
        (b"GET /hello HTTP/2.0", 400),
        (b"GET /hel\0lo HTTP/1.1", 400),
        (b"GET /hello HTTP/1.1\r\nno colon", 400),
        (b"GET /hello HTTP/1.1\r\n folded: x", 400),
        (b"GET /hello HTTP/1.1\r\nA : x", 400),
        (b"GET /hello HTTP/1.1\r\nA: x\ry", 400),
        (b"GET /hello HTTP/1.1\r\nHost: y", 400),
        (b"GET /hello HTTP/1.1\r\nContent-Length: x", 400),
        (b"GET /hello HTTP/1.1\r\nA:" + b" " * 65 + b"x", 400),
        (b"GET /hello HTTP/1.1\r\nA: x" + b" " * 64, 200),
        (b"", 400),
        (b"\x16\x03\x01\x02\0\x01\0", 400),
    ],
)
@pytest.mark.asyncio
async def test_only_plain_questions_are_answered(running: Running, request_line: bytes, expected: int) -> None:
    status, header, _ = await running.ask(request_line + b"\r\nHost: x\r\n\r\n")
    assert status == expected
    assert header.get("Allow") == ("GET, HEAD" if expected == 405 else None)


@pytest.mark.asyncio
async def test_a_head_without_end_is_refused_when_it_is_too_long(running: Running) -> None:
    reader, writer = await running.connect()
    writer.write(b"GET /hello HTTP/1.1\r\nA: " + b"x" * (HEAD_MAX + 100))
    first = await asyncio.wait_for(reader.read(20), 20)
    assert STATUS.match(first)
    assert STATUS.match(first)[1] == b"400"  # type: ignore[index]
    writer.close()


@settings(deadline=None, max_examples=300)
@given(
    st.binary(max_size=200) | st.text(max_size=100).map(lambda t: b"GET /hello HTTP/1.1\r\nHost: x\r\n" + t.encode())
)
def test_any_bytes_get_a_proper_answer(head: bytes) -> None:
    async def answered() -> int:
        running = Running()
        await running.start()
        try:
            return (await running.ask(head + b"\r\n\r\n"))[0]
        finally:
            await running.server.close()

    assert asyncio.run(answered()) in (200, 400, 404, 405)


HOLD = 0.25  # seconds; the shapes below held the loop for a second to minutes


@pytest.mark.parametrize(
    "hostile",
    [
        b"GET / HTTP/1.1\r\nX:" + b" " * 8000 + b"\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nX:" + b" " * 8000 + b"\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nX:" + b" \t" * 4000 + b"\r\r\n\r\n",
        START + (b"X:" + b" " * 60 + b"\r\n") * 128 + b"X: \x00\r\n\r\n",
        START + b"X:" + b"a " * 4000 + b"\x00\r\n\r\n",
        START + b"X: a\r\n" + b" \r\n" * 2600 + b"\x00\r\n\r\n",
        START + b"X:\r\n" * 2000 + b"\r\n",
        START + b"X:\n" * 2600 + b"\n",
        START + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 40_000,
        START + b"Transfer-Encoding: " + b"a," * 4000 + b"\r\n\r\n",
        START + b"Connection: " + b"upgrade," * 1000 + b"\r\n\r\n",
        (START + b"\r\n") * 20_000,  # pipelined
        b"G" * 1_000_000,
    ],
    ids=range(13),
)
@pytest.mark.asyncio
async def test_no_request_holds_the_loop(running: Running, hostile: bytes) -> None:
    """Measured as processor time of this thread: another job of the machine does not count."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - before)

    watching = asyncio.create_task(watch())
    for size in (len(hostile), 1460):
        _, writer = await running.connect()
        for start in range(0, len(hostile), size):
            writer.write(hostile[start : start + size])
            await asyncio.sleep(0)
        assert (await running.ask(START + b"\r\n"))[0] == 200
        writer.close()
    watching.cancel()
    assert longest < HOLD


@pytest.mark.asyncio
async def test_a_connection_gets_one_answer(running: Running) -> None:
    _, _, body = await running.ask((START + b"\r\n") * 3)
    assert body == b"hello "


@pytest.mark.asyncio
async def test_a_body_is_not_read(running: Running) -> None:
    _, _, body = await running.ask(START + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    assert body == b"hello "


@pytest.mark.asyncio
async def test_a_defect_in_a_page_is_told_and_hurts_nobody_else(running: Running) -> None:
    assert (await running.ask(b"GET /broken HTTP/1.0\r\n\r\n"))[0] == 500
    assert running.log.events == ["http.error"]
    assert (await running.ask(b"GET /hello HTTP/1.0\r\n\r\n"))[0] == 200


@pytest.mark.asyncio
async def test_who_drips_a_request_is_cut_off(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_WAIT", 0.3)
    reader, writer = await running.connect()
    writer.write(b"GET /hello HTTP/1.1\r\n")

    async def drip() -> None:
        while True:
            writer.write(b"A: b\r\n")
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    try:
        assert await asyncio.wait_for(reader.read(), 20) == b""
    except ConnectionResetError:
        pass
    finally:
        dripping.cancel()


@pytest.mark.asyncio
async def test_silent_connections_keep_nobody_out(running: Running) -> None:
    silent = [await running.connect() for _ in range(http_server.CONNECTIONS_MAX + 5)]
    status, _, body = await running.ask(b"GET /hello HTTP/1.0\r\n\r\n")
    assert (status, body) == (200, b"hello ")
    reader, _ = silent[0]
    assert await asyncio.wait_for(reader.read(), 20) == b""  # the oldest had to go
    reader, writer = silent[-1]
    writer.write(b"GET /hello HTTP/1.0\r\n\r\n")
    assert (await asyncio.wait_for(reader.read(), 20)).endswith(b"hello ")
    for _, writer in silent:
        writer.close()


@pytest.mark.asyncio
async def test_who_does_not_read_is_cut_off_and_holds_nobody(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "ANSWER_WAIT", 0.5)
    reader, writer = await running.connect()
    writer.write(b"GET /big HTTP/1.0\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.pause_reading()
    assert (await running.ask(b"GET /hello HTTP/1.0\r\n\r\n"))[0] == 200
    while running.server.open:
        await asyncio.sleep(0.01)
    writer.transport.resume_reading()
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(len(BIG)), 20)
    writer.close()


@pytest.mark.asyncio
async def test_a_large_answer_arrives_whole(running: Running) -> None:
    assert (await running.ask(b"GET /big HTTP/1.0\r\n\r\n"))[2] == BIG


@pytest.mark.asyncio
async def test_an_address_in_use_is_an_error(running: Running) -> None:
    with pytest.raises(OSError, match="in use"):
        await HttpServer(Application(PAGES, Log())).start(*running.where)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_the_end_drops_who_is_there(running: Running) -> None:
    reader, writer = await running.connect()
    writer.write(b"GET /hel")
    await running.ask(b"GET /hello HTTP/1.0\r\n\r\n")  # the first one is surely there now
    await running.server.close()
    with pytest.raises(ConnectionError):
        await running.connect()
    try:
        assert await asyncio.wait_for(reader.read(), 20) == b""
    except ConnectionResetError:
        pass
    writer.close()


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("[::1]:80", ("::1", 80)),
        ("localhost:0", ("localhost", 0)),
        ("off", None),
    ],
)
def test_addresses(text: str, where: tuple[str, int] | None) -> None:
    assert parse_listen(text) == where


@pytest.mark.parametrize(
    "text", ["", "9464", ":9464", "::1:9464", "a b:1", "host:", "host:x", "host:65536", "host:-1", "OFF"]
)
def test_what_is_no_address_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_listen(text)

"""Log lines: whole, bounded, parsable, one write each, with event names from one table."""

import json
import logging
import os
import threading
from pathlib import Path

import pytest
from lab.events import said

from contentfilter.log import EVENTS, LINE_LIMIT, Forward, make_logger


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture
def target(tmp_path: Path) -> tuple[int, Path]:
    path = tmp_path / "log"
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), path


def test_a_json_line_has_time_level_event_and_the_fields(target: tuple[int, Path]) -> None:
    log = make_logger("json", "info", target[0], pid=7)
    log.info("mail.done", id="ab", score=1.5, none=None, path=Path("/x"), nested={"a": [1]})
    line = json.loads(lines(target[1])[0])
    assert list(line)[:3] == ["time", "level", "event"]
    assert line["time"].endswith("Z")
    del line["time"]
    assert line == {
        "level": "info", "event": "mail.done", "pid": 7, "id": "ab", "score": 1.5, "none": None,
        "path": "/x", "nested": {"a": [1]},
    }  # fmt: skip


def test_a_logfmt_line_quotes_what_needs_it(target: tuple[int, Path]) -> None:
    log = make_logger("logfmt", "info", target[0])
    log.info(
        "mail.done", plain="a@b", spaced="two words", quoted='say "hi"', forged="x\nevent=mail.done", empty="", n=5
    )
    (line,) = lines(target[1])
    words = line.decode()
    for expected in ("event=mail.done", "plain=a@b", 'spaced="two words"', '"say \\"hi\\""', 'empty=""', "n=5"):
        assert expected in words
    assert 'forged="x\\nevent=mail.done"' in words


@pytest.mark.parametrize("style", ["json", "logfmt"])
@pytest.mark.parametrize(
    "fields",
    [
        {"a": "x" * 100_000},
        {"a": "x" * 5000, "b": "é" * 5000},
        {"a": ["x" * 5000] * 3},
        {f"k{i}": "y" * 60 for i in range(300)},
    ],
    ids=["long", "two long", "nested", "many"],
)
def test_a_line_is_never_longer_than_a_pipe_takes_whole(
    style: str, fields: dict[str, str], target: tuple[int, Path]
) -> None:
    log = make_logger(style, "info", target[0])  # type: ignore[arg-type]
    log.info("mail.done", id="ab", **fields)
    (line,) = lines(target[1])
    assert len(line) <= LINE_LIMIT
    assert b"mail.done" in line
    assert b"ab" in line
    if style == "json":
        assert json.loads(line)["event"] == "mail.done"


def test_lone_surrogates_do_not_stop_the_log(target: tuple[int, Path]) -> None:
    for style in ("json", "logfmt"):
        make_logger(style, "info", target[0]).info("mail.done", name=os.fsdecode(b"\xff"))  # type: ignore[arg-type]
    assert len(lines(target[1])) == 2


def test_levels_below_the_wanted_one_are_not_written(target: tuple[int, Path]) -> None:
    log = make_logger("json", "warning", target[0])
    log.info("mail.done")
    log.warning("mail.done")
    assert [json.loads(line)["level"] for line in lines(target[1])] == ["warning"]


def test_an_exception_is_in_the_line(target: tuple[int, Path]) -> None:
    log = make_logger("json", "info", target[0])
    try:
        raise ValueError("x" * 10)
    except ValueError:
        log.exception("intake.internal-error")
    (line,) = lines(target[1])
    assert "ValueError: xxxxxxxxxx" in json.loads(line)["exception"]


def test_a_log_that_is_gone_does_not_stop_mail() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    make_logger("json", "info", writer).info("mail.done")
    os.close(writer)
    make_logger("json", "info", writer).info("mail.done")


def test_a_log_that_nobody_reads_does_not_stop_mail_and_tells_later_what_is_missing() -> None:
    reader, writer = os.pipe()
    log = make_logger("json", "info", writer)

    def fill() -> None:
        for _ in range(2_000):
            log.info("mail.done", text="x" * 100)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for a reader"
    kept = os.read(reader, 1 << 20).splitlines()
    log.info("mail.done")
    log.info("mail.done")
    first, second = map(json.loads, os.read(reader, 1 << 20).splitlines())
    assert first["lines_lost"] == 2_000 - len(kept) > 0
    assert "lines_lost" not in second
    for fd in (reader, writer):
        os.close(fd)


def test_the_libraries_own_records_come_as_events(target: tuple[int, Path]) -> None:
    handler = Forward(make_logger("json", "info", target[0]))
    handler.handle(logging.LogRecord("asyncio", logging.ERROR, "f", 1, "task %s died", ("x",), None))
    line = json.loads(lines(target[1])[0])
    assert (line["event"], line["logger"], line["text"], line["level"]) == (
        "python.log", "asyncio", "task x died", "error",
    )  # fmt: skip


def test_every_event_in_the_source_is_in_the_table_and_the_other_way_round() -> None:
    assert set(said()) | {"python.log"} == set(EVENTS)

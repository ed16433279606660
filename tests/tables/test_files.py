"""Reading table files: whole, current, bounded; missing means empty, unreadable means an error."""

import asyncio
import contextlib
import os
import subprocess
import sys

import pytest

from contentfilter.errors import ConfigError
from contentfilter.files import read_file, replace_file
from contentfilter.tables import files
from contentfilter.tables.files import load_tables, sources


def load(directory):
    return asyncio.run(load_tables(str(directory)))


def refused(directory):
    with pytest.raises(ConfigError) as caught:
        load(directory)
    return str(caught.value)


def test_missing_files_are_empty_tables(tmp_path):
    rows, problems = load(tmp_path)
    assert (rows.clamav, rows.spamd, rows.default_domain, problems) == ({}, {}, b"", ())
    assert rows.sources == sources(str(tmp_path))
    assert {source.size for source in rows.sources} == {-1}


def test_both_tables_their_problems_and_the_default_domain_are_read(tmp_path):
    (tmp_path / "clamavclients").write_bytes(b"a@x.example\nbad line\n")
    (tmp_path / "spamdclients").write_bytes(b"!*\n")
    (tmp_path / "me").write_bytes(b"Me.Example \t\nsecond\n")
    rows, problems = load(tmp_path)
    assert rows.clamav == {b"a@x.example": b""}
    assert rows.spamd == {b"*": b"!"}
    assert rows.default_domain == b"me.example"
    assert [(os.path.basename(p.path), p.line) for p in problems] == [("clamavclients", 2)]
    (tmp_path / "envnoathost").write_bytes(b"mail.example")
    assert load(tmp_path)[0].default_domain == b"mail.example"


@pytest.mark.parametrize("name", ["clamavclients", "spamdclients", "me", "envnoathost"])
def test_any_change_of_a_source_is_seen(tmp_path, name):
    path = tmp_path / name
    rows, _ = load(tmp_path)
    assert sources(str(tmp_path)) == rows.sources
    path.write_bytes(b"x.example\n")
    rows, _ = load(tmp_path)
    assert sources(str(tmp_path)) == rows.sources
    status = path.stat()
    path.rename(tmp_path / "old")
    path.write_bytes(b"y.example\n")  # the same size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # and the same time: another inode
    assert sources(str(tmp_path)) != rows.sources
    path.unlink()
    assert sources(str(tmp_path)) != rows.sources


def test_what_is_no_file_is_an_error_not_an_empty_table(tmp_path):
    (tmp_path / "clamavclients").mkdir()
    assert "clamavclients" in refused(tmp_path)


READER = """
import asyncio, sys
from contentfilter.errors import ConfigError
from contentfilter.tables.files import load_tables
try:
    asyncio.run(load_tables(sys.argv[1]))
except ConfigError as error:
    print(error)
"""


def test_a_named_pipe_makes_nobody_wait(tmp_path):
    os.mkfifo(tmp_path / "spamdclients")
    # In a process of its own: a thread that waits for the pipe's other end would keep this one from ending.
    done = subprocess.run([sys.executable, "-c", READER, tmp_path], capture_output=True, text=True, timeout=30)
    assert "not a regular file" in done.stdout


def test_a_file_that_is_too_large_is_refused_unread(tmp_path):
    with open(tmp_path / "clamavclients", "wb") as file:
        file.truncate(files.MAX_SIZE + 1)
    assert "the limit is" in refused(tmp_path)


@pytest.fixture
def nobody():
    """Root can read everything: be somebody else for a while."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_file_without_permission_is_an_error(tmp_path, nobody):
    with contextlib.suppress(PermissionError):  # root's own directory is closed to others as it is
        (tmp_path / "clamavclients").touch(mode=0)
    assert "Permission denied" in refused(tmp_path)


def test_a_loop_of_links_is_an_error(tmp_path):
    (tmp_path / "clamavclients").symlink_to("clamavclients")
    assert "cannot read it" in refused(tmp_path)


class Changing:
    """In place of os.fstat: says that the file has changed, the given number of times."""

    def __init__(self, times):
        self.times, self.calls, self.real = times, 0, os.fstat

    def __call__(self, fd):
        self.calls += 1
        status = self.real(fd)
        if self.calls % 2 == 0 and self.calls <= 2 * self.times:
            return os.stat_result((*status[:6], status.st_size + 1, *status[7:]))
        return status


@pytest.mark.parametrize("times", [0, 1, 4])
def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch, times):
    (tmp_path / "f").write_bytes(b"whole")
    changing = Changing(times)
    monkeypatch.setattr(files.os, "fstat", changing)
    data, state = read_file(str(tmp_path / "f"), 100)
    assert (data, state.size) == (b"whole", 5)
    assert changing.calls == 2 * times + 2


def test_a_file_that_never_stops_changing_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"whole")
    monkeypatch.setattr(files.os, "fstat", Changing(1000))
    with pytest.raises(ConfigError, match="keeps changing"):
        read_file(str(tmp_path / "f"), 100)


def test_the_loop_goes_on_while_a_table_is_parsed(tmp_path):
    (tmp_path / "clamavclients").write_bytes(b"".join(b"u%d@x.example\n" % i for i in range(200_000)))

    async def run():
        ticks = 0
        loading = asyncio.ensure_future(load_tables(str(tmp_path)))
        while not loading.done():
            await asyncio.sleep(0)
            ticks += 1
        return ticks, await loading

    ticks, (rows, _) = asyncio.run(run())
    assert len(rows.clamav) == 200_000
    assert ticks > 10


def test_a_replaced_file_has_the_mode_asked_for_and_no_traces_stay(tmp_path):
    path = tmp_path / "f"
    replace_file(str(path), (b"a", b"b"), 0o604)
    assert path.read_bytes() == b"ab"
    assert path.stat().st_mode & 0o777 == 0o604
    assert os.listdir(tmp_path) == ["f"]

"""Sizes are those that are there; what cannot be measured is missing, and disturbs nothing else."""

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from contentfilter.deadline import Deadline
from contentfilter.model import Message
from contentfilter.monitor.measure import backlog, measure
from contentfilter.settings import Settings
from contentfilter.store.journal import Journal, journal_path
from contentfilter.store.quarantine import Quarantine
from contentfilter.tables.rows import Rows
from contentfilter.tables.snapshot import FILE, compile_snapshot


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return msgspec.convert({"service": {"state": str(tmp_path)}}, Settings)


def measured(settings: Settings) -> dict[str, float]:
    return {name.removeprefix("contentfilter_"): value for name, _, value in measure(settings)}


def test_an_empty_state_directory_has_sizes_of_zero(settings: Settings) -> None:
    found = measured(settings)
    assert (found["quarantine_entries"], found["quarantine_bytes"], found["journal_bytes"]) == (0, 0, 0)
    disk = os.statvfs(settings.service.state)
    assert found["state_size_bytes"] == disk.f_blocks * disk.f_frsize
    assert 0 < found["state_free_bytes"] <= found["state_size_bytes"]
    assert "tables_built_timestamp_seconds" not in found


def test_what_is_kept_is_measured(settings: Settings, tmp_path: Path) -> None:
    message = Message(-1, 1000, b"x" * 1000)
    asyncio.run(Quarantine.of(settings).keep("0" * 16, message, {}, Deadline.after(10)))
    compile_snapshot(Rows(), str(tmp_path / FILE), created=1234.5)
    with Journal.open(journal_path(settings)):
        found = measured(settings)
        sidecar = next((tmp_path / "quarantine" / "entries").glob("*.json")).stat().st_size
        assert (found["quarantine_entries"], found["quarantine_bytes"]) == (1, 1000 + sidecar)
        assert found["journal_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("journal.sqlite*")
                                             if not path.name.endswith("-shm"))  # fmt: skip
        assert found["journal_bytes"] > 0
        assert found["tables_built_timestamp_seconds"] == 1234.5


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"clamav_rows", b"clamav_r0ws"))


def _remove(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [_damage, _remove, lambda path: path.write_bytes(b"")])
def test_one_thing_that_cannot_be_read_leaves_the_others(
    settings: Settings, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    snapshot = tmp_path / FILE
    compile_snapshot(Rows(), str(snapshot))
    assert "tables_built_timestamp_seconds" in measured(settings)
    spoil(snapshot)
    found = measured(settings)
    assert "tables_built_timestamp_seconds" not in found
    assert {"quarantine_bytes", "journal_bytes", "state_free_bytes"} <= set(found)


def test_the_kernel_tells_how_many_wait_at_a_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(20)
        assert backlog(listener.fileno()) == (0, 20)
        clients = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        for client in clients:
            client.connect(str(tmp_path / "s"))
        assert backlog(listener.fileno()) == (3, 20)
        listener.accept()[0].close()
        assert backlog(listener.fileno()) == (2, 20)
        for client in clients:
            client.close()


def test_what_is_no_socket_has_no_queue(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        assert backlog(file.fileno()) is None
    assert backlog(-1) is None

"""Kept completely or not at all, readable by nobody else."""

import hashlib
import json
import os
import stat

import pytest

from contentfilter.deadline import Deadline
from contentfilter.model import Message
from contentfilter.verdict.quarantine import Quarantine


def message_of(data: bytes) -> Message:
    return Message(-1, len(data), data)


def files(directory):
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


@pytest.mark.asyncio
async def test_message_and_sidecar_are_complete_and_private(tmp_path):
    data = b"Subject: x\n\n\0\xff" * 100_000
    name = await Quarantine(tmp_path / "q").keep("id1", message_of(data), {"rule": "r"}, Deadline.after(10))
    assert name == hashlib.sha256(data).hexdigest()
    assert files(tmp_path / "q") == ["entries/id1.json", f"messages/{name[:2]}/{name}.eml"]
    kept = tmp_path / "q" / "messages" / name[:2] / f"{name}.eml"
    assert kept.read_bytes() == data
    facts = json.loads((tmp_path / "q" / "entries" / "id1.json").read_text())
    assert facts == {"incident": "id1", "sha256": name, "size": len(data), "rule": "r"}
    for path in (tmp_path / "q").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


@pytest.mark.asyncio
async def test_equal_messages_are_stored_once(tmp_path):
    quarantine = Quarantine(tmp_path)
    for incident in ("a", "b"):
        await quarantine.keep(incident, message_of(b"same"), {}, Deadline.after(10))
    assert len(list((tmp_path / "messages").rglob("*.eml"))) == 1
    assert len(list((tmp_path / "entries").glob("*.json"))) == 2


@pytest.mark.asyncio
async def test_a_failure_leaves_nothing_and_is_told(tmp_path, monkeypatch):
    quarantine = Quarantine(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        await quarantine.keep("id", message_of(b"x"), {}, Deadline.after(10))
    assert files(tmp_path) == []


@pytest.mark.asyncio
async def test_an_expired_deadline_is_told(tmp_path):
    with pytest.raises(TimeoutError):
        await Quarantine(tmp_path).keep("id", message_of(b"x"), {}, Deadline.after(-1))

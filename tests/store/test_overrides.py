"""bypass.json: what was saved is read again; whatever is not what the daemon wrote bypasses nothing."""

import fcntl
import json
import os
import stat
from pathlib import Path

import pytest

from contentfilter.errors import ConfigError
from contentfilter.model import OriginKind, Scanner
from contentfilter.policy.overrides import AllowEntry, Bypass
from contentfilter.store import overrides
from contentfilter.store.overrides import (
    ALLOW_FILE,
    AUDIT,
    AUDIT_MAX,
    change_allowed,
    read_allowed,
    read_bypasses,
    read_usable,
    save,
)
from contentfilter.store.overrides import BYPASS_FILE as FILE

ORDER = Bypass(
    scanner=Scanner.CLAMD,
    since=1000.0,
    until=2800.0,
    reason='café \\ "quoted"',
    by="root",
    origins=(OriginKind.RELAY, OriginKind.LOCAL),
)
SOUND = {"scanner": "clamd", "since": 0, "until": 600, "reason": "r", "by": "x", "origins": []}


def test_what_was_saved_is_read_again_and_private(tmp_path: Path) -> None:
    save(str(tmp_path), (ORDER,), (), [{"event": "one"}])
    save(str(tmp_path), (ORDER,), (), [{"event": "two"}])
    assert read_bypasses(str(tmp_path)) == (ORDER,)
    assert [json.loads(line)["event"] for line in (tmp_path / AUDIT).read_text().splitlines()] == ["one", "two"]
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (FILE, AUDIT)} == {0o600}


def test_no_file_is_no_bypass(tmp_path: Path) -> None:
    assert read_bypasses(str(tmp_path)) == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        json.dumps([SOUND | {"until": 8 * 86_400}]).encode(),
        json.dumps([SOUND | {"until": -1}]).encode(),
        json.dumps([SOUND | {"scanner": "loadertypes"}]).encode(),
        json.dumps([SOUND | {"scanner": "everything"}]).encode(),
        json.dumps([SOUND | {"origins": ["mars"]}]).encode(),
        json.dumps([SOUND | {"reason": "two\nlines"}]).encode(),
        json.dumps([SOUND, SOUND]).encode(),
        b"[" + b" " * 70_000 + b"]",
    ],
)
def test_what_the_daemon_did_not_write_bypasses_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"bypass\.json: damaged .*nothing is bypassed"):
        read_bypasses(str(tmp_path))


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(ConfigError, match="nothing is bypassed"):
        read_bypasses(str(tmp_path))


def test_the_audit_is_written_though_the_list_cannot_be(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(OSError, match=os.strerror(21)):
        save(str(tmp_path), (ORDER,), (), [{"event": "one"}])
    assert json.loads((tmp_path / AUDIT).read_text()) == {"event": "one"}


def test_the_audit_does_not_grow_for_ever_and_the_last_orders_stay(tmp_path: Path) -> None:
    reason = "x" * 10_000
    for number in range(250):
        save(str(tmp_path), (), (), [{"event": str(number), "reason": reason}])
    kept = [json.loads(line)["event"] for name in (f"{AUDIT}.1", AUDIT) for line in (tmp_path / name).open()]
    assert kept == [str(number) for number in range(250 - len(kept), 250)]
    assert len(kept) >= 100
    assert {path.name for path in tmp_path.iterdir()} == {FILE, ALLOW_FILE, AUDIT, f"{AUDIT}.1"}
    assert all(path.stat().st_size <= AUDIT_MAX for path in tmp_path.iterdir())


def test_the_audit_follows_no_link(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    (tmp_path / AUDIT).symlink_to(target)
    with pytest.raises(OSError, match=os.strerror(40)):
        save(str(tmp_path), (), (), [{"event": "one"}])
    assert not target.exists()


def test_the_allow_list_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    entry = {"signature": "Win.Bad-1", "owner": "anna", "reason": "r", "created": 1.0, "expires": 100.0}
    (tmp_path / ALLOW_FILE).write_text(json.dumps([entry]))
    assert read_allowed(str(tmp_path)) == (
        AllowEntry(signature="Win.Bad-1", by="anna", reason="r", since=1.0, until=100.0),
    )
    save(str(tmp_path), (), read_allowed(str(tmp_path)), [])
    assert json.loads((tmp_path / ALLOW_FILE).read_text()) == [entry]


def test_a_damaged_file_disables_its_own_kind_only(tmp_path: Path) -> None:
    save(str(tmp_path), (ORDER,), (), [])
    (tmp_path / ALLOW_FILE).write_text("{not json")
    bypasses, allowed, problems = read_usable(str(tmp_path))
    assert (bypasses, allowed) == ((ORDER,), ())
    assert "nothing is allowed" in str(problems[0])


def test_a_save_leaves_the_file_of_the_other_kind(tmp_path: Path) -> None:
    (tmp_path / ALLOW_FILE).write_text("{not json")
    save(str(tmp_path), (ORDER,), None, [])
    assert (tmp_path / ALLOW_FILE).read_text() == "{not json"
    (tmp_path / FILE).write_text("{not json")
    save(str(tmp_path), None, (), [])
    assert (tmp_path / FILE).read_text() == "{not json"


def test_a_lock_that_is_never_released_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overrides, "LOCK_WAIT", 0.1)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="lock"):
            change_allowed(str(tmp_path), lambda old: old, 0.0)
    finally:
        os.close(fd)

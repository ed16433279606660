"""bypass.json: what was saved is read again; whatever is not what the daemon wrote bypasses nothing."""

import json
import os
import stat
from pathlib import Path

import pytest

from contentfilter.errors import ConfigError
from contentfilter.model import OriginKind, Scanner
from contentfilter.policy.bypass import Bypass
from contentfilter.store.bypass import AUDIT, AUDIT_MAX, FILE, read_bypasses, save

ORDER = Bypass(Scanner.CLAMD, 1000.0, 2800.0, 'café \\ "quoted"', "root", (OriginKind.RELAY, OriginKind.LOCAL))
SOUND = {"scanner": "clamd", "since": 0, "until": 600, "reason": "r", "by": "x", "origins": []}


def test_what_was_saved_is_read_again_and_private(tmp_path: Path) -> None:
    save(str(tmp_path), (ORDER,), [{"event": "one"}])
    save(str(tmp_path), (ORDER,), [{"event": "two"}])
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
        save(str(tmp_path), (ORDER,), [{"event": "one"}])
    assert json.loads((tmp_path / AUDIT).read_text()) == {"event": "one"}


def test_the_audit_does_not_grow_for_ever_and_the_last_orders_stay(tmp_path: Path) -> None:
    reason = "x" * 10_000
    for number in range(250):
        save(str(tmp_path), (), [{"event": str(number), "reason": reason}])
    kept = [json.loads(line)["event"] for name in (f"{AUDIT}.1", AUDIT) for line in (tmp_path / name).open()]
    assert kept == [str(number) for number in range(250 - len(kept), 250)]
    assert len(kept) >= 100
    assert {path.name for path in tmp_path.iterdir()} == {FILE, AUDIT, f"{AUDIT}.1"}
    assert all(path.stat().st_size <= AUDIT_MAX for path in tmp_path.iterdir())


def test_the_audit_follows_no_link(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    (tmp_path / AUDIT).symlink_to(target)
    with pytest.raises(OSError, match=os.strerror(40)):
        save(str(tmp_path), (), [{"event": "one"}])
    assert not target.exists()

"""Whether the wall clock may be believed about the age of things."""

from pathlib import Path

import pytest

from contentfilter.supervisor.clock import DAY, believable

HOUR = 3600.0


def test_the_clock_is_believed_from_hour_to_hour_and_after_a_day_off(tmp_path: Path) -> None:
    path, now = tmp_path / "clock", 1e9
    assert all(believable(path, now + hour * HOUR) for hour in range(100))
    assert believable(path, now + 99 * HOUR + DAY)


def test_a_clock_that_jumped_ahead_lets_nothing_go_for_its_age_for_a_day(tmp_path: Path) -> None:
    path, now = tmp_path / "clock", 1e9
    assert believable(path, now)
    ahead = now + 365 * DAY
    assert not any(believable(path, ahead + hour * HOUR) for hour in range(24))
    assert believable(path, ahead + DAY)
    assert believable(path, ahead + DAY + HOUR)


def test_a_clock_that_was_set_right_again_is_believed_at_once(tmp_path: Path) -> None:
    path, now = tmp_path / "clock", 1e9
    assert believable(path, now)
    assert not believable(path, now + 365 * DAY)
    assert not believable(path, now + 800 * DAY), "it jumped once more"
    assert believable(path, now + HOUR)
    assert believable(path, now + 2 * HOUR)


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 1000])
def test_a_damaged_note_of_the_clock_begins_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clock").write_bytes(content)
    assert believable(tmp_path / "clock", 1e9)
    assert not believable(tmp_path / "clock", 2e9)
    assert believable(tmp_path / "nowhere" / "clock", 1e9)

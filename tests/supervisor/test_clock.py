"""Whether the wall clock may be believed about the age of things."""

from pathlib import Path

import pytest

from contentfilter.supervisor.clock import DAY, clock_is_sane

HOUR = 3600.0


def test_the_clock_is_believed_from_hour_to_hour_and_after_a_day_off(tmp_path: Path) -> None:
    path, now = tmp_path / "clock", 1e9
    assert all(clock_is_sane(path, now + hour * HOUR) for hour in range(100))
    assert clock_is_sane(path, now + 99 * HOUR + DAY)


def test_a_clock_that_jumped_ahead_lets_nothing_go_for_its_age_for_a_day(tmp_path: Path) -> None:
    path, now = tmp_path / "clock", 1e9
    assert clock_is_sane(path, now)
    ahead = now + 365 * DAY
    assert not any(clock_is_sane(path, ahead + hour * HOUR) for hour in range(24))
    assert clock_is_sane(path, ahead + DAY)
    assert clock_is_sane(path, ahead + DAY + HOUR)


def test_a_clock_that_was_set_right_again_is_believed_at_once(tmp_path: Path) -> None:
    path, now = tmp_path / "clock", 1e9
    assert clock_is_sane(path, now)
    assert not clock_is_sane(path, now + 365 * DAY)
    assert not clock_is_sane(path, now + 800 * DAY), "it jumped once more"
    assert clock_is_sane(path, now + HOUR)
    assert clock_is_sane(path, now + 2 * HOUR)


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 1000])
def test_a_damaged_note_of_the_clock_begins_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clock").write_bytes(content)
    assert clock_is_sane(tmp_path / "clock", 1e9)
    assert not clock_is_sane(tmp_path / "clock", 2e9)
    assert clock_is_sane(tmp_path / "nowhere" / "clock", 1e9)

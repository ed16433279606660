"""Floors: what is available by the machine and by the cgroup, and what is too little."""

import threading
from pathlib import Path

import pytest

from contentfilter.doors import watermarks
from contentfilter.doors.watermarks import ResourceMonitor, Watermarks, available_memory, exhausted_resource

MEGABYTE = 1 << 20


def system(root: Path, available: int, groups: dict[str, tuple[str, int, int]]) -> Path:
    """A machine with so much available; groups: name -> memory.max, memory.current, page cache in it."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: 99999 kB\nMemAvailable:  {available // 1024} kB\nHugePages_Free: 0\n"
    )
    (root / "proc/self/cgroup").write_text("1:name=systemd:/old\n0::/system.slice/contentfilter.service\n")
    for name, (limit, current, cache) in groups.items():
        directory = root / "sys/fs/cgroup" / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text(limit + "\n")
        (directory / "memory.current").write_text(f"{current}\n")
        (directory / "memory.stat").write_text(f"anon 1\nfile {cache + 1}\nactive_file {cache}\ninactive_file 0\n")
    return root


def test_the_machine_says_what_is_available(tmp_path: Path) -> None:
    root = system(tmp_path, 500 * MEGABYTE, {"system.slice/contentfilter.service": ("max", 1, 0)})
    assert available_memory(root) == 500 * MEGABYTE


@pytest.mark.parametrize("group", ["system.slice/contentfilter.service", "system.slice"])
def test_a_cgroup_may_allow_less_and_page_cache_counts_as_free(tmp_path: Path, group: str) -> None:
    root = system(tmp_path, 500 * MEGABYTE, {group: (str(100 * MEGABYTE), 90 * MEGABYTE, 20 * MEGABYTE)})
    assert available_memory(root) == 30 * MEGABYTE


def test_nothing_to_look_at_is_no_shortage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_memory(tmp_path) is None
    monkeypatch.setattr(watermarks, "available_memory", lambda: None)
    assert exhausted_resource(Watermarks(1 << 60, 1 << 60, str(tmp_path / "missing"))) == ""


def test_this_machine_has_memory_and_disk(tmp_path: Path) -> None:
    assert exhausted_resource(Watermarks(1, 1, str(tmp_path))) == ""
    assert exhausted_resource(Watermarks(1 << 60, 1, str(tmp_path))) == "memory"
    assert exhausted_resource(Watermarks(1, 1 << 60, str(tmp_path))) == "disk"
    assert exhausted_resource(Watermarks(0, 0, str(tmp_path))) == ""


def test_what_was_short_needs_some_more_before_it_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Watermarks(100 * MEGABYTE, 0, str(tmp_path))
    for available, short, expected in (
        (99, "", "memory"),
        (110, "", ""),
        (110, "memory", "memory"),
        (126, "memory", ""),
    ):
        monkeypatch.setattr(watermarks, "available_memory", lambda available=available: available * MEGABYTE)
        assert exhausted_resource(wanted, short) == expected, available


def test_the_lookout_tells_each_change_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watermarks, "EVERY", 0.001)
    disk = [1 << 60]
    reported: list[str] = []
    news = threading.Condition()

    def changed(short: str) -> None:
        with news:
            reported.append(short)
            news.notify_all()

    lookout = ResourceMonitor(lambda: Watermarks(0, disk[0], str(tmp_path)), changed)
    lookout.start()
    with news:
        assert news.wait_for(lambda: reported == ["disk"], 10)
        disk[0] = 1
        assert news.wait_for(lambda: reported == ["disk", ""], 10)
    lookout.stop()
    lookout._thread.join(10)
    assert not lookout._thread.is_alive()

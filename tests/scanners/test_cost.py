"""The signature scan of a hostile message takes time in proportion to its size, and bounded memory."""

import contextlib
import threading
import time
import tracemalloc

import pytest
from lab.calibration import work_unit
from lab.hostile import SHAPES

from contentfilter.errors import BackendError
from contentfilter.scanners.signatures.engine import Engine, default_loadertypes, default_signatures

BOTH = Engine(default_signatures(), default_loadertypes())
WARLORD = Engine(default_signatures(), default_loadertypes(), "compatible")
MEGABYTE = 1_000_000


def cost(engine: Engine, message: bytes, enough: float = 0.0) -> float:
    """CPU time of a scan in work units, the best of three; the first that is below ``enough``."""
    best = float("inf")
    for _ in range(3):
        unit = work_unit()  # now, for other jobs of the machine slow both
        start = time.thread_time()
        with contextlib.suppress(BackendError):  # a limit
            engine.scan(message)
        best = min(best, (time.thread_time() - start) / unit)
        if best < enough:
            break
    return best


@pytest.mark.parametrize("name", SHAPES)
def test_the_cost_grows_with_the_size_and_not_faster(name: str) -> None:
    small, message = cost(BOTH, SHAPES[name](75_000)), SHAPES[name](600_000)
    linear = 20 * small + 2  # 8 times the size; quadratic work would be 64 times
    large = cost(BOTH, message, min(linear, 80))
    assert large < linear
    assert large < 80  # measured: at most 22
    assert cost(WARLORD, message, 30) < 30  # measured: at most 14


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("base64 in base64", 8 * MEGABYTE),
        ("one base64 attachment", 24 * MEGABYTE),
        ("one line of base64", 24 * MEGABYTE),
        ("a long line", 24 * MEGABYTE),
        ("quoted-printable lines", 8 * MEGABYTE),
        ("header lines", 8 * MEGABYTE),
        ("different boundaries", MEGABYTE),
    ],
)
def test_the_memory_does_not_grow_with_the_message(name: str, size: int) -> None:
    """What is decoded is walked two megabytes at a time, and windows are smaller; boundaries are counted."""
    message = SHAPES[name](size)
    tracemalloc.start()
    try:
        with contextlib.suppress(BackendError):
            BOTH.scan(memoryview(message))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * MEGABYTE


@pytest.mark.parametrize("engine", [BOTH, WARLORD], ids=["mime", "compatible"])
@pytest.mark.parametrize("name", ["a long line", "a long header line", "empty lines", "one line of base64", "NULs"])
def test_another_thread_gets_its_turn_while_one_line_is_scanned(name: str, engine: Engine) -> None:
    """No single match runs over the whole message: a match holds the interpreter's lock, and the heartbeat waits."""
    message = SHAPES[name]((96 if engine is BOTH or name != "empty lines" else 2) * MEGABYTE)
    before = threading.active_count()
    seconds = 0.0

    def scan() -> None:
        nonlocal seconds
        with contextlib.suppress(BackendError):
            engine.scan(message)
        seconds = time.thread_time()

    thread = threading.Thread(target=scan)
    turns = 0
    thread.start()
    while thread.is_alive():
        turns += 1
        time.sleep(0.001)
    thread.join()
    assert turns > 20 * seconds  # on a busy machine, too: at least every 50 ms of work
    assert threading.active_count() == before

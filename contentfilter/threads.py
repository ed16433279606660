"""Blocking work off the event loop, in threads that nobody joins: a call that never returns delays no shutdown."""

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(act: Callable[[], T]) -> T:
    """Run ``act`` in a thread that does not delay the end of the process; return or raise its result."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(settled: Callable[[], None]) -> None:
        if not done.done():  # else cancelled: the service ends
            settled()

    def work() -> None:
        try:
            settled = partial(done.set_result, act())
        except Exception as error:
            settled = partial(done.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, settled)

    threading.Thread(target=work, name="housekeeping", daemon=True).start()
    return await done


class DaemonExecutor(Executor):
    """Executor with at most ``limit`` daemon threads, started when needed.

    ``concurrent.futures.ThreadPoolExecutor`` joins its threads at exit; with a hung disk that wait has no end.
    """

    def __init__(self, name: str, limit: int, patience: float = float("inf")) -> None:
        """``patience``: seconds for which all threads may be busy without completing a call; then calls fail fast."""
        self._name, self._limit, self._patience = name, limit, patience
        self._progress = time.monotonic()
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._started = self._running = 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        """As Executor.submit. A call that no thread has begun can be cancelled.

        The future fails with OSError while all threads hang.
        """
        future: Future[T] = Future()
        if self._hangs():
            future.set_exception(OSError(errno.ETIMEDOUT, f"{self._name}: no call has completed for a while"))
            return future
        self._calls.put((future, partial(fn, *args, **kwargs)))
        if self._idle.acquire(blocking=False):
            return future
        with self._lock:
            if self._started < self._limit:
                self._started += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return future

    def _hangs(self) -> bool:
        """True if all threads have calls, and none has completed one within ``patience``."""
        with self._lock:
            if self._running < self._limit:
                return False
        return time.monotonic() - self._progress > self._patience

    def _run(self) -> None:
        while True:
            self._run_next()
            self._idle.release()

    def _run_next(self) -> None:
        """One call; a function of its own, so that an idle thread keeps no reference to the last one."""
        future, call = self._calls.get()
        if not future.set_running_or_notify_cancel():
            return
        with self._lock:
            self._running += 1
            self._progress = time.monotonic()
        try:
            result = call()
        except BaseException as error:  # it is for the caller
            self._completed()
            future.set_exception(error)
        else:
            self._completed()
            future.set_result(result)

    def _completed(self) -> None:
        with self._lock:
            self._running -= 1
            self._progress = time.monotonic()

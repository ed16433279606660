"""Blocking work off the event loop, in threads that nobody joins: a call that never returns delays no shutdown."""

import asyncio
import threading
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

    def __init__(self, name: str, limit: int) -> None:
        self._name, self._limit = name, limit
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._started = 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        """As Executor.submit. A call that no thread has begun can be cancelled."""
        future: Future[T] = Future()
        self._calls.put((future, partial(fn, *args, **kwargs)))
        if self._idle.acquire(blocking=False):
            return future
        with self._lock:
            if self._started < self._limit:
                self._started += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return future

    def _run(self) -> None:
        while True:
            self._run_next()
            self._idle.release()

    def _run_next(self) -> None:
        """One call; a function of its own, so that an idle thread keeps no reference to the last one."""
        future, call = self._calls.get()
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = call()
        except BaseException as error:  # it is for the caller
            future.set_exception(error)
        else:
            future.set_result(result)

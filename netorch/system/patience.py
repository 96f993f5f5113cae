"""Waiting that ends: by an event, at a deadline, or because the person has had enough.

Many probes wait at once, each in a thread of its own, and Ctrl-C reaches only the main one. So
nothing waits for a socket alone: `Patience.wait` also watches an eventfd, which `stop` makes
readable for all of them, and raises Stopped. `Patience.each` starts such threads and outlives them.
"""

import os
import queue
import select
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 100  # at most; a probe has a handful of descriptors, and 1,024 is the usual limit


class Stopped(Exception):
    """The person interrupted; whoever waits cleans up and ends."""


class Patience:
    """Shared by all threads of a run; a context manager."""

    def __init__(self) -> None:
        self._stopped = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._stopped)

    def stop(self) -> None:
        os.eventfd_write(self._stopped, 1)

    def wait(self, until: float, fd: int | None = None, events: int = select.POLLIN) -> bool:
        """Wait for the descriptor; False if `until` (of time.monotonic) came first."""
        poll = select.poll()
        poll.register(self._stopped, select.POLLIN)
        if fd is not None:
            poll.register(fd, events)
        left = max(0.0, until - time.monotonic())
        ready = [found for found, _ in poll.poll(left * 1000)]
        if self._stopped in ready:
            raise Stopped
        return bool(ready)

    def each(self, items: Iterable[T], work: Callable[[T], R]) -> list[R]:
        """`work` on all items side by side; the results in order.

        An interruption stops them all. The first exception is raised when all threads have ended.
        """
        todo = list(enumerate(items))
        left, lock = iter(todo), threading.Lock()
        results: queue.SimpleQueue[tuple[int, R | BaseException]] = queue.SimpleQueue()

        def take() -> None:
            while True:
                with lock:
                    job = next(left, None)
                if job is None:
                    return
                try:
                    results.put((job[0], work(job[1])))
                except BaseException as error:
                    results.put((job[0], error))

        threads = [threading.Thread(target=take) for _ in range(min(len(todo), _THREADS))]
        try:
            for thread in threads:
                thread.start()
            found = dict(results.get() for _ in todo)
        except BaseException:
            self.stop()
            raise
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        return [_result(found[index]) for index, _ in todo]


def _result(found: R | BaseException) -> R:
    if isinstance(found, BaseException):
        raise found
    return found

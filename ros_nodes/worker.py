"""One thread, one job at a time, and of the jobs that wait only the newest."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class NewestFirst(Generic[Job]):
    """Runs jobs in a thread of its own; a job that has not begun makes room for a newer one.

    Args:
        handle: does a job; must not raise.
    """

    def __init__(self, handle: Callable[[Job], None]) -> None:
        self.superseded = 0
        """Jobs that were replaced before they began."""
        self._handle = handle
        self._waiting: Job | None = None
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="planning", daemon=True)
        self._thread.start()

    def offer(self, job: Job) -> None:
        """Leave a job; it begins as soon as the one in progress is done."""
        with self._changed:
            self.superseded += self._waiting is not None
            self._waiting = job
            self._changed.notify()

    def stop(self) -> None:
        """Drop what waits, wait for what is in progress, and end the thread."""
        with self._changed:
            self._stopping = True
            self._waiting = None
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                job, self._waiting = self._waiting, None
            assert job is not None
            self._handle(job)

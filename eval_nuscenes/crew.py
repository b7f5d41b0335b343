"""Jobs shared out over processes, with progress; they stop at once on Ctrl-C, and results come in order."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2
from rich.progress import Progress

from vla_autoprune.errors import VlaError

Job = TypeVar("Job")
Result = TypeVar("Result")
Step = Callable[[], None]
"""A job calls this after each of its steps; it counts, and raises when the work is to stop."""

_REFRESH_S = 0.2


class Crew(contextlib.AbstractContextManager["Crew"]):
    """Some worker processes, or this process alone.

    Args:
        workers: number of processes; 1 works in this one.
        progress: where bars are shown.
    """

    def __init__(self, workers: int, progress: Progress) -> None:
        self._progress = progress
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # Started afresh, not forked: OpenCV's threads do not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._steps, self._stop = context.Value("q", 0), context.Event()
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, (self._steps, self._stop))

    def map(
        self, title: str, work: Callable[[Job, Step], Result], jobs: Sequence[Job], steps_per_job: int
    ) -> Iterator[Result]:
        """Do all jobs.

        Args:
            title: of the progress bar.
            work: what to do; a function at the top of a module, as are the jobs' types.
            jobs: what to do it with.
            steps_per_job: how often each job calls its step.

        Yields:
            Results in the order of the jobs.

        Raises:
            VlaError: a worker process died.
        """
        task = self._progress.add_task(title, total=len(jobs) * steps_per_job)
        if self._pool is None:
            for job in jobs:
                yield work(job, lambda: self._progress.advance(task))
            return
        before = self._steps.value
        with (
            _interrupts_ignored()
        ):  # inherited by the processes that start here, so that only this one answers
            waiting = [self._pool.submit(_work, work, job) for job in jobs]
        waiting.reverse()
        try:
            while waiting:
                done, _ = wait(waiting[-1:], timeout=_REFRESH_S)
                self._progress.update(task, completed=self._steps.value - before)
                if done:
                    yield waiting.pop().result()
        except BrokenProcessPool as error:
            raise VlaError(
                "a worker process died, perhaps for want of memory; use fewer (--workers)"
            ) from error

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._stop.set()
            self._pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """The main process gave up, so the worker does."""


_steps: Any = None
_stop: Any = None


def _start_worker(steps: Any, stop: Any) -> None:
    global _steps, _stop
    _steps, _stop = steps, stop
    cv2.setNumThreads(1)
    main = multiprocessing.parent_process()
    assert main is not None

    def end_with_main() -> None:
        main.join()
        os._exit(1)

    # Without this, workers outlive a main process that was killed.
    threading.Thread(target=end_with_main, daemon=True).start()


def _work(work: Callable[[Job, Step], Result], job: Job) -> Result:
    return work(job, _report)


def _report() -> None:
    if _stop.is_set():
        raise _StoppedError
    with _steps.get_lock():
        _steps.value += 1


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)

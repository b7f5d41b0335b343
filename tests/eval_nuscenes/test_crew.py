import importlib
import io
import os
import signal
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console
from rich.progress import Progress

from eval_nuscenes.crew import Crew
from vla_autoprune.errors import VlaError

# Worker processes import what they do by name, so it has to lie in a module of its own.
CHORES = """
import os, time
from pathlib import Path

def square(job, step):
    time.sleep(0.05 * (3 - job % 4))
    step()
    return job * job

def fail_at_two(job, step):
    if job == 2:
        raise ValueError("two")
    return job

def die(job, step):
    os._exit(9)

def dawdle(job, step):
    for _ in range(2000):
        time.sleep(0.01)
        step()
    Path(__file__).with_name(f"done {job}").touch()
"""


@pytest.fixture
def chores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "chores.py").write_text(CHORES)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("chores")


@pytest.fixture
def progress() -> Progress:
    return Progress(console=Console(file=io.StringIO()))


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_jobs_and_every_step_counts(
    chores: ModuleType, progress: Progress, workers: int
) -> None:
    with Crew(workers, progress) as crew:
        assert list(crew.map("squares", chores.square, range(8), 1)) == [n * n for n in range(8)]
        assert list(crew.map("again", chores.square, range(3), 1)) == [0, 1, 4]
    assert [task.total for task in progress.tasks] == [8, 3]
    assert all(task.completed <= task.total for task in progress.tasks)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_job_reaches_the_caller(chores: ModuleType, progress: Progress, workers: int) -> None:
    with pytest.raises(ValueError, match="two"), Crew(workers, progress) as crew:
        list(crew.map("fails", chores.fail_at_two, range(4), 0))


def test_a_worker_that_dies_is_reported(chores: ModuleType, progress: Progress) -> None:
    with pytest.raises(VlaError, match=r"worker process died.*--workers"), Crew(2, progress) as crew:
        list(crew.map("dies", chores.die, range(2), 0))


def test_leaving_stops_jobs_at_their_next_step(
    chores: ModuleType, progress: Progress, tmp_path: Path
) -> None:
    def interrupt() -> None:
        while not (progress.tasks and progress.tasks[-1].completed):  # before, jobs are still handed out
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), Crew(2, progress) as crew:
        threading.Thread(target=interrupt, daemon=True).start()
        list(crew.map("interrupted", chores.dawdle, range(4), 2000))
    assert not list(tmp_path.glob("done *"))

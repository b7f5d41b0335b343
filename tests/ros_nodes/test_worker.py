from __future__ import annotations

import threading

from ros_nodes.worker import NewestFirst


def test_one_job_at_a_time_and_of_the_waiting_only_the_newest():
    done, begun, go = [], threading.Event(), threading.Event()

    def handle(job: int) -> None:
        begun.set()
        assert go.wait(10)
        done.append(job)

    worker = NewestFirst(handle)
    worker.offer(0)
    assert begun.wait(10)
    for job in (1, 2, 3):
        worker.offer(job)
    begun.clear()
    go.set()
    assert begun.wait(10)
    worker.stop()
    assert done == [0, 3] and worker.superseded == 2


def test_stopping_drops_what_waits_and_finishes_what_runs():
    done, begun, go = [], threading.Event(), threading.Event()

    def handle(job: int) -> None:
        begun.set()
        assert go.wait(10)
        done.append(job)

    worker = NewestFirst(handle)
    worker.offer(0)
    assert begun.wait(10)
    worker.offer(1)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    go.set()
    stopping.join(10)
    assert not stopping.is_alive() and done[0] == 0

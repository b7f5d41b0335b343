"""What this machine can do at best: a large matrix product and a large copy, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from vla_autoprune.errors import BackendError
from vla_autoprune.profiling.document import Ceiling
from vla_autoprune.runtime.backend import Backend

GEMM_SIZE = 1024
COPY_MIB = 64
ROUNDS = 8
TIMEOUT_S = 120

_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def measure_ceiling(backend: Backend, threads: int | None = None) -> Ceiling:
    """The roofline of what a backend runs on.

    On the host in a process of its own, as the threads of numpy's BLAS are fixed when it is loaded. On a
    device the copy is measured through the backend; a backend offers no matrix product of its own, so the
    compute ceiling stays unmeasured.

    Args:
        backend: whose device is meant.
        threads: CPU threads; None takes all cores.

    Returns:
        The best of `ROUNDS`: what disturbs can only slow down.

    Raises:
        BackendError: the process failed; the message has its last words.
    """
    if backend.clock == "device":
        rate = _device_copy(backend)
        return Ceiling(
            bytes_per_s=rate,
            source=f"device copy of {COPY_MIB} MiB on {backend.device}; matrix product not measured",
        )
    return measure_host(threads)


def measure_host(threads: int | None = None) -> Ceiling:
    """The roofline of this machine's CPU; see `measure_ceiling`."""
    count = threads or os.cpu_count() or 1
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(count))}
    command = [sys.executable, "-m", __name__, str(count)]
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except subprocess.SubprocessError as error:
        last = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        raise BackendError(f"measuring the machine's ceilings failed: {' '.join(last)}") from error
    found = json.loads(run.stdout)
    return Ceiling(
        **found,
        source=f"numpy float32 {GEMM_SIZE}³ matrix product and {COPY_MIB} MiB copies, {count} threads, "
        f"best of {ROUNDS}",
    )


def _device_copy(backend: Backend) -> float:
    elements = COPY_MIB * 2**20 // 4
    source, target = (backend.view(backend.allocate(elements, "float32"), (elements, 1)) for _ in range(2))
    program = backend.program([("copy", lambda: backend.move_rows(source, 0, target, 0, elements))])
    best_ms = float("inf")
    for _ in range(ROUNDS):
        program()
        best_ms = min(best_ms, program.times_ms()["copy"])
    return 2 * COPY_MIB * 2**20 / (best_ms / 1e3)


def _best_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _host_copy(threads: int) -> float:
    """Bytes per second of copies in as many threads; numpy lets go of the interpreter while it copies."""
    from concurrent.futures import ThreadPoolExecutor

    part = COPY_MIB * 2**20 // 4 // threads
    pairs = [(np.ones(part, dtype=np.float32), np.empty(part, dtype=np.float32)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best_s(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))
    return 2 * 4 * part * threads / seconds


def _measure_host(threads: int) -> dict[str, float]:
    generator = np.random.default_rng(0)
    left, right = (generator.random((GEMM_SIZE, GEMM_SIZE), dtype=np.float32) for _ in range(2))
    out = np.empty_like(left)
    seconds = _best_s(lambda: np.matmul(left, right, out=out))
    return {"flops_per_s": 2 * GEMM_SIZE**3 / seconds, "bytes_per_s": _host_copy(threads)}


def better(one: Ceiling, other: Ceiling) -> Ceiling:
    """The higher of two measurements of one machine: what disturbs it can only lower them."""
    pairs = ((one.flops_per_s, other.flops_per_s), (one.bytes_per_s, other.bytes_per_s))
    flops, copied = (max((rate for rate in pair if rate is not None), default=None) for pair in pairs)
    return Ceiling(flops_per_s=flops, bytes_per_s=copied, source=f"{one.source}; measured twice")


if __name__ == "__main__":
    print(json.dumps(_measure_host(int(sys.argv[1]))))

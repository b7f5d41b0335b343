"""Many frames, another bucket every frame: memory must not grow, nor answers depend on what came before."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from engines.backends import open_backend
from vla_autoprune.frame import Command, EgoState
from vla_autoprune.runtime.pipeline import Pipeline, Timings
from vla_autoprune.runtime.planner import Planner

FRAMES = 1000
WARM_UP = 60
LARGEST_GROWTH_MIB = 3.0
"""One leaked hidden state per frame of this tiny bundle would be 14 MiB, one leaked image set 280 MiB."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"),
]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_a_thousand_frames_that_switch_buckets_leave_memory_as_it_was(stored_bundle, name):
    """Vision, prefill and one decode step per frame: the other steps of an answer repeat the first."""
    if name == "torch":
        pytest.importorskip("torch")
    backend = open_backend(name, stored_bundle, threads=1)
    prompt = Planner(stored_bundle, backend).prompt
    pipeline = Pipeline(stored_bundle, backend)
    pixels = np.random.default_rng(0).normal(size=(3, *pipeline.pixels.shape)).astype(np.float32)
    prompts = [
        prompt.build(EgoState(speed), command)
        for speed, command in ((3.0, Command.LEFT), (6.0, Command.STRAIGHT), (9.0, Command.RIGHT))
    ]
    buckets = stored_bundle.recipe.buckets
    answers: dict[tuple[int, str], tuple[float, bytes]] = {}
    begin = 0.0
    # Three inputs and five buckets have no common divisor, so every pair comes up.
    turns = zip(range(WARM_UP + FRAMES), itertools.cycle(range(3)), itertools.cycle(buckets), strict=False)
    for number, which, bucket in turns:
        if number == WARM_UP:
            begin = resident_mib()
        pipeline.pixels[:] = pixels[which]
        timings = Timings()
        pipeline.encode(timings)
        ids = prompts[which]
        prefill = pipeline.prefill(ids, len(ids), lambda _, bucket=bucket: bucket, timings)
        logits = pipeline.decode(int(prefill.logits.argmax()), timings)
        answer = (prefill.complexity, logits.tobytes())
        assert answers.setdefault((which, bucket.name), answer) == answer
    growth_mib = resident_mib() - begin
    assert len(answers) == 3 * len(buckets)
    assert growth_mib < LARGEST_GROWTH_MIB, f"{growth_mib:.1f} MiB in {FRAMES} frames"

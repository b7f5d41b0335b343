from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def planner(stored_bundle):
    from engines.onnxruntime import OnnxRuntimeBackend
    from vla_autoprune.runtime.planner import Planner

    return Planner(stored_bundle, OnnxRuntimeBackend(stored_bundle, threads=1))


@pytest.fixture(scope="session")
def small_frames(planner):
    """Synthetic frames of a camera that the model takes without much resizing."""
    from dataclasses import replace

    from vla_autoprune.profiling.measure import synthetic_frames

    return [
        replace(frame, images={name: image[::5, ::5].copy() for name, image in frame.images.items()})
        for frame in synthetic_frames(planner, 2)
    ]


@pytest.fixture(scope="session")
def make_profile(small_frames):
    """From a planner and what to run to its profile; the ceilings are made up."""
    from vla_autoprune.profiling.document import Ceiling
    from vla_autoprune.profiling.measure import Run, profile

    def make(planner, frames=10, buckets=(), **more):
        ceiling = Ceiling(flops_per_s=1e11, bytes_per_s=1e10, source="made up for a test")
        return profile(planner, small_frames, Run(frames, 1, buckets, "test", "noise"), ceiling, **more)

    return make


@pytest.fixture(scope="session")
def tiny_profile(planner, make_profile):
    return make_profile(planner, frames=12)

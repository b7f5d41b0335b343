"""Ray against serial: equal results, and a killed worker costs its batch only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("nuscenes")

from eval_nuscenes.bundle_run import BundleRun, SplitChoice
from eval_nuscenes.evaluation import PlanLog, RunKey, SampleRecord, plan_samples
from eval_nuscenes.nuscenes_writer import dataset_options, write_dataset
from eval_nuscenes.ray_runs import RayRun
from vla_autoprune.bundle import Bundle
from vla_autoprune.errors import InputError, VlaError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle_run(stored_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> BundleRun:
    root = tmp_path_factory.mktemp("data") / "synth"
    options = dataset_options(scenes=1, duration_s=6.0, width=96, height=54, kinds=("lead",))
    write_dataset(root, options, workers=1)
    samples = SplitChoice(root, "v1.0-synth", "all")
    return BundleRun((stored_bundle.path,), samples, budgets=(0.4,), threads=1, warm_up=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One for all tests here: starting Ray takes longer than planning."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def without_timings(records: list[SampleRecord]) -> dict[str, SampleRecord]:
    return {
        record.token: record.model_copy(
            update={
                "plans": {
                    name: plan.model_copy(update={"timings_ms": {}}) for name, plan in record.plans.items()
                }
            }
        )
        for record in records
    }


def test_an_address_where_nothing_listens_is_told_at_once(
    bundle_run: BundleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with (
            pytest.raises(InputError, match=f"no Ray cluster answers at --ray {address} "),
            RayRun(address, 1, bundle_run.open),
        ):
            pass


@pytest.mark.usefixtures("cluster")
def test_two_replicas_plan_what_one_process_plans_though_one_is_killed(
    bundle_run: BundleRun, run_key: RunKey, tmp_path: Path
) -> None:
    opened = bundle_run.open()
    split = opened.split
    log = PlanLog(tmp_path / "serial", run_key)
    serial = list(plan_samples(split, opened.variants, log, opened.cameras, opened.reduction))
    opened.close()
    with RayRun("local", 2, bundle_run.open, warm_up=1, batch=2) as replicas:
        assert "2 Ray replicas on" in replicas.machine
        log = PlanLog(tmp_path / "ray", run_key)
        planning = replicas.plan(split, log)
        first = [next(planning), next(planning)]
        killed = list(replicas._actors)
        ray.kill(killed[0])
        shared = [*first, *planning]
        assert killed[0] not in replicas._actors and killed[1] in replicas._actors
        assert list(replicas.plan(split, log)) == []
    assert sorted(record.token for record in shared) == sorted(split.tokens)
    assert without_timings(shared) == without_timings(serial)
    assert PlanLog(tmp_path / "ray", run_key).records.keys() == set(split.tokens)


@pytest.mark.usefixtures("cluster")
def test_what_a_replica_cannot_read_is_told(bundle_run: BundleRun, run_key: RunKey, tmp_path: Path) -> None:
    split = bundle_run.samples.open()
    victim = split[3].cameras["CAM_FRONT"].path
    whole = victim.read_bytes()
    with RayRun("local", 1, bundle_run.open, warm_up=0, batch=2) as replicas:
        assert replicas.machine
        victim.write_bytes(b"no image")
        with pytest.raises(InputError, match=r"image .* cannot be decoded"):
            list(replicas.plan(split, PlanLog(tmp_path, run_key)))
    victim.write_bytes(whole)
    assert len(PlanLog(tmp_path, run_key).records) == 2


@pytest.mark.usefixtures("cluster")
def test_a_replica_that_cannot_start_is_told(bundle_run: BundleRun) -> None:
    broken = BundleRun((bundle_run.bundles[0] / "absent",), bundle_run.samples)
    with RayRun("local", 1, broken.open) as replicas, pytest.raises(VlaError, match="absent"):
        _ = replicas.machine


@pytest.mark.usefixtures("cluster")
def test_more_replicas_than_processors_are_refused(bundle_run: BundleRun) -> None:
    with (
        pytest.raises(InputError, match=r"--replicas is 5; the Ray cluster has 2 CPUs"),
        RayRun("local", 5, bundle_run.open),
    ):
        pass

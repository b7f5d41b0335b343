from __future__ import annotations

import stat
import time
from types import SimpleNamespace

import pytest

from vla_autoprune.errors import BackendError
from vla_autoprune.profiling import sensors
from vla_autoprune.profiling.document import SensorState
from vla_autoprune.profiling.sensors import (
    HostClocks,
    Nvml,
    Rapl,
    Reading,
    Readings,
    Tegrastats,
    parse_tegrastats,
    watching,
)


@pytest.fixture(scope="module")
def lines(repository):
    folder = repository / "tests" / "data" / "sensors"
    return {path.stem: path.read_text().splitlines() for path in folder.glob("*.txt")}


def test_rails_of_agx_orin_sum_to_its_module(lines):
    busy, idle = map(parse_tegrastats, lines["tegrastats_agx_orin"])
    assert busy.rails_w["VDD_GPU_SOC"] == 24.812 and busy.rails_w["VDDQ_VDD2_1V8AO"] == 2.102
    # VDDQ_VDD2_1V8AO hangs below VIN_SYS_5V0: counting it would count it twice.
    assert busy.total_w == pytest.approx(24.812 + 3.204 + 7.461)
    assert busy.clocks_mhz == {"gpu": 1300, "cpu": 2201} and busy.memory_mib == 9120
    assert busy.temperatures_c["tj"] == 56.312 and busy.temperatures_c["gpu"] == 54.218
    assert idle.total_w == pytest.approx(6.755)
    assert "GPU" not in idle.temperatures_c and idle.temperatures_c["CPU"] == 44.562
    assert set(idle.rails_w) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}


def test_boards_with_a_rail_for_the_whole_take_that(lines):
    (orin_nx,) = map(parse_tegrastats, lines["tegrastats_orin_nx"])
    assert orin_nx.total_w == 12.479 and orin_nx.rails_w["VDD_SOC"] == 2.817
    assert orin_nx.clocks_mhz == {"gpu": 917, "cpu": 1984}
    busy, idle = map(parse_tegrastats, lines["tegrastats_thor"])
    assert busy.total_w == 78.42 and busy.rails_w["VDD_CPU_SOC_MSS"] == 11.762
    assert busy.clocks_mhz == {"gpu": 1575, "cpu": 2601}
    assert idle.rails_w["VDD_GPU"] == -0.392 and idle.total_w == 23.004  # a real offset, not to be hidden
    assert "gpu" not in idle.clocks_mhz and "gpu" not in idle.temperatures_c


def test_a_line_that_is_none_is_refused():
    with pytest.raises(BackendError, match="'permission denied', which is no line"):
        parse_tegrastats("permission denied\n")


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_tegrastats_is_run_and_read(tmp_path, repository):
    recorded = repository / "tests" / "data" / "sensors" / "tegrastats_thor.txt"
    script = f"while read -r line; do echo \"$line\"; sleep 0.02; done < '{recorded}'\nexec sleep 60"
    sensor = Tegrastats(program(tmp_path / "tegrastats", script))
    try:
        until = time.monotonic() + 10
        while sensor.read().total_w != 23.004 and time.monotonic() < until:
            time.sleep(0.01)
        assert sensor.read().total_w == 23.004
    finally:
        sensor.close()
    with pytest.raises(BackendError, match="tegrastats ended"):
        sensor.read()


def test_tegrastats_without_permission_says_so(tmp_path):
    refusing = program(tmp_path / "refusing", "echo 'tegrastats: permission denied' >&2; exit 1")
    with pytest.raises(BackendError, match=r"permission denied.*needs sudo"):
        Tegrastats(refusing)
    locked = tmp_path / "locked"
    locked.write_text("")
    with pytest.raises(BackendError, match="cannot be run"):
        Tegrastats(str(locked))


def zone(root, name, uj, most=10_000_000):
    folder = root / f"intel-rapl:{name}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"package-{name}\n")
    (folder / "energy_uj").write_text(str(uj))
    (folder / "max_energy_range_uj").write_text(str(most))
    return folder / "energy_uj"


def test_rapl_counts_packages_and_goes_round(tmp_path):
    counter = zone(tmp_path, "0", 9_000_000)
    zone(tmp_path, "1", 1_000_000)
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0, which would be counted twice
    rapl = Rapl(tmp_path)
    assert rapl.read().energy_j == 10.0
    counter.write_text("500000")
    assert rapl.read().energy_j == pytest.approx(11.5)


def test_rapl_that_is_absent_or_locked_says_so(tmp_path):
    with pytest.raises(BackendError, match="has no RAPL zone"):
        Rapl(tmp_path)
    zone(tmp_path, "0", 1).unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # reading it fails, for root too
    with pytest.raises(BackendError, match="energy_uj cannot be read"):
        Rapl(tmp_path)


def test_host_clocks_without_any_are_absent(tmp_path):
    with pytest.raises(BackendError, match="neither"):
        HostClocks(tmp_path, tmp_path)
    (tmp_path / "cpu0" / "cpufreq").mkdir(parents=True)
    (tmp_path / "cpu0" / "cpufreq" / "scaling_cur_freq").write_text("2450000\n")
    found = HostClocks(tmp_path, tmp_path, tmp_path).read()
    assert found.clocks_mhz == {"cpu": 2450} and found.throttled is None


def test_throttling_that_the_kernel_counts_is_seen_once(tmp_path):
    cpu, card = tmp_path / "cpu0", tmp_path / "hwmon3"
    for folder in (cpu / "cpufreq", cpu / "thermal_throttle", card):
        folder.mkdir(parents=True)
    (cpu / "cpufreq" / "scaling_cur_freq").write_text("2450000\n")
    hot = cpu / "thermal_throttle" / "package_throttle_count"
    hot.write_text("7\n")
    (card / "oc3_event_cnt").write_text("0\n")
    sensor = HostClocks(tmp_path, tmp_path, tmp_path)
    assert sensor.read().throttled == ()
    hot.write_text("9\n")
    assert sensor.read().throttled == ("too hot",) and sensor.read().throttled == ()
    (card / "oc3_event_cnt").write_text("1\n")
    assert sensor.read().throttled == ("over-current or under-voltage",)


def test_a_clock_of_no_number_is_a_fault_and_not_the_end(tmp_path):
    (tmp_path / "cpu0" / "cpufreq").mkdir(parents=True)
    (tmp_path / "cpu0" / "cpufreq" / "scaling_cur_freq").write_text("<unknown>\n")
    with watching([HostClocks(tmp_path, tmp_path, tmp_path)]) as readings:
        pass
    assert "<unknown>" in readings.faults[HostClocks.name]


def test_only_a_sensor_that_tells_of_throttling_denies_it():
    state = SensorState(sensor="rail", before={}, after={})
    assert state.throttling == "does not tell of throttling"
    assert state.model_copy(update={"throttled": ()}).throttling == "no throttling seen"
    readings = Readings([Steady()])
    readings.of["steady"] = [(0.0, Reading()), (1.0, Reading())]
    assert readings.throttled("steady") is None
    readings.of["steady"].append((2.0, Reading(throttled=("power cap",))))
    assert readings.throttled("steady") == ("power cap",)


@pytest.fixture
def recorded_card(monkeypatch):
    """The real nvidia-ml-py, whose calls into the driver answer what a card once said."""
    pynvml = pytest.importorskip("pynvml")
    reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    said = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetHandleByIndex": "card",
        "nvmlDeviceGetName": "NVIDIA GeForce RTX 4090",
        "nvmlDeviceGetPowerUsage": 312_450,
        "nvmlDeviceGetTotalEnergyConsumption": 1_234_567_890,
        "nvmlDeviceGetTemperature": 61,
        "nvmlDeviceGetClockInfo": 2_610,
        "nvmlDeviceGetCurrentClocksEventReasons": reasons,
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3 * 2**30),
    }
    for name, value in said.items():
        monkeypatch.setattr(pynvml, name, lambda *_, value=value: value)
    return pynvml


def test_nvml_is_read_through_its_own_names(recorded_card):
    sensor = Nvml()
    found = sensor.read()
    assert sensor.name == "NVML NVIDIA GeForce RTX 4090"
    assert found.total_w == 312.45 and found.energy_j == 1_234_567.89
    assert found.temperatures_c == {"gpu": 61} and found.clocks_mhz == {"sm": 2610, "memory": 2610}
    assert found.throttled == ("power cap",) and found.memory_mib == 3072
    assert all(hasattr(recorded_card, name) for name in sensors.NVML_REASONS)


def test_what_a_card_does_not_support_is_left_out(recorded_card, monkeypatch):
    def refuse(*_):
        raise recorded_card.NVMLError(recorded_card.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(recorded_card, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    assert Nvml().read().energy_j is None and Nvml().read().total_w == 312.45

    def lost(*_):
        raise recorded_card.NVMLError(recorded_card.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(recorded_card, "nvmlDeviceGetPowerUsage", lost)
    with pytest.raises(BackendError, match=r"stopped answering: .*lost"):
        Nvml().read()


class Steady:
    name = "steady"

    def __init__(self, *readings):
        self._readings = list(readings)

    def read(self):
        if not self._readings:
            raise BackendError("gone")
        return self._readings.pop(0) if len(self._readings) > 1 else self._readings[0]

    def close(self):
        pass


def test_energy_is_the_integral_of_power_or_the_difference_of_a_counter():
    readings = Readings([Steady()])
    for at, watts in ((0.0, 10.0), (1.0, 20.0), (3.0, 20.0)):
        readings.of["steady"].append((at, Reading(total_w=watts, rails_w={"a": watts})))
    assert readings.energy("steady") == (55.0, 3.0)
    assert readings.mean_rails_w("steady") == {"a": pytest.approx(50 / 3)}
    readings.of["steady"] = [(0.0, Reading(energy_j=5.0)), (2.0, Reading(energy_j=9.0))]
    assert readings.energy("steady") == (4.0, 2.0)
    readings.of["steady"] = [(0.0, Reading()), (2.0, Reading())]
    assert readings.energy("steady") is None


def test_a_sensor_that_stops_is_named_and_spoils_nothing():
    with watching([Steady()]) as readings:
        pass
    assert readings.faults == {"steady": "gone"} and readings.energy("steady") is None


def test_energy_of_a_plan_is_in_the_profile(planner, make_profile, monkeypatch):
    pytest.importorskip("onnxruntime")
    from vla_autoprune.profiling import measure

    monkeypatch.setattr(measure, "ENERGY_SECONDS", 0.2)
    monkeypatch.setattr(measure, "IDLE_SECONDS", 0.1)
    sensor = Steady(Reading(total_w=30.0, rails_w={"VIN": 30.0}, throttled=("power cap",)))
    found = make_profile(planner, frames=2, buckets=("full",), sensors=[sensor])
    (energy,) = found.buckets[0].energy
    assert energy.mean_w == pytest.approx(30.0) and energy.rails_w == {"VIN": pytest.approx(30.0)}
    assert energy.per_plan_j == pytest.approx(30.0 * energy.seconds / energy.plans)
    assert energy.above_idle_j == pytest.approx(0.0, abs=1e-6)
    assert found.sensors[0].throttled == ("power cap",)

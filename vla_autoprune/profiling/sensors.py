"""Power, clocks and temperature: NVML on NVIDIA cards, tegrastats on a Jetson, RAPL and sysfs on a CPU.

A sensor that is absent or may not be read is named with its reason; nothing is guessed in its place.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vla_autoprune.errors import BackendError

POWERCAP = Path("/sys/class/powercap")
CPUFREQ = Path("/sys/devices/system/cpu")
THERMAL = Path("/sys/class/thermal")
HWMON = Path("/sys/class/hwmon")

INTERVAL_S = 0.05
TEGRASTATS_INTERVAL_MS = 100
FIRST_LINE_S = 5.0

TOTAL_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")
"""Rails that carry the whole board or module: Thor, Orin NX and Nano, the first Nano."""

SUMMED_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
"""AGX Orin has no such rail; these three feed its module, and VDDQ_VDD2_1V8AO hangs below the last."""

_UNPOWERED_C = -256.0
"""What tegrastats writes for a part that is switched off."""

_RAIL = re.compile(r"\b((?:VDD|VIN|POM|CV)\w*) (-?\d+)(?:mW)?/(-?\d+)(?:mW)?")
_TEMPERATURE = re.compile(r"\b(\w+)@(-?\d+(?:\.\d+)?)C\b")
_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
_GPU_CLOCK = re.compile(r"\bGR3D_FREQ (?:\d+%)?@\[?(\d+)")
_CPU = re.compile(r"\bCPU \[([^\]]*)\]")

NVML_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonHwThermalSlowdown": "hardware thermal slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "software thermal slowdown",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}
"""Reasons that slow a card down; idling and application clocks are none."""


@dataclass(frozen=True)
class Reading:
    """What a sensor says at a moment.

    Attributes:
        rails_w: power of each rail.
        total_w: of what the sensor covers; None where it only counts energy, or nothing.
        energy_j: a counter that only rises; None where there is none.
        throttled: what slows the device down, empty for nothing; None where the sensor does not tell.
        memory_mib: used device memory.
    """

    rails_w: Mapping[str, float] = field(default_factory=dict)
    total_w: float | None = None
    energy_j: float | None = None
    temperatures_c: Mapping[str, float] = field(default_factory=dict)
    clocks_mhz: Mapping[str, float] = field(default_factory=dict)
    throttled: tuple[str, ...] | None = None
    memory_mib: float | None = None

    def flat(self) -> dict[str, float | str]:
        """Everything but the rails, by name and unit, for a report."""
        found: dict[str, float | str] = {f"{name} °C": value for name, value in self.temperatures_c.items()}
        found.update({f"{name} MHz": value for name, value in self.clocks_mhz.items()})
        if self.total_w is not None:
            found["W"] = round(self.total_w, 3)
        if self.memory_mib is not None:
            found["memory MiB"] = round(self.memory_mib, 1)
        return found


class Sensor(Protocol):
    """Something that can be read again and again."""

    name: str

    def read(self) -> Reading:
        """What it says now.

        Raises:
            BackendError: it has stopped saying anything.
        """
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Nvml:
    """An NVIDIA card through NVML.

    Args:
        index: of the card.

    Raises:
        BackendError: nvidia-ml-py, the driver or the card is absent.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            import pynvml
        except ModuleNotFoundError as error:
            way_out = "pip install 'vla_autoprune[profile]'"
            raise BackendError(f"nvidia-ml-py is not installed; {way_out}") from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._card = pynvml.nvmlDeviceGetHandleByIndex(index)
            self.name = f"NVML {_text(pynvml.nvmlDeviceGetName(self._card))}"
        except pynvml.NVMLError as error:
            raise BackendError(f"NVML: {error}") from error

    def read(self) -> Reading:
        """Power, energy counter, temperature, clocks, memory and throttling, as far as the card has them."""
        nvml, card = self._nvml, self._card
        milliwatts = self._asked(nvml.nvmlDeviceGetPowerUsage, card)
        millijoules = self._asked(nvml.nvmlDeviceGetTotalEnergyConsumption, card)
        celsius = self._asked(nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU)
        clocks = {
            "sm": self._asked(nvml.nvmlDeviceGetClockInfo, card, nvml.NVML_CLOCK_SM),
            "memory": self._asked(nvml.nvmlDeviceGetClockInfo, card, nvml.NVML_CLOCK_MEM),
        }
        reasons = self._asked(nvml.nvmlDeviceGetCurrentClocksEventReasons, card) or 0
        memory = self._asked(nvml.nvmlDeviceGetMemoryInfo, card)
        watts = None if milliwatts is None else milliwatts / 1e3
        return Reading(
            rails_w={} if watts is None else {"board": watts},
            total_w=watts,
            energy_j=None if millijoules is None else millijoules / 1e3,
            temperatures_c={} if celsius is None else {"gpu": float(celsius)},
            clocks_mhz={name: float(value) for name, value in clocks.items() if value is not None},
            throttled=tuple(why for name, why in NVML_REASONS.items() if reasons & getattr(nvml, name)),
            memory_mib=None if memory is None else memory.used / 2**20,
        )

    def close(self) -> None:
        """Let go of the driver."""
        self._nvml.nvmlShutdown()

    def _asked(self, ask: Any, *what: Any) -> Any:
        """An answer, None from a card that does not support the question."""
        try:
            return ask(*what)
        except self._nvml.NVMLError_NotSupported:
            return None
        except self._nvml.NVMLError as error:
            raise BackendError(f"{self.name} stopped answering: {error}") from error


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def parse_tegrastats(line: str) -> Reading:
    """One line of `tegrastats`, of any JetPack that writes rails in milliwatts.

    Args:
        line: as it is printed; each rail has power now and its mean, of which the first is taken.

    Returns:
        Rails in watts with their total (one rail on Thor, Orin NX and Nano, a sum on AGX Orin), temperatures
        of parts that are switched on, clocks, used memory.

    Raises:
        BackendError: it is no such line.
    """
    ram = _RAM.search(line)
    if ram is None:
        raise BackendError(f"tegrastats says {line.strip()[:100]!r}, which is no line of its statistics")
    rails = {name: int(now) / 1e3 for name, now, _ in _RAIL.findall(line)}
    total = next((rails[name] for name in TOTAL_RAILS if name in rails), None)
    if total is None and all(name in rails for name in SUMMED_RAILS):
        total = sum(rails[name] for name in SUMMED_RAILS)
    temperatures = {name: float(value) for name, value in _TEMPERATURE.findall(line)}
    clocks = {}
    gpu, cpu = _GPU_CLOCK.search(line), _CPU.search(line)
    if gpu:
        clocks["gpu"] = float(gpu[1])
    cores = [float(value) for value in re.findall(r"%@(\d+)", cpu[1])] if cpu else []
    if cores:
        clocks["cpu"] = max(cores)
    return Reading(
        rails_w=rails,
        total_w=total,
        temperatures_c={name: value for name, value in temperatures.items() if value != _UNPOWERED_C},
        clocks_mhz=clocks,
        memory_mib=float(ram[1]),
    )


class Tegrastats:
    """A Jetson through its own program, which prints a line per interval.

    Args:
        program: where it is; None looks for it.

    Raises:
        BackendError: it is not there, may not be run, or prints nothing that can be read.
    """

    name = "tegrastats"

    def __init__(self, program: str | None = None) -> None:
        found = program or shutil.which("tegrastats")
        if found is None:
            raise BackendError("tegrastats is not on the PATH; it comes with JetPack")
        try:
            self._process = subprocess.Popen(
                [found, "--interval", str(TEGRASTATS_INTERVAL_MS)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        except OSError as error:
            raise BackendError(f"{found} cannot be run ({error.strerror}); try with sudo") from error
        self._last: Reading | None = None
        self._fault = "printed nothing"
        self._arrived = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        self._arrived.wait(FIRST_LINE_S)
        if self._last is None:
            self.close()
            raise BackendError(f"{found}: {self._fault}; without permission it needs sudo")

    def read(self) -> Reading:
        """The last line."""
        if self._last is None or self._process.poll() is not None:
            raise BackendError(f"tegrastats ended with {self._process.poll()}: {self._fault}")
        return self._last

    def close(self) -> None:
        """End the program."""
        self._process.terminate()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._last = parse_tegrastats(line)
            except BackendError as error:
                self._fault = str(error)
            self._arrived.set()
        self._arrived.set()


class Rapl:
    """A processor's own energy counters, one per package.

    Args:
        root: where the kernel shows them.

    Raises:
        BackendError: there are none, or they may not be read.
    """

    name = "RAPL"

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = [path for path in sorted(root.glob("*-rapl:*")) if path.name.count(":") == 1]
        if not zones:
            raise BackendError(f"{root} has no RAPL zone; the processor or the virtual machine shows none")
        self._zones = zones
        self._seen: dict[Path, int] = {}
        self._wrapped_uj = dict.fromkeys(zones, 0)
        try:
            self._names = {zone: (zone / "name").read_text().strip() for zone in zones}
            self._range_uj = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in zones}
            self.read()
        except OSError as error:
            raise BackendError(
                f"{error.filename} cannot be read ({error.strerror}); it needs root, or sudo chmod a+r on it"
            ) from error

    def read(self) -> Reading:
        """Joules since some time before; the counters go round, which is made good."""
        total = 0
        for zone in self._zones:
            now = int((zone / "energy_uj").read_text())
            if now < self._seen.get(zone, 0):
                self._wrapped_uj[zone] += self._range_uj[zone]
            self._seen[zone] = now
            total += now + self._wrapped_uj[zone]
        return Reading(energy_j=total / 1e6)

    def close(self) -> None:
        """Nothing is held."""


class HostClocks:
    """Clocks and temperatures of the CPU from sysfs, and what it counts of throttling; no power.

    Args:
        cpufreq: holds clocks, and on x86 how often a core or package was too hot.
        thermal: holds temperatures.
        hwmon: holds, on a Jetson, how often over-current or under-voltage slowed it down.

    Raises:
        BackendError: the kernel shows neither clocks nor temperatures.
    """

    name = "CPU clocks and temperatures"

    def __init__(self, cpufreq: Path = CPUFREQ, thermal: Path = THERMAL, hwmon: Path = HWMON) -> None:
        self._clocks = sorted(cpufreq.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._zones = sorted(thermal.glob("thermal_zone*/temp"))
        if not self._clocks and not self._zones:
            raise BackendError(f"neither {cpufreq}/cpu*/cpufreq nor {thermal}/thermal_zone* is there")
        self._counters = {
            "too hot": sorted(cpufreq.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")),
            "over-current or under-voltage": sorted(hwmon.glob("hwmon*/oc*_event_cnt")),
        }
        self._counted = self._count()

    def read(self) -> Reading:
        """The fastest core's clock, every zone's temperature, and what has throttled since the last time."""
        kilohertz = [int(path.read_text()) for path in self._clocks]
        temperatures = {}
        for path in self._zones:
            try:
                temperatures[(path.parent / "type").read_text().strip()] = int(path.read_text()) / 1e3
            except OSError:  # a zone whose part is switched off refuses
                continue
        before, self._counted = self._counted, self._count()
        throttled = tuple(why for why, count in self._counted.items() if count > before[why])
        return Reading(
            temperatures_c=temperatures,
            clocks_mhz={"cpu": max(kilohertz) / 1e3} if kilohertz else {},
            throttled=throttled if self._counted else None,
        )

    def _count(self) -> dict[str, int]:
        return {
            why: sum(int(path.read_text()) for path in paths)
            for why, paths in self._counters.items()
            if paths
        }

    def close(self) -> None:
        """Nothing is held."""


_FAULTS = (BackendError, OSError, ValueError)
"""What a sensor may raise; sysfs writes "<unknown>" where a number is expected."""

KINDS = {"NVML": Nvml, "tegrastats": Tegrastats, "RAPL": Rapl, "CPU clocks": HostClocks}


def find_sensors() -> tuple[list[Sensor], dict[str, str]]:
    """Every sensor of this machine.

    Returns:
        Those that can be read, and for the others why not.
    """
    found: list[Sensor] = []
    absent: dict[str, str] = {}
    for name, kind in KINDS.items():
        try:
            found.append(kind())
        except _FAULTS as error:
            absent[name] = str(error)
    return found, absent


class Readings:
    """What sensors said over a time.

    Args:
        sensors: read in a thread of their own until the `with` block of `watching` ends.
    """

    def __init__(self, sensors: Sequence[Sensor]) -> None:
        self.sensors = sensors
        self.of: dict[str, list[tuple[float, Reading]]] = {sensor.name: [] for sensor in sensors}
        self.faults: dict[str, str] = {}

    def read_all(self) -> None:
        """Read every sensor once; one that stops answering is noted and asked no more."""
        for sensor in self.sensors:
            if sensor.name in self.faults:
                continue
            try:
                self.of[sensor.name].append((time.perf_counter(), sensor.read()))
            except _FAULTS as error:
                self.faults[sensor.name] = str(error)

    def energy(self, sensor: str) -> tuple[float, float] | None:
        """Joules and seconds between the first and the last reading; None where the sensor tells no power."""
        rows = self.of[sensor]
        if len(rows) < 2:
            return None
        (begin, first), (end, last) = rows[0], rows[-1]
        if first.energy_j is not None and last.energy_j is not None:
            return last.energy_j - first.energy_j, end - begin
        joules = 0.0
        for (t0, one), (t1, two) in itertools.pairwise(rows):
            if one.total_w is None or two.total_w is None:
                return None
            joules += (one.total_w + two.total_w) / 2 * (t1 - t0)
        return joules, end - begin

    def mean_rails_w(self, sensor: str) -> dict[str, float]:
        """Mean power of each rail."""
        rows = [reading.rails_w for _, reading in self.of[sensor]]
        return {
            name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in (rows[0] if rows else {})
        }

    def throttled(self, sensor: str) -> tuple[str, ...] | None:
        """Everything that slowed the device down meanwhile; None where the sensor does not tell."""
        told = [reading.throttled for _, reading in self.of[sensor] if reading.throttled is not None]
        return tuple(sorted({why for each in told for why in each})) if told else None


@contextmanager
def watching(sensors: Sequence[Sensor]) -> Iterator[Readings]:
    """Read sensors all the while, first and last thing included."""
    readings = Readings(sensors)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL_S):
            readings.read_all()

    readings.read_all()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        stop.set()
        thread.join()
        readings.read_all()

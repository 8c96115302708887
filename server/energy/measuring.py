"""Reads the counters while a run goes on, and keeps `energy.json` as fresh as its last round."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from server.energy.settings import EnergySettings
from server.energy.sources import POWERCAP, NotReadable, Nvml, ProcessorTime, Rapl, Source, gpu_uuid
from server.records.energy import ENERGY_FILE, EnergyPart, EnergyRecord, EnergySession
from server.rounds.observer import Observer
from server.store.checkpoint import Checkpoint
from shared.files.atomic import write_json
from shared.files.json_files import read_if_there

# RAPL's counters begin anew after 262 kJ on many machines: at 500 W after nine minutes.
_SECONDS_BETWEEN_READINGS = 20.0


class Meter:
    """The counters of this machine from now on; a thread reads them so often that none runs over unseen.

    Args:
        settings: see there.
        gpu: whether training may use one.
        powercap: where Linux shows RAPL.
    """

    def __init__(self, settings: EnergySettings, *, gpu: bool, powercap: Path = POWERCAP) -> None:
        self._started, self._clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        self._not_counted: list[str] = []
        self._sources: dict[Source, float] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        try:
            self._sources[Rapl(powercap)] = 0.0
        except NotReadable as reason:
            self._sources[ProcessorTime(settings.cpu_watts)] = 0.0
            self._not_counted.append(f"what RAPL would measure of the processors: {reason}")
        if gpu and (uuid := gpu_uuid()) is not None:
            try:
                self._sources[Nvml(uuid)] = 0.0
            except NotReadable as reason:
                self._not_counted.append(f"the GPU: {reason}")
        self._thread = threading.Thread(target=self._work, name="energy", daemon=True)
        self._thread.start()

    def read(self) -> EnergySession:
        """Return what was drawn so far."""
        with self._lock:
            for source in self._sources:
                try:
                    self._sources[source] = source.joules()
                except NotReadable as reason:
                    text = f"{source.of}, from {time.monotonic() - self._clock:.0f} s on: {reason}"
                    if not any(known.startswith(f"{source.of}, from") for known in self._not_counted):
                        self._not_counted.append(text)
            parts = tuple(
                EnergyPart(of=one.of, joules=joules, measured=one.measured, method=one.method, error=one.error)
                for one, joules in self._sources.items()
            )
            return EnergySession(
                started=self._started,
                seconds=time.monotonic() - self._clock,
                parts=parts,
                not_counted=tuple(self._not_counted),
            )

    def close(self) -> None:
        """End the thread."""
        self._ended.set()

    def _work(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_READINGS):
            self.read()


class EnergyObserver(Observer):
    """Counts the energy of one training from when it is made; see `Observer`.

    Args:
        folder: the run folder.
        gpu: whether training may use one.
    """

    def __init__(self, folder: Path, settings: EnergySettings, *, gpu: bool) -> None:
        self._folder, self._settings = folder, settings
        self._meter = Meter(settings, gpu=gpu)
        self._before: tuple[EnergySession, ...] | None = None

    def round_done(self, checkpoint: Checkpoint) -> None:
        """See `Observer`."""
        self._write()

    def ended(self, checkpoint: Checkpoint, *, complete: bool) -> None:
        """See `Observer`."""
        self._write()
        self.close()

    def close(self) -> None:
        """End counting, whatever became of the training."""
        self._meter.close()

    def _write(self) -> None:
        path = self._folder / ENERGY_FILE
        if self._before is None:
            found = read_if_there(path, EnergyRecord)
            self._before = found.sessions if found else ()
        record = EnergyRecord(
            sessions=(*self._before, self._meter.read()),
            price_per_kwh=self._settings.price_per_kwh,
            price_per_hour=self._settings.price_per_hour,
        )
        write_json(path, record)

"""Is a worker alive, and how much does it do: a watch for hangs, and a count of rows. No process is touched here."""

import contextlib

import psutil

from fallow.engine.settings import EngineSettings

CHECK_INTERVAL_S = 0.5
RATE_WINDOW_S = 5.0


class Watch:
    """Tells a worker that hangs from one that computes or waits for a processor."""

    def __init__(self, settings: EngineSettings, process_id: int | None) -> None:
        self._settings = settings
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._process = None if process_id is None else psutil.Process(process_id)
        self._heard_s = 0.0
        self._active_s = 0.0
        self._processor_s = -1.0

    def begin(self, now_s: float) -> None:
        """Something was heard, or an answer is owed from now on."""
        self._heard_s = self._active_s = now_s

    def verdict(self, now_s: float) -> str | None:
        """Why the worker must be given up, or `None`."""
        silent_s = now_s - self._heard_s
        if silent_s >= self._settings.silence_timeout_s:
            return f"the engine's worker process gave no answer for {silent_s:.0f} s"
        if silent_s < CHECK_INTERVAL_S:
            return None
        if self._is_active():
            self._active_s = now_s
        idle_s = now_s - self._active_s
        return f"the engine's worker process hangs: idle for {idle_s:.1f} s" if self._gives_up(idle_s) else None

    def _gives_up(self, idle_s: float) -> bool:
        return idle_s >= self._settings.hang_timeout_s

    def _is_active(self) -> bool:
        if self._process is None:
            return False
        try:
            with self._process.oneshot():
                times, status = self._process.cpu_times(), self._process.status()
        except psutil.Error:
            return False
        used_s = times.user + times.system
        advanced, self._processor_s = used_s > self._processor_s, used_s
        return advanced or status in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)


class Rate:
    """Rows per second over the last `RATE_WINDOW_S`, in two halves."""

    def __init__(self) -> None:
        self._started_s = 0.0
        self._now = 0
        self._before = 0

    def add(self, rows: int, now_s: float) -> None:
        self._roll(now_s)
        self._now += rows

    def per_s(self, now_s: float) -> float:
        self._roll(now_s)
        return (self._before + self._now) / (RATE_WINDOW_S + now_s - self._started_s)

    def _roll(self, now_s: float) -> None:
        elapsed_s = now_s - self._started_s
        if elapsed_s >= RATE_WINDOW_S:
            self._before = self._now if elapsed_s < 2 * RATE_WINDOW_S else 0
            self._now = 0
            self._started_s = now_s

"""Processes that score tracks beside the one that separates them."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

from stemserve.evaluation.metrics import BSS_METRICS, FILTER_TAPS

# BLAS with threads of its own in every process would fight for the cores, and its sums would
# depend on their number.
_ONE_THREAD: Final = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@contextlib.contextmanager
def scoring_processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of fresh processes (gRPC's threads forbid a fork); none outlives the block."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_start)
    with _environment(_ONE_THREAD):
        try:
            yield pool
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def default_jobs(metrics: Sequence[str], track_bytes: int) -> int:
    """Return how many tracks are scored at once: one per core, as far as memory goes.

    Args:
        metrics: that are computed.
        track_bytes: of the largest track, see :func:`scoring_bytes`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = max(1, cores or 1)
    available = _available_bytes()
    if available is not None and any(metric in BSS_METRICS for metric in metrics):
        jobs = min(jobs, max(1, available // track_bytes))
    return jobs


def scoring_bytes(frames: int, channels: int, stems: int) -> int:
    """Return about how much memory museval takes for a track.

    Its parts are the interpreter, five copies of the system of equations for the distortion
    filters, and the sources with their spectra in double precision. Within 11 % of what was
    measured for 2 and 4 stereo stems of 1 minute, and 4 of 30 s and 4 minutes (4.9 GB).
    """
    sources = max(2, stems) * channels
    spectrum = 1 << math.ceil(math.log2(frames + FILTER_TAPS))
    equations = 8 * (sources * FILTER_TAPS) ** 2
    return (
        150_000_000
        + 5 * equations
        + sources * (16 * spectrum + 12 * frames)
        + channels * 24 * spectrum
    )


def _available_bytes() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def _start() -> None:
    """Prepare a process: the one that separates decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

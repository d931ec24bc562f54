"""Times several contenders against each other in one process.

Contenders take turns, one sample each per round, so that drift of the machine (clock, other processes, temperature)
hits all alike. Ratios are formed round by round and their median is reported. A sample is as many calls as fill half a
millisecond, after one call that is not timed: it finds the caches as the neighbour left them, and what it pays for that
says something of the neighbour. Page faults and interruptions by other processes are counted: where fresh memory or a
busy machine is measured, that is said.
"""

import ctypes
import gc
import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE_SECONDS = 5e-4
WARM_UPS = 10
LEAST_ROUNDS = 5  # also of contenders so slow that the time limit ends the measurement early

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Contender:
    name: str
    call: Callable[[], Any]
    prepare: Callable[[], Any] | None = None  # before each sample, outside the measured time


@dataclass(frozen=True)
class Times:
    """Seconds per call, ``samples[contender][round]``, and the calls in each sample."""

    samples: dict[str, list[float]]
    calls: dict[str, int]
    faults: dict[str, float]  # page faults per call, the median of the rounds
    interruptions: dict[str, float]  # how often per call another process took a core away, likewise

    def rounds(self) -> int:
        return len(next(iter(self.samples.values())))

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def spread(self, name: str) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        tenths = statistics.quantiles(self.samples[name], n=10, method="inclusive")
        return tenths[0], tenths[-1]

    def ratio(self, over: str, under: str) -> float:
        """Median over the rounds of time(over) / time(under)."""
        return statistics.median(self._ratios(over, under))

    def ratio_interval(self, over: str, under: str, level: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
        """Where that median lies with this confidence: the middle of the medians of bootstrap samples of the rounds."""
        ratios, draw = self._ratios(over, under), random.Random(0)
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
        outside = round(resamples * (1 - level) / 2)
        return medians[outside], medians[-1 - outside]

    def _ratios(self, over: str, under: str) -> list[float]:
        return [a / b for a, b in zip(self.samples[over], self.samples[under], strict=True)]


def measure(contenders: Sequence[Contender], device: str, *, rounds: int, seconds: float) -> Times:
    """``rounds`` rounds, fewer (at least five) only where that takes longer than ``seconds`` per contender."""
    clock = _cuda_seconds if device == "cuda" else _cpu_seconds
    calls = {one.name: _warm_up(one, clock, seconds) for one in contenders}
    samples: dict[str, list[float]] = {one.name: [] for one in contenders}
    faults: dict[str, list[float]] = {one.name: [] for one in contenders}
    interruptions: dict[str, list[float]] = {one.name: [] for one in contenders}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds * len(contenders)
        for number in range(rounds):
            if number >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            start = number % len(contenders)  # nobody always runs behind the same neighbour
            for one in (*contenders[start:], *contenders[:start]):
                if one.prepare:
                    one.prepare()
                clock(one.call, 1)  # after it the caches hold what this contender works on, as far as they can
                before = resource.getrusage(resource.RUSAGE_SELF)
                samples[one.name].append(clock(one.call, calls[one.name]) / calls[one.name])
                after = resource.getrusage(resource.RUSAGE_SELF)
                faults[one.name].append((after.ru_minflt - before.ru_minflt) / calls[one.name])
                interruptions[one.name].append((after.ru_nivcsw - before.ru_nivcsw) / calls[one.name])
    finally:
        gc.enable()
    return Times(samples, calls, _medians(faults), _medians(interruptions))


def _medians(counts: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in counts.items()}


def _warm_up(one: Contender, clock: Callable[[Callable[[], Any], int], float], seconds: float) -> int:
    """Warms up (the heap first grows for some rounds) and returns how many calls make a sample."""
    if one.prepare:
        one.prepare()
    clock(one.call, 1)  # compilation, first allocations
    fastest, end = math.inf, time.perf_counter() + seconds
    for number in range(WARM_UPS):
        if number >= 2 and time.perf_counter() > end:
            break
        fastest = min(fastest, clock(one.call, 1))
    calls = max(1, min(1000, round(SAMPLE_SECONDS / fastest)))
    clock(one.call, calls)
    return calls


def _cpu_seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], Any], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def keep_freed_memory() -> None:
    """Raises malloc's thresholds for everything in this process alike.

    Otherwise glibc gives large blocks back to the system each time, and every result pays page faults for fresh memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**30)):
        print("warning: malloc's thresholds could not be raised; large results pay page faults, whoever makes them")

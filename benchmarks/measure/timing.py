"""Times of functions that take turns: machines drift by more than the differences of interest."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

try:
    import resource
except ImportError:  # Windows counts no page faults
    resource = None  # type: ignore[assignment]

#: Bytes written between two calls on a GPU: several times any L2 cache, so that a call finds nothing in it.
FLUSHED = 1 << 28
#: Fewer rounds have no quartiles.
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Sample:
    """What one call took, averaged over the calls of a sample.

    Attributes:
        seconds: by the clock, or by the GPU's own events where they were asked for.
        cpu_seconds: of this process, all threads, kernel included.
        faults: page faults served without disk (minor).
    """

    seconds: float
    cpu_seconds: float
    faults: float


def interleave(
    sides: Sequence[Callable[[], object]],
    rounds: int,
    calls: Sequence[int],
    *,
    sample: Callable[[Callable[[], object], int], Sample] | None = None,
    progress: Callable[[], object] | None = None,
    until: float = math.inf,
) -> list[list[Sample]]:
    """Sample functions in turn, round by round; each round begins one further on, and every second runs backwards.

    Args:
        sides: what to call.
        rounds: samples of each.
        calls: how often a sample calls its function, for each side.
        sample: takes one sample; by the clock when None.
        progress: called after every round.
        until: when, by `time.monotonic`, the rounds that there are have to do; `LEAST_ROUNDS` are taken at least.

    Returns:
        The samples of each side, by round.
    """
    take = sample or sample_by_clock
    found: list[list[Sample]] = [[] for _ in sides]
    order = list(range(len(sides)))
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.monotonic() > until:
                break
            start = (turn // 2) % max(1, len(order))
            turned = order[start:] + order[:start]
            for side in turned if turn % 2 == 0 else reversed(turned):
                found[side].append(take(sides[side], calls[side]))
            gc.collect()
            if progress is not None:
                progress()
    finally:
        if collecting:
            gc.enable()
    return found


def calls_per_sample(seconds: float, shortest_sample_s: float = 0.02) -> int:
    """How often a function that takes `seconds` is called so that the sample lasts about that long."""
    return max(1, min(1000, round(shortest_sample_s / max(seconds, 1e-7))))


def sample_by_clock(function: Callable[[], object], calls: int) -> Sample:
    """Seconds, CPU seconds and page faults of one call, averaged over `calls` of them."""
    synchronise()
    before = time.perf_counter(), time.process_time(), _faults()
    for _ in range(calls):
        function()
    synchronise()
    after = time.perf_counter(), time.process_time(), _faults()
    return Sample(*((end - start) / calls for start, end in zip(before, after, strict=True)))


def sample_by_events(function: Callable[[], object], calls: int) -> Sample:
    """Seconds of one call by CUDA events, every call after the L2 cache has been overwritten: the mean of `calls`."""
    seconds = event_seconds(function, calls, torch.empty(FLUSHED, dtype=torch.int8, device="cuda"))
    return Sample(sum(seconds) / calls, 0.0, 0.0)


def event_seconds(function: Callable[[], object], calls: int, flush: torch.Tensor) -> list[float]:
    """Seconds of each call by CUDA events; `flush` is overwritten before every one."""
    events = []
    for _ in range(calls):
        flush.zero_()
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        function()
        pair[1].record()
        events.append(pair)
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in events]


def _faults() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt) if resource is not None else 0.0


@dataclass(frozen=True)
class Comparison:
    """How two functions compare in time.

    Attributes:
        a_ms: median time of one call of the first.
        b_ms: median time of one call of the second.
        ratio: a_ms / b_ms: above 1, the second is faster.
        low: lower end of the ratio's 95% bootstrap interval.
        high: its upper end.
        cpu_ratio: the same ratio in CPU time of this process, all threads, kernel included: other people's load on the
            machine does not enter it, threads that spin and GPUs make it meaningless.
        pairs: interleaved pairs measured.
        calls: calls per sample (short functions are called several times).
        a_faults: page faults served without disk (minor) in one call of the first, median.
        b_faults: the same of the second.
    """

    a_ms: float
    b_ms: float
    ratio: float
    low: float
    high: float
    cpu_ratio: float
    pairs: int
    calls: int
    a_faults: float
    b_faults: float


def compare(
    a: Callable[[], object],
    b: Callable[[], object],
    pairs: int = 7,
    *,
    warmups: int = 1,
    shortest_sample_s: float = 0.02,
    progress: Callable[[], object] | None = None,
) -> Comparison:
    """Time two functions in interleaved pairs, the order within a pair alternating.

    Args:
        a: the baseline.
        b: what is compared with it.
        pairs: how many pairs; seven is the least a quoted ratio may rest on.
        warmups: untimed calls of each before the first pair.
        shortest_sample_s: a sample repeats its function until it lasts about this long.
        progress: called after every pair.

    Returns:
        Medians, their ratio and its bootstrap interval.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    if a is b:
        raise ValueError("a and b are the same object; wrap one of them in a lambda to compare it with itself")
    for _ in range(max(1, warmups)):
        quickest = min(sample_by_clock(a, 1).seconds, sample_by_clock(b, 1).seconds)
    calls = calls_per_sample(quickest, shortest_sample_s)
    of_a, of_b = interleave((a, b), pairs, (calls, calls), progress=progress)
    a_s, b_s = ([sample.seconds for sample in side] for side in (of_a, of_b))
    a_cpu, b_cpu = (statistics.median(sample.cpu_seconds for sample in side) for side in (of_a, of_b))
    low, high = ratio_interval(a_s, b_s)
    return Comparison(
        a_ms=1e3 * statistics.median(a_s),
        b_ms=1e3 * statistics.median(b_s),
        ratio=statistics.median(a_s) / statistics.median(b_s),
        low=low,
        high=high,
        cpu_ratio=a_cpu / max(b_cpu, 1e-9),
        pairs=pairs,
        calls=calls,
        a_faults=statistics.median(sample.faults for sample in of_a),
        b_faults=statistics.median(sample.faults for sample in of_b),
    )


def on_cuda() -> bool:
    """Whether this process has tensors on an NVIDIA or AMD GPU; asking does not start CUDA."""
    return torch.cuda.is_available() and torch.cuda.memory_allocated() > 0


def on_mps() -> bool:
    """Whether this process has tensors on an Apple GPU."""
    return torch.backends.mps.is_available() and torch.mps.current_allocated_memory() > 0


def synchronise() -> None:
    """Wait for the GPU, where one is in use."""
    if on_cuda():
        wait: Callable[[], None] = torch.cuda.synchronize
        wait()
    elif on_mps():
        torch.mps.synchronize()


def ratio_interval(
    a: Sequence[float], b: Sequence[float], draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of median(a) / median(b), resampling pairs: what slows both at once cancels."""
    generator = random.Random(0)
    pairs = list(zip(a, b, strict=True))
    ratios = []
    for _ in range(draws):
        drawn_a, drawn_b = zip(*generator.choices(pairs, k=len(pairs)), strict=True)
        ratios.append(statistics.median(drawn_a) / statistics.median(drawn_b))
    ratios.sort()
    tail = (1 - level) / 2
    return ratios[int(tail * draws)], ratios[min(draws - 1, int((1 - tail) * draws))]

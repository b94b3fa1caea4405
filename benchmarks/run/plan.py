"""What a run measures: subjects, their sides, and the points, with an estimate of the time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...configs.kernel import did_you_mean
from ...configs.presets import PRESETS, candidates
from ...errors import BadInput
from ..report.results import BACKWARD, FORWARD

#: Operations in the order of what they take of a model's time; those that are not named follow.
FIRST = ("edge_transition", "invariant_point_attention", "edge_features", "attention", "triangle_multiplication",
         "triangle_attention", "attention_pair_bias", "factorized_point_attention")  # fmt: skip
LENGTHS = {"cpu": (64, 128, 256), "mps": (64, 128, 256, 512), "cuda": (128, 256, 512, 1024)}
DTYPES: Mapping[str, tuple[str, ...]] = {"cuda": ("bfloat16", "float32")}
#: Seconds that a run may take that names neither what nor how long to measure.
USUAL_BUDGET = 240.0
#: A forward pass takes this part of forward and backward together, about.
FORWARD_SHARE = 0.3
#: Seconds to start a process, and what a sample lasts at least.
START_S, SAMPLE_S = 4.0, 0.02
#: Calls of each side beside those that are timed: two before, two for its memory, which draw inputs as well.
CALLS_BESIDE = 6.0
#: What a check takes, in short calls with gradients: three items, longer ones, the truth in float64.
CHECK_CALLS = 10.0


@dataclass(frozen=True)
class Plan:
    """What to measure, in order.

    Attributes:
        subjects: Specifications, as `worker.build` takes them.
        lengths: Residues, ascending.
        modes: Of `rows.MODES`.
        dtypes: Precisions.
        device: Where.
        words: The values of `--kernel`: which sides; all that can run when empty.
        baseline: The side that ratios are taken against; the first that is measured when empty.
        rounds: Samples of each side.
        seed: Of the inputs.
        memory: Whether to measure it.
        budget: Seconds of measuring; what would take more of them is left out. None for as long as it takes.
        threads: PyTorch's threads; PyTorch's own choice when None.
    """

    subjects: tuple[Mapping[str, Any], ...]
    lengths: tuple[int, ...]
    modes: tuple[str, ...] = (FORWARD, BACKWARD)
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    words: tuple[str, ...] = ()
    baseline: str = ""
    rounds: int = 7
    seed: int = 0
    memory: bool = True
    budget: float | None = None
    threads: int | None = None

    def points(self) -> Iterator[dict[str, Any]]:
        """Every point, short ones first: what a budget leaves out is the longest."""
        for length in self.lengths:
            for dtype in self.dtypes:
                for mode in self.modes:
                    yield {
                        "mode": mode,
                        "length": length,
                        "dtype": dtype,
                        "device": self.device,
                        "seed": self.seed,
                    }


@dataclass
class Known:
    """What `describe` told of a subject, and what was learned of its time since.

    Attributes:
        name: The subject's name.
        sides: All of them.
        alike: For a side, the presets that it stands for besides its own.
        why: Why a side can run at none of the points; empty if it can at one.
        growth: The power of the length by which the work grows.
        trial_s: Seconds of one short call, gradients and all.
        trial_length: How short.
        sizes: The widths.
    """

    name: str
    sides: list[str]
    alike: Mapping[str, list[str]] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    growth: float = 2.0
    trial_s: float = 0.0
    trial_length: int = 32
    sizes: Mapping[str, int] = field(default_factory=dict)
    _seen: dict[tuple[str, str], tuple[int, tuple[float, ...], float]] = field(default_factory=dict)

    def learn(self, point: Mapping[str, Any], calls: Sequence[float], rounds: int, beside: float) -> None:
        """Remember what a point took.

        Args:
            point: Which.
            calls: Seconds of one call of each side.
            rounds: How many samples were taken of each.
            beside: Seconds of all that was done at it, but for checks: those are made once.
        """
        rest = max(0.0, beside - _timing(calls, rounds))
        self._seen[point["dtype"], point["mode"]] = (point["length"], tuple(calls), rest)

    def has_seen(self, point: Mapping[str, Any]) -> bool:
        """Whether a shorter point of the same pass has been measured."""
        return (point["dtype"], point["mode"]) in self._seen

    def estimate(self, point: Mapping[str, Any], sides: int, rounds: int) -> float:
        """Seconds that a point will take, from a shorter one or from the trial."""
        seen = self._seen.get((point["dtype"], point["mode"]))
        if seen is not None:
            length, calls, rest = seen
            longer = point["length"] / length
            # What is not timed grows, too, but little of it as the calls do.
            return _timing([seconds * longer**self.growth for seconds in calls], rounds) + rest * longer
        share = FORWARD_SHARE if point["mode"] == FORWARD else 1.0
        grown = (point["length"] / self.trial_length) ** self.growth
        # A kernel takes less than the definition, which the trial most often ran.
        return _timing([0.7 * share * self.trial_s * grown] * sides, rounds) + CHECK_CALLS * (sides + 2) * self.trial_s


def _timing(calls: Sequence[float], rounds: int) -> float:
    """Seconds to take samples of some calls in turns, and to call each beside that."""
    return sum(rounds * max(SAMPLE_S, seconds) + CALLS_BESIDE * seconds for seconds in calls)


def chosen(
    subject: str, known: Known, words: Sequence[str], device: str, baseline: str = ""
) -> tuple[list[str], set[str]]:
    """The sides of a subject that the words of `--kernel` ask for, and those among them that must run.

    Args:
        subject: The subject's name.
        known: Its sides.
        words: A side, a preset, or OPERATION=KERNEL.
        device: For presets.
        baseline: One more side.
    """
    if not words:
        return list(known.sides), set()
    of_kind = device.partition(":")[0]
    wanted: set[str] = set()
    must: set[str] = set()
    for word in [*words, *([baseline] if baseline else [])]:
        operation, equals, kernel = word.partition("=")
        sides = [side for side in known.sides if word == side or word in known.alike.get(side, ())]
        if sides:
            wanted.update(sides)
        elif equals:
            if operation == subject:
                wanted.add(kernel)
                must.add(kernel)
        elif word in PRESETS:
            listed = [side for side in candidates(word, subject, of_kind) if side in known.sides]
            ready = [side for side in listed if not known.why.get(side)]
            wanted.update((ready or listed)[:1])
    return [side for side in known.sides if side in wanted] + sorted(wanted - set(known.sides)), must


def check_words(words: Sequence[str], every: Sequence[Known], operations: Sequence[str]) -> None:
    """Refuse a word of `--kernel` that means nothing.

    Raises:
        BadInput: It names no kernel, preset or operation; the message has the nearest.
    """
    sides = {word for known in every for side in known.sides for word in (side, *known.alike.get(side, ()))}
    for word in words:
        operation, equals, kernel = word.partition("=")
        if not equals or word in sides:
            if word not in sides and word not in PRESETS:
                raise BadInput(
                    f"--kernel {word}: no such kernel or preset" + did_you_mean(word, sorted(sides | {*PRESETS}))
                )
            continue
        if operation not in operations:
            raise BadInput(f"--kernel {word}: no operation {operation!r}" + did_you_mean(operation, sorted(operations)))
        own = [side for known in every if known.name == operation for side in known.sides]
        if own and kernel not in own:
            raise BadInput(f"--kernel {word}: {operation} has no kernel {kernel!r}" + did_you_mean(kernel, own))

"""How the processes of a run share its samples: each begins with its own part, then helps where work is left.

There is no process group: a shared folder and claims in it are enough. What a process makes does not depend on how many
there are. The batches are those of the whole run, and one is always made whole, even where only some of its samples
are missing: the model's arithmetic may round otherwise in a batch of another size.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from pathlib import Path

from ...files.locks import Claim, holder
from .rank import Worker
from .sample_folder import clear_leftovers_of
from .targets import Target

Batch = list[Target]

#: Seconds between two looks at what another process is making: at first, and at most.
_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
#: Seconds of waiting after which a process that has no ranks beside it says for whom it waits.
_PATIENCE = 10.0
#: Seconds between two counts of what all have made.
_BETWEEN_COUNTS = 5.0


def share(groups: Sequence[Batch], worker: Worker) -> list[Batch]:
    """The batches that a worker begins with: every n-th, since neighbours are of one length."""
    return list(groups[worker.rank :: worker.world_size])


class SharedWork:
    """The batches of a run as one of its processes takes them.

    Args:
        out_dir: The output folder.
        groups: All batches of the run.
        worker: Which process this is.
        done: Whether a sample needs no more work.
        help_others: Whether to go on with what other workers have left; their part alone cannot be told from work that
            is done where samples are made anew.
    """

    def __init__(
        self,
        out_dir: Path,
        groups: Sequence[Batch],
        worker: Worker,
        *,
        done: Callable[[Target], bool],
        help_others: bool,
    ) -> None:
        own = share(groups, worker)
        after = [Worker(rank % worker.world_size, worker.world_size) for rank in _others(worker)] if help_others else []
        self._remaining = [(batch, True) for batch in own if not _all(done, batch)]
        self._remaining += [(batch, False) for other in after for batch in share(groups, other)]
        self._out_dir, self._worker, self._done = out_dir, worker, done
        self._counted = time.monotonic()

    def __len__(self) -> int:
        """Batches that were not done when last looked at."""
        return len(self._remaining)

    def __iter__(self) -> Generator[tuple[Batch, Batch]]:
        """Gives batches to make, and the samples of each that are claimed, until every sample is done.

        The claims last until the next batch is asked for. Where all that is left is claimed by other processes, this
        waits: they may die, and their work is taken over.

        Raises:
            OSError: A claim cannot be made.
        """
        pause, waited = _PAUSE, 0.0
        while True:
            blocked: Path | None = None
            busy = False
            for batch, own in list(self._remaining):
                with ExitStack() as claims:
                    mine, held = self._claim(batch, own, claims)
                    blocked = blocked or held
                    if mine:
                        busy, pause, waited = True, _PAUSE, 0.0
                        yield batch, mine
            self.look_again()
            if not self._remaining:
                return
            if not busy and blocked is not None:
                time.sleep(pause)
                before, waited, pause = waited, waited + pause, min(2 * pause, _LONGEST_PAUSE)
                if self._worker.alone and before < _PATIENCE <= waited:
                    count = sum(not self._done(target) for batch, _ in self._remaining for target in batch)
                    warnings.warn(f"waiting for {count} sample(s) that {holder(blocked)} is making", stacklevel=3)

    def look_again(self) -> None:
        """Leaves out the batches that are done by now, whoever made them."""
        self._remaining = [(batch, own) for batch, own in self._remaining if not _all(self._done, batch)]
        self._counted = time.monotonic()

    @property
    def counted_lately(self) -> bool:
        """Whether looking again now would be too soon: it asks the file system for every sample that is left."""
        return time.monotonic() - self._counted < _BETWEEN_COUNTS

    def _claim(self, batch: Batch, own: bool, claims: ExitStack) -> tuple[Batch, Path | None]:
        """The samples of a batch that are now this process's to make, and one that another is making."""
        mine: Batch = []
        blocked: Path | None = None
        for target in batch:
            if self._done(target):
                continue
            place = self._out_dir / target.folder
            place.parent.mkdir(exist_ok=True)
            claim = Claim.take(place)
            if claim is None:
                blocked = place
                continue
            claims.enter_context(claim)
            if not claim.locked and not own:  # nobody can tell whether its owner is at it
                self._remaining.remove((batch, own))
                return [], blocked
            if claim.inherited:
                clear_leftovers_of(place)
            if not self._done(target):  # it may have been finished between the two
                mine.append(target)
        return mine, blocked


def _others(worker: Worker) -> range:
    """The ranks after this one, around: so that who is done first does not meet all others at the same batch."""
    return range(worker.rank + 1, worker.rank + worker.world_size)


def _all(done: Callable[[Target], bool], batch: Batch) -> bool:
    return all(done(target) for target in batch)

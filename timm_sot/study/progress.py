""" Progress bars: one for a study, and one for each of its runs in progress """
import sys
from typing import Any, Dict, Sequence, Tuple

from tqdm import tqdm

from .store import Run

__all__ = ['Progress']


class Progress:
    """The bars, on stderr; those of runs only on a terminal."""

    def __init__(self, runs: Sequence[Run]):
        """Initialize the bars for the runs to come."""
        self.width = max(len(run.row) for run in runs)
        self.study = tqdm(
            total=sum(run.epochs for run in runs), desc='study', unit='epoch',
            mininterval=0.5 if sys.stderr.isatty() else 10.)
        self.bars: Dict[str, Tuple[int, Any]] = {}  # line and bar of a run
        self.begun: Dict[str, int] = {}  # epochs of a run that the bar of the study counts

    def begin(self, run: Run, epoch: int, steps: int) -> None:
        """A run begins, or continues, at an epoch, in epochs of so many steps."""
        self._found(run, epoch)
        self.leave(run)
        taken = {line for line, _ in self.bars.values()}
        line = next(line for line in range(1, len(taken) + 2) if line not in taken)
        bar = tqdm(
            total=run.epochs * steps, initial=epoch * steps, unit='step',
            desc=f'{run.row:{self.width}} seed {run.seed}', position=line, leave=False, disable=None)
        self.bars[run.name] = line, bar

    def step(self, run: Run, steps: int = 1) -> None:
        """A run has done so many steps more."""
        self.bars[run.name][1].update(steps)

    def epoch(self, run: Run, top1: float) -> None:
        """A run has finished an epoch."""
        self.bars[run.name][1].set_postfix({'top-1': f'{top1:.2f}'})
        self.begun[run.name] += 1
        self.study.update()

    def elsewhere(self, run: Run) -> None:
        """A run has been finished by another process."""
        self._found(run, run.epochs)

    def _found(self, run: Run, epochs: int) -> None:
        """So many epochs are done, or fewer than were counted, which says nothing about how fast we are."""
        more = epochs - self.begun.get(run.name, 0)
        self.begun[run.name] = epochs
        if more:
            self.study.initial += more
            self.study.n += more
            self.study.last_print_n += more
            self.study.refresh()

    def done(self, run: Run, result: Dict[str, Any]) -> None:
        """A run is finished, with that result."""
        self.leave(run)
        self.write(
            f'{run.row} seed {run.seed}: top-1 {result["final"]:.2f}, best {result["best"]:.2f}, '
            f'{result["seconds"]:.1f} s')

    def leave(self, run: Run) -> None:
        """A run is not in progress any more."""
        if run.name in self.bars:
            self.bars.pop(run.name)[1].close()

    def write(self, text: str) -> None:
        """Print a line without breaking the bars."""
        self.study.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close all bars."""
        for _, bar in self.bars.values():
            bar.close()
        self.bars = {}
        self.study.close()

""" Progress bars of a study """
import pytest

from timm_sot.study.progress import Progress
from timm_sot.study.store import Run

RUNS = [Run(model, {}, 3, 4) for model in ('cct_2', 'cct_2_sot_q', 'cct_2_sot_qk')]


@pytest.fixture
def progress():
    progress = Progress(RUNS)
    yield progress
    progress.close()


def test_bars(progress, capsys):
    assert (progress.study.n, progress.study.total) == (0, 12)
    for run, epoch in zip(RUNS, (1, 3)):
        progress.begin(run, epoch, 10)
    assert progress.study.n == progress.study.initial == 4, 'done before, and not counted as fast'
    (line, bar), (other_line, other) = progress.bars[RUNS[0].name], progress.bars[RUNS[1].name]
    assert (line, other_line) == (1, 2) and bar.total == other.total == 40

    progress.epoch(RUNS[0], 50.)
    assert progress.study.n == 5 and progress.study.initial == 4
    progress.done(RUNS[0], {'final': 61.5, 'best': 62.25, 'seconds': 3.})
    assert 'cct_2 seed 3: top-1 61.50, best 62.25, 3.0 s' in capsys.readouterr().err
    progress.begin(RUNS[2], 0, 10)
    assert progress.bars[RUNS[2].name][0] == 1, 'the line that is free'
    assert list(progress.bars) == [RUNS[1].name, RUNS[2].name]


def test_begins_again(progress):
    """As after the loss of its worker."""
    progress.begin(RUNS[0], 2, 10)
    progress.begin(RUNS[0], 1, 10)
    assert len(progress.bars) == 1 and progress.bars[RUNS[0].name][0] == 1
    assert progress.study.n == progress.study.initial == 1, 'an epoch is to be done again'
    progress.leave(RUNS[0])
    progress.leave(RUNS[0])
    assert not progress.bars


def test_steps(monkeypatch):
    """Bars of runs are there on a terminal alone."""
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, 'stderr', Terminal())
    progress = Progress(RUNS)
    progress.begin(RUNS[1], 1, 10)
    progress.step(RUNS[1])
    progress.step(RUNS[1], 4)
    progress.epoch(RUNS[1], 12.345)
    bar = progress.bars[RUNS[1].name][1]
    assert bar.n == 15 and bar.postfix == 'top-1=12.35' and bar.desc == 'cct_2_sot_q  seed 3'
    progress.close()
    assert bar.disable and progress.study.disable and not progress.bars


def test_elsewhere(progress):
    """Runs of another process count as a whole, our own are not counted again."""
    progress.begin(RUNS[0], 0, 10)
    for _ in range(RUNS[0].epochs):
        progress.epoch(RUNS[0], 50.)
    for run in (RUNS[0], RUNS[1], RUNS[1]):
        progress.elsewhere(run)
    assert (progress.study.n, progress.study.initial) == (8, 4)

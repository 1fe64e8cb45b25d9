""" Figures of a report: learning curves, paired differences, a sweep

Bands are the mean ± one standard deviation over seeds, the spread of single runs; bars are the 95 % intervals of
paired differences. A row with one run is a line or a point, without either.
"""
import textwrap
from itertools import cycle
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..viz.figures import BLUE, ORANGE, STYLE, new_figure
from .statistics import Difference, Summary, summarize

__all__ = ['differences', 'learning_curves', 'sweep']

# Okabe and Ito's colours, without the yellow that white swallows; the first is the baseline's. Lines of one course are
# told apart by their dashes.
COLORS = ('black', BLUE, ORANGE, '#009e73', '#cc79a7', '#56b4e9', '#e69f00')
DASHES = ('-', '--', '-.', ':')
GREY = '0.55'
MEAN = dict(fmt='D', color=ORANGE, markersize=4, elinewidth=1.8)
ORIGINAL = 'original experiment, best epoch of one run each'  # of the last epochs of its rows nothing was published
ORIGINAL_LAST = 'original experiment, last epoch of one run each'

Results = Sequence[Dict[str, Any]]


@rc_context(STYLE)
def learning_curves(rows: Mapping[str, Results], images: str) -> Figure:
    """Top-1 after each epoch, all epochs and the last third of them.

    Args:
        rows: Results by what the figure calls their row.
        images: What the top-1 is measured on.
    """
    columns = max(1, min(3, 120 // (10 + max(map(len, rows)))))  # of the legend
    figure = new_figure(3.5 + 0.19 * -(-len(rows) // columns))
    whole, end = figure.subplots(1, 2)
    epochs = max(len(result['top1']) for results in rows.values() for result in results)
    first = epochs - max(2, -(-epochs // 3))  # of the last third, counted from 0; of two epochs that is both
    for (label, results), linestyle, color in zip(rows.items(), cycle(DASHES), cycle(COLORS)):
        top1 = np.array([result['top1'] for result in results])  # (runs, epochs)
        x, mean = np.arange(1, top1.shape[1] + 1), top1.mean(0)
        for ax in (whole, end):
            ax.plot(x, mean, linestyle, color=color, linewidth=1.4, label=f'{label} (n = {len(results)})')
            if len(results) > 1:
                sd = top1.std(0, ddof=1)
                ax.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)
    late = [value for results in rows.values() for result in results for value in result['top1'][first:]]
    end.set(xlim=(first + 1, epochs), ylim=(min(late) - 0.3, max(late) + 0.3))
    whole.set(ylabel=f'top-1 on {images}, %', title='all epochs')
    end.set(title='the last third')
    for ax in (whole, end):
        ax.set_xlabel('epoch')
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
    figure.legend(*whole.get_legend_handles_labels(), loc='outside lower center', ncols=columns, frameon=False)
    return figure


@rc_context(STYLE)
def differences(
        rows: Mapping[str, Difference],
        baseline: str,
        original: Optional[Mapping[str, float]] = None,
) -> Figure:
    """Paired differences to a baseline in top-1: a point for each seed, mean and interval, a line at no difference.

    Args:
        rows: Differences by what the figure calls their row.
        baseline: What it calls the baseline.
        original: Published differences by row.
    """
    xlabel = wrapped(f'top-1 minus that of {baseline}, percentage points', 50)
    figure = new_figure(1.1 + 0.2 * len(xlabel.splitlines()) + 0.38 * len(rows))
    ax = figure.subplots()
    ax.axvline(0, color='black', linewidth=1)
    for y, (label, difference) in enumerate(rows.items()):
        summary = difference.summary
        ax.plot(
            difference.values, [y + 0.18] * len(difference.values), 'o', color=BLUE, alpha=0.5, markersize=4,
            markeredgewidth=0, label='a pair of runs of one seed')
        if summary.n > 1:
            ax.errorbar(summary.mean, y, xerr=bars(summary), label='mean and 95 % interval', **MEAN)
        if original and label in original:
            ax.plot(original[label], y - 0.2, 'x', color=GREY, markersize=5, label=ORIGINAL)
    ax.set_yticks(range(len(rows)), [f'{label} (n = {difference.summary.n})' for label, difference in rows.items()])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(xlabel)
    ax.grid(axis='x', alpha=0.3)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=3, frameon=False)
    return figure


def wrapped(text: str, width: int) -> str:
    """In lines of at most so many characters, if its words are: what does not fit into a figure is cut off."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def bars(summary: Summary):
    """The interval as matplotlib's errorbar takes it, None if there is none."""
    return None if summary.low is None else [[summary.mean - summary.low], [summary.high - summary.mean]]


@rc_context(STYLE)
def sweep(
        values: Mapping[float, Results],
        argument: str,
        label: str,
        images: str,
        baseline: str = '',
        baseline_results: Results = (),
        compared: Optional[Mapping[float, Difference]] = None,
        original: Optional[Mapping[float, float]] = None,
) -> Figure:
    """Top-1 of the last epoch over the values of an argument, and below it the paired differences to the baseline.

    Args:
        values: Results by value of the argument.
        argument: Its name.
        label: What the figure calls the rows, less the argument.
        images: What the top-1 is measured on.
        baseline: What it calls the baseline.
        baseline_results: Results of the baseline, for the band behind.
        compared: Differences to it by value of the argument.
        original: Published top-1 of the last epoch by value of the argument.
    """
    figure = new_figure(5.6 if compared else 3.6)
    panels = (3, 2) if compared else (3,)  # heights
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=panels)
    ax = axes[0, 0]
    if baseline_results:
        summary = summarize([result['final'] for result in baseline_results])
        if summary.sd is not None:
            ax.axhspan(summary.mean - summary.sd, summary.mean + summary.sd, color='black', alpha=0.15, linewidth=0)
        ax.axhline(summary.mean, color='black', linewidth=1.3, label=f'{baseline} (n = {summary.n})')
    if original:
        ax.plot(
            *zip(*sorted(original.items())), color=GREY, linewidth=0.8, marker='.', markersize=3, label=ORIGINAL_LAST)
    x = sorted(values)
    summaries = [summarize([result['final'] for result in values[value]]) for value in x]
    counts = sorted({summary.n for summary in summaries})
    n = f'{counts[0]}' if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'
    mean = [summary.mean for summary in summaries]
    ax.plot(
        x, mean, linestyle='-' if counts[0] > 1 else 'none', marker='o', color=BLUE, markersize=4,
        label=f'{label} (n = {n})')
    for run in runs_of_spread(summaries):
        sd = [summaries[i].sd for i in run]
        low, high = ([mean[i] + sign * s for i, s in zip(run, sd)] for sign in (-1, 1))
        if len(run) > 1:
            ax.fill_between([x[i] for i in run], low, high, color=BLUE, alpha=0.2, linewidth=0)
        else:
            ax.errorbar(x[run[0]], mean[run[0]], sd, color=BLUE, alpha=0.4)
    ax.set_ylabel(f'top-1 on {images}, %')
    ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc='outside upper center', ncols=3, frameon=False)
    if compared:
        ax = axes[1, 0]
        ax.axhline(0, color='black', linewidth=1)
        for value, difference in compared.items():
            summary = difference.summary
            ax.errorbar(value, summary.mean, yerr=bars(summary), **MEAN)
        with_bars = any(bars(difference.summary) for difference in compared.values())
        ax.set_ylabel(wrapped(f'minus {baseline}', 30) + ',\npaired, 95 % interval' * with_bars)
        ax.grid(alpha=0.3)
    ax.set_xlabel(argument)
    return figure


def runs_of_spread(summaries) -> List[List[int]]:
    """Stretches of neighbours that have a standard deviation, as indices."""
    runs: List[List[int]] = []
    for i, summary in enumerate(summaries):
        if summary.sd is not None:
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i])
    return runs

""" Statistics of the results of a study

All of them are over runs of different seeds. What differs between two rows is taken pair by pair, since runs of one
seed share their batches, augmentations and initial values. Intervals are those of Student's t for each mean by itself,
95 %; that many comparisons were made is the business of `holm` alone.
"""
from math import isfinite
from statistics import fmean
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
from scipy import stats

__all__ = ['Difference', 'Summary', 'decide', 'holm', 'paired', 'summarize']

ALPHA = 0.05  # level of the tests, and 1 - ALPHA that of the intervals
Result = Dict[str, Any]  # a line of results.jsonl

# what two runs share that make a pair; `recipe` is not in the lines, who reads them from several studies adds it
PAIRED_BY = ('seed', 'epochs', 'data', 'device', 'recipe')


class Summary(NamedTuple):
    """Mean and spread of a sample."""
    n: int
    mean: float
    sd: Optional[float]  # of the sample, None for n = 1
    low: Optional[float]  # ends of the interval of the mean, None where `has_spread` is false
    high: Optional[float]


class Difference(NamedTuple):
    """What one row has more than another in the runs of the same seeds."""
    seeds: List[int]
    values: List[float]  # by seed
    summary: Summary
    p: Optional[float]  # of the paired t-test, two-sided; None where there is no interval


def summarize(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and interval of the mean, by Student's t with n - 1 degrees of freedom.

    Of one value, and of values that are all the same, there is no interval: its width would be 0, however few they are;
    nor is there one where a value is not finite.
    """
    n, mean = len(values), fmean(values)
    sd = float(np.std(values, ddof=1)) if n > 1 else None  # that of the standard library fails where one is NaN
    if not has_spread(values):
        return Summary(n, mean, sd, None, None)
    low, high = stats.ttest_1samp(values, 0.).confidence_interval(1 - ALPHA)
    return Summary(n, mean, sd, float(low), float(high))


def has_spread(values: Sequence[float]) -> bool:
    """Whether values are finite and differ by more than rounding."""
    return len(values) > 1 and all(map(isfinite, values)) and max(values) - min(values) > 1e-9


def paired(results: Sequence[Result], others: Sequence[Result], key: str) -> Optional[Difference]:
    """Compare two rows in what the lines call `key`: `results` minus `others`, in pairs.

    A pair has the same seed, epochs, images, device and recipe; runs without a partner are left out.

    Returns:
        The difference, None if there is no pair.

    Raises:
        ValueError: If a row holds two runs that would make the same pair.
    """
    def by_partner(row):
        found = {tuple(result.get(name) for name in PAIRED_BY): result for result in row}
        if len(found) < len(row):
            raise ValueError(f'two runs of a row have the same {", ".join(PAIRED_BY)}.')
        return found

    mine, theirs = by_partner(results), by_partner(others)
    shared = sorted((partner for partner in mine if partner in theirs), key=lambda partner: partner[0])
    if not shared:
        return None
    values = [mine[partner][key] - theirs[partner][key] for partner in shared]
    p = float(stats.ttest_1samp(values, 0.).pvalue) if has_spread(values) else None
    return Difference([partner[0] for partner in shared], values, summarize(values), p)


def holm(p_values: Sequence[Optional[float]]) -> List[Optional[float]]:
    """p-values adjusted by Holm's step-down method, which bounds the chance of any false rejection among them.

    The k-th smallest of m is multiplied by m - k + 1, and is at least as large as those before it and at most 1. None,
    a comparison that could not be tested, stays None and is not counted.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: List[Optional[float]] = [None] * len(p_values)
    largest = 0.
    for k, (p, i) in enumerate(order):
        largest = adjusted[i] = max(largest, min(1., (len(order) - k) * p))
    return adjusted


def decide(difference: Optional[Difference], adjusted: Optional[float], digits: int = 2) -> int:
    """Whether a row is better than the other (1), worse (-1) or neither was shown (0).

    It takes both, also as they are printed: an interval on one side of zero, with `digits` decimals, and an adjusted
    p-value that rejects, with three digits. (The second implies the first but for rounding.)
    """
    if difference is None or difference.summary.low is None or adjusted is None or not float(f'{adjusted:.3g}') < ALPHA:
        return 0
    low, high = round(difference.summary.low, digits), round(difference.summary.high, digits)
    return (low > 0) - (high < 0)

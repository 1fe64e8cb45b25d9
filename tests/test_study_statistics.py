""" Means, intervals, paired differences, Holm's method """
import math

import pytest
from scipy import stats

from timm_sot.study.statistics import Difference, Summary, decide, holm, paired, summarize


def runs(values, first_seed=0, **same):
    shared = dict(epochs=30, data='images', device='gpu', recipe='{}', **same)
    return [{**shared, 'seed': first_seed + i, 'final': value, 'best': value + 1} for i, value in enumerate(values)]


def test_summary_in_closed_form():
    """Two values: t of one degree of freedom is Cauchy's distribution, whose quantile is a tangent."""
    summary = summarize([70., 71.])
    assert (summary.n, summary.mean) == (2, 70.5) and summary.sd == pytest.approx(math.sqrt(0.5))
    assert summary.high - summary.mean == pytest.approx(0.5 * math.tan(math.pi * 0.475))
    assert summary.mean - summary.low == pytest.approx(summary.high - summary.mean)


def test_summary_by_table():
    """Student's t of four degrees of freedom at 97.5 % is 2.776 in every table."""
    summary = summarize([1., 2., 3., 4., 5.])
    assert summary.sd == pytest.approx(math.sqrt(2.5))
    assert summary.high == pytest.approx(3 + 2.776 * math.sqrt(2.5 / 5), abs=5e-4)
    assert (summary.low, summary.high) == pytest.approx(stats.t.interval(0.95, 4, 3, math.sqrt(2.5 / 5)))


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('values, sd', [([70.25], None), ([70.25] * 4, 0.), ([0.1 + 0.2, 0.3], 0.)])
def test_no_interval(values, sd):
    summary = summarize(values)
    assert summary.n == len(values) and summary.mean == pytest.approx(values[0])
    assert summary.sd == (sd if sd is None else pytest.approx(sd, abs=1e-9))
    assert summary.low is summary.high is None


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('values', [[math.nan, 1.], [math.nan] * 3])
def test_what_is_not_finite_is_said(values):
    summary = summarize(values)
    assert math.isnan(summary.mean) and math.isnan(summary.sd) and summary.low is summary.high is None
    difference = paired(runs(values), runs([1.] * 3), 'final')
    assert math.isnan(difference.summary.mean) and difference.p is None and decide(difference, None) == 0


def test_paired_against_scipy():
    mine, theirs = [75.1, 74.2, 76.0, 75.5], [74.9, 74.3, 75.1, 75.0]
    difference = paired(runs(mine), runs(theirs), 'final')
    expected = stats.ttest_rel(mine, theirs)
    assert difference.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (difference.summary.low, difference.summary.high) == pytest.approx((interval.low, interval.high))
    assert difference.values == pytest.approx([0.2, -0.1, 0.9, 0.5]) and difference.seeds == [0, 1, 2, 3]
    assert difference.summary.mean == pytest.approx(0.375)


def test_paired_by_seed():
    """Whatever the order, and without the seeds that one of them lacks."""
    mine = [*reversed(runs([10., 20., 40.])), *runs([1000.], first_seed=9)]
    difference = paired(mine, runs([22., 43., 2000.], first_seed=1), 'final')
    assert difference.seeds == [1, 2] and difference.values == [-2., -3.]
    assert difference.summary.n == 2


def test_pairing_takes_out_what_seeds_share():
    seeds = [0., 5., -3., 8.]
    mine, theirs = ([value + seed for value, seed in zip(values, seeds)] for values in ([1.1, 0.9, 1., 1.2], [0.] * 4))
    assert paired(runs(mine), runs(theirs), 'final').p < 0.001 < 0.5 < stats.ttest_ind(mine, theirs).pvalue


@pytest.mark.parametrize('key', ['epochs', 'data', 'device', 'recipe'])
def test_other_conditions_make_no_pair(key):
    mine, theirs = runs([70., 71., 72.]), runs([69., 69., 69.])
    for result in theirs[1:]:
        result[key] = 'other'
    assert paired(mine, theirs, 'final').seeds == [0]
    assert paired(mine[1:], theirs, 'final') is None


def test_key():
    theirs = runs([1., 2.])
    theirs[1]['best'] = 0.
    assert paired(runs([1., 2.]), theirs, 'best').values == [0., 3.]


@pytest.mark.filterwarnings('error')
def test_differences_without_a_test():
    one = paired(runs([70.]), runs([69.]), 'final')
    assert one.values == [1.] and one.p is one.summary.low is None
    same = paired(runs([76.49, 73.45, 70.]), runs([75.49, 72.45, 69.]), 'final')  # but for rounding
    assert same.summary.mean == pytest.approx(1.) and same.p is same.summary.low is None
    assert paired(runs([70.]), [], 'final') is None


def test_ambiguous_pairs():
    with pytest.raises(ValueError, match='two runs'):
        paired(runs([1., 2.]), [*runs([1.]), *runs([2.])], 'final')


@pytest.mark.parametrize('p, adjusted', [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 * 0.005, 3 * 0.01, 2 * 0.03, then 0.04 but not less
    ([0.04], [0.04]),
    ([0.6, 0.7], [1., 1.]),
    ([0.02, 0.02, 0.02], [0.06, 0.06, 0.06]),
    ([0.01, None, 0.02], [0.02, None, 0.02]),  # a family of two
    ([None], [None]),
    ([], []),
])
def test_holm(p, adjusted):
    assert holm(p) == pytest.approx(adjusted)


def make_difference(low, high):
    return Difference([0, 1], [low, high], Summary(2, (low + high) / 2, 1., low, high), 0.01)


@pytest.mark.parametrize('low, high, adjusted, expected', [
    (0.5, 1.5, 0.04, 1),
    (-1.5, -0.5, 0.04, -1),
    (0.5, 1.5, 0.06, 0),  # Holm does not reject
    (0.5, 1.5, 0.05, 0),
    (0.5, 1.5, 0.04998, 0),  # it is printed as 0.05
    (-0.1, 1.5, 0.04, 0),  # the interval contains zero
    (-1.5, 0.1, 0.04, 0),
    (0.004, 1.5, 0.04, 0),  # it is printed as 0.00 to 1.50
    (-1.5, -0.004, 0.04, 0),
    (0.5, 1.5, None, 0),
    (0.5, 1.5, math.nan, 0),
    (math.nan, math.nan, 0.01, 0),
])
def test_decide(low, high, adjusted, expected):
    assert decide(make_difference(low, high), adjusted) == expected


def test_decide_without_a_test():
    assert decide(None, 0.01) == 0
    assert decide(paired(runs([70.]), runs([60.]), 'final'), 0.01) == 0

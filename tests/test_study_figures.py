""" Figures of a report """
import matplotlib.text
import pytest
from study_lines import BASELINE, BETTER, SWEEP, WORSE, make_line

from timm_sot.study import figures
from timm_sot.study.statistics import paired, summarize


def lines_of(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_learning_curves():
    lines = [make_line('a', {}, seed, 70., top1=[10. * (1 + seed), 20., 30.]) for seed in range(2)]
    figure = figures.learning_curves({'two': lines, 'one': lines[:1]}, 'test images')
    whole, end = figure.axes
    drawn = lines_of(whole)
    assert drawn['two (n = 2)'].get_ydata().tolist() == [15., 20., 30.]
    assert drawn['one (n = 1)'].get_ydata().tolist() == [10., 20., 30.]
    band, = whole.collections  # of the row with two runs alone
    ys = band.get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == pytest.approx((15 - 50 ** 0.5, 30.))
    assert whole.get_ylabel() == 'top-1 on test images, %' and end.get_xlim() == (2, 3)


def test_differences_figure():
    differences = {'better': paired(BETTER, BASELINE, 'final'), 'one': paired(WORSE[:1], BASELINE, 'final')}
    ax, = figures.differences(differences, 'cct_2', {'better': 0.5}).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ['better (n = 5)', 'one (n = 1)']
    by_seed = [line for line in ax.get_lines() if line.get_label() == 'a pair of runs of one seed']
    assert by_seed[0].get_xdata().tolist() == pytest.approx([0.8, 1.1, 0.9, 1.1, 1.1])
    bar, = [bar for bar in ax.collections if len(bar.get_segments())]
    summary = differences['better'].summary
    assert bar.get_segments()[0][:, 0].tolist() == pytest.approx([summary.low, summary.high])
    assert any(line.get_xdata() == [0, 0] for line in ax.get_lines()), 'the line of no difference'
    assert lines_of(ax)[figures.ORIGINAL].get_xdata().tolist() == [0.5]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], 'the first row is at the top'
    one = figures.differences({'one': differences['one']}, 'cct_2')
    assert [text.get_text() for text in one.legends[0].get_texts()] == ['a pair of runs of one seed'], 'no interval'


def test_long_names_are_not_cut_off():
    baseline = 'cct_2_sot_shares attn_drop_rate=0.0 drop_path_rate=0.0 sot_iters=0'
    pair = paired(BETTER, BASELINE, 'final')
    for figure in (
            figures.differences({baseline[:-1] + '5': pair}, baseline),
            figures.sweep({1: BETTER}, 'x', 'row', 'test images', baseline, BASELINE, {1: pair})):
        figure.draw_without_rendering()
        ax = figure.axes[-1]
        labels = [ax.xaxis.label, ax.yaxis.label, *ax.get_yticklabels()]
        for label in filter(matplotlib.text.Text.get_text, labels):
            box = label.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1, label


def test_sweep_figure():
    values = {reg: [line for line in SWEEP if line['kwargs']['sot_reg'] == reg] for reg in (0.1, 0.2, 0.5, 1)}
    compared = {reg: paired(row, BETTER, 'final') for reg, row in values.items()}
    figure = figures.sweep(
        values, 'sot_reg', 'row', 'test images', 'cct_2', BASELINE, compared, {0.1: 75., 0.2: 76.})
    top, bottom = figure.axes
    drawn = lines_of(top)
    assert drawn[figures.ORIGINAL_LAST].get_xydata().tolist() == [[0.1, 75.], [0.2, 76.]]
    assert drawn['cct_2 (n = 5)'].get_ydata() == pytest.approx([76.06] * 2)
    points = drawn['row (n = 1 to 4)']
    assert points.get_xdata().tolist() == [0.1, 0.2, 0.5, 1] and points.get_linestyle() == 'None'
    band, = top.collections  # over the values with several runs
    assert band.get_paths()[0].vertices[:, 0].min() == 0.2
    behind, = top.patches
    assert behind.get_height() == pytest.approx(2 * summarize([line['final'] for line in BASELINE]).sd)
    assert bottom.get_xlabel() == 'sot_reg' and 'interval' in bottom.get_ylabel()
    only = figures.sweep({1: BASELINE, 2: BETTER}, 'x', 'row', 'test images')
    assert len(only.axes) == 1 and lines_of(only.axes[0])['row (n = 5)'].get_linestyle() == '-'

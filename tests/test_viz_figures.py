""" What the figures contain """
import math
import re
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_sot import apply_sot, attention_maps
from timm_sot.viz import figures
from timm_sot.viz.inputs import model_input
from timm_sot.viz.maps import row_entropy

TINY = dict(img_size=32, patch_size=8, depth=3, embed_dim=48, num_heads=3)


def make(name, **kwargs):
    """The same weights at each call, and attention that is not even, as it is with timm's initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, **kwargs)
        for name, p in model.named_parameters():
            if 'qkv' in name:
                nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope='module')
def models():
    return {name: make(name) for name in ('cct_2', 'cct_2_sot_qk')}


def mixed():
    return apply_sot(make('vit_tiny_patch16_224', **TINY), 'sot_q', reg=0.02, blocks=[1])


@pytest.fixture(scope='module')
def vit():
    return mixed()


@pytest.fixture(scope='module')
def image():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((32, 32), Image.BICUBIC)


def maps_of(model, image):
    model.eval()
    return attention_maps(model, model_input(model, image)[None])


def panels(figure):
    """Axes of the figure without those of colour bars, and those of colour bars."""
    bars = [ax for ax in figure.axes if ax.get_label() == '<colorbar>']
    return [ax for ax in figure.axes if ax not in bars], bars


def heatmap(ax):
    """The data of the last image that is drawn in the axes."""
    return np.ma.getdata(ax.get_images()[-1].get_array())


def bar_label(bar):
    return bar.get_ylabel() or bar.get_xlabel()


def texts(figure):
    """All texts of a figure."""
    return '\n'.join(artist.get_text() for artist in figure.findobj(lambda artist: hasattr(artist, 'get_text')))


def assert_same_limits(axes):
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in axes}) == 1


def assert_same_colours(axes):
    assert len({(im.get_clim(), im.get_cmap().name) for ax in axes for im in ax.get_images()[-1:]}) == 1
    assert axes[0].get_images()[-1].get_cmap().name in ('viridis', 'cividis')


# compare

def test_compare(models, image):
    figure = figures.compare(models, image, layer=0, head=1, image_name='noise.png')
    axes, bars = panels(figure)
    assert len(axes) == 12 and len(bars) == 6
    rows = np.array(axes).reshape(4, 3)  # histograms and heatmaps of the first model, then of the second
    for (name, model), histograms, heatmaps in zip(models.items(), rows[::2], rows[1::2]):
        record = maps_of(model, image)['blocks.0']
        for kind, histogram, ax in zip(('scores', 'sot', 'weights'), histograms, heatmaps):
            assert ax.get_xlabel() == 'key token' and ax.get_ylabel() == 'query token'
            assert histogram.get_ylabel() == 'entries' and histogram.get_yscale() == 'log'
            if kind in record:
                matrix = record[kind][0, 1]
                np.testing.assert_allclose(heatmap(ax), matrix, atol=1e-6)
                assert sum(bar.get_height() for bar in histogram.patches) == matrix.numel()
            else:
                assert np.isnan(heatmap(ax)).all() and not histogram.patches
                assert 'softmax of the scores' in ax.texts[0].get_text()
    for column in rows.T:
        assert_same_limits(column[::2])
        assert_same_limits(column[1::2])
        assert_same_colours(column[1::2])
        assert len({histogram.get_xlabel() for histogram in column[::2]}) == 1
    low, high = rows[1, 2].get_images()[0].get_clim()
    largest = max(maps_of(model, image)['blocks.0']['weights'][0, 1].max() for model in models.values())
    assert low == 0 and math.isclose(high, largest, rel_tol=1e-5)
    assert rows[1, 1].get_images()[0].get_clim() == (0, 1)
    labels = [r'score $QK^\top d^{-1/2}$', 'entry of the SOT matrix', 'attention weight']
    assert [bar_label(bar) for bar in bars] == 2 * labels
    for histogram in rows[::2, 2]:
        line, = histogram.get_lines()
        assert line.get_xdata()[0] == 1 / 64

    text = texts(figure)
    for expected in (
            'image noise.png', 'cct_2 · blocks.0 · head 1\n', 'cct_2_sot_qk · blocks.0 · head 1 · reg 0.1',
            'SOT(Q, K), before softmax', 'weights, after softmax', 'weights, softmax of scores'):
        assert expected in text, expected
    assert 'dropout' not in text


def test_compare_without_softmax(image):
    figure = figures.compare({'m': timm.create_model('cct_2_sot_q_nosoftmax', sot_reg=0.3)}, image)
    axes, _ = panels(figure)
    assert not axes[2].get_lines(), 'rows of these weights do not sum to 1: 1/N is not uniform'
    assert r'weights, SOT(Q) $d^{-1/2}$' in texts(figure) and 'sot_q_nosoftmax, reg 0.3' in texts(figure)


@pytest.mark.parametrize('iters, title, source', [
    (5, 'weights, plan with learned shares', 'the plan itself'),
    (0, 'weights, softmax of cosines', 'the softmax of the cosines'),
])
def test_compare_of_learned_shares(image, iters, title, source):
    figure = figures.compare({'m': timm.create_model('cct_2_sot_shares', sot_iters=iters)}, image)
    axes, _ = panels(figure)
    assert axes[2].get_lines(), 'rows of these weights sum to 1'
    text = texts(figure)
    for expected in (title, 'no SOT matrix', f'the weights are\n{source}', 'scores (unused here)',
                     f'sot_shares, reg learned, {iters} iterations'):
        assert expected in text, expected


def test_compare_mean_over_heads(models, image):
    figure = figures.compare(models, image, layer='blocks.1', head='mean')
    record = maps_of(models['cct_2'], image)['blocks.1']
    np.testing.assert_allclose(heatmap(panels(figure)[0][3]), record['scores'][0].mean(0), atol=1e-6)
    assert 'cct_2 · blocks.1 · mean over heads' in texts(figure)


# heads

@pytest.mark.parametrize('matrix', ['scores', 'sot', 'weights'])
def test_heads(models, vit, image, matrix):
    shown = {'cct_2_sot_qk': models['cct_2_sot_qk'], 'vit': vit}
    figure = figures.heads(shown, image, matrix=matrix, image_name='noise.png')
    axes, bars = panels(figure)
    expected = [
        (key, h, values) for model in shown.values() for key, record in maps_of(model, image).items()
        if matrix in record for h, values in enumerate(record[matrix][0])]
    assert len(axes) == len(expected) == (4 + 3 if matrix == 'sot' else 4 + 9) and len(bars) == 2
    for ax, (key, h, values) in zip(axes, expected):
        np.testing.assert_allclose(heatmap(ax), values, atol=1e-6)
        if h == 0:
            assert ax.get_ylabel() == key
    assert_same_colours(axes)
    assert [ax.get_title() for ax in axes[:4]] == ['head 0', 'head 1', '', '']
    text = texts(figure)
    for part in ('image noise.png', 'cct_2_sot_qk · reg 0.1', 'vit · sot_q, reg 0.02', 'query token', 'key token'):
        assert part in text
    assert {bar_label(bar) for bar in bars} == {figures.LABELS[matrix]}


def test_heads_of_layers_with_other_numbers_of_tokens(image):
    """As those of a PiT: each matrix is whole."""
    model = make('pit_ti_224', img_size=64, depth=(1, 1, 1))
    figure = figures.heads({'pit': model}, image)
    axes = [ax for ax in panels(figure)[0] if ax.get_images()]
    assert len({heatmap(ax).shape for ax in axes}) == 3
    for ax in axes:
        height, width = heatmap(ax).shape
        assert ax.get_xlim() == (-0.5, width - 0.5) and ax.get_ylim() == (height - 0.5, -0.5)


# patches

def test_patches_of_a_gray_image(image):
    ax = panels(figures.patches({'cct_2': make('cct_2', in_chans=1)}, image))[0][0]
    shown, = ax.get_images()
    assert shown.get_cmap().name == 'gray' and shown.get_clim() == (0., 1.)


def test_patches(models, image):
    queries = [(0, 7), (5, 2)]
    figure = figures.patches(models, image, queries=queries, head=1, image_name='noise.png')
    axes, (bar,) = panels(figure)
    axes = np.array(axes).reshape(2, 5)
    pixels = np.asarray(image) / 255
    for (row, column), line in zip(queries, axes):
        np.testing.assert_allclose(heatmap(line[0]), pixels, atol=1e-5)
        assert line[0].get_ylabel() == f'patch {row},{column}'
        for i, model in enumerate(models.values()):
            weights = maps_of(model, image)['blocks.1']['weights'][0, 1, 8 * row + column]
            expected = weights.reshape(8, 8) * 64
            nearest, bilinear = (heatmap(ax) for ax in line[1 + 2 * i:3 + 2 * i])
            assert nearest.shape == bilinear.shape == (32, 32)
            np.testing.assert_allclose(nearest, np.kron(expected, np.ones((4, 4))), rtol=1e-5)
            # the values are those in the middle of the patches, linear between
            at = [np.interp(np.arange(32) + 0.5, np.arange(8) * 4 + 2, row) for row in np.eye(8)]  # (8, 32)
            np.testing.assert_allclose(bilinear, np.transpose(at) @ expected.numpy() @ at, atol=1e-4)
            under = line[1 + 2 * i].get_images()[0]
            np.testing.assert_allclose(under.get_array(), pixels.mean(-1), atol=1e-5)
        for ax in line:
            frame, = ax.patches
            assert (frame.get_xy(), frame.get_width()) == ((4 * column - 0.5, 4 * row - 0.5), 4)
    assert_same_colours(list(axes[:, 1:].flat))
    assert 'uniform' in bar_label(bar) and bar.get_lines()[0].get_xdata()[0] == 1
    text = texts(figure)
    for part in ('image noise.png', 'cct_2\nblocks.1 · head 1\nsoftmax\nnearest',
                 'cct_2_sot_qk\nblocks.1 · head 1\nreg 0.1\n', 'bilinear'):
        assert part in text, part


def test_patches_leave_out_the_class_token_and_take_other_grids(models, vit, image):
    shown = {'cct_2': models['cct_2'], 'vit': vit}  # 8x8 tokens, and a class token before 4x4
    figure = figures.patches(shown, image, queries=[(7, 2)], layer=1)
    axes, _ = panels(figure)
    weights = maps_of(vit, image)['blocks.1']['weights'][0].mean(0)
    expected = weights[1 + 4 * 3 + 1, 1:].reshape(4, 4) * 17
    np.testing.assert_allclose(heatmap(axes[3]), np.kron(expected, np.ones((8, 8))), rtol=1e-5)
    assert axes[3].patches[0].get_xy() == (8 - 0.5, 24 - 0.5)
    assert 'mean over heads' in texts(figure)


def test_patches_without_softmax(image):
    # S d^-1/2 has no rows of sum 1: what is uniform is only seen once they are divided by it
    model = make('cct_2_sot_q_nosoftmax')
    axes, _ = panels(figures.patches({'m': model}, image, queries=[(3, 4)], head=1))
    weights = maps_of(model, image)['blocks.1']['weights'][0, 1, 8 * 3 + 4]
    assert abs(weights.sum() - 1) > 0.1
    np.testing.assert_allclose(heatmap(axes[1])[::4, ::4], (64 * weights / weights.sum()).reshape(8, 8), rtol=1e-5)


@pytest.mark.parametrize('matrix, limits', [('sot', (0, 1)), ('scores', None)])
def test_patches_of_other_matrices(models, image, matrix, limits):
    model = {'cct_2_sot_qk': models['cct_2_sot_qk']}
    axes, (bar,) = panels(figures.patches(model, image, matrix=matrix))
    values = maps_of(model['cct_2_sot_qk'], image)['blocks.1'][matrix][0].mean(0)[8 * 2 + 2]
    np.testing.assert_allclose(heatmap(axes[1])[::4, ::4], values.reshape(8, 8), atol=1e-6)
    assert bar_label(bar) == figures.LABELS[matrix]
    assert limits is None or axes[1].get_images()[-1].get_clim() == limits


# entropy

def test_entropy(models, image):
    images = [image, image.rotate(90), image.rotate(180)]
    figure = figures.entropy(models, images, images_name='3 images of noise', batch_size=2)
    axes, _ = panels(figure)
    assert len(axes) == 2
    assert_same_limits(axes)
    assert axes[0].get_ylabel() == r'row entropy / $\log N$' and axes[0].get_ylim()[0] == 0
    for ax, (name, model) in zip(axes, models.items()):
        assert ax.get_title() == name
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ['head 0', 'head 1'] * 2
        assert {'blocks.0', 'blocks.1'} <= {text.get_text() for text in ax.texts}
        dashed = [line for line in ax.get_lines() if line.get_linestyle() == '--']
        assert [list(line.get_ydata()) for line in dashed] == [[1, 1]]

        expected = [
            torch.stack([row_entropy(maps_of(model, im)[key]['weights'][0, h]) for im in images])
            for key in ('blocks.0', 'blocks.1') for h in range(2)]
        # a violin has lines at its smallest, its median and its largest value
        lines = [lines.get_segments() for lines in ax.collections if hasattr(lines, 'get_segments')]
        drawn = np.array([y for segments in lines for segment in segments for y in segment[:, 1]])
        values = np.array([v.item() for e in expected for v in (e.min(), e.quantile(0.5), e.max())])
        distances = np.abs(drawn[:, None] - values)
        assert distances.min(0).max() < 1e-5 and distances.min(1).max() < 1e-5
    assert '3 images of noise' in texts(figure) and 'uniform' in texts(figure) and 'reg 0.1' in texts(figure)


def test_entropies(models, image):
    images = [image, image.rotate(90), image.rotate(180)]
    values = figures.entropies(models['cct_2'], images, batch_size=2)
    assert {key: value.shape for key, value in values.items()} == {'blocks.0': (3, 2, 64), 'blocks.1': (3, 2, 64)}
    expected = row_entropy(maps_of(models['cct_2'], images[2])['blocks.1']['weights'][0])
    torch.testing.assert_close(values['blocks.1'][2], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('depth', [4, 40])
def test_entropy_of_deep_models(image, depth):
    model = timm.create_model('cct_2', depth=depth)
    figure = figures.entropy({'deep': model}, [image])
    axes, _ = panels(figure)
    assert 'head' in texts(figure).split()
    assert len(axes[0].get_xticks()) == 2 * depth


@pytest.mark.parametrize('value, text', [
    (0.5, '0.500'), (0.9994, '0.999'), (0.99998, '1−2e−5'), (1 - 1e-7, '>1−1e−6'), (1., '>1−1e−6'),
    (float('nan'), 'nan')])
def test_relative_entropy(value, text):
    assert figures.relative_entropy(value) == text


# reg

def test_reg(models, image):
    model = models['cct_2_sot_qk']
    regs = (0.02, 0.1, 2.)
    figure = figures.reg({'cct_2_sot_qk': model}, image, regs=regs, layer=0, head=1, image_name='noise.png')
    axes, (bar,) = panels(figure)
    heatmaps, histograms = np.array(axes).reshape(2, 3)
    for reg, ax, histogram in zip(regs, heatmaps, histograms):
        # in the first layer Q and K do not depend on reg, so a model that has it everywhere has the same matrix
        changed = make('cct_2_sot_qk', sot_reg=reg)
        changed.load_state_dict(model.state_dict())
        matrix = maps_of(changed, image)['blocks.0']['sot'][0, 1]
        np.testing.assert_allclose(heatmap(ax), matrix, atol=1e-6)
        assert sum(patch.get_height() for patch in histogram.patches) == matrix.numel()
        assert ax.get_title() == f'reg {reg:g}' + (" (the model's)" if reg == 0.1 else '')
    assert_same_limits(list(histograms))
    assert_same_colours(list(heatmaps))
    assert heatmaps[0].get_images()[0].get_clim() == (0, 1) and bar_label(bar) == 'entry of the SOT matrix'
    assert {layer.attn.reg for layer in model.blocks} == {0.1}
    assert 'cct_2_sot_qk · blocks.0 · head 1' in texts(figure) and 'image noise.png' in texts(figure)


def test_settings_of_the_solver(image):
    model = timm.create_model('cct_2', attn='sot_q', sot_reg=0.2, sot_iters=3, sot_tol=0.05)
    compared, over_regs = (texts(draw({'m': model}, image)) for draw in (figures.compare, figures.reg))
    assert 'm · blocks.1 · head 0 · sot_q, reg 0.2, 3 iterations, tol 0.05' in compared
    assert 'm · blocks.1 · head 0 · sot_q, 3 iterations, tol 0.05' in over_regs
    # a variant is said where the name does not say it, or begins with it by chance
    assert 'cct_2_sot_qk · blocks.1 · head 0 · sot_q, 3 it' in texts(figures.reg({'cct_2_sot_qk': model}, image))
    assert 'cct_2_sot_q (x) · blocks.1 · head 0 · 3 it' in texts(figures.reg({'cct_2_sot_q (x)': model}, image))


# All figures

CALLS = {
    'compare': lambda models, image, **kwargs: figures.compare(models, image, **kwargs),
    'heads': lambda models, image, **kwargs: figures.heads(models, image, **kwargs),
    'patches': lambda models, image, **kwargs: figures.patches(models, image, **kwargs),
    'entropy': lambda models, image, **kwargs: figures.entropy(models, [image], **kwargs),
}


@pytest.mark.parametrize('figure', CALLS)
def test_dropout_is_off_unless_asked_for(image, figure):
    model = make('cct_2', attn_drop_rate=0.5, drop_path_rate=0.9, proj_drop_rate=0.9).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    seen = {}
    block = model.blocks[0]
    block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.update(dropped=(out == 0).any()))
    block.mlp.drop1.register_forward_hook(lambda module, args, out: seen.update(mlp=(out == 0).float().mean()))

    drawn = CALLS[figure]({'m': model}, image)
    assert not seen['dropped'] and 'dropout' not in texts(drawn)
    drawn = CALLS[figure]({'m': model}, image, dropout=True)
    assert seen['dropped'] and 'attention dropout on' in texts(drawn)
    assert seen['mlp'] < 0.5, 'only the dropout of the attention weights'
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize('extension, start', [('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')])
def test_formats(models, image, tmp_path, extension, start):
    path = tmp_path / f'figure.{extension}'
    figures.heads(models, image).savefig(path)
    assert path.read_bytes().startswith(start)


def test_text_is_inside_and_apart(models, image):
    """At README width nothing is cut off, and titles of panels do not run into each other."""
    shown = {**models, 'cct_2_sot_qk_nosoftmax': timm.create_model('cct_2_sot_qk_nosoftmax')}
    for draw in (figures.compare, figures.patches):
        figure = draw(shown, image, image_name='a/folder/with/an/image_0001.jpeg')
        figure.set_dpi(100)
        figure.draw_without_rendering()
        width, height = figure.canvas.get_width_height()
        assert width <= 900
        labels = [label for ax in figure.axes for label in (ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label)]
        for label in [*labels, *(part._suptitle for part in [figure, *figure.subfigs])]:
            box = label.get_window_extent()
            assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, label
        titles = [title for ax in figure.axes for title in (ax.title, ax._left_title) if title.get_text().strip()]
        titles = [(title.get_window_extent().padded(-2), title.get_text()) for title in titles]
        for i, (box, text) in enumerate(titles):
            for other, other_text in titles[:i]:
                if '\n' not in text + other_text:
                    assert not box.overlaps(other), (text, other_text)


@pytest.mark.parametrize('call, message', [
    (lambda m, i: figures.compare(m, i, layer=2),
     r'cct_2 has no attention layer 2; choose a number from -2 to 1 or one of blocks\.0, blocks\.1'),
    (lambda m, i: figures.compare(m, i, layer='blocks.7'), r'no attention layer blocks\.7'),
    (lambda m, i: figures.reg({'vit': mixed()}, i, regs=[0.1], layer=0),
     r'blocks\.0 of vit makes no SOT matrix; these do: blocks\.1\.'),
    (lambda m, i: figures.compare(m, i, head=2), "cct_2 has no head 2 in blocks.1; choose one from 0 to 1, or 'mean'"),
    (lambda m, i: figures.compare(m, i, head='first'), 'no head first'),
    (lambda m, i: figures.heads(m, i, matrix='sot'), 'cct_2 has no SOT matrix'),
    (lambda m, i: figures.heads(m, i, matrix='weight'), "matrix='weight' is unknown; choose one of .*'weights'"),
    (lambda m, i: figures.patches(m, i, queries=[(0, 8)]), 'patch 0,8 is not in the grid of cct_2, .* columns 0 to 7'),
    (lambda m, i: figures.reg(m, i), 'cct_2 has no SOT matrix'),
    (lambda m, i: figures.reg(m, i, regs=[0.]), r'reg=0\.0 must be a positive finite number'),
])
def test_user_errors(models, image, call, message):
    with pytest.raises(ValueError, match=message):
        call(models, image)


def test_model_without_a_grid(image):
    model = timm.create_model('vit_tiny_patch16_224', reg_tokens=2, **TINY)
    figures.patches({'registers': model}, image)  # known: num_prefix_tokens
    model.num_prefix_tokens = 0
    with pytest.raises(ValueError, match='cannot tell where in the image the 19 tokens of VisionTransformer are'):
        figures.patches({'registers': model}, image)


def test_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if re.match(r'matplotlib($|\.)|timm_sot\.viz\.figures', name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ImportError, match=r"pip install 'timm-sot\[viz\]'"):
        import timm_sot.viz.figures  # noqa: F401


@pytest.mark.parametrize('layer', [None, 1, -2, 'blocks.1'])
def test_layers_count_as_those_of_apply_sot(vit, image, layer):
    """All of them, also where few have a SOT matrix; by default it is the last of these."""
    maps = attention_maps(vit.eval(), model_input(vit, image)[None])
    assert figures.find_layer(maps, layer, 'vit', 'sot') == 'blocks.1'
    assert figures.find_layer(maps, None, 'vit') == 'blocks.2'


def test_a_layer_without_the_matrix(image):
    """It is refused, whichever way it is named, and not taken for another."""
    model = apply_sot(timm.create_model('vit_tiny_patch16_224', **{**TINY, 'depth': 4}), 'sot_qk', blocks=[-2, -1])
    for draw in (figures.reg, lambda *args, **kwargs: figures.patches(*args, matrix='sot', **kwargs)):
        for layer, key in ((None, 'blocks.3'), (-1, 'blocks.3'), (-2, 'blocks.2'), (2, 'blocks.2')):
            assert key in texts(draw({'vit': model}, image, layer=layer))
        for layer, key in ((0, 'blocks.0'), (1, 'blocks.1'), (-3, 'blocks.1'), ('blocks.0', 'blocks.0')):
            message = rf'{key} of vit makes no SOT matrix; these do: blocks\.2, blocks\.3\.'
            with pytest.raises(ValueError, match=message):
                draw({'vit': model}, image, layer=layer)


def test_the_distance_is_said():
    """Where it is not the default, and of a layer that has one."""
    for model, said in (
            (timm.create_model('cct_2_sot_qk', sot_distance='cosine'), True),
            (timm.create_model('cct_2_sot_qk'), False),
            (timm.create_model('cct_2_sot_shares', sot_distance='cosine'), False)):
        assert ('cosine distance' in figures.describe('model', model, 'blocks.1', 0)) == said


def test_compiled_model(models, image):
    compiled = {name: torch.compile(model) for name, model in models.items()}
    for draw in (figures.heads, figures.patches, figures.compare):
        for actual, wanted in zip(panels(draw(compiled, image))[0], panels(draw(models, image))[0]):
            for shown, expected in zip(actual.get_images(), wanted.get_images()):
                np.testing.assert_array_equal(shown.get_array(), expected.get_array())

""" Figures of attention

Each function runs the models that it is given and returns a matplotlib Figure. Panels that show the same quantity share
their axes and colours, so they can be compared. Models are in evaluation mode while they are looked at, whatever mode
they are in otherwise; `dropout=True` switches the dropout of the attention weights on, and nothing else.
"""
import math
import re
from contextlib import contextmanager
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

try:
    from matplotlib.figure import Figure
except ImportError as e:
    raise ImportError("the figures need matplotlib; install it with: pip install 'timm-sot[viz]'") from e
from matplotlib import patheffects, rc_context
from matplotlib.patches import Rectangle

from ..patch import attention_layers
from .inputs import model_input, shown_pixels, token_grid
from .maps import attention_entropy, attention_maps, attributes_set, rows_of_sum_one

__all__ = ['compare', 'entropy', 'heads', 'patches', 'reg']

WIDTH = 9  # inches: 900 pixels, what a README has room for, at the 100 dots an inch for which 9-point text is legible
STYLE = {'font.size': 9, 'axes.titlesize': 9, 'figure.titlesize': 10, 'xtick.labelsize': 8, 'ytick.labelsize': 8}
CMAP = 'viridis'
BLUE, ORANGE = '#0072b2', '#d55e00'  # of Okabe and Ito's colours, which all eyes can tell apart

MATRICES = ('scores', 'sot', 'weights')
LABELS = {'scores': r'score $QK^\top d^{-1/2}$', 'sot': 'entry of the SOT matrix', 'weights': 'attention weight'}

Models = Mapping[str, nn.Module]
Maps = Dict[str, Dict[str, torch.Tensor]]


@rc_context(STYLE)
def compare(
        models: Models,
        image: Image.Image,
        *,
        layer: Optional[Union[int, str]] = None,
        head: Union[int, str] = 0,
        image_name: str = '',
        dropout: bool = False,
) -> Figure:
    """Histogram and heatmap of scores, SOT matrix and weights, of one head of each model, for one image.

    Args:
        models: Models by the name that the figure gives them.
        image: Image for all of them.
        layer: Which attention layer: its number among all of them, also from the end, or the name of its block; None
            for the last that has what is drawn.
        head: Which head, or 'mean' for the mean over heads.
        image_name: What the figure calls the image.
        dropout: Apply the models' dropout to the attention weights.
    """
    rows = []
    for name, model in models.items():
        maps = maps_of(model, [image], dropout)
        key = find_layer(maps, layer, name)
        matrices = {kind: pick_head(matrix[0], head, name, key) for kind, matrix in maps[key].items()}
        rows.append((name, model, key, matrices))
    scores, weights = ([matrices[kind] for *_, matrices in rows] for kind in ('scores', 'weights'))
    limits = {
        'scores': (min(m.min().item() for m in scores), max(m.max().item() for m in scores)),
        'sot': (0., 1.),
        'weights': (0., max(m.max().item() for m in weights)),
    }
    most = max(m.numel() for m in scores)

    figure = new_figure(4.6 * len(rows) + 0.3)
    figure.suptitle(about(image_name, dropout))
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (name, model, key, matrices) in zip(parts, rows):
        part.suptitle(describe(name, model, key, head), weight='bold')
        attention = layer_of(model, key)
        learned, source = getattr(attention, 'learned', False), 'the softmax of the scores'
        if learned:
            source = 'the plan itself' if attention.iters else 'the softmax of the cosines'
        for kind, (histogram, heatmap) in zip(MATRICES, part.subplots(2, 3, height_ratios=(2, 3)).T):
            if kind in matrices:
                matrix = matrices[kind]
                draw_histogram(histogram, matrix, limits[kind], most)
            else:  # the axes and colours remain, for the panels of all models to be of one size
                matrix = torch.full_like(matrices['weights'], float('nan'))
                heatmap.text(
                    0.5, 0.5, f'the weights are\n{source}', ha='center', va='center', transform=heatmap.transAxes)
                set_histogram_axes(histogram, limits[kind], most)
            if kind == 'weights' and (getattr(attention, 'softmax', True) or learned):
                mark_uniform(histogram, matrix)
            histogram.set(title=panel_title(kind, attention), xlabel=LABELS[kind], ylabel='entries')
            part.colorbar(draw_heatmap(heatmap, matrix, limits[kind]), ax=heatmap, label=LABELS[kind])
            heatmap.set(xlabel='key token', ylabel='query token')
    return figure


@rc_context(STYLE)
def heads(
        models: Models,
        image: Image.Image,
        *,
        matrix: str = 'weights',
        image_name: str = '',
        dropout: bool = False,
) -> Figure:
    """Heatmaps of one kind of matrix for all layers and heads of each model, for one image.

    Args:
        models: Models by the name that the figure gives them.
        image: Image for all of them.
        matrix: 'scores', 'sot' or 'weights'.
        image_name: What the figure calls the image.
        dropout: Apply the models' dropout to the attention weights.
    """
    shown = {}  # by model and layer, (H, N, N)
    for name, model in models.items():
        maps = maps_of(model, [image], dropout)
        check_matrix(maps, matrix, name)
        shown[name] = {key: record[matrix][0] for key, record in maps.items() if matrix in record}
    limits = shared_limits(matrix, [heads for by_layer in shown.values() for heads in by_layer.values()])
    rows = [len(by_layer) for by_layer in shown.values()]
    columns = [max(len(heads) for heads in by_layer.values()) for by_layer in shown.values()]

    side = min(2.2, (WIDTH - 1.4) / max(columns))
    figure = new_figure((side + 0.15) * sum(rows) + 0.9 * len(shown) + 0.3, width=max(5., side * max(columns) + 1.6))
    figure.suptitle(about(image_name, dropout))
    parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=rows)[:, 0]
    for part, (name, by_layer), num_columns in zip(parts, shown.items(), columns):
        settings = sorted({sot_settings(layer_of(models[name], key), name) for key in by_layer} - {''})
        part.suptitle(' · '.join([name, *settings]), weight='bold')
        share = len({heads.shape[-1] for heads in by_layer.values()}) == 1  # one number of tokens
        axes = part.subplots(len(by_layer), num_columns, squeeze=False, sharex=share, sharey=share)
        for row, (key, heads) in zip(axes, by_layer.items()):
            row[0].set_ylabel(key)
            for ax, values in zip(row, heads):
                drawn = draw_heatmap(ax, values, limits)
            for ax in row[len(heads):]:
                ax.set_axis_off()
        for h, ax in enumerate(axes[0]):
            ax.set_title(f'head {h}')
        part.supxlabel('key token', size=9)
        part.supylabel('query token', size=9)
        part.colorbar(drawn, ax=axes, label=LABELS[matrix], aspect=30, shrink=min(1., 3 / len(by_layer)))
    return figure


@rc_context(STYLE)
def patches(
        models: Models,
        image: Image.Image,
        *,
        queries: Sequence[Tuple[int, int]] = (),
        matrix: str = 'weights',
        layer: Optional[Union[int, str]] = None,
        head: Union[int, str] = 'mean',
        image_name: str = '',
        dropout: bool = False,
) -> Figure:
    """Where in the image the attention of chosen patches goes, over the image at its resolution.

    Weights are shown relative to uniform ones, as w N for N tokens, so that models of different N can be compared; the
    rows of variants without softmax, which do not sum to 1, are divided by their sum first, as they are for `entropy`.
    Class tokens and the like are not part of the image and are left out.

    Args:
        models: Models by the name that the figure gives them.
        image: Image for all of them.
        queries: Patches (row, column), counted in the token grid of the first model; for models of another grid, the
            patch at the same place. By default three on the diagonal.
        matrix: 'scores', 'sot' or 'weights'.
        layer: Which attention layer, as in `compare`.
        head: Which head, or 'mean' for the mean over heads.
        image_name: What the figure calls the image.
        dropout: Apply the models' dropout to the attention weights.
    """
    shown = []  # (model's name, model, layer, grid, pixels, (H', W', H', W') matrix over the image)
    for name, model in models.items():
        maps = maps_of(model, [image], dropout)
        check_matrix(maps, matrix, name)
        key = find_layer(maps, layer, name, matrix)
        values = maps[key][matrix][0]  # (H, N, N)
        if matrix == 'weights' and not getattr(layer_of(model, key), 'softmax', True):
            values = rows_of_sum_one(values).float()
        values = pick_head(values, head, name, key)
        N = values.shape[-1]
        height, width = token_grid(model, N)
        values = values[-height * width:, -height * width:].reshape(height, width, height, width)
        pixels = shown_pixels(model, model_input(model, image))
        shown.append((name, model, key, (height, width), pixels, values * N if matrix == 'weights' else values))
    first_grid, first_pixels = shown[0][3], shown[0][4]
    queries = queries or [(first_grid[0] * i // 4, first_grid[1] * i // 4) for i in (1, 2, 3)]
    for row, column in queries:
        if not (0 <= row < first_grid[0] and 0 <= column < first_grid[1]):
            raise ValueError(
                f'patch {row},{column} is not in the grid of {next(iter(models))}, which has rows 0 to '
                f'{first_grid[0] - 1} and columns 0 to {first_grid[1] - 1}.')
    places = [[place_in(grid, query, first_grid) for query in queries] for *_, grid, _, _ in shown]
    rows_shown = [[values[place] for place in at] for (*_, values), at in zip(shown, places)]
    limits = shared_limits(matrix, [row for rows in rows_shown for row in rows])
    label = r'attention weight / uniform weight ($w\,N$)' if matrix == 'weights' else LABELS[matrix]

    columns = 1 + 2 * len(shown)
    side = min(1.9, (WIDTH - 1.2) / columns)
    figure = new_figure((side + 0.1) * len(queries) + 1.8, width=side * columns + 1.2)
    figure.suptitle(about(image_name, dropout))
    axes = figure.subplots(len(queries), columns, squeeze=False)
    for query, ax in zip(queries, axes[:, 0]):
        ax.imshow(first_pixels.numpy(), cmap='gray', vmin=0., vmax=1.)  # the colours of one channel
        outline(ax, query, first_grid, first_pixels.shape[:2])
        ax.set_ylabel(f'patch {query[0]},{query[1]}')
    axes[0, 0].set_title('query patch')
    for m, (name, model, key, grid, pixels, _) in enumerate(shown):
        for i, (values, place) in enumerate(zip(rows_shown[m], places[m])):
            for column, mode in enumerate(('nearest', 'bilinear')):
                ax = axes[i, 1 + 2 * m + column]
                drawn = draw_overlay(ax, values, pixels, mode, limits)
                outline(ax, place, grid, pixels.shape[:2])
        # the heading is as wide as both columns and must not widen the first
        settings = sot_settings(layer_of(model, key), name) or 'softmax'
        heading = f'{name}\n{key} · {head_title(head)}\n{settings}\nnearest'
        axes[0, 1 + 2 * m].set_title(heading, loc='left').set_in_layout(False)
        axes[0, 2 + 2 * m].set_title(' \n \n \nbilinear', loc='left')
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    bar = figure.colorbar(drawn, ax=axes, label=label, location='bottom', shrink=0.6, aspect=40)
    bar.solids.set_alpha(1)
    if matrix == 'weights':
        bar.ax.axvline(1, color='white', path_effects=[patheffects.withStroke(linewidth=3, foreground='black')])
    return figure


@rc_context(STYLE)
def entropy(
        models: Models,
        images: Sequence[Image.Image],
        *,
        images_name: str = '',
        dropout: bool = False,
        batch_size: int = 8,
) -> Figure:
    """Entropy of the rows of the attention weights by layer and head, as a distribution over queries and images.

    Divided by log N, so that 1 is uniform attention, that is mean pooling, and 0 looks at a single token.

    Args:
        models: Models by the name that the figure gives them.
        images: Images for all of them.
        images_name: What the figure calls them.
        dropout: Apply the models' dropout to the attention weights.
        batch_size: Number of images at a time.
    """
    values = {name: entropies(model, images, dropout, batch_size) for name, model in models.items()}
    most = max(sum(e.shape[1] for e in by_layer.values()) for by_layer in values.values())
    columns = min(3, len(values)) if most <= 8 else 1
    rows = -(-len(values) // columns)
    figure = new_figure(2.9 * rows + 0.4)
    figure.suptitle(' · '.join([images_name or f'{len(images)} images', *([about('', dropout)] * dropout)]))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for ax in axes.flat[len(values):]:
        ax.set_axis_off()
    for ax, (name, by_layer) in zip(axes.flat, values.items()):
        draw_entropies(ax, by_layer, most)
        ax.set_title(name, weight='bold')
        settings = sorted({sot_settings(layer_of(models[name], key), name) for key in by_layer} - {''})
        ax.text(0.98, 0.03, '\n'.join(settings), ha='right', va='bottom', transform=ax.transAxes)
    for ax in axes[:, 0]:
        ax.set_ylabel(r'row entropy / $\log N$')
    return figure


@rc_context(STYLE)
def reg(
        models: Models,
        image: Image.Image,
        *,
        regs: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.),
        layer: Optional[Union[int, str]] = None,
        head: Union[int, str] = 0,
        image_name: str = '',
) -> Figure:
    """Histogram and heatmap of the SOT matrix of one head of each model over a range of regularizations.

    The coefficient of the one layer is changed: its Q and K remain what the model as it is gives it.

    Args:
        models: Models by the name that the figure gives them.
        image: Image for all of them.
        regs: Entropy regularizations.
        layer: Which attention layer, as in `compare`.
        head: Which head, or 'mean' for the mean over heads.
        image_name: What the figure calls the image.
    """
    for value in regs:
        if not 0 < value < float('inf'):
            raise ValueError(f'reg={value!r} must be a positive finite number.')
    shown = []
    for name, model in models.items():
        maps = maps_of(model, [image], False)
        check_matrix(maps, 'sot', name)
        key = find_layer(maps, layer, name, 'sot')
        matrices = []
        for value in regs:
            with attributes_set(layer_of(model, key), {'reg': float(value)}):
                matrices.append(pick_head(maps_of(model, [image], False)[key]['sot'][0], head, name, key))
        shown.append((name, model, key, matrices))
    most = max(matrix.numel() for *_, matrices in shown for matrix in matrices)

    figure = new_figure(3.7 * len(shown) + 0.3)
    figure.suptitle(about(image_name, False))
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, (name, model, key, matrices) in zip(parts, shown):
        settings = sot_settings(layer_of(model, key), name, with_reg=False)
        part.suptitle(' · '.join(filter(None, [name, key, head_title(head), settings])), weight='bold')
        axes = part.subplots(2, len(regs), squeeze=False, sharex='row', sharey='row', height_ratios=(5, 4))
        for value, matrix, (heatmap, histogram) in zip(regs, matrices, axes.T):
            drawn = draw_heatmap(heatmap, matrix, (0., 1.))
            own = " (the model's)" if value == layer_of(model, key).reg else ''
            heatmap.set(title=f'reg {value:g}{own}', xlabel='key token')
            draw_histogram(histogram, matrix, (0., 1.), most, bins=25)
            histogram.set(xlabel='SOT entry', box_aspect=0.8)
        axes[0, 0].set_ylabel('query token')
        axes[1, 0].set_ylabel('entries')
        part.colorbar(drawn, ax=axes[0], label='entry of the SOT matrix', aspect=12)
    return figure


def new_figure(height: float, width: float = WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout='constrained')


def draw_heatmap(ax, matrix: torch.Tensor, limits: Tuple[float, float]):
    """A matrix (N, N) as colours, one pixel an entry, the first query at the top."""
    ax.set_box_aspect(1)
    return ax.imshow(matrix.numpy(), cmap=CMAP, vmin=limits[0], vmax=limits[1], interpolation='nearest')


def draw_histogram(ax, matrix: torch.Tensor, limits: Tuple[float, float], most: int, bins: int = 50) -> None:
    """Histogram of all entries; counts are logarithmic, or the few large weights would not be seen."""
    low, high = limits
    span = (low, high) if low < high else (low - 0.5, high + 0.5)
    ax.hist(matrix.flatten().numpy(), bins=bins, range=span, color=BLUE)
    set_histogram_axes(ax, limits, most)


def set_histogram_axes(ax, limits: Tuple[float, float], most: int) -> None:
    low, high = limits
    margin = 0.02 * (high - low) or 0.5
    ax.set(xlim=(low - margin, high + margin), yscale='log', ylim=(0.5, 5 * most))


def mark_uniform(ax, weights: torch.Tensor) -> None:
    """A line at the weight of uniform attention, behind the bars, and the range of the weights in numbers."""
    N = weights.shape[-1]
    ax.axvline(1 / N, color=ORANGE, linestyle='--', zorder=0, label=f'uniform: {1 / N:.4f}')
    title = f'range {weights.min():.4f}–{weights.max():.4f}'
    ax.legend(
        loc='upper right', frameon=False, borderaxespad=0.2, handlelength=1.5, fontsize=8, title=title,
        title_fontsize=8)


def draw_overlay(ax, values: torch.Tensor, pixels: torch.Tensor, mode: str, limits: Tuple[float, float]):
    """Values of a token grid (H', W') over a grey copy of the image, at the resolution of the image (H, W)."""
    # faint, for the colours over it to be read
    ax.imshow(pixels.mean(dim=-1).numpy(), cmap='gray', vmin=-0.5, vmax=1.5)
    values = F.interpolate(
        values[None, None], pixels.shape[:2], mode=mode, align_corners=False if mode == 'bilinear' else None)[0, 0]
    return ax.imshow(values.numpy(), cmap=CMAP, vmin=limits[0], vmax=limits[1], alpha=0.65, interpolation='nearest')


def outline(ax, place: Tuple[int, int], grid: Tuple[int, int], size: Tuple[int, int]) -> None:
    """A frame around the patch at (row, column) of the token grid, on an image of `size` (height, width)."""
    height, width = size[0] / grid[0], size[1] / grid[1]
    ax.add_patch(Rectangle(
        (place[1] * width - 0.5, place[0] * height - 0.5), width, height, fill=False, edgecolor='white', linewidth=1.5,
        clip_on=False, path_effects=[patheffects.withStroke(linewidth=3.5, foreground='black')]))


def draw_entropies(ax, by_layer: Dict[str, torch.Tensor], most: int) -> None:
    """A violin for each head with its median above it; layers take turns in colour.

    Args:
        ax: Where to.
        by_layer: Entropies by layer, (images, H, N).
        most: The largest number of violins of any axes of the figure: what is written beside them depends on it.
    """
    few, many = most <= 4, most > 32
    position, ticks = 0., {}
    for i, (key, values) in enumerate(by_layer.items()):
        color = (BLUE, ORANGE)[i % 2]
        start = position
        for h, head in enumerate(values.transpose(0, 1).flatten(1)):  # (images, H, N) -> (H, images * N)
            for name, artists in ax.violinplot(head.numpy(), [position], widths=0.8, showmedians=True).items():
                for artist in artists if name == 'bodies' else [artists]:
                    artist.set_color(color)
            if not many:
                ax.text(
                    position, 1.03, relative_entropy(head.quantile(0.5).item()), ha='center', va='bottom', fontsize=8,
                    color=color, rotation=0 if few else 90)
            ticks[position] = f'head {h}' if few else f'{h}'
            position += 1
        ax.text(
            (start + position - 1) / 2, -0.11, key, ha='center', va='top', color=color,
            transform=ax.get_xaxis_transform())
        position += 0.5
    if not few:  # the ticks are bare numbers
        ax.text(-0.01, -0.03, 'head', ha='right', va='top', fontsize=8, transform=ax.transAxes)
    ax.axhline(1, color='black', linestyle='--', linewidth=1)
    ax.set(xticks=[*ticks], xticklabels=ticks.values(), xlim=(-0.7, position - 0.8))
    ax.set(ylim=(0, 1.12 if few or many else 1.3))
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1], ['0', '0.2', '0.4', '0.6', '0.8', 'uniform: 1'])


def relative_entropy(value: float) -> str:
    """A number with its distance from 1 where four digits would not show any."""
    if value < 0.9995 or math.isnan(value):  # of a single token
        return f'{value:.3f}'
    return f'1−{1 - value:.0e}'.replace('e-0', 'e−') if value < 1 - 1e-6 else '>1−1e−6'


def entropies(
        model: nn.Module,
        images: Sequence[Image.Image],
        dropout: bool = False,
        batch_size: int = 8,
) -> Dict[str, torch.Tensor]:
    """Entropies relative to uniform attention, by layer, (images, H, N)."""
    batches: Dict[str, List[torch.Tensor]] = {}
    for start in tqdm(range(0, len(images), batch_size), unit='batch', delay=1., leave=False, disable=None):
        x = input_of(model, images[start:start + batch_size])
        with evaluation(model, dropout):
            for key, values in attention_entropy(model, x).items():
                batches.setdefault(key, []).append(values.cpu())
    return {key: torch.cat(values) for key, values in batches.items()}


def input_of(model: nn.Module, images: Sequence[Image.Image]) -> torch.Tensor:
    """Images as a batch in the model's dtype and on its device."""
    x = torch.stack([model_input(model, image) for image in images])
    reference = next(model.parameters(), x)
    return x.to(reference.device, reference.dtype)


def maps_of(model: nn.Module, images: Sequence[Image.Image], dropout: bool) -> Maps:
    """`attention_maps` of images in evaluation mode, on the CPU and in float32."""
    x = input_of(model, images)
    with evaluation(model, dropout):
        maps = attention_maps(model, x)
    return {key: {kind: matrix.float().cpu() for kind, matrix in record.items()} for key, record in maps.items()}


@contextmanager
def evaluation(model: nn.Module, dropout: bool = False) -> Iterator[None]:
    """A context in which the model is in evaluation mode, its attention dropout excepted if that is asked for."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    if dropout:
        for layer in attention_layers(model).values():
            layer.attn_drop.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def find_layer(maps: Maps, layer: Optional[Union[int, str]], name: str, matrix: str = 'weights') -> str:
    """The key of a layer given by key or by number, by default of the last that has `matrix`."""
    keys = list(maps)
    having = [key for key in keys if matrix in maps[key]]
    if layer is None:
        return having[-1]
    if isinstance(layer, int) and -len(keys) <= layer < len(keys):
        layer = keys[layer]
    if layer not in keys:
        raise ValueError(
            f'{name} has no attention layer {layer}; choose a number from {-len(keys)} to {len(keys) - 1} or one of '
            f'{", ".join(keys)}.')
    if layer not in having:
        raise ValueError(f'{layer} of {name} makes no SOT matrix; these do: {", ".join(having)}.')
    return layer


def pick_head(matrix: torch.Tensor, head: Union[int, str], name: str, key: str) -> torch.Tensor:
    """One head of a matrix, (H, N, N) -> (N, N), or their mean."""
    if head == 'mean':
        return matrix.mean(dim=0)
    if not isinstance(head, int) or not -len(matrix) <= head < len(matrix):
        raise ValueError(f"{name} has no head {head} in {key}; choose one from 0 to {len(matrix) - 1}, or 'mean'.")
    return matrix[head]


def check_matrix(maps: Maps, matrix: str, name: str) -> None:
    if matrix not in MATRICES:
        raise ValueError(f'matrix={matrix!r} is unknown; choose one of {MATRICES}.')
    if not any(matrix in record for record in maps.values()):
        raise ValueError(f'{name} has no SOT matrix: only sot_q, sot_qk and sot_qkt make one, with or '
                         f'without softmax.')


def shared_limits(matrix: str, values: Sequence[torch.Tensor]) -> Tuple[float, float]:
    """Limits of the colours for all panels of a kind of matrix."""
    low = min(v.min().item() for v in values) if matrix == 'scores' else 0.
    return low, 1. if matrix == 'sot' else max(v.max().item() for v in values)


def place_in(grid: Tuple[int, int], place: Tuple[int, int], of: Tuple[int, int]) -> Tuple[int, int]:
    """The patch of one token grid in which the middle of a patch of another lies."""
    row, column = (int((p + 0.5) * size / size_of) for p, size, size_of in zip(place, grid, of))
    return row, column


def layer_of(model: nn.Module, key: str) -> nn.Module:
    model = getattr(model, '_orig_mod', model)  # of torch.compile, which `attention_maps` looks into, too
    layers = {name.removesuffix('.attn'): layer for name, layer in attention_layers(model).items()}
    return layers[key]


def sot_settings(layer: nn.Module, name: str, with_reg: bool = True) -> str:
    """What there is to say of an SOT layer of the model called `name`, '' for one with softmax attention."""
    if not getattr(layer, 'operands', '') and not getattr(layer, 'learned', False):
        return ''
    named = re.search(rf'{layer.variant}(?!\w)', name)  # sot_q is not named by cct_2_sot_qk
    settings = [] if named else [layer.variant]
    if with_reg:
        settings.append('reg learned' if layer.learned else f'reg {layer.reg:g}')
    if layer.operands and layer.distance != 'euclidean':
        settings.append(f'{layer.distance} distance')
    if layer.iters != 10:
        settings.append(f'{layer.iters} iterations')
    if layer.tol is not None:
        settings.append(f'tol {layer.tol:g}')
    return ', '.join(settings)


def describe(name: str, model: nn.Module, key: str, head: Union[int, str]) -> str:
    """Model, layer, head and settings, as a title."""
    return ' · '.join(filter(None, [name, key, head_title(head), sot_settings(layer_of(model, key), name)]))


def head_title(head: Union[int, str]) -> str:
    return 'mean over heads' if head == 'mean' else f'head {head}'


def about(image_name: str, dropout: bool) -> str:
    """What the whole figure is of, as a title."""
    return ' · '.join([f'image {image_name}'] * bool(image_name) + ['attention dropout on'] * dropout)


def panel_title(kind: str, layer: nn.Module) -> str:
    """A matrix in the field's words, as the layer makes it."""
    operands, learned = getattr(layer, 'operands', ''), getattr(layer, 'learned', False)
    sot = {'q': 'SOT(Q)', 'qk': 'SOT(Q, K)', 'qkt': r'SOT(Q, $K^\top$)'}.get(operands, 'SOT')
    if kind == 'scores':
        return 'scores (unused here)' if operands or learned else 'scores'
    if kind == 'sot' and not operands:
        return 'no SOT matrix'
    if kind == 'sot':
        return f'{sot}, before softmax' if layer.softmax else sot
    if learned:
        return 'weights, plan with learned shares' if layer.iters else 'weights, softmax of cosines'
    if not operands:
        return 'weights, softmax of scores'
    return 'weights, after softmax' if layer.softmax else rf'weights, {sot} $d^{{-1/2}}$'

""" Studies worth running, as arguments of `Study` """
from dataclasses import dataclass
from typing import Any, Dict, NamedTuple, Sequence, Tuple

__all__ = ['ORIGINAL', 'PRESETS', 'Study']

Row = Tuple[str, Dict[str, Any]]  # model and its arguments


@dataclass
class Study:
    """What is trained: every row with every seed, and on what."""
    rows: Sequence[Row]
    seeds: Sequence[int] = (0,)
    data_dir: str = ''  # the digits of scikit-learn
    dataset: str = ''  # what timm calls a dataset in `data_dir`, '' for an image folder
    download: bool = False
    fraction: float = 1.
    holdout: float = 0.


SOT_ROWS = ('cct_2_sot_q', 'cct_2_sot_q_nosoftmax', 'cct_2_sot_qk', 'cct_2_sot_qk_nosoftmax', 'cct_2_sot_qkt')

# the recipe of the original runs
ORIGINAL = dict(
    epochs=30, batch_size=128, lr=5e-4, weight_decay=3e-2, smoothing=0.1, schedule='original',
    augment=('autoaugment', 'crop', 'flip'))


class Preset(NamedTuple):
    """A study and how its models are trained; `recipe` holds arguments of `Recipe`."""
    rows: Sequence[Row]
    seeds: Sequence[int]
    recipe: Dict[str, Any]


PRESETS: Dict[str, Preset] = {
    'quick': Preset([('cct_2', {}), ('cct_2_sot_q', {}), ('cct_2_sot_qk', {})], (0,), {}),
    'seed': Preset(
        [('cct_2', {}), *((model, dict(sot_reg=0.1, sot_tol=0.1)) for model in SOT_ROWS)], range(5), ORIGINAL),
    'sweep': Preset(
        [('cct_2', {}), *(('cct_2_sot_qk', dict(sot_reg=i / 40, sot_tol=0.1)) for i in range(1, 41))], (0,), ORIGINAL),
    'shares': Preset(
        # what the model has beside its attention, alone; the model; and the scores of its attention through softmax
        [('cct_2', {}), ('cct_2', dict(context=True)), ('cct_2_sot_shares', {}),
         ('cct_2_sot_shares', dict(sot_iters=0))], range(5), ORIGINAL),
}

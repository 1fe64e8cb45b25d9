""" What the original experiment published """
import pytest
from study_lines import CIFAR, HELD_OUT_DATA, RECIPE

from timm_sot.study import original
from timm_sot.study.presets import PRESETS


def test_numbers():
    """Mean and standard deviation that are known of the 40 numbers."""
    best = [best for best, _ in original.SWEEP.values()]
    assert [*original.SWEEP] == [kwargs['sot_reg'] for _, kwargs in PRESETS['sweep'].rows[1:]]
    assert sum(best) / 40 == pytest.approx(76.24, abs=0.005) and all(a >= b for a, b in original.SWEEP.values())
    assert [*original.ROWS] == [model for model, _ in PRESETS['seed'][0]]


@pytest.mark.parametrize('changes, epochs, data, expected', [
    ({}, 30, CIFAR, True),
    ({'precision': 'bfloat16'}, 30, 'CIFAR-10 50000+10000 sha256:0', True),
    ({}, 30, original.JPEG.replace('cifar10-jpeg', 'images'), True),
    ({'lr': 0.1}, 30, CIFAR, False),
    ({'augment': ['crop', 'flip']}, 30, CIFAR, False),
    ({}, 200, CIFAR, False),
    ({}, 30, HELD_OUT_DATA, False),
    ({}, 30, 'cifar100 50000+10000 sha256:0', False),
    ({}, 30, 'svhn 50000+10000 sha256:0', False),
])
def test_is_original(changes, epochs, data, expected):
    recipe = {**RECIPE, 'augment': [*RECIPE['augment']], **changes}  # as read from study.json
    assert original.is_original(recipe, epochs, data) is expected


def test_unknown_recipe():
    assert not original.is_original(None, 30, CIFAR)

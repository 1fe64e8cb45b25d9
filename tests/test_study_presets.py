""" Studies worth running """
import timm

import timm_sot  # noqa: F401
from timm_sot.study.controls import control_of
from timm_sot.study.engine import Recipe
from timm_sot.study.presets import PRESETS
from timm_sot.study.runner import build_model


def test_presets():
    for rows, seeds, settings in PRESETS.values():
        assert len(seeds) == len(set(seeds)) and Recipe(**settings)
        for model, kwargs in rows:
            build_model((model, kwargs), 10, 0)


def test_seed_preset_is_the_original_experiment():
    rows, seeds, settings = PRESETS['seed']
    attention = [timm.create_model(model, **kwargs).blocks[0].attn for model, kwargs in rows]
    assert [layer.variant for layer in attention] == [
        'softmax', 'sot_q', 'sot_q_nosoftmax', 'sot_qk', 'sot_qk_nosoftmax', 'sot_qkt']
    assert all((layer.reg, layer.tol, layer.iters) == (0.1, 0.1, 10) for layer in attention[1:])
    assert len(seeds) == 5


def test_sweep_preset():
    (softmax, *rows), seeds, settings = PRESETS['sweep']
    assert softmax == PRESETS['seed'].rows[0], 'the band behind the sweep, and the same run in one folder'
    assert settings == PRESETS['seed'].recipe and set(seeds) <= set(PRESETS['seed'].seeds)
    regs = [kwargs['sot_reg'] for _, kwargs in rows]
    assert regs == [0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.275, 0.3, 0.325, 0.35, 0.375, 0.4,
                    0.425, 0.45, 0.475, 0.5, 0.525, 0.55, 0.575, 0.6, 0.625, 0.65, 0.675, 0.7, 0.725, 0.75, 0.775, 0.8,
                    0.825, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975, 1.]


def test_shares_preset_has_the_controls():
    rows, seeds, settings = PRESETS['shares']
    assert settings == PRESETS['seed'].recipe and len(seeds) == 5
    softmax, context, shares, control = rows
    assert softmax == PRESETS['seed'].rows[0] and shares == ('cct_2_sot_shares', {})
    assert control == control_of(*shares)
    parameters = [
        {name for name, _ in timm.create_model(model, **kwargs).named_parameters()} for model, kwargs in rows]
    of_context = {f'blocks.{i}.context.weight' for i in range(2)}
    of_shares = {f'blocks.{i}.attn.{name}' for i in range(2) for name in ('log_reg', 'share')}
    assert parameters[1] == parameters[0] | of_context
    assert parameters[2] == parameters[1] | of_shares

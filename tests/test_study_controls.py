""" Which row is the control of which """
import pytest

from timm_sot.study.controls import TRIED, control_of


@pytest.mark.parametrize('model, kwargs, control', [
    ('cct_2_sot_shares', {}, {'sot_iters': 0}),
    ('cct_2_sot_shares', {'sot_iters': 3, 'sot_reg': 0.2}, {'sot_iters': 0, 'sot_reg': 0.2}),
    ('cct_7', {'attn': 'sot_shares'}, {'attn': 'sot_shares', 'sot_iters': 0}),
    ('cct_2', {'candidate': 'plan', 'img_size': 16}, {'candidate': 'cosine', 'img_size': 16}),
])
def test_control(model, kwargs, control):
    assert control_of(model, kwargs) == (model, control)
    assert control_of(model, control) is None, 'of a control there is none'


@pytest.mark.parametrize(
    'model, kwargs', [('cct_2', {}), ('cct_2_sot_qk', {'sot_reg': 0.1}), ('cct_2', {'attn': 'sot_q'})])
def test_rows_without_a_control(model, kwargs):
    assert control_of(model, kwargs) is None


def test_controls_of_what_was_tried_are_no_forms():
    assert not set(TRIED) & set(TRIED.values())

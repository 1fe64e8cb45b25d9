""" SOT attention by name, in models that take an attn_layer """
import pickle

import pytest
import timm
import torch
from timm.models import save_for_hf, vision_transformer

from timm_sot import SOTAttention, apply_sot
from timm_sot.attention import VARIANTS
from timm_sot.layers import NAMED_LAYERS, get_model_args, update_model_args

pytestmark = pytest.mark.skipif(
    not hasattr(vision_transformer, 'ATTN_LAYERS'), reason='needs the names of timm 1.0.23')


@pytest.mark.parametrize('variant', [name for name in VARIANTS if name != 'softmax'])
def test_is_what_apply_sot_makes(variant):
    kwargs = dict(img_size=64, qk_norm=True, attn_drop_rate=0.1) if variant != 'sot_qkt' else {}
    torch.manual_seed(0)
    model = timm.create_model('test_vit', attn_layer=variant, **kwargs).eval()
    torch.manual_seed(0)
    applied = apply_sot(timm.create_model('test_vit', **kwargs), variant).eval()
    for block, other in zip(model.blocks, applied.blocks):
        assert type(block.attn) is type(other.attn) is SOTAttention
        assert block.attn.extra_repr() == other.attn.extra_repr()
        assert block.attn.attn_drop.p == other.attn.attn_drop.p
    state = applied.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    if variant != 'sot_qkt':  # whose tokens are not as many as its channels
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(model(x), applied(x))
    pickle.loads(pickle.dumps(model))


def test_apply_sot_changes_it():
    model = timm.create_model('test_vit', attn_layer='sot_shares')
    apply_sot(model, 'softmax')
    assert {type(block.attn) for block in model.blocks} == {timm.layers.Attention}


def test_names():
    assert set(NAMED_LAYERS) == set(VARIANTS) - {'softmax'}
    assert issubclass(NAMED_LAYERS['sot_q'], SOTAttention) and NAMED_LAYERS['sot_q'].__name__ == 'sot_q'


@pytest.mark.skipif(update_model_args is None, reason='needs the saved arguments of timm 1.0.31')
def test_saved_with_its_attention(tmp_path):
    model = timm.create_model('test_vit', attn_layer='sot_shares').eval()
    torch.nn.init.normal_(model.blocks[0].attn.share)
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(loaded(x), model(x)) and loaded.blocks[0].attn.variant == 'sot_shares'


@pytest.mark.skipif(update_model_args is None, reason='needs the saved arguments of timm 1.0.31')
@pytest.mark.parametrize('before', ['', 'sot_qk', 'sot_shares'])
@pytest.mark.parametrize('after', ['softmax', 'sot_q_nosoftmax', 'sot_shares'])
def test_saved_with_the_attention_that_apply_sot_gave_it(tmp_path, before, after):
    model = apply_sot(timm.create_model('test_vit', img_size=32, attn_layer=before or 'attn'), after).eval()
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.skipif(update_model_args is None, reason='needs the saved arguments of timm 1.0.31')
@pytest.mark.parametrize('after', ['softmax', 'sot_qk', 'sot_shares'])
def test_naflexvit_is_saved_with_its_attention(tmp_path, after):
    kwargs = dict(patch_size=16, embed_dim=64, depth=2, num_heads=2, pos_embed_grid_size=(2, 2))
    model = timm.create_model('naflexvit_base_patch16_gap', attn_layer='sot_shares', num_classes=3, **kwargs)
    apply_sot(model, after).eval()
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_a_mask_that_the_model_makes_is_refused():
    """NaFlexViT's, of which patches there are."""
    model = timm.create_model('naflexvit_base_patch16_gap', depth=1, embed_dim=64, num_heads=2).eval()
    patches = dict(
        patches=torch.randn(1, 4, 16 * 16 * 3), patch_coord=torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]]),
        patch_valid=torch.tensor([[True, True, True, False]]))
    model(patches)
    apply_sot(model, 'sot_qk')
    model(torch.randn(1, 3, 32, 32))
    with pytest.raises(NotImplementedError, match='attn_mask'):
        model(patches)


@pytest.mark.skipif(update_model_args is None, reason='needs the saved arguments of timm 1.0.31')
@pytest.mark.parametrize('wrap', [torch.compile, torch.nn.Sequential])
def test_attention_is_recorded_in_the_model_that_another_module_holds(wrap):
    model = timm.create_model('test_vit', img_size=32)
    apply_sot(wrap(model), 'sot_qk')
    assert get_model_args(model)['attn_layer'] == 'sot_qk'


@pytest.mark.skipif(update_model_args is None, reason='needs the saved arguments of timm 1.0.31')
def test_each_of_several_models_has_a_record_of_its_own():
    models = torch.nn.Sequential(*(timm.create_model('test_vit', img_size=32) for _ in range(2)))
    apply_sot(models, 'sot_qk', blocks=range(len(models[0].blocks)))
    assert [get_model_args(model).get('attn_layer') for model in models] == ['sot_qk', None]


@pytest.mark.skipif(update_model_args is None, reason='needs the saved arguments of timm 1.0.31')
@pytest.mark.parametrize('kwargs', [dict(reg=0.5), dict(blocks=[0])])
def test_attention_without_a_name_is_saved_without_one(tmp_path, kwargs):
    """Of a model that had one, too: it would say what is not so."""
    for before in ('attn', 'sot_q'):
        model = apply_sot(timm.create_model('test_vit', img_size=32, attn_layer=before), 'sot_qk', **kwargs)
        assert get_model_args(model)['attn_layer'] == 'attn'
    untouched = timm.create_model('test_vit', img_size=32)
    assert 'attn_layer' not in get_model_args(apply_sot(untouched, 'softmax'))


def test_softmax_has_a_name_as_well():
    """So that a sweep over the variants needs no other word for it."""
    model = timm.create_model('test_vit', attn_layer='softmax')
    assert {type(block.attn) for block in model.blocks} == {timm.layers.Attention}

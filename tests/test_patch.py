""" Self-Optimal-Transport attention inside timm models """
import copy
import math
import re

import numpy as np
import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

import timm_sot.cct
from timm_sot import SOTAttention, apply_sot

SOT = ['sot_q', 'sot_q_nosoftmax', 'sot_qk', 'sot_qk_nosoftmax', 'sot_qkt']
TINY = dict(img_size=32, patch_size=8, depth=3, embed_dim=48, num_heads=3, num_classes=5)
MODELS = {
    'vit': lambda **kwargs: timm.create_model('vit_tiny_patch16_224', **{**TINY, **kwargs}),
    'deit_distilled': lambda **kwargs: timm.create_model('deit_tiny_distilled_patch16_224', **{**TINY, **kwargs}),
    'cct': lambda **kwargs: timm.create_model('cct_2', num_classes=5, **kwargs),
}

needs_record = pytest.mark.skipif(
    timm_sot.cct.update_model_args is None, reason=f'timm {timm.__version__} keeps no record of what a model is')


def make_model(name='vit', **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name](**kwargs)
        for p in model.parameters():  # timm's initial weights are too small for attention to be anything but even
            if p.ndim == 2:
                nn.init.normal_(p, std=0.1)
    return model.eval()


def make_square_vit(**kwargs):
    """A ViT of 16 tokens and head width 16, for sot_qkt."""
    return make_model(class_token=False, global_pool='avg', **kwargs)


def make_images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def attention_layers(model):
    return [module for module in model.modules() if isinstance(module, Attention)]


def settings(model):
    return [(m.variant, m.reg, m.iters, m.tol) if type(m) is SOTAttention else type(m) for m in attention_layers(model)]


def snapshot(model):
    """Type and attributes of every module; parameters, submodules and hooks by the objects that they are."""
    return {
        name: (module, type(module), {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for name, module in model.named_modules()
    }


def assert_only_attention_gained(before, after):
    """Between two snapshots nothing went or changed, and nothing came but attributes of attention layers."""
    assert before.keys() == after.keys()
    for name, (module, cls, attributes) in before.items():
        module_after, cls_after, attributes_after = after[name]
        assert module_after is module
        if issubclass(cls, Attention):
            assert {k: attributes_after[k] for k in attributes} == attributes, name
        else:
            assert cls_after is cls, name
            # in _model_args CCT records its attention
            for key in (attributes.keys() | attributes_after.keys()) - {'_model_args'}:
                assert attributes_after[key] == attributes[key], (name, key)


@pytest.mark.parametrize('variant', SOT)
@pytest.mark.parametrize('name', MODELS)
def test_swaps_attention_and_nothing_else(name, variant):
    if name == 'cct':  # its layers are SOTAttention in any case; back to timm's own for a start
        model = apply_sot(make_model(name), 'softmax')
    else:
        model = make_model(name)
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    assert {type(layer) for layer in attention_layers(model)} == {Attention}

    assert apply_sot(model, variant, reg=0.3, iters=7, tol=0.01) is model
    assert settings(model) == [(variant, 0.3, 7, 0.01)] * (2 if name == 'cct' else 3)
    assert_only_attention_gained(before, snapshot(model))
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_default_settings():
    assert settings(apply_sot(make_model())) == [('sot_qk', 0.1, 10, None)] * 3


@pytest.mark.parametrize('variant', ['sot_q', 'sot_q_nosoftmax', 'sot_qk', 'sot_qk_nosoftmax'])
@pytest.mark.parametrize('name', MODELS)
def test_output_changes_and_comes_back(name, variant):
    model, x = make_model(name), make_images()
    apply_sot(model, 'softmax')
    expected = model(x)
    attributes = [set(vars(layer)) for layer in attention_layers(model)]
    before = snapshot(model)

    apply_sot(model, variant)
    changed = model(x)
    assert changed.isfinite().all()
    assert (changed - expected).abs().max() > 1e-3 * expected.abs().max()

    apply_sot(model, 'softmax')
    assert torch.equal(model(x), expected)
    assert_only_attention_gained(before, snapshot(model))
    for layer, names in zip(attention_layers(model), attributes):
        assert type(layer) is Attention
        # these two are timm's, its older versions do not have them
        assert set(vars(layer)) - names <= {'attn_dim', 'gate'}


def test_shares_come_and_go():
    model, x = make_model(), make_images()
    expected, values = model(x), copy.deepcopy(model.state_dict())
    apply_sot(model, 'sot_shares', reg=0.2, iters=5)
    assert settings(model) == [('sot_shares', 0.2, 5, None)] * 3
    assert all(torch.equal(model.state_dict()[key], value) for key, value in values.items())
    assert model.state_dict().keys() - values.keys() == {
        f'blocks.{i}.attn.{name}' for i in range(3) for name in ('log_reg', 'share')}
    assert (model(x) - expected).abs().max() > 1e-3 * expected.abs().max()
    assert not [p for p in model.parameters() if not p.requires_grad or p.dtype != torch.float32]
    apply_sot(model, 'sot_qk')
    assert list(model.state_dict()) == list(values)
    apply_sot(model, 'softmax')
    assert torch.equal(model(x), expected) and type(model.blocks[0].attn) is Attention
    assert list(model.state_dict()) == list(values)


def test_shares_follow_device_and_dtype():
    model = apply_sot(make_model().to('meta', torch.bfloat16), 'sot_shares')
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}


def test_cct_is_like_one_built_that_way():
    x = make_images()
    built = make_model('cct', attn='sot_qk', sot_reg=0.3, sot_iters=4)
    assert torch.equal(apply_sot(make_model('cct'), 'sot_qk', reg=0.3, iters=4)(x), built(x))
    assert torch.equal(apply_sot(built, 'softmax')(x), make_model('cct')(x))


def test_model_may_be_an_attention_layer():
    layer = Attention(32, 2)
    assert apply_sot(layer) is layer and type(layer) is SOTAttention


# Kept

def test_keeps_training_mode_and_dropout_rates():
    model = make_model(attn_drop_rate=0.2, proj_drop_rate=0.3, drop_path_rate=0.1)
    model.train()
    model.blocks[1].eval()
    apply_sot(model)
    assert [layer.training for layer in attention_layers(model)] == [True, False, True]
    assert model.training and model.blocks[0].training and not model.blocks[1].training
    assert {(layer.attn_drop.p, layer.proj_drop.p) for layer in attention_layers(model)} == {(0.2, 0.3)}

    dropped = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: dropped.append((out == 0).float().mean()))
    torch.manual_seed(0)
    model(make_images(8))
    assert len(dropped) == 3
    assert all(abs(rate - expected) < 0.05 for rate, expected in zip(dropped, (0.2, 0., 0.2))), dropped


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_keeps_dtype(dtype):
    model = apply_sot(make_model().to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(make_images().to(dtype)).dtype == dtype


def test_keeps_device():
    model = apply_sot(make_model().to('meta'))
    assert all(p.is_meta for p in model.parameters())
    assert model(make_images().to('meta')).shape == (2, 5)


def test_keeps_what_is_frozen():
    model = make_model().requires_grad_(False)
    model.blocks[1].attn.requires_grad_(True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    apply_sot(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    model(make_images()).square().sum().backward()
    assert {name: p.grad is not None for name, p in model.named_parameters()} == before


def test_keeps_hooks():
    model = make_model()
    calls = []
    attn = model.blocks[0].attn
    attn.register_forward_pre_hook(lambda module, args: calls.append('pre'))
    attn.attn_drop.register_forward_hook(lambda module, args, out: calls.append('attn_drop'))
    attn.register_forward_hook(lambda module, args, out: calls.append(type(module)))
    attn.qkv.weight.register_hook(lambda grad: calls.append('grad'))
    for variant, cls in (('sot_qk', SOTAttention), ('softmax', Attention)):
        apply_sot(model, variant)
        for layer in attention_layers(model):
            layer.fused_attn = False
        calls.clear()
        model(make_images()).sum().backward()
        assert calls == ['pre', 'attn_drop', cls, 'grad']


def test_keeps_checkpoints_loading():
    model = make_model()
    patched = apply_sot(make_model())
    assert not any(patched.load_state_dict(model.state_dict()))
    assert not any(model.load_state_dict(patched.state_dict()))


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_optimizer_from_before_still_trains(variant):
    model, x, target = make_model(), make_images(4), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.)
    apply_sot(model, variant)
    before = copy.deepcopy(model.state_dict())
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unchanged = [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]
    assert unchanged == []
    q, k, v = ((model.blocks[0].attn.qkv.weight - before['blocks.0.attn.qkv.weight']) != 0).chunk(3)
    assert q.any() and v.any()
    assert k.any() == (variant != 'sot_q'), 'SOT(Q) has no use for the keys'


# blocks=

@pytest.mark.parametrize('blocks, changed', [
    (None, [0, 1, 2]),
    ([0], [0]),
    ([1, 2], [1, 2]),
    ((-1,), [2]),
    ([-3, 1], [0, 1]),
    (range(2), [0, 1]),
    (iter([0, 2]), [0, 2]),
    ((i for i in (-1, 1)), [1, 2]),
    (np.arange(2), [0, 1]),
    ([2, 2, -1], [2]),
    ([], []),
])
def test_blocks(blocks, changed):
    model = apply_sot(make_model(), blocks=blocks)
    assert [i for i, block in enumerate(model.blocks) if type(block.attn) is SOTAttention] == changed
    assert model(make_images()).isfinite().all()


def test_blocks_of_a_patched_model():
    model = apply_sot(make_model(), 'sot_q', reg=0.3)
    apply_sot(model, 'sot_qk', reg=0.2, blocks=[1])
    apply_sot(model, 'softmax', blocks=[-1])
    assert settings(model) == [('sot_q', 0.3, 10, None), ('sot_qk', 0.2, 10, None), Attention]


@pytest.mark.parametrize('blocks, index', [([3], 3), ([0, -4], -4), ((0, 1, 17), 17)])
def test_blocks_out_of_range(blocks, index):
    model = make_model()
    before = snapshot(model)
    message = (
        f'blocks={list(blocks)} names attention layer {index}, but the model has 3 of them: '
        f'choose from -3 to 2, or None for all')
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_sot(model, blocks=blocks)
    assert snapshot(model) == before


@pytest.mark.parametrize('blocks', [2, [0, 0.5], '12', [True, False], torch.tensor([True, False]), torch.tensor(1)])
def test_blocks_of_the_wrong_type(blocks):
    model = make_model()
    before = snapshot(model)
    message = f'blocks={blocks!r} must be None, for all, or integers in a list, such as blocks=[-1]'
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_sot(model, blocks=blocks)
    assert snapshot(model) == before, 'the first layer was changed'


# Saved and loaded by timm

def saved_and_loaded(model, folder):
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


@needs_record
@pytest.mark.parametrize('built, calls, expected', [
    ({}, [dict(variant='sot_qk', reg=0.7)], ('sot_qk', 0.7, 10, None)),
    ({}, [dict(variant='sot_q_nosoftmax', reg=np.float32(0.25), iters=np.int64(3), tol=0.5)],
     ('sot_q_nosoftmax', 0.25, 3, 0.5)),
    (dict(attn='sot_qk', sot_reg=0.3, sot_tol=0.1), [dict(variant='sot_q')], ('sot_q', 0.1, 10, None)),
    (dict(attn='sot_qk'), [dict(variant='softmax')], ('softmax', 0.1, 10, None)),
    ({}, [dict(blocks=[0], reg=0.7), dict(blocks=[1], reg=0.7)], ('sot_qk', 0.7, 10, None)),
])
def test_cct_is_saved_with_its_attention(tmp_path, built, calls, expected):
    model, x = make_model('cct', **built), make_images()
    for call in calls:
        apply_sot(model, **call)
    loaded = saved_and_loaded(model, tmp_path)
    assert settings(loaded) == [expected] * 2
    assert torch.equal(loaded(x), model(x))


@needs_record
def test_layers_that_no_arguments_make_are_not_recorded(tmp_path):
    model = make_model('cct', attn='sot_qk', sot_reg=0.3)
    apply_sot(model, 'sot_q', blocks=[0])
    assert [block.attn.variant for block in saved_and_loaded(model, tmp_path).blocks] == ['softmax'] * 2
    apply_sot(model, 'sot_q', reg=0.3)
    assert settings(saved_and_loaded(model, tmp_path)) == [('sot_q', 0.3, 10, None)] * 2
    apply_sot(model, 'softmax', blocks=[0])
    assert [block.attn.variant for block in saved_and_loaded(model, tmp_path).blocks] == ['softmax'] * 2


@needs_record
def test_settings_that_softmax_attention_does_not_take_are_not_recorded(tmp_path):
    model, x = apply_sot(make_model('cct', attn='sot_shares', sot_iters=0), 'softmax'), make_images()
    assert torch.equal(saved_and_loaded(model, tmp_path)(x), model(x))


@needs_record
def test_cct_is_saved_with_its_distance(tmp_path):
    model, x = apply_sot(make_model('cct'), 'sot_qk', distance='cosine'), make_images()
    loaded = saved_and_loaded(model, tmp_path)
    assert [block.attn.distance for block in loaded.blocks] == ['cosine'] * 2
    assert torch.equal(loaded(x), model(x)) and not torch.equal(model(x), apply_sot(model, 'sot_qk')(x))


# On a model that has SOT attention

def test_changes_the_variant():
    model, x = apply_sot(make_model(), 'sot_q', reg=0.5), make_images()
    before = snapshot(model)
    apply_sot(model, 'sot_qk_nosoftmax', reg=0.2, iters=3, tol=0.1)
    assert settings(model) == [('sot_qk_nosoftmax', 0.2, 3, 0.1)] * 3
    assert snapshot(model).keys() == before.keys()
    fresh = apply_sot(make_model(), 'sot_qk_nosoftmax', reg=0.2, iters=3, tol=0.1)
    assert torch.equal(model(x), fresh(x))


def test_distance():
    layer = SOTAttention(32, 2, variant='sot_q')
    apply_sot(layer, 'sot_qk', distance='cosine')
    assert layer.distance == 'cosine'
    apply_sot(layer, 'sot_qk')
    assert layer.distance == 'euclidean', 'what is not given gets its default'


def test_softmax_on_a_model_without_sot():
    model = make_model()
    before = snapshot(model)
    assert apply_sot(model, 'softmax') is model
    assert snapshot(model) == before


# Errors: the argument, its value, what would work; and nothing has changed

@pytest.mark.parametrize('patched', [False, True])
@pytest.mark.parametrize('name, value, works', [
    ('variant', 'sot', "is unknown; choose one of ('softmax', 'sot_q', 'sot_q_nosoftmax', 'sot_qk', "
                       "'sot_qk_nosoftmax', 'sot_qkt', 'sot_shares')"),
    *(('reg', value, 'must be a positive finite number; 0.1 is the default') for value in (0, -1., math.inf, math.nan)),
    *(('iters', value, 'must be an integer of at least 1') for value in (0, -1, 1.5)),
    *(('tol', value, 'must be None (run exactly iters iterations) or a number of at least 0') for value in (
        -1, math.nan)),
    ('distance', 'l2', "is unknown; choose one of ('euclidean', 'cosine')"),
])
def test_bad_arguments(name, value, works, patched):
    model = make_model()
    if patched:
        apply_sot(model, 'sot_q', reg=0.3)
    before = snapshot(model)
    for variant in ('sot_qk', 'softmax'):
        with pytest.raises(ValueError, match=re.escape(f'{name}={value!r} {works}')):
            apply_sot(model, **{'variant': variant, name: value})
        assert snapshot(model) == before


def test_model_without_attention():
    model = timm.create_model('resnet10t')
    before = snapshot(model)
    message = (
        r'model \(ResNet\) has no timm.layers.Attention or timm_sot.SOTAttention module; '
        r'found none with attention in the name of its class\. apply_sot and attention_maps take models .* like '
        r'vit_base_patch16_224, ')
    for variant in ('sot_qk', 'softmax'):
        with pytest.raises(ValueError, match=message):
            apply_sot(model, variant)
    assert snapshot(model) == before


def test_model_with_another_attention():
    model = timm.create_model(
        'swin_tiny_patch4_window7_224', img_size=56, embed_dim=24, depths=(1, 1), num_heads=(1, 2))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r'no timm.layers.Attention .*; found [^;]*swin_transformer.WindowAttention'):
        apply_sot(model)
    assert snapshot(model) == before


def test_names_attention_by_its_short_name():
    class TalkingHeadAttn(nn.Module):
        pass

    with pytest.raises(ValueError, match='found .*TalkingHeadAttn'):
        apply_sot(nn.Sequential(TalkingHeadAttn()))


@pytest.mark.parametrize('model', ['vit_tiny_patch16_224', None])
def test_what_is_no_model(model):
    message = f'model={model!r} must be a torch.nn.Module, such as timm.create_model returns'
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_sot(model)


def test_models_that_the_error_names_work():
    with pytest.raises(ValueError) as error:
        apply_sot(nn.Identity())
    names = re.findall(r'\w+_\w+', str(error.value).partition(' like ')[2])
    assert len(names) > 2
    for name in names:
        apply_sot(timm.create_model(name, device='meta'))


def test_subclass_with_a_forward_of_its_own_is_left_alone():
    class OtherAttention(Attention):
        def forward(self, x):
            return x

    model = make_model()
    model.blocks[1].attn = OtherAttention(48, 3)
    apply_sot(model)
    assert [type(layer) for layer in attention_layers(model)] == [SOTAttention, OtherAttention, SOTAttention]
    with pytest.raises(ValueError, match='found .*OtherAttention'):
        apply_sot(OtherAttention(48, 3))


def test_subclass_of_sot_attention_keeps_its_class():
    class Named(SOTAttention):
        def extra_repr(self):
            return 'mine'

    model, x = apply_sot(make_model()), make_images()
    model.blocks[1].attn.__class__ = Named
    for variant in ('sot_q', 'softmax', 'sot_qk'):
        apply_sot(model, variant, reg=0.3, iters=4)
        assert type(model.blocks[1].attn) is Named
        assert (model.blocks[1].attn.variant, model.blocks[1].attn.reg) == (variant, 0.3)
        assert torch.equal(model(x), apply_sot(make_model(), variant, reg=0.3, iters=4)(x))


@pytest.mark.parametrize('variant', ['sot_qk', 'softmax'])
def test_subclass_with_weights_of_its_own_is_refused(variant):
    class Scaled(SOTAttention):
        def attention_weights(self, q, k, attn_mask=None, is_causal=False):
            return self.factor * super().attention_weights(q, k, attn_mask, is_causal)

    model = apply_sot(make_model(), 'sot_q')
    model.blocks[1].attn.__class__ = Scaled
    model.blocks[1].attn.factor = nn.Parameter(torch.ones(3, 1, 1))
    before = snapshot(model)
    for blocks, index in ((None, 1), ([0, -2], -2)):
        with pytest.raises(ValueError, match=f'attention layer {index} is a .*Scaled, .* naming others in blocks'):
            apply_sot(model, variant, blocks=blocks)
        assert snapshot(model) == before
    apply_sot(model, variant, blocks=[0, 2])
    assert type(model.blocks[1].attn) is Scaled and model.blocks[1].attn.variant == 'sot_q'


def test_qkt_needs_as_many_tokens_as_channels_when_it_runs():
    model = apply_sot(make_square_vit(), 'sot_qkt')
    out = model(make_images())
    model.set_input_size(img_size=64)  # resizing alone is legal
    with pytest.raises(ValueError, match='needs N = D, got 64 tokens and head width 16; change the image size'):
        model(make_images(size=64))
    model.set_input_size(img_size=32)
    assert model(make_images()).shape == out.shape

    model = apply_sot(make_model(), 'sot_qkt')  # with its class token, as is giving it to a model that does not fit
    with pytest.raises(ValueError, match="needs N = D, got 17 tokens and head width 16; .* use variant 'sot_qk'"):
        model(make_images())


# With torch's transformations

def mixed_variants():
    """A ViT whose blocks all differ, also in the settings that a compiler may take for constants."""
    model = make_square_vit()
    apply_sot(model, 'sot_qkt', reg=0.2, blocks=[0])
    apply_sot(model, 'sot_q_nosoftmax', iters=3, blocks=[1])
    return model


MAKE = {
    **{variant: lambda variant=variant: apply_sot(make_square_vit(), variant) for variant in SOT},
    'mixed': mixed_variants,
    'softmax_again': lambda: apply_sot(apply_sot(make_square_vit()), 'softmax'),
}


def output_and_gradients(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def assert_same_results(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('make', MAKE)
def test_torchscript(make):
    model, x = MAKE[make](), make_images()
    expected = output_and_gradients(model, x)
    assert_same_results(output_and_gradients(torch.jit.script(model), x), expected)


@pytest.mark.parametrize('make', ['sot_qk', 'mixed', 'softmax_again'])
def test_compile_without_graph_breaks(make):
    torch._dynamo.reset()
    model, x = MAKE[make](), make_images()
    expected = output_and_gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    assert_same_results(output_and_gradients(compiled, x), expected)


def test_compiled_model_may_be_patched():
    torch._dynamo.reset()
    model, x = make_model(depth=1), make_images()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    for variant in ('softmax', 'sot_q', 'sot_qk', 'softmax'):
        apply_sot(compiled, variant)
        expected = output_and_gradients(model, x)
        assert_same_results(output_and_gradients(compiled, x), expected)


@pytest.mark.parametrize('make', MAKE)
def test_deepcopy(make):
    model, x = MAKE[make](), make_images()
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    apply_sot(twin, 'sot_q', reg=5.)
    with torch.no_grad():
        twin.blocks[0].attn.qkv.weight.zero_()
    assert torch.equal(model(x), expected), 'the copy shares something'

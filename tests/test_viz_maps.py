""" attention_maps: the matrices of a forward """
import contextlib
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.utils import AttentionExtract
from torch import nn

from timm_sot import SOTAttention, apply_sot, attention_maps, sinkhorn
from timm_sot.attention import VARIANTS
from timm_sot.viz.maps import attention_entropy, attention_statistics, common_part, row_entropy

TINY = dict(img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=5)
SOT = [variant for variant in VARIANTS if VARIANTS[variant].operands]


def strengthen(model):
    for p in model.parameters():  # timm's initial weights are too small for attention to be anything but even
        if p.ndim == 2:
            nn.init.normal_(p, std=0.1)
    return model.eval()


def make_vit(variant='', **kwargs):
    """A ViT with timm's own softmax attention, or with a variant by apply_sot."""
    kwargs = {**TINY, **kwargs}
    if variant == 'sot_qkt':
        kwargs.update(class_token=False, global_pool='avg')  # 16 tokens, head width 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = strengthen(timm.create_model('vit_tiny_patch16_224', **kwargs))
    return apply_sot(model, variant, reg=0.05) if variant else model


def make_cct(variant='softmax', **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return strengthen(timm.create_model('cct_2', attn=variant, **kwargs))


def make_images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}


def state(model):
    """All there is to a model: attributes of every module, hooks by the objects that they are, values of tensors."""
    attributes = {
        name: (type(module), {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for name, module in model.named_modules()
    }
    return attributes, {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(before, after):
    assert before[0] == after[0]
    assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())


MODELS = {
    'vit': make_vit,
    **{f'vit_{variant}': lambda variant=variant: make_vit(variant) for variant in VARIANTS},
    **{f'cct_{variant}': lambda variant=variant: make_cct(variant) for variant in VARIANTS},
    'deit_distilled': lambda: strengthen(timm.create_model('deit_tiny_distilled_patch16_224', **TINY)),
    'mixed': lambda: apply_sot(make_vit(), 'sot_q', blocks=[1]),
}


@pytest.mark.parametrize('make', MODELS)
def test_keys_and_shapes(make):
    model, x = MODELS[make](), make_images()
    maps = attention_maps(model, x)
    assert list(maps) == ['blocks.0', 'blocks.1']
    for key, record in maps.items():
        layer = model.get_submodule(key).attn
        sot = getattr(layer, 'operands', '') != ''
        assert list(record) == (['scores', 'sot', 'weights'] if sot else ['scores', 'weights'])
        N = record['weights'].shape[-1]
        assert {matrix.shape for matrix in record.values()} == {(2, layer.num_heads, N, N)}
        assert not any(matrix.requires_grad for matrix in record.values())


@pytest.mark.parametrize('fused, tolerance', [(False, 1e-6), (True, 1e-5)])
@pytest.mark.parametrize('make', MODELS)
def test_weights_times_v_is_the_output_of_a_forward(make, fused, tolerance):
    model, x = MODELS[make](), make_images()
    maps = attention_maps(model, x)

    seen = {}
    for name, layer in layers_of(model).items():
        layer.fused_attn = fused
        layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: (args[0], out)}))
    with torch.no_grad():
        model(x)
        for name, layer in layers_of(model).items():
            tokens, out = seen[name]
            B, N, C = tokens.shape
            v = layer.qkv(tokens).reshape(B, N, 3, layer.num_heads, -1)[:, :, 2].transpose(1, 2)
            expected = layer.proj((maps[name.removesuffix('.attn')]['weights'] @ v).transpose(1, 2).reshape(B, N, C))
            assert (out - expected).abs().max() <= tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize('make', MODELS)
def test_matrices_are_those_of_an_unfused_forward(make):
    model, x = MODELS[make](), make_images()
    maps = attention_maps(model, x)

    seen = {}
    for name, layer in layers_of(model).items():
        layer.fused_attn = False
        layer.q_norm.register_forward_hook(lambda module, args, out, name=name: seen.update({(name, 'q'): out}))
        layer.k_norm.register_forward_hook(lambda module, args, out, name=name: seen.update({(name, 'k'): out}))
        layer.attn_drop.register_forward_hook(lambda module, args, out, name=name: seen.update({(name, 'w'): out}))
    with torch.no_grad():
        model(x)
    for name, layer in layers_of(model).items():
        record = maps[name.removesuffix('.attn')]
        q, k, weights = (seen[name, what] for what in 'qkw')
        d = q.shape[-1]
        assert torch.equal(record['weights'], weights)
        torch.testing.assert_close(record['scores'], q @ k.mT * d ** -0.5, rtol=1e-6, atol=1e-6)
        if 'sot' in record:
            sot = record['sot']
            assert sot.min() >= 0 and sot.max() <= 1 and (sot.diagonal(dim1=-2, dim2=-1) == 1).all()
            made_of_it = (sot * d ** -0.5).softmax(-1) if layer.softmax else sot * d ** -0.5
            torch.testing.assert_close(made_of_it, weights, rtol=1e-6, atol=1e-6)
        elif getattr(layer, 'variant', 'softmax') == 'softmax':
            torch.testing.assert_close(record['scores'].softmax(-1), weights, rtol=1e-6, atol=1e-6)
        else:
            torch.testing.assert_close(layer.attention_weights(q, k), weights)


@pytest.mark.parametrize('make', MODELS)
def test_logits_are_those_of_the_model(make):
    model, x = MODELS[make](), make_images()
    with torch.no_grad():
        expected = model(x)
    logits = []
    handle = model.register_forward_hook(lambda module, args, out: logits.append(out))
    attention_maps(model, x)
    handle.remove()
    torch.testing.assert_close(logits, [expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('variant', [variant for variant in VARIANTS if not variant.endswith('_nosoftmax')])
def test_rows_of_weights_sum_to_1(variant):
    for record in attention_maps(make_cct(variant), make_images()).values():
        torch.testing.assert_close(record['weights'].sum(-1), torch.ones(2, 2, 64))


# Nothing is left behind

@pytest.mark.parametrize('context', [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('mode', ['eval', 'train', 'mixed'])
@pytest.mark.parametrize('make', ['vit', 'vit_sot_q', 'cct_sot_qk'])
def test_model_is_unchanged(make, mode, context):
    model, x = MODELS[make](), make_images()
    model.train(mode != 'eval')
    if mode == 'mixed':
        model.blocks[1].eval()
        model.blocks[0].attn.fused_attn = False
    kept = model.blocks[0].attn.attn_drop.register_forward_hook(lambda module, args, out: None)
    model.blocks[0].requires_grad_(False)
    for p in model.blocks[1].parameters():
        p.grad = torch.ones_like(p)
    grads = {name: p.grad for name, p in model.named_parameters()}
    before = state(model)
    with context():
        maps = attention_maps(model, x)
    assert_unchanged(before, state(model))
    assert kept.id in model.blocks[0].attn.attn_drop._forward_hooks
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert len(maps) == 2


@pytest.mark.parametrize('make', ['vit', 'vit_sot_q', 'cct_sot_qk'])
def test_model_is_unchanged_when_its_forward_raises(make):
    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    model, x = MODELS[make](), make_images()
    handle = model.blocks[1].attn.proj.register_forward_hook(stop)
    before = state(model)
    with pytest.raises(Stop):
        attention_maps(model, x)
    assert_unchanged(before, state(model))
    handle.remove()
    assert len(attention_maps(model, x)) == 2


@pytest.mark.parametrize('make', ['vit', 'vit_sot_q', 'cct_sot_qk'])
def test_gradients_are_those_of_before(make):
    model, x = MODELS[make](), make_images()

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters()]

    before = gradients()
    attention_maps(model, x)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before))


def test_batch_norm_of_a_model_in_training_mode():
    model = nn.Sequential(nn.BatchNorm1d(4), SOTAttention(32, 2)).train()
    before = state(model)
    maps = attention_maps(model, torch.randn(2, 4, 32))
    assert_unchanged(before, state(model))
    assert list(maps) == ['1']


def test_dropout_is_that_of_the_models_mode():
    model, x = make_cct('sot_qk', attn_drop_rate=0.5), make_images()
    assert all((record['weights'] > 0).all() for record in attention_maps(model, x).values())
    model.train()
    for record in attention_maps(model, x).values():
        assert 0.4 < (record['weights'] == 0).float().mean() < 0.6
        assert (record['sot'] > 0).all()


# Models

def test_a_layer_alone():
    layer = SOTAttention(32, 2)
    maps = attention_maps(layer, torch.randn(2, 6, 32))
    assert list(maps) == [''] and maps['']['sot'].shape == (2, 2, 6, 6)


def test_layers_that_did_not_run_are_absent():
    model = make_vit()
    model.forward = lambda x: model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert list(attention_maps(model, make_images())) == ['blocks.0']


def test_qk_norm():
    model = make_vit('sot_qk', qk_norm=True)
    record = attention_maps(model, make_images())['blocks.0']
    assert (record['scores'].abs() <= 16 ** 0.5 + 1e-5).all(), 'rows of norm sqrt(d) each, times d^-1/2'


def test_model_without_attention():
    with pytest.raises(ValueError, match='ResNet.* has no timm.layers.Attention'):
        attention_maps(timm.create_model('resnet10t'), make_images())


@pytest.mark.parametrize('how', ['wrapped', 'in place'])
def test_compiled_model(how):
    torch._dynamo.reset()
    model, x = make_cct('sot_qk', depth=1), make_images()
    expected = attention_maps(copy.deepcopy(model), x)
    if how == 'wrapped':
        compiled = torch.compile(model, backend='eager')
    else:
        compiled = model
        model.compile(backend='eager')
    compiled(x)
    maps = attention_maps(compiled, x)
    assert maps.keys() == expected.keys()
    assert all(torch.equal(maps[key][kind], matrix) for key in maps for kind, matrix in expected[key].items())


def test_gradient_checkpointing():
    model, x = make_cct('sot_qk').train(), make_images()
    model.set_grad_checkpointing()
    assert len(attention_maps(model, x)) == 2
    model(x).sum().backward()


@pytest.mark.parametrize('variant', ['softmax', 'sot_qk'])
def test_autocast(variant):
    model, x = make_cct(variant), make_images()
    expected = attention_maps(model, x)
    with torch.autocast('cpu', torch.bfloat16):
        maps = attention_maps(model, x)
    for key, record in maps.items():
        torch.testing.assert_close(record['weights'].float(), expected[key]['weights'], rtol=0.2, atol=5e-4)
        if variant == 'sot_qk':
            assert record['sot'].dtype == torch.float32


@pytest.mark.parametrize('variant', ['softmax', 'sot_qk', 'sot_shares'])
def test_timms_own_extraction_finds_the_same(monkeypatch, variant):
    """With fused attention turned off as in timm, which layers ask when they are made."""
    monkeypatch.setattr(timm.layers.config, '_USE_FUSED_ATTN', 0)
    model, x = make_cct(variant), make_images()
    assert not model.blocks[0].attn.fused_attn
    found = AttentionExtract(model, method='hook')(x)
    maps = attention_maps(model, x)
    assert list(found) == ['blocks.0.attn.attn_drop', 'blocks.1.attn.attn_drop']
    for weights, record in zip(found.values(), maps.values()):
        torch.testing.assert_close(weights, record['weights'])


def test_masks_are_still_refused():
    layer = SOTAttention(32, 2)
    model = nn.Sequential(layer)
    model.forward = lambda x: layer(x, is_causal=True)
    with pytest.raises(NotImplementedError, match='is_causal'):
        attention_maps(model, torch.randn(1, 4, 32))
    assert 'attention_weights' not in vars(layer)


# Entropy

def test_row_entropy():
    weights = torch.randn(2, 3, 5, 8).softmax(-1)
    expected = -(weights * weights.log()).sum(-1).double() / torch.tensor(8.).log()
    torch.testing.assert_close(row_entropy(weights), expected)
    torch.testing.assert_close(row_entropy(3 * weights), expected)
    assert row_entropy(torch.ones(4, 8)).sub(1).abs().max() < 1e-15
    assert (row_entropy(F.one_hot(torch.arange(8), 8).float()) == 0).all()


def test_row_entropy_close_to_uniform():
    """1 - H / log N is sum_i d_i^2 / (2 N log N) for weights (1 + d_i) / N of small d with sum 0."""
    d = torch.tensor([1., -2., 3., -2.])
    for size in (1e-2, 1e-4):
        expected = (size * d).square().sum() / (2 * 4 * torch.tensor(4.).log())
        assert 1 - row_entropy((1 + size * d) / 4).item() == pytest.approx(expected.item(), rel=0.03)


@pytest.mark.parametrize('make, variant', [(make_vit, ''), (make_vit, 'sot_q_nosoftmax'), (make_cct, 'sot_qk')])
def test_attention_entropy(make, variant):
    model = make(variant) if variant else make()
    before = state(model)
    entropies = attention_entropy(model, make_images())
    maps = attention_maps(model, make_images())
    assert entropies.keys() == maps.keys() and entropies
    for name, record in maps.items():
        torch.testing.assert_close(entropies[name], row_entropy(record['weights']), rtol=0, atol=1e-9)
    after = state(model)
    assert after[0] == before[0] and all(torch.equal(after[1][name], value) for name, value in before[1].items())


def test_common_part():
    weights = torch.randn(2, 3, 8, 8).softmax(-1)
    same = weights[..., :1, :].expand(-1, -1, 8, -1)
    torch.testing.assert_close(common_part(same), torch.ones(2, 3).double())
    plan = sinkhorn(torch.randn(2, 3, 8, 8), iters=200).exp()
    assert common_part(plan).max() < 1e-6
    assert (common_part(torch.ones(2, 8, 8)) == 0).all()
    assert common_part(torch.full((8, 8), torch.nan)).isnan()
    # half of the rows look at one token, half at another: the mean row differs half as much from their own mean
    two = F.one_hot(torch.tensor([0, 1] * 4), 8).float()
    assert common_part(3 * two).item() == pytest.approx((2 * 0.375 ** 2 + 6 / 64) / (0.875 ** 2 + 7 / 64))


def test_attention_statistics():
    model = make_vit('sot_qk')
    found = attention_statistics(model, make_images(), [row_entropy, common_part])
    for name, record in attention_maps(model, make_images()).items():
        assert len(found[name]) == 2
        torch.testing.assert_close(found[name][1], common_part(record['weights']), rtol=1e-4, atol=1e-9)


def test_attention_entropy_restores_a_model_that_fails():
    model = make_vit()
    with pytest.raises(AssertionError):
        attention_entropy(model, make_images(size=16))
    assert all(layer.fused_attn and not layer.attn_drop._forward_hooks for layer in layers_of(model).values())

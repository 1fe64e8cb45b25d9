""" Self-Optimal-Transport attention """
import copy
import inspect
import io
import math
import pickle
import re
import shutil
from pathlib import Path

import pytest
import timm.layers.attention
import torch
import torch._inductor.config
from safetensors.torch import load_file
from timm.layers import Attention
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from kernels import ProductDtypes
from reference import error
from timm_sot import SOTAttention, attention as attention_module
from timm_sot.attention import MIN_REG, VARIANTS, shares_attention_weights
from timm_sot.kernels.threads import loops_work

GOLDEN = load_file(Path(__file__).parent / 'golden' / 'sot_attention.safetensors')
# whose weights have no parameters
ALL = ['softmax', 'sot_q', 'sot_q_nosoftmax', 'sot_qk', 'sot_qk_nosoftmax', 'sot_qkt']
SOT = ALL[1:]
EVERY = [*ALL, 'sot_shares']
needs_loops = pytest.mark.skipif(not loops_work(), reason='needs numba')

# The constructor of timm's Attention, as SOTAttention knows it, and what to try of it in the installed timm
ATTENTION_PARAMETERS = {
    'dim', 'num_heads', 'attn_head_dim', 'dim_out', 'qkv_bias', 'qk_norm', 'scale_norm', 'proj_bias', 'gated',
    'attn_drop', 'proj_drop', 'norm_layer', 'device', 'dtype',
}
FEATURES = {
    'plain': {},
    'qkv_bias': dict(qkv_bias=True),
    'no_proj_bias': dict(proj_bias=False),
    'qk_norm': dict(qk_norm=True, norm_layer=nn.LayerNorm),
    'scale_norm': dict(scale_norm=True, norm_layer=nn.LayerNorm),
    'gated': dict(gated=True, qkv_bias=True),
    'attn_head_dim': dict(attn_head_dim=24),
    'dim_out': dict(dim_out=40),
    'all_at_once': dict(qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm, gated=True, attn_head_dim=24),
}
INSTALLED = set(inspect.signature(Attention.__init__).parameters) - {'self'}
FEATURES = {name: kwargs for name, kwargs in FEATURES.items() if set(kwargs) <= INSTALLED}


def make_tokens(batch=2, tokens=16, dim=32, seed=0):
    return torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(seed))


def make_layer(variant='sot_qk', cls=SOTAttention, dim=32, num_heads=2, **kwargs):
    """A layer with weights that make attention uneven; the same ones for the same arguments of timm."""
    if cls is SOTAttention:
        kwargs['variant'] = variant
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = cls(dim, num_heads, **kwargs)
        for p in layer.parameters():
            nn.init.normal_(p, std=0.2)
    return layer.eval()


def watch(layer):
    """A dict that holds the q, k and attention weights of the layer's last forward, from hooks.

    The weights exist where they pass through attn_drop: in the path that is not fused.
    """
    layer.fused_attn = False
    seen = {}
    layer.q_norm.register_forward_hook(lambda module, args, out: seen.update(q=out))
    layer.k_norm.register_forward_hook(lambda module, args, out: seen.update(k=out))
    layer.attn_drop.register_forward_hook(lambda module, args, out: seen.update(weights=args[0], dropped=out))
    return seen


def test_table_of_variants():
    assert list(VARIANTS) == EVERY


# The golden file: what the code of the experiments computed

@pytest.mark.parametrize('variant', ALL)
def test_golden(variant):
    layer = SOTAttention(128, 2, variant=variant, tol=0.1).eval()
    layer.load_state_dict({name: GOLDEN[name] for name in ('qkv.weight', 'proj.weight', 'proj.bias')})
    seen = watch(layer)
    out = layer(GOLDEN['x'])
    assert error(seen['weights'], GOLDEN[f'{variant}.attn']) < 1e-5
    assert error(out, GOLDEN[f'{variant}.out']) < 1e-5


# Agreement with the float64 reference

@pytest.mark.parametrize('reg, iters, tol', [(0.1, 10, None), (0.02, 3, None), (1., 20, 0.1)])
@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
@pytest.mark.parametrize('variant', ALL)
def test_weights_equal_reference(variant, distance, reg, iters, tol):
    layer = make_layer(variant, reg=reg, iters=iters, tol=tol, distance=distance)
    seen = watch(layer)
    layer(make_tokens())
    expected = reference.attention_weights(seen['q'], seen['k'], variant, reg, iters, tol, distance)
    assert error(seen['weights'], expected) < 1e-5


def test_defaults():
    assert make_layer().extra_repr() == SOTAttention(
        32, variant='sot_qk', reg=0.1, iters=10, tol=None, distance='euclidean').extra_repr()
    assert SOTAttention(32).num_heads == Attention(32).num_heads


@pytest.mark.parametrize('feature', FEATURES)
@pytest.mark.parametrize('variant', SOT)
def test_features_of_timm_hold_in_sot_variants(variant, feature):
    layer = make_layer(variant, **FEATURES[feature])
    x = make_tokens(tokens=layer.head_dim)
    seen = watch(layer)
    out = layer(x)

    B, N, C = x.shape
    v = layer.qkv(x).reshape(B, N, 3, 2, layer.head_dim)[:, :, 2].transpose(1, 2)
    expected = reference.attention_weights(seen['q'], seen['k'], variant).float() @ v
    expected = layer.norm(expected.transpose(1, 2).flatten(2))
    if 'gated' in FEATURES[feature]:
        expected = expected * layer.gate(x).sigmoid()
    assert error(out, layer.proj(expected)) < 1e-5
    assert ('qk_norm' in FEATURES[feature]) == isinstance(layer.q_norm, nn.LayerNorm)


@pytest.mark.parametrize('variant', SOT)
def test_gradients_equal_reference(variant):
    layer = make_layer(variant)
    seen = watch(layer)
    out = layer(make_tokens())
    seen['q'].retain_grad()
    seen['k'].retain_grad()
    seen['weights'].retain_grad()
    out.square().sum().backward()

    q, k = (seen[name].detach().double().requires_grad_() for name in 'qk')
    expected = reference.attention_weights(q, k, variant)
    expected.backward(seen['weights'].grad.double())
    assert error(seen['q'].grad, q.grad) < 1e-4
    if variant.startswith('sot_q_') or variant == 'sot_q':
        assert seen['k'].grad is None and k.grad is None, 'the keys are not used'
    else:
        assert error(seen['k'].grad, k.grad) < 1e-4


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
def test_images_of_a_batch_are_independent(variant):
    layer = make_layer(variant)
    x = make_tokens(batch=3) * torch.tensor([0.1, 1., 10.])[:, None, None]
    together = layer(x)
    for b in range(3):
        assert error(layer(x[b:b + 1])[0], together[b]) < 1e-6


@pytest.mark.parametrize('variant', ['sot_q', 'sot_q_nosoftmax', 'sot_qk', 'sot_qk_nosoftmax'])
def test_permutation_equivariance(variant):
    layer = make_layer(variant)
    x = make_tokens()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert error(layer(x[:, order]), layer(x)[:, order]) < 1e-5


# The weights

@pytest.mark.parametrize('variant', EVERY)
def test_row_sums_and_range(variant):
    layer = make_layer(variant)
    seen = watch(layer)
    layer(make_tokens())
    row_sums = seen['weights'].sum(dim=-1)
    if not variant.endswith('_nosoftmax'):
        assert (row_sums - 1).abs().max() < 1e-6
    else:
        assert (row_sums - 1).abs().min() > 1e-3, 'rows of S d^-1/2 do not sum to 1'
        S = seen['weights'] * layer.head_dim ** 0.5
        assert (S >= 0).all() and (S <= 1 + 1e-6).all()
        assert (S.diagonal(dim1=-2, dim2=-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('variant', EVERY)
def test_weights_pass_through_attn_drop(variant, fused):
    layer = make_layer(variant)
    layer.fused_attn = fused
    x = make_tokens()
    calls = []

    def every_token_sees_itself_only(module, args, out):
        calls.append(out.shape)
        return torch.eye(16).expand_as(out)

    layer.attn_drop.register_forward_hook(every_token_sees_itself_only)
    out = layer(x)
    if fused:
        assert calls == [], 'fused attention never holds its weights'
    else:
        assert calls == [(2, 2, 16, 16)]
        assert error(out, layer.proj(layer.qkv(x)[..., 64:])) < 1e-5, 'what the hook returned was not used'


@pytest.mark.parametrize('variant', EVERY)
def test_dropout(variant):
    x = make_tokens()
    layer = make_layer(variant, attn_drop=0.5)
    seen = watch(layer)
    torch.manual_seed(0)
    layer.train()
    first = layer(x)
    kept = seen['dropped'] != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert error(seen['dropped'][kept], 2 * seen['weights'][kept]) < 1e-6
    assert not torch.equal(layer(x), first)
    without = make_layer(variant)
    without.fused_attn = False
    assert torch.equal(layer.eval()(x), without(x))

    layer = make_layer(variant, proj_drop=0.5)
    assert 0.4 < (layer.train()(x) == 0).float().mean() < 0.6
    assert not (layer.eval()(x) == 0).any()


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('path', ['best', 'eager', 'scripted'])
@pytest.mark.parametrize('variant', EVERY)
def test_dropout_of_fused_layers(monkeypatch, variant, path):
    """In which the weights pass through no module."""
    if path == 'eager':
        monkeypatch.setattr(attention_module, 'choose_path', lambda *args: 'eager')
    x = make_tokens()
    layer = make_layer(variant, attn_drop=0.5)
    assert layer.fused_attn
    without = layer(x).detach()
    layer.train()
    if path == 'scripted':
        layer = torch.jit.script(layer)

    def draw(seed):
        torch.manual_seed(seed)
        return layer(x).detach()

    assert torch.equal(draw(0), draw(0))
    outputs = torch.stack([draw(seed) for seed in range(100)])
    assert (outputs - without).abs().amax(dim=(1, 2, 3)).min() > 0.05 * without.abs().max(), 'nothing was dropped'
    assert error(outputs.mean(0), without) < 0.3


# 'softmax' is timm's Attention

MASKS = {
    'none': {},
    'float': dict(attn_mask=torch.randn(16, 16, generator=torch.Generator().manual_seed(0))),
    'bool': dict(attn_mask=torch.ones(2, 1, 16, 16, dtype=torch.bool).tril(2)),
    'causal': dict(is_causal=True),
}
FORWARD = set(inspect.signature(Attention.forward).parameters)
MASKS = {name: mask for name, mask in MASKS.items() if set(mask) <= FORWARD}
if not hasattr(timm.layers.attention, 'resolve_self_attn_mask'):
    MASKS.pop('bool', None)  # before, timm added a bool mask to the scores unless fused


@pytest.mark.parametrize('mask', MASKS)
@pytest.mark.parametrize('feature', FEATURES)
@pytest.mark.parametrize('fused', [False, True])
def test_softmax_is_timms_attention_bit_for_bit(fused, feature, mask):
    ours = make_layer('softmax', attn_drop=0.2, proj_drop=0.2, **FEATURES[feature])
    timms = make_layer(cls=Attention, attn_drop=0.2, proj_drop=0.2, **FEATURES[feature])
    assert ours.fused_attn == timms.fused_attn
    ours.fused_attn = timms.fused_attn = fused
    assert ours.state_dict().keys() == timms.state_dict().keys()
    for training in (False, True):
        results = []
        for layer in (ours, timms):
            x = make_tokens().requires_grad_()
            torch.manual_seed(1)
            out = layer.train(training)(x, **MASKS[mask])
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))))
        assert all(map(torch.equal, *results))


def test_all_of_timms_attention_is_known():
    """SOTAttention has a forward of its own: what timm adds to its Attention would silently be ignored there."""
    new = INSTALLED - ATTENTION_PARAMETERS
    assert not new, f'timm.layers.Attention has new parameters: make SOTAttention.forward do what {sorted(new)} ask for'
    new = FORWARD - {'self', 'x', 'attn_mask', 'is_causal'}
    assert not new, f'timm.layers.Attention.forward has new parameters: make that of SOTAttention take {sorted(new)}'
    methods = {name for name, value in vars(Attention).items() if inspect.isfunction(value)}
    assert methods == {'__init__', 'forward'}, 'timm.layers.Attention has new methods: see what they do'


@pytest.mark.skipif('bool' not in MASKS, reason='this timm has no bool masks in its unfused path')
def test_a_mask_leaves_no_weight_in_float16():
    layer = make_layer('softmax').half()
    seen = watch(layer)
    mask = MASKS['bool']['attn_mask']
    out = layer(make_tokens().half(), attn_mask=mask)
    assert out.isfinite().all()
    assert (seen['weights'][~mask.expand(2, 2, 16, 16)] == 0).all()
    assert (seen['weights'].float().sum(dim=-1) - 1).abs().max() < 1e-2


@pytest.mark.parametrize('mask', [
    dict(attn_mask=torch.zeros(16, 16)),
    dict(attn_mask=torch.ones(16, 16, dtype=torch.bool)),
    dict(is_causal=True),
])
@pytest.mark.parametrize('variant', EVERY[1:])
def test_masks_are_refused_by_sot_variants(variant, mask):
    layer = make_layer(variant)
    with pytest.raises(NotImplementedError, match="attn_mask and is_causal are supported by variant 'softmax' only"):
        layer(make_tokens(), **mask)
    layer(make_tokens(), attn_mask=None, is_causal=False)
    graph = torch.fx.symbolic_trace(layer)  # in which the mask is not known
    assert torch.equal(graph(make_tokens(), None, False), layer(make_tokens()))
    with pytest.raises(NotImplementedError, match="attn_mask and is_causal are supported by variant 'softmax' only"):
        graph(make_tokens(), mask.get('attn_mask'), mask.get('is_causal', False))


# Precision

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('variant', ALL)
def test_dtype_argument(variant, dtype):
    layer = make_layer(variant, dtype=dtype)
    layer.fused_attn = False
    assert {p.dtype for p in layer.parameters()} == {dtype}
    seen = watch(layer)
    out = layer(make_tokens().to(dtype))
    out.float().square().sum().backward()
    assert out.dtype == dtype and out.isfinite().all()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())
    # the reference of the q and k that the layer has rounded; only SOT is computed wider than these
    assert seen['weights'].dtype == dtype
    expected = reference.attention_weights(seen['q'], seen['k'], variant)
    rounding = torch.finfo(dtype).eps * (8 if variant == 'softmax' else 0.5)
    assert error(seen['weights'], expected) < rounding + (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('variant', [name for name in VARIANTS if name != 'sot_qkt'])
def test_no_tokens(variant, fused):
    layer, x = make_layer(variant), make_tokens(tokens=0).requires_grad_()
    layer.fused_attn = fused
    layer(x).sum().backward()
    assert layer(x).shape == x.grad.shape == (2, 0, 32)


@pytest.mark.parametrize('reg', [1e-8, 1e-12, 1e-30])
def test_regularizations_of_which_float32_has_no_digit(reg):
    for seed in range(10):  # not all would show it
        layer, x = make_layer(reg=reg), make_tokens(seed=seed).requires_grad_()
        layer(x).sum().backward()
        assert x.grad.isfinite().all()



@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
@pytest.mark.parametrize('variant', SOT)
def test_autocast(variant, distance, dtype):
    layer = make_layer(variant, distance=distance)
    seen = watch(layer)
    expected_out = layer(make_tokens())
    with torch.autocast('cpu', dtype=dtype):
        out = layer(make_tokens())
    out.float().square().sum().backward()
    assert seen['q'].dtype == seen['weights'].dtype == out.dtype == dtype, 'autocast was not on'
    expected = reference.attention_weights(seen['q'], seen['k'], variant, distance=distance)
    assert error(seen['weights'], expected) < torch.finfo(dtype).eps / 2 + 1e-5
    # the plan is steep: what rounded tokens do to it is no error, but it stays the same computation
    assert error(out, expected_out) < 0.2
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# Errors: the argument, its value, what would work

@pytest.mark.parametrize('how', ['constructor', 'set_variant'])
@pytest.mark.parametrize('name, value, works', [
    ('variant', 'sot', "is unknown; choose one of ('softmax', 'sot_q', 'sot_q_nosoftmax', 'sot_qk', "
                       "'sot_qk_nosoftmax', 'sot_qkt', 'sot_shares')"),
    ('variant', 'sot_qkt_nosoftmax', 'is unknown; choose one of'),
    *(('reg', value, 'must be a positive finite number; 0.1 is the default') for value in (
        0, -1., math.inf, math.nan, '0.1', None)),
    *(('iters', value, 'must be an integer of at least 1') for value in (0, -1, 1.5)),
    *(('tol', value, 'must be None (run exactly iters iterations) or a number of at least 0') for value in (
        -1, math.nan, 'none')),
    ('distance', 'l1', "is unknown; choose one of ('euclidean', 'cosine')"),
])
def test_bad_arguments(how, name, value, works):
    kwargs = {'variant': 'sot_q', name: value}
    layer = make_layer('sot_qk', reg=0.3)
    before = dict(vars(layer))
    with pytest.raises(ValueError, match=re.escape(f'{name}={value!r} {works}')):
        if how == 'constructor':
            SOTAttention(32, 2, **kwargs)
        else:
            layer.set_variant(**kwargs)
    assert vars(layer) == before


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match='regularization'):
        SOTAttention(32, 2, regularization=0.1)


@pytest.mark.parametrize('tokens', [15, 17, 64])
def test_qkt_needs_as_many_tokens_as_channels(tokens):
    layer = make_layer('sot_qkt')  # legal for any token count, as it is not known yet
    layer(make_tokens(tokens=16))
    message = f"variant 'sot_qkt' .* needs N = D, got {tokens} tokens and head width 16; .* use variant 'sot_qk'"
    with pytest.raises(ValueError, match=message):
        layer(make_tokens(tokens=tokens))
    layer(make_tokens(tokens=16))


# As a module among others

@pytest.mark.parametrize('variant', ALL)
def test_extra_repr(variant):
    shown = repr(make_layer(variant, reg=0.3, iters=7, tol=0.01, distance='cosine'))
    assert f'variant={variant!r}' in shown
    assert repr(make_layer('sot_shares', reg=0.3, iters=7)).startswith(
        "SOTAttention(\n  variant='sot_shares', reg=0.3, iters=7\n")
    settings = "reg=0.3, iters=7, tol=0.01, distance='cosine'"
    assert (settings in shown) == (variant != 'softmax'), 'softmax has no settings of its own'


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize('variant', EVERY)
def test_copies(variant, duplicate):
    layer = make_layer(variant, reg=0.3, iters=3, tol=None if variant == 'sot_shares' else 0.01, distance='cosine')
    twin = duplicate(layer)
    assert type(twin) is SOTAttention and repr(twin) == repr(layer)
    assert torch.equal(twin(make_tokens()), layer(make_tokens()))
    with torch.no_grad():
        twin.qkv.weight.zero_()
    assert (layer.qkv.weight != 0).all(), 'the copy shares its weights'


def test_state_dict_is_timms():
    assert make_layer().state_dict().keys() == make_layer(cls=Attention).state_dict().keys()


def output_and_gradients(layer, x):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('kwargs', [{}, dict(tol=0.1), dict(distance='cosine')], ids=str)
@pytest.mark.parametrize('variant', EVERY)
def test_torchscript(variant, kwargs):
    if variant == 'sot_shares':
        kwargs = dict(iters=0 if 'tol' in kwargs else 5)  # it knows no tol
    layer = make_layer(variant, reg=0.3, **kwargs)
    scripted = torch.jit.script(layer)
    for x in (make_tokens(), make_tokens(batch=1, seed=1)):
        expected = output_and_gradients(layer, x)
        for actual, value in zip(output_and_gradients(scripted, x), expected):
            assert error(actual, value) < 1e-5


@pytest.mark.parametrize('kwargs', [{}, dict(distance='cosine')], ids=str)
@pytest.mark.parametrize('variant', EVERY)
def test_compile_without_graph_breaks(variant, kwargs):
    torch._dynamo.reset()
    layer = make_layer(variant, **kwargs)
    expected = output_and_gradients(layer, make_tokens())
    compiled = torch.compile(layer, fullgraph=True, backend='eager')
    for actual, value in zip(output_and_gradients(compiled, make_tokens()), expected):
        assert error(actual, value) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='inductor needs a C++ compiler')
def test_compile_unfused_with_inductor():
    """Whose code takes results to be laid out as the fakes of the operators say; K^T goes in transposed."""
    torch._dynamo.reset()
    layer = make_layer('sot_qkt', iters=2)
    layer.fused_attn = False
    expected = output_and_gradients(layer, make_tokens())
    # its cache on the disk would bring back what an earlier version of the operators looked like
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(layer, fullgraph=True)
        for actual, value in zip(output_and_gradients(compiled, make_tokens()), expected):
            assert error(actual, value) < 1e-5


@pytest.mark.parametrize('variant', EVERY)
def test_meta_device(variant):
    layer = SOTAttention(32, 2, variant=variant, device='meta')
    assert all(p.is_meta for p in layer.parameters())
    out = layer(make_tokens().to('meta'))
    assert out.is_meta and out.shape == (2, 16, 32)
    layer = layer.to_empty(device='cpu')
    layer.load_state_dict(make_layer(variant).state_dict())
    assert torch.equal(layer.eval()(make_tokens()), make_layer(variant)(make_tokens()))


def test_compile_on_the_meta_device():  # which has no autocast to switch off
    torch._dynamo.reset()
    compiled = torch.compile(SOTAttention(32, 2, device='meta'), fullgraph=True, backend='eager')
    assert compiled(make_tokens().to('meta')).shape == (2, 16, 32)


def test_compile_under_autocast():
    torch._dynamo.reset()
    layer = make_layer(distance='cosine')  # whose matrix product autocast would round
    compiled = torch.compile(layer, fullgraph=True, backend='eager')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected, out = layer(make_tokens()), compiled(make_tokens())
    assert out.dtype == torch.bfloat16
    assert error(out, expected) < 1e-6


# 'sot_shares', which learns

def shares_layer(share=0.3, dtype=torch.float32, iters=5, **kwargs):
    """A layer whose heads have learned regularizations and shares."""
    layer = make_layer('sot_shares', dtype=dtype, iters=iters, **kwargs)
    with torch.no_grad():
        layer.log_reg.copy_(torch.tensor([0.1, 0.3]).log().view(2, 1, 1))
        if layer.share is not None:
            layer.share.mul_(share / 0.2)
    return layer


def shares_reference(layer, seen):
    """Weights of a layer in float64, and what their gradients go to: queries, keys and what is learned."""
    inputs = [seen[name].detach().double().requires_grad_() for name in 'qk']
    inputs += [p.detach().double().requires_grad_() for p in (layer.log_reg, layer.share) if p is not None]
    return reference.shares_attention_weights(*inputs, *[None] * (4 - len(inputs)), iters=layer.iters), inputs


@pytest.mark.parametrize('share', [0., 0.3, 3.])
@pytest.mark.parametrize('iters', [0, 1, 5, 30])
def test_shares_equal_reference(iters, share):
    layer = shares_layer(share, iters=iters)
    seen = watch(layer)
    out = layer(make_tokens())
    for name in ('q', 'k', 'weights'):
        seen[name].retain_grad()
    out.square().sum().backward()
    expected, inputs = shares_reference(layer, seen)
    assert error(seen['weights'], expected) < 1e-5
    expected.backward(seen['weights'].grad.double())
    ours = [seen['q'].grad, seen['k'].grad, layer.log_reg.grad, *([layer.share.grad] if iters else [])]
    for actual, wanted in zip(ours, inputs, strict=True):
        assert error(actual, wanted.grad) < 1e-4


@needs_loops
@pytest.mark.parametrize('iters', [0, 5])
@pytest.mark.parametrize('dtype, bars', [(torch.float32, (1e-5, 1e-4)), (torch.bfloat16, (2e-2, 6e-2))])
def test_shares_run_in_the_loops(dtype, bars, iters):
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **kwargs or {})

    results = []
    for fused in (True, False):
        layer = shares_layer(dtype=dtype, iters=iters)
        layer.fused_attn = fused
        with Record():
            results.append(output_and_gradients(layer, make_tokens().to(dtype)))
        assert (torch.ops.timm_sot.shares_attention.default in called) == fused
        called.clear()
    for i, (actual, wanted) in enumerate(zip(*results)):
        assert error(actual, wanted) < bars[i > 0]


@pytest.mark.parametrize('fused', [True, False])
def test_least_learned_regularization(fused):
    """What is below it counts as it, and learns no further; what begins with it does learn."""
    outputs = []
    for log_reg in (-10., math.log(MIN_REG)):
        layer = make_layer('sot_shares', reg=MIN_REG)
        layer.fused_attn = fused
        nn.init.constant_(layer.log_reg, log_reg)
        torch.manual_seed(0)
        nn.init.normal_(layer.share)
        outputs.append(layer(make_tokens()))
        outputs[-1].square().sum().backward()
        assert layer.log_reg.grad.all() == (log_reg > -10.) and layer.share.grad.any()
    assert error(*outputs) < 1e-4


def test_no_product_is_rounded_to_tensorfloat():
    """Which timm's train.py allows a GPU, and a plan does not stand."""
    q, k = (torch.randn(2, 2, 16, 8, device='meta', requires_grad=True) for _ in 'qk')
    learned = torch.randn(2, 1, 1, device='meta'), torch.randn(2, 8, 1, device='meta', requires_grad=True)
    with ProductDtypes() as products:
        shares_attention_weights(q, k, *learned, 3).sum().backward()
    assert set(products.seen) == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('variant', EVERY[1:])
def test_weights_where_products_are_rounded_to_tensorfloat(monkeypatch, variant):
    x = make_tokens()
    expected = output_and_gradients(make_weights(variant), x)
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', True)
    for actual, wanted in zip(output_and_gradients(make_weights(variant).cuda(), x.cuda()), expected):
        assert wanted is None or error(actual.cpu(), wanted) < 2e-4  # None: of what makes queries and keys


def make_weights(variant):
    """A module from tokens, which are queries and keys as they are, to attention weights in plain torch."""
    layer = make_layer(variant)

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            q = x.unflatten(-1, (2, 16)).transpose(1, 2)
            return self.layer.attention_weights(q, q.flip(-2))

    return Weights()


def test_shares_begin_equal_and_with_reg():
    layer = SOTAttention(32, 2, variant='sot_shares', reg=0.2, iters=40)
    assert torch.equal(layer.log_reg, torch.full((2, 1, 1), math.log(0.2))) and not layer.share.any()
    seen = watch(layer.eval())
    layer(make_tokens())
    # columns of equal shares: a doubly stochastic matrix
    torch.testing.assert_close(seen['weights'].sum(-2), torch.ones(2, 2, 16))
    nn.init.ones_(layer.log_reg)
    nn.init.ones_(layer.share)
    layer.reset_parameters()
    assert torch.equal(layer.log_reg, torch.full((2, 1, 1), math.log(0.2))) and not layer.share.any()


def test_columns_get_their_shares():
    layer = shares_layer(iters=200)
    seen = watch(layer)
    layer(make_tokens())
    shares = (seen['k'] @ layer.share).softmax(dim=-2).squeeze(-1)
    assert shares.max() > 2 * shares.min()
    torch.testing.assert_close(seen['weights'].mean(-2), shares, rtol=1e-3, atol=1e-6)
    few = shares_layer(iters=5)
    seen = watch(few)
    few(make_tokens())
    assert 1e-4 < (seen['weights'].mean(-2) / shares - 1).abs().max() < 0.2, 'near, as the docstring says'


def test_without_iterations_it_is_softmax():
    layer = shares_layer(iters=0)
    assert layer.share is None and 'share' not in layer.state_dict()
    seen = watch(layer)
    layer(make_tokens())
    cosines = torch.cosine_similarity(seen['q'].unsqueeze(-2), seen['k'].unsqueeze(-3), dim=-1)
    torch.testing.assert_close(seen['weights'], (cosines / layer.log_reg.exp()).softmax(-1))


@pytest.mark.parametrize('log_reg', [-1e4, math.log(0.03), 0., 10., 80.])
@pytest.mark.parametrize('share', [0., 1., 1e3, 1e30])
@pytest.mark.parametrize('scale', [1e-4, 1., 1e4])
def test_shares_at_the_ends_of_their_range(scale, share, log_reg):
    """One key like the queries and all others opposite, equal tokens and zero ones: what a kernel can be at worst."""
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    q = torch.cat([x.expand(1, 1, 14, 8), torch.zeros(1, 1, 2, 8)], 2) * scale
    k = torch.cat([x, -x.expand(1, 1, 13, 8), torch.zeros(1, 1, 2, 8)], 2) * scale
    leaves = [y.clone().requires_grad_() for y in (
        q, k, torch.full((1, 1, 1), log_reg), torch.full((1, 8, 1), float(share)))]
    weights = shares_attention_weights(*leaves, 5)
    (weights * torch.arange(256.).view(16, 16)).sum().backward()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 16))
    expected = reference.shares_attention_weights(*(y.double() for y in leaves), iters=5)
    assert error(weights.detach(), expected.detach()) < 1e-3
    for leaf in leaves[:3]:
        assert leaf.grad.isfinite().all()
    assert leaves[3].grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_shares_in_other_dtypes(dtype):
    layer = shares_layer(dtype=dtype)
    seen = watch(layer)
    out = layer(make_tokens().to(dtype))
    out.float().square().sum().backward()
    expected, _ = shares_reference(layer, seen)
    assert error(seen['weights'], expected) < torch.finfo(dtype).eps / 2 + (1e-12 if dtype == torch.float64 else 1e-5)
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_shares_under_autocast(dtype):
    layer = shares_layer()
    seen = watch(layer)
    with torch.autocast('cpu', dtype=dtype):
        out = layer(make_tokens())
    assert seen['q'].dtype == seen['weights'].dtype == out.dtype == dtype, 'autocast was not on'
    expected, _ = shares_reference(layer, seen)
    assert error(seen['weights'], expected) < torch.finfo(dtype).eps / 2 + 1e-5


@pytest.mark.parametrize('to_torchscript', [
    torch.jit.script,
    lambda function: torch.jit.trace(
        function, example_inputs=(torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8), torch.zeros(2, 1, 1),
                                  torch.randn(2, 8, 1))),
])
def test_shares_in_torchscript(to_torchscript):
    """TorchScript cannot turn autocast off, which would round what is multiplied; zero rows are like no other."""
    def weights(q, k, log_reg, share):  # not a closure, which TorchScript refuses
        return shares_attention_weights(q, k, log_reg, share, 5)

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 2, 16, 8, generator=generator)
    q[..., 3, :], k[..., 5, :] = 0., 0.
    args = q, k, torch.full((2, 1, 1), -3.), torch.randn(2, 8, 1, generator=generator)
    expected = weights(*args)
    scripted = to_torchscript(weights)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert error(scripted(*args), expected) < 1e-5


def test_shares_keep_no_matrix_per_iteration():
    def saved_bytes(iters):
        layer, sizes = shares_layer(iters=iters), {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: sizes.update({x.untyped_storage().data_ptr(): x.nbytes}) or x, lambda x: x):
            weights = layer.attention_weights(*torch.randn(2, 1, 2, 256, 16).requires_grad_())
        assert weights.requires_grad
        return sum(sizes.values())

    assert saved_bytes(21) - saved_bytes(1) < 0.1 * 20 * 2 * 256 * 256 * 4


def test_permutation_and_batch_of_shares():
    layer, x = shares_layer(), make_tokens(batch=3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert error(layer(x[:, order]), layer(x)[:, order]) < 1e-5
    assert error(layer(x[1:2]), layer(x)[1:2]) < 1e-6


def test_changing_to_and_from_shares():
    layer, x = make_layer('softmax'), make_tokens()
    expected, names = layer(x), list(layer.state_dict())
    layer.set_variant('sot_shares', reg=0.2)
    assert set(layer.state_dict()) == {'log_reg', 'share', *names}
    assert error(layer(x), expected) > 1e-2
    layer.set_variant('softmax')
    assert list(layer.state_dict()) == names and torch.equal(layer(x), expected)


@pytest.mark.parametrize('kwargs, message', [
    (dict(reg=0.02), "reg=0.02 must be at least 0.03 for variant 'sot_shares'"),
    (dict(tol=0.1), "tol=0.1 must be None for variant 'sot_shares'"),
    (dict(iters=-1), 'iters=-1 must be an integer of at least 0'),
    (dict(iters=False), 'iters=False must be an integer of at least 0'),
])
def test_bad_arguments_of_shares(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SOTAttention(32, 2, variant='sot_shares', **kwargs)

""" The operator timm_sot::sot_attention, whatever implements it """
import contextlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from kernels import (
    BARS,
    DEVICE,
    HAS_CUDA,
    PATHS,
    VARIANTS,
    assert_close,
    device_of,
    dropout_factor,
    expected,
    make_inputs,
    run,
    settings,
    values_read,
)
from reference import error
from timm_sot import SOTAttention, attention
from timm_sot.attention import VARIANTS as ALL_VARIANTS, sot_attention_weights
from timm_sot.kernels import fused
from timm_sot.kernels.fused import choose_path, fused_sot_attention
from timm_sot.kernels.operands import LEAST_REG
from timm_sot.kernels.threads import loops_work

GOLDEN = Path(__file__).parent / 'golden'
SOT = torch.ops.timm_sot.sot_attention
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason='needs a GPU')


# The rule

@pytest.mark.parametrize('device, dtype, tokens, width, tol, path', [
    ('cuda', torch.bfloat16, 64, 64, None, 'onchip'),
    ('cuda', torch.float16, 1, 16, None, 'onchip'),
    ('cuda', torch.float32, 128, 64, None, 'onchip'),
    ('cuda', torch.float32, 64, 128, None, 'onchip'),
    ('cuda', torch.bfloat16, 129, 64, None, 'strips'),
    ('cuda', torch.float16, 256, 16, None, 'strips'),
    ('cuda', torch.bfloat16, 257, 64, None, 'streamed'),
    ('cuda', torch.bfloat16, 197, 65, None, 'streamed'),
    ('cuda', torch.float32, 197, 64, None, 'streamed'),
    ('cuda', torch.float32, 129, 128, None, 'streamed'),
    ('cuda', torch.bfloat16, 65536, 64, None, 'streamed'),
    ('cuda', torch.bfloat16, 64, 129, None, 'eager'),
    ('cuda', torch.float64, 64, 64, None, 'eager'),
    ('cuda', torch.float32, 64, 64, 0.1, 'eager'),
    ('cpu', torch.float32, 64, 64, None, 'cpu'),
    ('cpu', torch.bfloat16, 64, 200, None, 'cpu'),
    ('cpu', torch.float64, 64, 64, None, 'eager'),
    ('cpu', torch.float32, 64, 64, 0.1, 'cpu'),
    ('cpu', torch.float32, 8192, 64, None, 'cpu'),
    ('cpu', torch.float32, 8193, 64, None, 'eager'),
    ('meta', torch.float32, 64, 64, None, 'eager'),
    ('mps', torch.float32, 64, 64, None, 'eager'),
])
def test_rule(monkeypatch, device, dtype, tokens, width, tol, path):
    gpu = type('Properties', (), dict(major=9, shared_memory_per_block_optin=227 << 10))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: gpu)
    monkeypatch.setattr(fused, 'HAS_TRITON', True)
    monkeypatch.setattr(fused, 'loops_work', lambda: True)
    device = torch.device(device)
    assert choose_path(device, dtype, tokens, width, tol) == path
    assert choose_path(device, dtype, tokens, width, tol, reg=LEAST_REG) == path
    assert choose_path(device, dtype, tokens, width, tol, reg=0.9 * LEAST_REG) == 'eager'
    monkeypatch.setattr(fused, 'loops_work', lambda: False)
    assert choose_path(device, dtype, tokens, width, tol) == ('eager' if path == 'cpu' else path)
    gpu.major = 7
    assert choose_path(device, dtype, tokens, width, tol) == 'eager'
    gpu.major = 9
    monkeypatch.setattr(fused, 'HAS_TRITON', False)
    assert choose_path(device, dtype, tokens, width, tol) == 'eager'


@pytest.mark.parametrize('dtype, tokens, width, hopper, ampere, small', [
    (torch.float32, 64, 64, 'onchip', 'onchip', 'onchip'),
    (torch.float32, 65, 64, 'onchip', 'streamed', 'streamed'),
    (torch.float32, 64, 65, 'onchip', 'eager', 'eager'),
    (torch.float32, 65, 65, 'streamed', 'eager', 'eager'),
    (torch.float32, 500, 128, 'streamed', 'eager', 'eager'),
    (torch.bfloat16, 128, 64, 'onchip', 'onchip', 'onchip'),
    (torch.float16, 128, 128, 'onchip', 'onchip', 'streamed'),
    (torch.bfloat16, 197, 64, 'strips', 'streamed', 'streamed'),
])
def test_rule_leaves_out_what_does_not_fit(monkeypatch, dtype, tokens, width, hopper, ampere, small):
    """Shared memory of a program: 227 KiB on Hopper, 163 KiB on an A100, 99 KiB on smaller GPUs of its generation."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(fused, 'HAS_TRITON', True)
    for kibibytes, path in ((227, hopper), (163, ampere), (99, small), (None, small)):
        gpu = type('Properties', (), dict(major=8))
        if kibibytes:  # torch 2.5 does not tell
            gpu.shared_memory_per_block_optin = kibibytes << 10
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: gpu)
        assert choose_path(torch.device('cuda'), dtype, tokens, width) == path, kibibytes


@pytest.mark.slow
def test_import_needs_neither_triton_nor_numba():
    """On some machines they do not exist, on others importing them takes long."""
    code = '''
import sys
sys.modules['triton'] = sys.modules['numba'] = None  # as if not installed
import torch, timm, timm_sot
layer = timm_sot.SOTAttention(32, 2)
layer(torch.randn(2, 16, 32)).sum().backward()
from timm_sot.kernels import fused
print(fused.HAS_TRITON, fused.cpu_works(), 'timm_sot.kernels.cpu_loops' in sys.modules)
'''
    code = code.replace("import torch", '''
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name in ('triton', 'numba') else find_spec(name, *args)
import torch''')
    command = [sys.executable, '-W', 'error::RuntimeWarning', '-c', code]  # nor is it anything to warn of
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, 'False False False\n'), result.stderr


# Values

@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('path', PATHS)
def test_golden_output(path, variant):
    """What the code of the experiments computed, whose early stop ended after 3 iterations."""
    golden = {name: x.to(device_of(path)) for name, x in load_file(GOLDEN / 'sot_attention.safetensors').items()}
    q, k, v = F.linear(golden['x'], golden['qkv.weight']).view(2, 64, 3, 2, 64).permute(2, 0, 3, 1, 4)
    out, _ = SOT(q, k, v, *settings(q, variant, iters=3), path)
    out = F.linear(out.transpose(1, 2).flatten(2), golden['proj.weight'], golden['proj.bias'])
    assert error(out.cpu(), golden[f'{variant}.out'].cpu()) < 1e-5


@pytest.mark.parametrize('reg, iters', [('0.025', 4), ('0.1', 3), ('0.8', 2)])
@pytest.mark.parametrize('operands', ['q', 'qk', 'qkt'])
@pytest.mark.parametrize('path', PATHS)
def test_golden_gradients(path, operands, reg, iters):
    """The same for the transform: attention without a softmax, to the identity, shows its matrix."""
    golden, name = load_file(GOLDEN / 'sot_transform.safetensors'), f'{operands}.reg{reg}'
    golden = {name: x.to(device_of(path))[:, None] for name, x in golden.items()}
    q, k, eye = golden['q'], golden['k'], torch.eye(64, device=device_of(path)).expand_as(golden['q'])
    q.requires_grad_()
    k.requires_grad_()
    out, _ = SOT(q, k, eye, operands, False, float(reg), iters, 1., 0., None, 'euclidean', path)
    assert error(out, golden[f'{name}.out']) < 2e-5
    out.backward(golden['grad_out'])
    for x, grad in ((q, 'grad_q'), (k, 'grad_k')):
        if f'{name}.{grad}' in golden:
            assert error(x.grad, golden[f'{name}.{grad}']) < 2e-4


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('path', PATHS)
def test_agrees_with_eager(path, variant, distance):
    """The function that SOTAttention calls, by this implementation and by plain torch."""
    operands, softmax, _ = ALL_VARIANTS[variant]
    results = []
    for fuse in (True, False):
        q, k, v, grad = make_inputs(1, 1, 16, 16, device=device_of(path))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if fuse:
            out = fused_sot_attention(*leaves, operands, softmax, 0.1, 5, 0.25, 0., distance, path)
        else:
            out = sot_attention_weights(*leaves[:2], operands, softmax, distance, 0.1, 5, None) @ leaves[2]
        out.backward(grad)
        results.append((out, *(x.grad for x in leaves)))
    for actual, wanted in zip(*results):
        assert (actual is None) == (wanted is None), 'both or neither use the keys'
        assert actual is None or error(actual, wanted) < 1e-4


@pytest.mark.parametrize('groups, spread, distance, bound', [
    (8, 0.1, 'euclidean', 3e-4), (8, 0.01, 'euclidean', 6e-3), (1, 0.01, 'cosine', 0.4)])
@pytest.mark.parametrize('path', PATHS)
def test_nearly_equal_tokens(path, groups, spread, distance, bound):
    """What README's Limits say of products that cancel, which the CPU loops do not use."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(groups, 64, generator=generator)[torch.arange(64) % groups]
    q, k = (
        (centers + spread * torch.randn(64, 64, generator=generator))[None, None].to(device_of(path)) for _ in 'qk')
    _, _, v, grad = make_inputs(1, 1, 64, 64, device=device_of(path))
    out, *gradients = (x.cpu() for x in run(path, q, k, v, grad, distance=distance))
    wanted_out, *wanted = expected(q, k, v, grad, distance=distance)
    assert error(out, wanted_out) < 1e-3
    for x, y in zip(gradients, wanted):
        assert error(x, y) < (1e-4 if path == 'cpu' else bound)


@pytest.mark.parametrize('width', [32] + [128] * HAS_CUDA)  # rounding on a GPU grows with it
@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
@pytest.mark.parametrize('dtype', BARS)
@pytest.mark.parametrize('path', PATHS)
def test_equal_tokens_have_no_gradient(path, dtype, distance, width):
    """Not what rounding leaves of their distances, divided by the largest of it."""
    if path == 'strips':
        width = min(width, 64)
    q, _, v, grad = make_inputs(2, 1, 20, width, dtype, device=device_of(path))
    q = q[:, :, :1].expand_as(q).contiguous()
    _, dq, _, dv = run(path, q, q, v, grad, 'sot_q', distance=distance)
    assert not dq.any() and dv.any()
    _, dq, dk, _ = run(path, q, q.clone(), v, grad, 'sot_qk', distance=distance)
    assert not dq.any() and not dk.any()


@pytest.mark.skipif(HAS_CUDA, reason='needs the interpreter')
@pytest.mark.parametrize('path, width', [('onchip', 64), ('onchip', 128), ('strips', 64), ('streamed', 64)])
@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
def test_equal_tokens_where_products_are_cut_off(monkeypatch, path, width, distance):
    """As tensor cores may do, by 8e-9 for each channel, which the interpreter does not."""
    builder = pytest.importorskip('triton.runtime.interpreter').InterpreterBuilder
    dot = builder.create_dot

    def cut_off(self, a, *args):
        out = dot(self, a, *args)
        out.data = out.data * out.data.dtype.type(1. - 8e-9 * a.data.shape[-1])
        return out

    q, _, v, grad = make_inputs(2, 1, 20, width, torch.float16, device=DEVICE)
    q = q[:, :, :1].expand_as(q).contiguous()
    monkeypatch.setattr(builder, 'create_dot', cut_off)
    _, dq, dk, dv = run(path, q, q.clone(), v, grad, 'sot_qk', distance=distance)
    assert not dq.any() and not dk.any() and dv.any()


@pytest.mark.parametrize('reg', [0.1, 1.])
@pytest.mark.parametrize('path', PATHS)
def test_equally_large_entries(path, reg):
    """Costs and entries of S that are largest together: what they receive is shared out, or goes to one of them."""
    q, k, v, grad = make_inputs(1, 1, 40, 16, device=device_of(path))
    q, k = q.clone(), k.clone()
    q[..., 20:, :], k[..., 20:, :] = q[..., :20, :], k[..., :20, :]  # the matrix repeats itself, but for its diagonal
    actual = run(path, q, k, v, grad, 'sot_qk_nosoftmax', reg=reg, iters=3)
    wanted = expected(q, k, v, grad, 'sot_qk_nosoftmax', reg=reg, iters=3)
    if path in ('onchip', 'cpu'):  # as the reference does
        assert_close(actual, wanted)
        return
    for x, y in zip(actual[1:3], wanted[1:3]):
        actual_sum, wanted_sum = (z[..., :20, :] + z[..., 20:, :] for z in (x.cpu().double(), y))
        assert error(actual_sum, wanted_sum) < 1e-5
        assert error(x.cpu().double(), y) > 0.1


# Properties that hold whatever the inputs are

@pytest.mark.parametrize('variant', [name for name in VARIANTS if name != 'sot_qkt'])  # which mixes tokens and channels
@pytest.mark.parametrize('path', PATHS)
def test_order_of_tokens(path, variant):
    tensors = make_inputs(2, 1, 21, 16, device=device_of(path))
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0)).to(tensors[0].device)
    first = run(path, *tensors, variant, iters=3)
    second = run(path, *(x[:, :, order] for x in tensors), variant, iters=3)
    wanted = [x[:, :, order].cpu().double() if x.numel() else None for x in first]
    assert_close(second, wanted)


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk', 'sot_qkt'])
@pytest.mark.parametrize('path', PATHS)
def test_problems_do_not_mix(path, variant):
    tensors = make_inputs(3, 2, 16, 16, device=device_of(path))
    together = run(path, *tensors, variant, iters=3)
    for b in range(3):
        for h in range(2):
            alone = run(path, *(x[b:b + 1, h:h + 1] for x in tensors), variant, iters=3)
            for x, y in zip(together, alone):
                assert not x.numel() or error(x[b, h], y[0, 0]) < 1e-5


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('path', PATHS)
def test_range_diagonal_and_sums(path, variant):
    """The identity as values shows the weights."""
    q, k, v, grad = make_inputs(2, 1, 16, 16, scale=3., device=device_of(path))
    weights = run(path, q, k, torch.eye(16, device=v.device).expand_as(v), grad, variant)[0]
    if variant.endswith('nosoftmax'):
        weights = weights * 4  # d^1/2
        assert (weights.diagonal(dim1=-2, dim2=-1) - 1).abs().max() < 1e-5
        assert 0 <= weights.min() and weights.max() < 1 + 1e-5
        assert (weights.sum(dim=-1) - 1).abs().min() > 1e-3  # of no row
        off = weights.masked_fill(torch.eye(16, dtype=torch.bool, device=v.device), 0)
        assert (off.amax(dim=(-2, -1)) - 1).abs().max() < 1e-5  # the largest of each matrix
    else:
        assert (weights.sum(dim=-1) - 1).abs().max() < 1e-5 and weights.min() > 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('variant', ['sot_q', 'sot_qk'])
@pytest.mark.parametrize('path', PATHS)
def test_close_directions(path, variant, dtype):
    """What is subtracted of the gradients cancels term by term, as rounded."""
    q, k, v, grad = make_inputs(1, 2, 20, 32, dtype, device=device_of(path))
    q, k = q[:, :, :1] + 0.03 * q, q[:, :, :1] + 0.03 * k
    assert_close(
        run(path, q, k, v, grad, variant, iters=5, distance='cosine'),
        expected(q, k, v, grad, variant, iters=5, distance='cosine'), dtype)


@pytest.mark.skipif(not fused.cpu_works(), reason='needs numba')
@pytest.mark.parametrize('reg, tol, ran', [
    (0.025, 0.1, (2, 6)), (0.1, 0.1, (2, 6)), (0.1, 1e9, (1, 1)), (0.1, 0., (7, 7))])
@pytest.mark.parametrize('variant', VARIANTS)
def test_early_stop(monkeypatch, variant, reg, tol, ran):
    """On a CPU the host counts the iterations that `tol` lets run, and the fused loops run as many."""
    operands, softmax, _ = ALL_VARIANTS[variant]
    given = []
    monkeypatch.setattr(fused, 'sot_attention', lambda *args: (given.append(args[6]), SOT(*args))[1])
    q, k, v, grad = make_inputs(3, 2, 64, 64, device='cpu')
    results = []
    for dtype in (torch.float32, torch.float64):  # there is no fused path in float64
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = attention.sot_attention(*leaves, operands, softmax, 'euclidean', reg, 7, tol)
        out.backward(grad.to(dtype))
        results.append((out, *(x.grad for x in leaves)))
    assert ran[0] <= given[0] <= ran[1]
    assert len(given) == 1
    for actual, wanted in zip(*results):
        assert (actual is None) == (wanted is None) and (actual is None or error(actual, wanted) < 1e-4)


@pytest.mark.skipif(not fused.cpu_works(), reason='needs numba')
def test_early_stop_where_nothing_can_be_counted():
    """What compiles, or has no data, takes plain torch, of which both know what to say."""
    q, k, v, _ = make_inputs(2, 2, 16, 16, device='cpu')
    args = 'qk', True, 'euclidean', 0.1, 7, 0.1
    torch._dynamo.reset()
    compiled = torch.compile(attention.sot_attention, backend='eager')
    assert error(compiled(q, k, v, *args), attention.sot_attention(q, k, v, *args)) < 1e-5
    with FakeTensorMode() as mode, pytest.raises(DataDependentOutputException):
        attention.sot_attention(*(mode.from_tensor(x) for x in (q, k, v)), *args)


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('where', ['q', 'k', 'v', 'grad'])
@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('N', [16, 18])  # with and without padding
def test_what_is_not_finite_is_not_hidden(path, where, bad, N):
    """Where plain torch answers it with NaN, no finite number comes out; and other problems do not see it."""
    for softmax, reg, distance in ((True, 0.1, 'euclidean'), (False, 0.02, 'cosine')):
        results = []
        for fuse in (True, False):
            tensors = [x.clone() for x in make_inputs(2, 1, N, 16, device=device_of(path))]
            tensors['qkv'.find(where)][1, 0, 3, 5] = bad  # the gradient is the last
            *leaves, grad = tensors
            for x in leaves:
                x.requires_grad_()
            if fuse:
                out = fused_sot_attention(*leaves, 'qk', softmax, reg, 3, 0.25, 0., distance, path)
            else:
                out = sot_attention_weights(*leaves[:2], 'qk', softmax, distance, reg, 3, None) @ leaves[2]
            out.backward(grad)
            results.append((out, *(x.grad for x in leaves)))
        for name, actual, wanted in zip(('out', 'dq', 'dk', 'dv'), *results):
            assert actual[0].isfinite().all()
            assert torch.equal(actual.isfinite(), wanted.isfinite()), f'{name} for {distance}'


# Dropout

@pytest.mark.parametrize('path', PATHS)
def test_dropout(path):
    p = 0.3
    q, k, v, grad = make_inputs(2, 2, 30, 32, device=device_of(path))
    factor = dropout_factor(path, q, k, 'sot_qk', p)
    assert abs((factor > 0).double().mean().item() - (1 - p)) < 0.03
    assert len({tuple(f.flatten().tolist()) for f in factor.flatten(0, 1)}) == 4  # problems differ
    assert_close(run(path, q, k, v, grad, iters=2, p=p), expected(q, k, v, grad, iters=2, factor=factor))


@pytest.mark.parametrize('path', PATHS)
def test_expectation_of_dropout(path):
    samples = 300 if HAS_CUDA or path == 'cpu' else 48
    q, k, v, _ = make_inputs(1, 1, 16, 16, device=device_of(path))
    args = ('qk', True, 0.1, 1, 0.25)
    without = fused_sot_attention(q, k, v, *args, 0., 'euclidean', path)
    q, k, v = (x.expand(samples, -1, -1, -1) for x in (q, k, v))
    torch.manual_seed(0)
    out = fused_sot_attention(q, k, v, *args, 0.5, 'euclidean', path)
    of_the_mean = out.std(dim=0) / samples ** 0.5
    assert ((out.mean(dim=0) - without[0]) / of_the_mean).square().mean().sqrt() < 1.2  # 1 but for chance


@pytest.mark.parametrize('path', PATHS)
def test_dropout_follows_the_generator(path):
    q, k, v, _ = make_inputs(1, 2, 16, 16, device=device_of(path))

    def draw(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return fused_sot_attention(q, k, v, 'qk', True, 0.1, 2, 0.25, 0.5, 'euclidean', path)

    first = draw(0)
    assert not torch.equal(draw(), first), 'the generator advances'
    assert torch.equal(draw(0), first)
    assert not torch.equal(draw(1), first)


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing(path, reentrant):
    """What a checkpoint computes again has the same mask."""
    results = []
    for checkpointed in (False, True):
        q, k, v, grad = make_inputs(1, 2, 16, 16, device=device_of(path))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def attention(q, k, v):
            return fused_sot_attention(q, k, v, 'qk', True, 0.1, 2, 0.25, 0.5, 'euclidean', path)

        torch.manual_seed(0)
        out = checkpoint(attention, *leaves, use_reentrant=reentrant) if checkpointed else attention(*leaves)
        torch.rand(100, device=q.device)  # the generator moves on before the backward pass
        out.backward(grad)
        results.append((out, *(x.grad for x in leaves)))
    assert all(map(torch.equal, *results))


# As an operator

@pytest.mark.slow
@pytest.mark.parametrize('variant, p', [('sot_q', 0.), ('sot_qkt', 0.3)])
@pytest.mark.parametrize('path', PATHS)
def test_opcheck(path, variant, p):
    q, k, v, grad = make_inputs(2, 1, 16, 16, device=device_of(path))
    args = (*settings(q, variant, iters=2, p=p), path)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(SOT.default, (*leaves, *args))
    _, saved = SOT(q, k, v, *args)
    torch.library.opcheck(torch.ops.timm_sot.sot_attention_backward.default, (grad, q, k, v, saved, *args))


@pytest.mark.parametrize('path', PATHS)
def test_mixed_devices(path):
    q, k, v, grad = make_inputs(1, 1, 16, 16, device=device_of(path))
    args = (*settings(q, 'sot_qk', iters=2), path)
    _, saved = SOT(q, k, v, *args)
    tensors = [grad, q, k, v, saved]
    for i in range(5):
        mixed = [x.to('meta') if j == i else x for j, x in enumerate(tensors)]
        with pytest.raises(RuntimeError, match='on one device, got .*meta'):
            torch.ops.timm_sot.sot_attention_backward(*mixed, *args)
        if 1 <= i <= 3:
            with pytest.raises(RuntimeError, match='on one device, got .*meta'):
                SOT(*mixed[1:4], *args)


@pytest.mark.parametrize(
    'layout', [torch.Tensor.contiguous, lambda x: x.mT.contiguous().mT, lambda x: x[:1].expand_as(x)])
@pytest.mark.parametrize('path', PATHS)
def test_opcheck_with_strides(path, layout):
    q, k, v, grad = (layout(x) for x in make_inputs(2, 2, 16, 16, device=device_of(path)))
    args = (*settings(q, 'sot_qk', iters=2), path)
    torch.library.opcheck(SOT.default, (q, k, v, *args), test_utils='test_faketensor')
    _, saved = SOT(q, k, v, *args)
    torch.library.opcheck(
        torch.ops.timm_sot.sot_attention_backward.default, (grad, q, k, v, saved, *args), test_utils='test_faketensor')


@pytest.mark.parametrize('path', PATHS)
def test_repeated_runs_are_equal(path):
    tensors = make_inputs(2, 2, 33, 16, device=device_of(path))
    assert all(map(torch.equal, run(path, *tensors, iters=3, p=0.2), run(path, *tensors, iters=3, p=0.2)))


@pytest.mark.parametrize('path', PATHS)
def test_empty_batch(path):
    q, k, v, grad = make_inputs(2, 2, 16, 16, device=device_of(path))
    assert [x.shape for x in run(path, q[:0], k[:0], v[:0], grad[:0])] == [(0, 2, 16, 16)] * 4


@pytest.mark.parametrize('variant', ['sot_qk', 'sot_q'])
@pytest.mark.parametrize('path', PATHS)
def test_rows_that_overlap(path, variant):
    """Windows of one vector: what torch makes of them has the order of their strides, where two are alike any."""
    _, k, v, grad = make_inputs(1, 1, 10, 16, device=device_of(path))
    q = torch.randn(1, 1, 26, generator=torch.Generator().manual_seed(0)).unfold(-1, 16, 1)[:, :, :10].to(k.device)
    for inputs in ((q, k, v, grad), (k, q, v, grad)):
        assert_close(run(path, *inputs, variant, iters=3), expected(*inputs, variant, iters=3))


@pytest.mark.parametrize('path', PATHS)
def test_keys_that_are_queries(path):
    """Of other tokens, so that distances that are 0 stand off the diagonal."""
    q, _, v, grad = make_inputs(1, 1, 16, 64, device=device_of(path))
    k = q.flip(-2).contiguous()
    assert_close(run(path, q, k, v, grad), expected(q, k, v, grad))


class NoGradient(torch.autograd.Function):
    """Hands none back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize('variant', ['sot_qk', 'sot_q', 'sot_shares'])
def test_output_that_gets_no_gradient(variant):
    layer = SOTAttention(32, 2, variant=variant).to(DEVICE)
    x = torch.randn(1, 5, 32, device=DEVICE, requires_grad=True)
    q, k, v = layer.qkv(x).reshape(1, 5, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
    NoGradient.apply(layer.attend(q, k, v)).sum().backward()
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize('variant', ['sot_qk', 'sot_shares'])
def test_what_does_not_fit_is_left_to_plain_torch(variant):
    """The kernels would read beyond the end of the keys."""
    layer = SOTAttention(32, 2, variant=variant).to(DEVICE)
    q, k, v = torch.randn(3, 2, 2, 6, 16, device=DEVICE)
    one_head = layer.attend(q, k[:, :1], v)
    torch.testing.assert_close(one_head, layer.attend(q, k[:, :1].expand_as(q), v), rtol=1e-4, atol=1e-5)
    wide = torch.cat([v, v], dim=-1)
    torch.testing.assert_close(
        layer.attend(q, k, wide), torch.cat([layer.attend(q, k, v)] * 2, dim=-1), rtol=1e-4, atol=1e-5)
    if variant == 'sot_qk':  # a token is matched with others of its number
        with pytest.raises(RuntimeError):
            layer.attend(q, k[:, :, :4], v[:, :, :4])


@pytest.mark.skipif(not loops_work(), reason='needs numba')
def test_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current GPU, which may be another one."""
    on, seen = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        on.append(tensor)
        yield
        on.pop()

    class Implementation:
        def __getattr__(self, name):
            seen.append((name, len(on)))
            return getattr(fused.importlib.import_module('timm_sot.kernels.cpu'), name)

    monkeypatch.setattr(torch.cuda, 'device_of', device_of)
    monkeypatch.setattr(fused, '_implementation', lambda path: Implementation())
    q, k, v, grad = make_inputs(1, 1, 16, 16, device='cpu')
    fused_sot_attention(q.requires_grad_(), k, v, 'qk', True, 0.1, 2, 0.25, 0., 'euclidean', 'cpu').backward(grad)
    assert seen == [('sot_attention_forward', 1), ('sot_attention_backward', 1)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
@pytest.mark.parametrize('N', [16, 130])
def test_second_gpu(N):
    results = []
    for device in ('cuda:0', 'cuda:1'):
        layer, _ = layer_and_input(device)
        x = torch.randn(2, N, 32, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        layer.load_state_dict(layer_and_input('cpu')[0].state_dict())
        results.append([y.cpu() for y in step(layer, x)])
    for actual, wanted in zip(*results):
        assert error(actual, wanted) < 1e-5 or wanted.abs().max() < 1e-6


@pytest.mark.parametrize('path', PATHS)
def test_second_derivative_is_refused(path):
    q, k, v, _ = make_inputs(1, 1, 16, 16, device=device_of(path))
    q.requires_grad_()
    out = fused_sot_attention(q, k, v, 'qk', True, 0.1, 2, 0.25, 0., 'euclidean', path)
    grad, = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative. Set fused_attn'):
        grad.sum().backward()


@pytest.mark.parametrize('path', PATHS)
def test_nothing_waits_for_the_device(path, monkeypatch):
    """Neither pass asks for the value of a tensor. On the CPU that means .item() and its relatives."""
    q, k, v, grad = make_inputs(1, 2, 16, 16, device=device_of(path))
    q.requires_grad_()
    args = ('qk', True, 0.1, 2, 0.25, 0.5, 'euclidean', path)
    fused_sot_attention(q, k, v, *args).backward(grad)  # compiles and loads
    if device_of(path) == 'cuda':
        torch.cuda.set_sync_debug_mode('error')
        try:
            fused_sot_attention(q, k, v, *args).backward(grad)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        return
    with values_read() as seen:
        fused_sot_attention(q, k, v, *args).backward(grad)
    assert not seen


# In the layer

def layer_and_input(device, variant='sot_qk', **kwargs):
    torch.manual_seed(0)
    layer = SOTAttention(32, 2, variant=variant, device=device, **kwargs)
    return layer, torch.randn(2, 16, 32, device=device, requires_grad=True)


def step(layer, x):
    x.grad = None
    layer.zero_grad()
    torch.manual_seed(1)
    out = layer(x)
    out.float().square().sum().backward()
    return out.detach(), x.grad.clone(), *(p.grad.clone() for p in layer.parameters())


def runs_fused(device):
    return choose_path(torch.device(device), torch.float32, 16, 16) != 'eager'


DEVICES = ['cpu', pytest.param('cuda', marks=needs_cuda)]


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('device', DEVICES)
def test_layer_is_the_same_with_and_without_fusion(device, variant):
    layer, x = layer_and_input(device, variant)
    fused_results = step(layer, x)
    layer.fused_attn = False
    for actual, wanted in zip(fused_results, step(layer, x)):
        assert error(actual, wanted) < 1e-4 or wanted.abs().max() < 1e-6


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_second_derivative_without_fusion(variant, distance):
    """What the error of the fused one advises."""
    layer, _ = layer_and_input('cpu', variant, dtype=torch.float64, iters=2, distance=distance)
    layer.fused_attn = False
    x = torch.randn(1, 16, 32, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    direction = torch.randn_like(x)
    actual, = torch.autograd.grad((gradient * direction).sum(), x)

    step = 1e-5
    ends = []
    for end in (x.detach() + step * direction, x.detach() - step * direction):
        ends.append(torch.autograd.grad(layer(end.requires_grad_()).square().sum(), end)[0])
    assert error(actual, (ends[0] - ends[1]) / (2 * step)) < 1e-5


@pytest.mark.parametrize('device', DEVICES)
def test_layer_calls_the_operator(device):
    from torch.profiler import profile
    layer, x = layer_and_input(device)
    with profile() as p:
        step(layer, x)
    called = any('timm_sot::sot_attention' == e.name for e in p.events())
    assert called == runs_fused(device)


@pytest.mark.parametrize('device', DEVICES)
def test_compiled_layer_calls_the_operator(device):
    torch._dynamo.reset()
    layer, x = layer_and_input(device)
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert ('timm_sot.sot_attention.default' in targets) == runs_fused(device), targets


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('qk_norm', [False, True])
@pytest.mark.parametrize('device', DEVICES)
def test_layer_under_autocast(device, qk_norm, dtype):
    """A norm widens the queries and keys under autocast; the values are what the projection made them."""
    layer, x = layer_and_input(device, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
    wanted = step(layer, x)
    with torch.autocast(device, dtype=dtype):
        out = layer(x)
        assert out.dtype == dtype
        actual = step(layer, x)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in actual[1:])
    assert error(actual[0], wanted[0]) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
@pytest.mark.parametrize('p', [0., 0.5])
@pytest.mark.parametrize('device', DEVICES)
def test_compile(device, p, backend):
    torch._dynamo.reset()
    layer, x = layer_and_input(device, attn_drop=p)
    # inductor's cache on the disk would bring back what an earlier version of the operators looked like
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        results = step(compiled, x)
    if p == 0. or backend == 'aot_eager':  # inductor draws random numbers of its own
        for actual, wanted in zip(results, step(layer, x)):
            assert error(actual, wanted) < 1e-5 or wanted.abs().max() < 1e-6
    else:
        assert all(map(torch.equal, results, step(compiled, x))), 'torch.manual_seed governs the mask'
        torch.manual_seed(2)
        assert not torch.equal(compiled(x), results[0])


@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize('device', DEVICES)
def test_compile_with_dynamic_shapes(device, fuse):
    torch._dynamo.reset()
    layer, _ = layer_and_input(device)
    layer.fused_attn = fuse
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager', dynamic=True)
    for B, N in ((2, 17), (3, 20), (5, 32)):  # the on-chip kernels know the next power of 2
        x = torch.randn(B, N, 32, device=device, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=True):  # for another number of tokens
            results = step(compiled, x)
        for actual, wanted in zip(results, step(layer, x)):
            assert error(actual, wanted) < 1e-5 or wanted.abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('device', DEVICES)
def test_export(device, strict, fuse, tmp_path):
    """For any number of images and of tokens, and to run where only torch is."""
    layer, x = layer_and_input(device)
    layer.fused_attn = fuse
    layer.eval()
    sizes = {0: torch.export.Dim('batch', min=2, max=64), 1: torch.export.Dim('tokens', min=2, max=1024)}
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes=(sizes,), strict=strict)
    x = torch.randn(7, 33, 32, device=device)
    assert error(program.module()(x), layer(x)) < (1e-6 if device == 'cpu' else 1e-5)
    if not hasattr(torch.compiler, 'is_exporting'):  # this torch does not say when it exports
        return
    torch.export.save(program, tmp_path / 'program.pt2')
    torch.save((x, layer(x)), tmp_path / 'tensors.pt')
    code = '''
import sys
sys.modules['timm_sot.kernels'] = None  # as if not installed
import torch
x, wanted = torch.load(sys.argv[1] + '/tensors.pt')
out = torch.export.load(sys.argv[1] + '/program.pt2').module()(x)
assert (out - wanted).norm() < 1e-5 * wanted.norm()
'''
    subprocess.run([sys.executable, '-c', code, tmp_path], check=True)


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode
    with FakeTensorMode():
        layer, x = layer_and_input(DEVICE)
        out = layer(x)
        out.sum().backward()
    assert out.shape == (2, 16, 32) and x.grad.shape == x.shape


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore:.*torch.jit')
def test_traced_layers_hold_plain_torch():
    """They are loaded where this package is not."""
    layer, x = layer_and_input(DEVICE)
    traced = torch.jit.trace(layer.eval(), x.detach())
    assert 'timm_sot::' not in str(traced.inlined_graph)
    assert error(traced(x), layer(x)) < 1e-5


@pytest.mark.parametrize('variant', ['sot_q', 'sot_qkt', 'sot_qk_nosoftmax'])
@pytest.mark.parametrize('device', DEVICES)
def test_torch_func(device, variant):
    """Transformations of functions see through a layer that is fused otherwise."""
    layer, x = layer_and_input(device, variant)
    x = x.detach()

    def loss(x):
        return layer(x).square().sum()

    wanted, = torch.autograd.grad(loss(x.requires_grad_()), x)
    x = x.detach()
    assert error(torch.func.grad(loss)(x), wanted) < 1e-4
    assert error(torch.func.vmap(torch.func.grad(lambda x: loss(x[None])))(x), wanted) < 1e-4
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(device)
    _, derivative = torch.func.jvp(loss, (x,), (tangent,))
    assert error(derivative, (wanted * tangent).sum()) < 1e-4
    with forward_ad.dual_level(), torch.no_grad():
        derivative = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent
    assert error(derivative, (wanted * tangent).sum()) < 1e-4


@needs_cuda
def test_cuda_graph():
    layer, x = layer_and_input('cuda', attn_drop=0.5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(), setattr(x, 'grad', None)
    with torch.cuda.graph(graph):
        out = layer(x)
        out.square().sum().backward()
    outs = []
    for _ in range(2):
        graph.replay()
        outs.append(out.clone())
    assert not torch.equal(*outs), 'a replay draws a mask of its own'
    assert out.isfinite().all() and x.grad.isfinite().all()


@needs_cuda
def test_many_problems():
    """More than one dimension of a CUDA grid holds."""
    q, k, v, _ = make_inputs(70000, 1, 4, 16, torch.bfloat16)
    for path in ('onchip', 'strips', 'streamed'):
        many, _ = SOT(q, k, v, *settings(q, 'sot_qk', iters=2), path)
        few, _ = SOT(q[-3:], k[-3:], v[-3:], *settings(q, 'sot_qk', iters=2), path)
        assert torch.equal(many[-3:], few)

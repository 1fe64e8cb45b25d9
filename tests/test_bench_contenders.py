""" What the bench compares: that it computes what its name says """
import pytest
import torch

from timm_sot import attention
from timm_sot.attention import VARIANTS, shares_attention_weights, sot_attention_weights
from timm_sot.bench import contenders

CPU = torch.device('cpu')


@pytest.mark.parametrize('tol', [None, 0.1])
def test_original_form_computes_the_same(tol):
    q, k = torch.randn(2, 3, 2, 64, contenders.D, generator=torch.Generator().manual_seed(0))
    expected = sot_attention_weights(q, k, 'qk', True, 'euclidean', contenders.REG, contenders.ITERS, tol)
    assert torch.allclose(contenders.original_weights(q, k, tol=tol), expected, rtol=1e-4, atol=1e-6)


def test_contenders_of_the_core_agree():
    q, k, v = contenders.qkv_inputs(2, 1, 64, torch.float32, CPU)
    assert not q.is_contiguous() and q.is_leaf and q.shape == (2, 1, 64, contenders.D)
    softmax = contenders.eager_softmax(q, k, v)
    assert torch.allclose(softmax, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)
    for variant in set(VARIANTS) - {'softmax'}:
        learned = contenders.learned_parameters(variant, 1, CPU)
        assert bool(learned) == (variant == 'sot_shares') and all(x.requires_grad and x.is_leaf for x in learned)
        if learned:
            weights = shares_attention_weights(q, k, *learned, contenders.ITERS)
        else:
            operands, softmax, _ = VARIANTS[variant]
            weights = sot_attention_weights(
                q, k, operands, softmax, 'euclidean', contenders.REG, contenders.ITERS, None)
        assert torch.allclose(contenders.sot_core(variant)(q, k, v, *learned), weights @ v, atol=1e-4), variant
    assert torch.allclose(contenders.unfused_core(q, k, v), contenders.sot_core('sot_qk')(q, k, v), atol=1e-4)


def test_the_path_of_a_contender_is_the_one_it_takes(monkeypatch):
    asked = []

    def choose(device, dtype, tokens, head_width, tol=None, strips=True, reg=None):
        asked.append((device, dtype, tokens, head_width, tol, strips, reg))
        return 'eager'

    monkeypatch.setattr(contenders, 'choose_path', choose)
    monkeypatch.setattr(attention, 'choose_path', choose)
    variants = sorted(set(VARIANTS) - {'softmax'})
    group = contenders.core_group(1, 1, 64, contenders.FORWARD, torch.bfloat16, CPU, 1., variants).build()
    named, asked[:] = asked[:], []
    for contender in group:
        if contender.path:
            contender.call()
    assert asked == named and len(asked) == len(variants)


def test_sinkhorn_contenders_agree():
    log_kernel = -torch.rand(2, 8, 8) / 0.1
    expected = contenders.sinkhorn(log_kernel, iters=contenders.ITERS)
    assert torch.allclose(contenders.plain_sinkhorn(log_kernel), expected, atol=1e-4)
    if pot := contenders.import_pot():
        mass = torch.full((2, 8), 1 / 8)
        plan = pot.bregman_log_projection_batch(
            log_kernel, mass, mass, max_iter=contenders.ITERS, tol=0., grad='autodiff')
        assert torch.allclose(plan['log_T'], expected, atol=1e-4)


def test_what_is_not_installed_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(contenders, 'import_pot', lambda: None)
    row, = [c for c in contenders.sinkhorn_group(1, 4, contenders.FORWARD, CPU, 1.).build() if c.name == 'POT']
    assert 'pip install pot' in row.skipped
    row, = [c for c in contenders.points_group(4, CPU, 1.).build() if c.name == 'flash-sinkhorn']
    assert row.skipped == 'needs CUDA'


@pytest.mark.parametrize('phase', [contenders.FORWARD, contenders.TRAIN])
def test_pass(phase):
    x = torch.ones(3, requires_grad=True)
    seen = []

    def fn(x):
        seen.append(torch.is_grad_enabled())
        y = x * 2
        if y.requires_grad:
            y.register_hook(lambda grad: seen.append(grad.tolist()))
        return y

    contenders.pass_of(fn, (x,), torch.full((3,), 5.), phase)()
    assert seen == ([False] if phase == contenders.FORWARD else [True, [5., 5., 5.]])
    assert x.grad is None


def test_training_step_moves_the_weights(monkeypatch):
    monkeypatch.setattr(contenders, 'BATCH', 2)
    models = []
    build = contenders.build_model
    monkeypatch.setattr(contenders, 'build_model', lambda *args: models.append(build(*args)) or models[-1])
    step, = contenders.step_group(['cct_2_sot_qk'], False, CPU, 1.).build()
    before = [p.clone() for p in models[0].parameters()]
    step.call()
    assert all(not torch.equal(a, b) for a, b in zip(before, models[0].parameters()))

""" Candidates for attention variants """
import pytest
import timm
import torch

import timm_sot
from timm_sot.study.candidates import CANDIDATES, ITERS, apply_candidate, control_of, plan
from timm_sot.study.runner import build_model, initial_state
from timm_sot.viz.maps import attention_entropy, row_entropy


def layer(name, seed=0):
    """The first attention layer of a small model, and queries and keys for it."""
    torch.manual_seed(seed)
    model = timm.create_model('cct_2', img_size=16)
    attention = apply_candidate(model, name).blocks[0].attn
    return attention, torch.randn(3, 2, 16, 64), torch.randn(3, 2, 16, 64)


def set_parameter(parameter, value):
    with torch.no_grad():
        parameter.fill_(value)


def test_controls():
    for name, candidate in CANDIDATES.items():
        if candidate.control is None:
            assert candidate.weights == 'softmax'
        else:
            control = CANDIDATES[candidate.control]
            assert control._replace(about='', control='', weights='') == candidate._replace(
                about='', control='', weights=''), f'{name} and its control differ in more than the weights'
            assert control.control is None
    controls = {candidate.control for candidate in CANDIDATES.values()} - {None}
    assert controls == {name for name, candidate in CANDIDATES.items() if candidate.control is None}


def test_rows_of_controls():
    assert control_of('cct_2', {'candidate': 'plan', 'img_size': 16}) == ('cct_2', {'candidate': 'cosine', 'img_size': 16})
    assert control_of('cct_2', {'candidate': 'bias'}) == ('cct_2', {'candidate': 'dot'}), 'not without its factor'
    assert control_of('cct_2', {'candidate': 'cosine'}) is control_of('cct_2', {}) is None


@pytest.mark.parametrize('name', CANDIDATES)
def test_rows_sum_to_the_mass(name):
    attention, q, k = layer(name)
    weights = attention.attention_weights(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.full((3, 2, 16), (CANDIDATES[name].mass or 1.) + CANDIDATES[name].common))
    assert weights.std() > 1e-3 * weights.mean()


@pytest.mark.parametrize('name', CANDIDATES)
def test_gradients_and_size(name):
    torch.manual_seed(0)
    model = timm.create_model('cct_2', num_classes=3)
    before = sum(p.numel() for p in model.parameters())
    kept = dict(model.named_parameters())
    apply_candidate(model, name)
    after = dict(model.named_parameters())
    assert all(after[key] is value for key, value in kept.items())
    assert sum(p.numel() for p in after.values()) <= 1.01 * before
    with torch.autocast('cpu', torch.bfloat16):
        out = model(torch.randn(2, 3, 32, 32))
    out.float().logsumexp(1).sum().backward()
    for key, parameter in after.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_plan_is_doubly_stochastic():
    kernel = (2 * torch.randn(2, 3, 16, 16, dtype=torch.float64)).softmax(-1)
    matrix, a, b = plan(kernel)
    torch.testing.assert_close(matrix, a * kernel * b)
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    log_plan = timm_sot.sinkhorn(kernel.log().transpose(-2, -1), iters=ITERS).transpose(-2, -1)
    # sinkhorn ends with the columns, from u first: on the transposed kernel it ends with the rows
    torch.testing.assert_close(matrix, 16 * log_plan.exp())


def test_shares_are_those_of_the_columns():
    kernel = torch.randn(2, 3, 16, 16, dtype=torch.float64).softmax(-1)
    shares = torch.randn(2, 3, 1, 16, dtype=torch.float64).softmax(-1)
    matrix, _, _ = plan(kernel, shares=shares)
    torch.testing.assert_close(matrix.sum(-2, keepdim=True) / 16, shares, rtol=0.05, atol=1e-3)
    assert (shares - 1 / 16).abs().max() > 0.05


def test_damping_goes_from_softmax_to_the_plan():
    kernel = torch.randn(2, 3, 16, 16).softmax(-1)
    torch.testing.assert_close(plan(kernel, damping=torch.zeros(3, 1, 1))[0], kernel)
    torch.testing.assert_close(plan(kernel, damping=torch.ones(3, 1, 1))[0], plan(kernel)[0])


@pytest.mark.parametrize('name, parameter, value, control', [
    ('relaxed', 'damping', -50., 'cosine'),
    ('relaxed', 'damping', 50., 'plan'),
    ('bias', 'gain', 0., 'dot'),
    ('log_plan', 'gain', 1., 'plan'),
    ('shares', 'share', 0., 'plan'),
    ('plan_contrast', 'contrast', 0., 'plan'),
    ('plan_mass', 'log_mass', 0., 'plan_sharp'),
    ('marginals', 'share', 0., 'plan'),
    ('cosine_gate', 'token_mass', 0., 'cosine'),
    ('plan_common_local', 'common', 0., 'plan'),
    ('cosine_common_local', 'common', 0., 'cosine'),
])
def test_special_cases(name, parameter, value, control):
    attention, q, k = layer(name)
    set_parameter(getattr(attention, parameter), value)
    expected = layer(control)[0].attention_weights(q, k)
    torch.testing.assert_close(attention.attention_weights(q, k), expected, rtol=1e-4, atol=1e-6)


def test_half():
    attention, q, k = layer('half')
    weights = attention.attention_weights(q, k)
    torch.testing.assert_close(weights[:, 0], layer('plan')[0].attention_weights(q, k)[:, 0])
    torch.testing.assert_close(weights[:, 1], layer('cosine')[0].attention_weights(q, k)[:, 1])


def test_gate():
    attention, q, k = layer('marginals')
    plain = attention.attention_weights(q, k)
    set_parameter(attention.token_mass, 0.01)
    sums = attention.attention_weights(q, k).sum(-1)
    torch.testing.assert_close(sums, (0.01 * q.sum(-1)).exp())
    assert (sums - plain.sum(-1)).abs().max() > 0.01


def test_half_of_an_odd_number_of_heads():
    model = apply_candidate(timm.create_model('vit_tiny_patch16_224', img_size=32), 'half')
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_masked_diagonal_and_identity():
    attention, q, k = layer('plan_masked')
    diagonal = attention.attention_weights(q, k).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, torch.full_like(diagonal, torch.tensor(-1.).sigmoid().item()))


def test_local_adds_the_neighbours_of_each_token():
    attention, q, k = layer('plan_local')
    attention.eval()
    v = torch.randn(3, 2, 16, 64)
    plain = layer('plan')[0].eval().attend(q, k, v)
    grid = torch.nn.functional.pad(v.reshape(3, 2, 4, 4, 64), (0, 0, 1, 1, 1, 1))  # around 4 x 4 tokens a row of zeros
    for head, channel in ((0, 0), (0, 63), (1, 0), (1, 3)):
        dy, dx = divmod((64 * head + channel) % 9, 3)
        neighbours = grid[:, head, dy:dy + 4, dx:dx + 4, channel].reshape(3, 16)
        got = attention.attend(q, k, v)[:, head, :, channel]
        torch.testing.assert_close(got, plain[:, head, :, channel] + neighbours)
    set_parameter(attention.near, 0.)
    torch.testing.assert_close(attention.attend(q, k, v), plain)


@pytest.mark.parametrize('name', ['plan_local', 'plan_grid'])
def test_no_grid(name):
    model = timm.create_model('vit_tiny_patch16_224', img_size=32)
    with pytest.raises(ValueError, match='the model has no grid_size'):
        apply_candidate(model, name)


def test_scores():
    attention, q, k = layer('dot')
    torch.testing.assert_close(attention.attention_weights(q, k), (q @ k.transpose(-2, -1) / 8).softmax(-1))
    attention, q, k = layer('cosine')
    cosines = torch.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), dim=-1)
    torch.testing.assert_close(attention.attention_weights(q, k), (10 * cosines).softmax(-1))
    attention, q, k = layer('distance')
    distances = torch.cdist(q, k)
    expected = (-10 * distances / distances.amax(-1, keepdim=True)).softmax(-1)
    torch.testing.assert_close(attention.attention_weights(q, k), expected, rtol=1e-4, atol=1e-6)


def test_a_token_that_nobody_looks_at():
    kernel = torch.full((1, 1, 4, 4), 1 / 3)
    kernel[..., 0] = 0.
    assert plan(kernel)[0].isfinite().all()


def test_unknown_candidate():
    with pytest.raises(ValueError, match="candidate='plam' is unknown; choose one of .*'plan'"):
        apply_candidate(timm.create_model('cct_2'), 'plam')


def test_entropy_of_a_candidate():
    model = apply_candidate(timm.create_model('cct_2'), 'plan').eval()
    images = torch.randn(2, 3, 32, 32)
    entropies = attention_entropy(model, images)
    weights = timm_sot.attention_maps(model, images)['blocks.1']['weights']
    torch.testing.assert_close(entropies['blocks.1'], row_entropy(weights))
    assert 0.5 < entropies['blocks.1'].mean() < 0.999


@pytest.mark.parametrize('candidate, low, high', [(None, 0., 1e-3), ('plan_mass', 0.05, 1.), ('cosine_mass', 0.05, 1.)])
@pytest.mark.parametrize('seed', range(3))
def test_what_attention_adds_before_training(candidate, low, high, seed):
    """How it varies over the tokens, relative to the tokens: README says so."""
    row = ('cct_2', {} if candidate is None else dict(candidate=candidate))
    model = build_model(row, 10, seed).eval()
    model.load_state_dict(initial_state(row, ('cct_2', {}), 10, seed))
    images = torch.nn.functional.interpolate(torch.randn(16, 3, 8, 8), 32, mode='bicubic')
    block, seen = model.blocks[0], {}
    block.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    block.attn.register_forward_hook(lambda module, args, out: seen.update(added=out))
    with torch.no_grad():
        model(images)
    tokens, added = ((x - x.mean(dim=1, keepdim=True)).std().item() for x in (seen['tokens'], seen['added']))
    assert low < added / tokens < high


def test_context_adds_the_neighbours_of_each_token_before_the_attention():
    attention, _, _ = layer('shares_context')
    attention.eval()
    x = torch.randn(3, 16, 128)
    grid = torch.nn.functional.pad(x.reshape(3, 4, 4, 128), (0, 0, 1, 1, 1, 1))  # around 4 x 4 tokens a row of zeros
    shifted = torch.stack([
        grid[:, dy:dy + 4, dx:dx + 4, channel] for channel in range(128) for dy, dx in [divmod(channel % 9, 3)]], dim=-1)
    expected = layer('shares')[0].eval()(x + shifted.reshape(3, 16, 128))
    torch.testing.assert_close(attention(x), expected)
    set_parameter(attention.near, 0.)
    torch.testing.assert_close(attention(x), layer('shares')[0].eval()(x))


def test_norm():
    attention, q, k = layer('shares_norm_local')
    v = torch.randn(3, 2, 16, 64)
    plain = layer('shares_local')[0].eval().attend(q, k, v)
    torch.testing.assert_close(attention.eval().attend(q, k, v), plain / plain.square().mean(-1, keepdim=True).sqrt())

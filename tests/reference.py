""" The specification in float64: what the package must compute, in the plainest way that computes it

Written without the package. One problem at a time, one matrix at a time, no shortcuts; torch only for its arithmetic
and for its derivatives. Those are exact, and where there is none the specification chooses: the distance of two equal
points has gradient 0, and so has the direction of a zero vector.
"""
import math

import torch


def per_problem(function, *tensors):
    """Apply a function of matrices to every problem of tensors of shape (..., N, D), in float64."""
    if tensors[0].ndim == 2:
        return function(*(t.double() for t in tensors))
    return torch.stack([per_problem(function, *problem) for problem in zip(*tensors)])


def logsumexp(x, dim):
    """log sum exp along one dimension of a matrix, which is kept. -inf entries add nothing."""
    largest = x.amax(dim, keepdim=True).detach()
    return largest + (x - largest).exp().sum(dim, keepdim=True).log()


def sinkhorn(log_kernel, iters=10, tol=None, row_mass=None):
    """Log-kernel(s) (..., N, M) to log-plan(s). `tol` looks at all problems at once, so they advance in lockstep."""
    N, M = log_kernel.shape[-2:]
    problems = log_kernel.double().reshape(-1, N, M)
    r = 1 / N if row_mass is None else row_mass
    c = N * r / M

    us = [torch.zeros(N, 1, dtype=torch.float64) for _ in problems]
    vs = [torch.zeros(1, M, dtype=torch.float64) for _ in problems]
    for _ in range(iters):
        changes = []
        for p, L in enumerate(problems):
            u = math.log(r) - logsumexp(L + vs[p], dim=1)
            changes.append((u - us[p]).abs().sum().item())
            us[p] = u
            vs[p] = math.log(c) - logsumexp(L + u, dim=0)
        if tol is not None and sum(changes) / len(changes) < tol:
            break
    return torch.stack([L + u + v for L, u, v in zip(problems, us, vs)]).reshape(log_kernel.shape)


def euclidean(x, y):
    """||x_i - y_j||_2."""
    squared = (x[:, None, :] - y[None, :, :]).square().sum(dim=-1)
    equal = squared == 0
    return squared.masked_fill(equal, 1.).sqrt().masked_fill(equal, 0.)  # the root has no derivative at 0


def cosine(x, y):
    """1 - cos(x_i, y_j), where a zero vector has cosine 0 with everything."""
    def unit(a):
        zero = (a == 0).all(dim=1, keepdim=True)
        length = a.masked_fill(zero, 1.).square().sum(dim=1, keepdim=True).sqrt()
        return (a / length).masked_fill(zero, 0.)

    return 1. - (unit(x)[:, None, :] * unit(y)[None, :, :]).sum(dim=-1)


def cost(x, y, distance='euclidean', normalize='row'):
    """Cost matrix of one problem."""
    C = {'euclidean': euclidean, 'cosine': cosine}[distance](x, y)
    if normalize == 'row':
        largest = C.amax(dim=1, keepdim=True)
    elif normalize == 'matrix':
        largest = C.amax()
    else:
        largest = torch.ones((), dtype=C.dtype)
    return C / torch.where(largest == 0, 1., largest)  # 0 / 0 is 0


def self_optimal_transport(
        x,
        y=None,
        distance='euclidean',
        normalize='row',
        reg=0.1,
        iters=10,
        tol=None,
        row_mass=None,
        mask_diagonal=True,
        sigmoid=True,
        max_scale=True,
):
    """Points (..., N, D) to matrices (..., N, N)."""
    N = x.shape[-2]
    on_diagonal = torch.eye(N, dtype=torch.bool)
    if N == 1 and mask_diagonal:
        return torch.ones(*x.shape[:-1], 1, dtype=torch.float64)

    def log_kernel(x, y):
        L = -cost(x, y, distance, normalize) / reg
        return L.masked_fill(on_diagonal, -math.inf) if mask_diagonal else L

    def finish(log_plan):
        S = log_plan.exp()
        if sigmoid:
            S = S / (1 + S)
        if max_scale:
            S = S / S.amax()
        return S.masked_fill(on_diagonal, 1.) if mask_diagonal else S

    L = per_problem(log_kernel, x, x if y is None else y)
    return per_problem(finish, sinkhorn(L, iters, None if tol is None else tol / reg, row_mass))


def attention_weights(q, k, variant, reg=0.1, iters=10, tol=None, distance='euclidean'):
    """Queries and keys (B, H, N, d) to attention weights (B, H, N, N)."""
    q, k = q.double(), k.double()
    d = q.shape[-1]
    if variant == 'softmax':
        scores = q @ k.transpose(-2, -1)
    else:
        y = {'q': q, 'qk': k, 'qkt': k.transpose(-2, -1)}[variant.split('_')[1]]
        scores = self_optimal_transport(q, y, distance, reg=reg, iters=iters, tol=tol)
    scores = scores * d ** -0.5
    if variant.endswith('_nosoftmax'):
        return scores
    weights = scores.exp()
    return weights / weights.sum(dim=-1, keepdim=True)


def shares_attention_weights(q, k, log_reg, share, iters):
    """Queries and keys (B, H, N, d), parameters of the heads (H, 1, 1) and (H, d, 1), to weights (B, H, N, N).

    A plan whose rows have mass 1 and whose columns have N times softmax_j(w.k_j), columns first.
    """
    def head(q, k, log_reg, share):
        L = (1. - cosine(q, k)) / log_reg.clamp_min(math.log(0.03)).exp()
        u, v = -logsumexp(L, dim=1), torch.zeros(1, len(k), dtype=torch.float64)
        if share is not None:
            log_share = (k @ share).T - logsumexp((k @ share).T, dim=1) + math.log(len(q))
            for _ in range(iters):
                v = log_share - logsumexp(L + u, dim=0)
                u = -logsumexp(L + v, dim=1)
        return (L + u + v).exp()

    q, k, log_reg = q.double(), k.double(), log_reg.double()
    share = [None] * len(log_reg) if share is None else share.double()
    return torch.stack([torch.stack([head(*each) for each in zip(*pair, log_reg, share)]) for pair in zip(q, k)])


def error(actual, expected):
    """Largest error, as a part of the largest value that was expected. NaN if there is one."""
    assert actual.shape == expected.shape, f'{tuple(actual.shape)}, expected {tuple(expected.shape)}'
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()

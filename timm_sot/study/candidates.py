""" Candidates: forms of SOT attention on trial, each with its control

A form that earns a name moves to attention.py and into timm's registry; the others live here only as long as they are
compared. A control turns the same scores into weights by a plain softmax, so that what a candidate gains over it is
the plan's doing and not that of the scores. In a study `candidate=NAME` stands among the arguments of a model.

In all formulas i is a query, j a key, h a head, and Greek letters are numbers learned for each head.
"""
import math
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias
from torch import nn

from .. import transform  # by its name: coupled.py changes what is in it
from ..attention import SOTAttention
from ..patch import attention_layers

__all__ = ['CANDIDATES', 'Candidate', 'CandidateAttention', 'apply_candidate', 'control_of']

ITERS = 5


class Candidate(NamedTuple):
    """One form; the fields after `control` are its parts, see CandidateAttention."""
    about: str
    control: Optional[str]  # the candidate that is its control, None for a control
    scores: str = 'cosine'
    weights: str = 'plan'
    factor: float = 10.
    mask_diagonal: bool = False
    identity: bool = False
    contrast: bool = False
    mass: Optional[float] = None
    gate: bool = False
    reach: Optional[float] = None
    local: bool = False
    common: bool = False
    context: bool = False
    norm: bool = False


def _with_control(name: str, about: str, control: str, **parts: Any) -> Dict[str, Candidate]:
    """A candidate and its control, which is called `control`."""
    return {
        name: Candidate(about, control, **parts),
        control: Candidate(f'control of {name}', None, **{**parts, 'weights': 'softmax'}),
    }


CANDIDATES: Dict[str, Candidate] = {
    **_with_control('plan', 'doubly stochastic, from cosines', 'cosine'),
    'relaxed': Candidate('between softmax and doubly stochastic, from cosines', 'cosine', weights='relaxed'),
    'shares': Candidate("a token's share of the attention is predicted, from cosines", 'cosine', weights='shares'),
    'half': Candidate('every other head a plan, the others softmax, from cosines', 'cosine', weights='half'),
    'log_plan': Candidate('softmax of the scaled log-plan, from cosines', 'cosine', weights='log_plan'),
    **_with_control('plan_sharp', 'as plan, from twice the factor', 'cosine_sharp', factor=20.),
    **_with_control('plan_dot', 'doubly stochastic, from dot products', 'dot', scores='dot', factor=1.),
    **_with_control('plan_distance', "doubly stochastic, from row 4's costs, learned reg", 'distance',
                    scores='distance', factor=10.),
    **_with_control('plan_masked', 'no token matched with itself, the identity mixed in, from cosines', 'cosine_masked',
                    mask_diagonal=True, identity=True),
    **_with_control('plan_contrast', 'differences from the mean of the tokens scaled, from cosines', 'cosine_contrast',
                    contrast=True),
    **_with_control('plan_mass', 'each head has a mass of its own, from cosines', 'cosine_mass', factor=20., mass=16.),
    'shares_mass': Candidate('as plan_mass, with shares', 'cosine_mass', weights='shares', factor=20., mass=16.),
    'marginals': Candidate('as shares, and the mass of each token is predicted', 'cosine_gate', weights='shares',
                           mass=1., gate=True),
    'cosine_gate': Candidate('control of marginals', None, weights='softmax', mass=1., gate=True),
    'shares_contrast': Candidate('as plan_contrast, with shares', 'cosine_contrast', weights='shares', contrast=True),
    **_with_control('plan_mass_4', "as plan_mass, from a smaller mass and plan's factor", 'cosine_mass_4', mass=4.),
    **_with_control('plan_grid', 'a cost of the displacement on the grid is learned, from cosines', 'cosine_grid',
                    reach=math.inf),
    **_with_control('plan_near', 'as plan_grid, the displacement at first costs its square', 'cosine_near', reach=1.),
    **_with_control('plan_near_mass', 'as plan_near, each head has a mass of its own', 'cosine_near_mass', mass=4.,
                    reach=1.),
    **_with_control('plan_near_contrast', 'as plan_near, differences from the mean of the tokens scaled',
                    'cosine_near_contrast', contrast=True, reach=1.),
    **_with_control('plan_local', 'values convolved on the grid are added, from cosines', 'cosine_local', local=True),
    'half_local': Candidate('as plan_local, every other head a plan, the others softmax', 'cosine_local',
                            weights='half', local=True),
    'shares_local': Candidate('as plan_local, with shares', 'cosine_local', weights='shares', local=True),
    **_with_control('plan_mass_local', 'as plan_local, each head has a mass of its own', 'cosine_mass_local', factor=20.,
                    mass=16., local=True),
    **_with_control('plan_common_local', 'as plan_local, and a part that is common to all queries is added',
                    'cosine_common_local', local=True, common=True),
    'shares_norm_local': Candidate('as shares_local, what each head gives is normalized', 'cosine_norm_local',
                                   weights='shares', local=True, norm=True),
    'cosine_norm_local': Candidate('control of shares_norm_local', None, weights='softmax', local=True, norm=True),
    'shares_context': Candidate('as shares, after each channel was convolved on the grid', 'cosine_context',
                                weights='shares', context=True),
    'cosine_context': Candidate('control of shares_context', None, weights='softmax', context=True),
    'bias': Candidate("row 4's SOT matrix as a bias on the scores of softmax", 'dot', scores='dot', factor=1.,
                      weights='bias'),
}


class CandidateAttention(SOTAttention):
    """timm's Attention with the weights of a candidate.

    scores s_ij
        'cosine'    tau_h cos(q_i, k_j)
        'dot'       tau_h q_i.k_j d^-1/2
        'distance'  -tau_h ||q_i - k_j|| / max_j ||q_i - k_j||
    weights
        'softmax'   softmax_j(s_ij)
        'plan'      N P_ij, with P the plan of the kernel exp(s_ij) after 5 iterations that end with the rows, which
                    therefore sum to 1, as for softmax, and the columns nearly so
        'relaxed'   the factors of the columns raised to the power sigmoid(rho_h): 0 is softmax, 1 is the plan
        'shares'    the columns have the masses softmax_j(w_h.k_j), w_h being learned, in place of 1/N
        'half'      the plan in even heads, softmax in odd ones
        'log_plan'  softmax_j(gamma_h log P_ij)
        'bias'      softmax_j(s_ij + gamma_h SOT(Q, K)_ij), SOT with its defaults
    mask_diagonal   s_ii = -infinity
    identity        (1 - sigmoid(iota_h)) weights + sigmoid(iota_h) identity
    contrast        weights + omega_h (weights - 1/N)
    mass            mu_h weights
    gate            exp(g_h.q_i) mu_h weights, g_h being learned
    reach           s_ij + tau_h r_h(i - j), r_h being a table over the displacements on the grid of the tokens that
                    starts from that of a Gaussian kernel, -|i - j|^2 / (2 reach^2 tau_h); infinity for none
    local           added to what the weights give: the values convolved on the grid, 3 x 3 and each channel by itself,
                    after CSWin's locally-enhanced positional encoding (https://arxiv.org/abs/2107.00652); channel c
                    starts as the value of neighbour c mod 9
    common          weights + omega_h softmax_j(c_h.k_j), c_h being learned: what every query gets
    context         queries, keys and values are those of the tokens plus the tokens convolved as the values are for
                    `local`, after the positional encoding of CPVT (https://arxiv.org/abs/2102.10882)
    norm            what a head gives a token is divided by its root mean square
    """

    def set_candidate(self, candidate: Candidate, grid_size: Optional[Tuple[int, int]]) -> None:
        """Add the parameters of a candidate, with their initial values."""
        self.set_variant('softmax')
        self.candidate = candidate
        self.fused_attn = False
        weight = self.qkv.weight

        def per_head(value: float) -> nn.Parameter:
            return nn.Parameter(weight.new_full((self.num_heads, 1, 1), value))

        self.log_factor = per_head(math.log(candidate.factor))
        if candidate.weights == 'relaxed':
            self.damping = per_head(0.)
        if candidate.weights == 'shares':
            self.share = nn.Parameter(weight.new_zeros(self.num_heads, self.head_dim, 1))
        if candidate.weights in ('log_plan', 'bias'):
            self.gain = per_head(1.)
        if candidate.identity:
            self.identity = per_head(-1.)
        if candidate.contrast:
            self.contrast = per_head(0.)
        if candidate.mass:
            self.log_mass = per_head(math.log(candidate.mass))
        if candidate.gate:
            self.token_mass = nn.Parameter(weight.new_zeros(self.num_heads, self.head_dim, 1))
        if candidate.common:
            self.common_key = nn.Parameter(weight.new_zeros(self.num_heads, self.head_dim, 1))
            self.common = per_head(1.)
        if (candidate.local or candidate.context or candidate.reach) and grid_size is None:
            raise ValueError('the model has no grid_size, the height and width of its grid of tokens.')
        if candidate.local or candidate.context:
            self.grid_size = grid_size
            channels = self.attn_dim if candidate.local else self.qkv.in_features
            neighbour = F.one_hot(torch.arange(channels, device=weight.device) % 9, 9).to(weight.dtype)
            self.near = nn.Parameter(neighbour.view(channels, 1, 3, 3))
        if candidate.context:  # with `forward` as it is, the layer is one of those of `attention_layers`
            self.register_forward_pre_hook(lambda layer, args: (args[0] + layer.convolve(args[0]), *args[1:]))
        if candidate.reach:
            self.displacement = RelPosBias(grid_size, self.num_heads, device=weight.device)
            height, width = grid_size
            dy = torch.arange(1 - height, height, device=weight.device).unsqueeze(1)
            dx = torch.arange(1 - width, width, device=weight.device)
            start = -(dy ** 2 + dx ** 2) / (2 * candidate.reach ** 2 * candidate.factor)
            with torch.no_grad():
                self.displacement.relative_position_bias_table.copy_(start.reshape(-1, 1))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: Any) -> torch.Tensor:
        out = super().attend(q, k, v, *mask)
        if self.candidate.local:
            B, H, N, D = v.shape
            near = self.convolve(v.transpose(1, 2).reshape(B, N, H * D))
            out = out + near.reshape(B, N, H, D).transpose(1, 2)
        return F.rms_norm(out, out.shape[-1:]) if self.candidate.norm else out

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens convolved on their grid, each channel by itself, (B, N, C) -> (B, N, C)."""
        grid = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *self.grid_size)
        return F.conv2d(grid, self.near.to(x.dtype), padding=1, groups=x.shape[2]).flatten(2).transpose(1, 2)

    def attention_weights(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        with transform.autocast_disabled(q.device):
            return self._weights(q.float(), k.float()).to(q.dtype)

    def _scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        scores = self.candidate.scores
        if scores == 'cosine':
            s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        elif scores == 'dot':
            s = q @ k.transpose(-2, -1) * self.scale
        else:
            s = -transform.pairwise_cost(q, k, 'euclidean', 'row')
        if self.candidate.reach:
            s = s + self.displacement.get_bias()
        s = s * self.log_factor.exp()
        if self.candidate.mask_diagonal:
            s = s.masked_fill(torch.eye(s.shape[-1], dtype=torch.bool, device=s.device), -math.inf)
        return s

    def _weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        kind, N = self.candidate.weights, q.shape[-2]
        s = self._scores(q, k)  # (B, H, N, N)
        if kind == 'bias':
            s = s + self.gain * transform.self_optimal_transport(q, k)
        weights = s.softmax(dim=-1)
        if kind == 'relaxed':
            weights, _, _ = plan(weights, damping=self.damping.sigmoid())
        elif kind == 'shares':
            weights, _, _ = plan(weights, shares=(k @ self.share).softmax(dim=-2).transpose(-2, -1))
        elif kind == 'half':
            balanced, _, _ = plan(weights[:, ::2])
            odd = torch.arange(self.num_heads, device=q.device).view(-1, 1, 1) % 2 == 1
            weights = torch.where(odd, weights, balanced.repeat_interleave(2, dim=1)[:, :self.num_heads])
        elif kind == 'log_plan':
            _, a, b = plan(weights)
            weights = (self.gain * (s.log_softmax(dim=-1) + a.log() + b.log())).softmax(dim=-1)
        elif kind == 'plan':
            weights, _, _ = plan(weights)
        if self.candidate.identity:
            share = self.identity.sigmoid()
            weights = (1 - share) * weights + share * torch.eye(N, device=q.device)
        if self.candidate.contrast:
            weights = weights + self.contrast * (weights - 1 / N)
        if self.candidate.mass:
            log_mass = self.log_mass + q @ self.token_mass if self.candidate.gate else self.log_mass
            weights = weights * log_mass.exp()
        if self.candidate.common:
            weights = weights + self.common * (k @ self.common_key).softmax(dim=-2).transpose(-2, -1)
        return weights


def plan(
        kernel: torch.Tensor,
        shares: Optional[torch.Tensor] = None,
        damping: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """N times the transport plan of a kernel, rows last.

    Args:
        kernel: Positive, (B, H, N, N), the rows of which sum to 1.
        shares: Masses of the columns, (B, H, 1, N), that sum to 1; None for 1/N each.
        damping: Power of the columns' factors, (H, 1, 1); None for 1.

    Returns:
        The matrix and its factors on the rows, (B, H, N, 1), and on the columns, (B, H, 1, N).
    """
    target = 1. if shares is None else shares * kernel.shape[-1]
    a = torch.ones_like(kernel[..., :1])
    for _ in range(ITERS):
        b = target / (a.transpose(-2, -1) @ kernel).clamp_min(1e-30)  # a token that nobody looks at
        if damping is not None:
            b = b ** damping
        a = 1 / (kernel @ b.transpose(-2, -1))
    return a * kernel * b, a, b


def apply_candidate(model: nn.Module, name: str) -> nn.Module:
    """Give the attention layers of a timm model the weights of a candidate, in place; returns the model.

    Raises:
        ValueError: If there is no such candidate, or the model lacks the layers or the grid of tokens that it needs.
    """
    if name not in CANDIDATES:
        raise ValueError(f'candidate={name!r} is unknown; choose one of {tuple(CANDIDATES)}.')
    for layer in attention_layers(model).values():
        layer.__class__ = CandidateAttention
        layer.set_candidate(CANDIDATES[name], getattr(model, 'grid_size', None))
    return model


def control_of(model: str, kwargs: Dict[str, Any]) -> Optional[Tuple[str, Dict[str, Any]]]:
    """The row of a study, model and arguments, that is the control of a row; None if it has none."""
    candidate = CANDIDATES.get(kwargs.get('candidate'))
    if candidate is None or candidate.control is None:
        return None
    return model, {**kwargs, 'candidate': candidate.control}

""" Self-Optimal-Transport attention

timm's multi-head self-attention with the attention matrix replaced by the Self-Optimal-Transport transform of the
queries, or of the queries and the keys (see transform.py for the papers).
"""
import math
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from timm.layers import Attention, maybe_add_mask, register_notrace_function
from torch import nn

from ._autoload import autoload
from .kernels.fused import choose_path, fused_sot_attention
from .kernels.shares import fused_shares_attention
from .kernels.sinkhorn import product, sum_rows
from .solver import operators_work, scale_to_shares
from .transform import (
    autocast_disabled,
    check_transform_args,
    compute_dtype,
    pairwise_cost,
    sot_matrix,
    unit_rows,
)

__all__ = ['SOTAttention', 'VARIANTS']

# Least regularization that 'sot_shares' learns, at which float32 carries its plan: the kernel spans exp(2 / MIN_REG).
MIN_REG = 0.03
MIN_LOG_REG = math.log(MIN_REG) - 1e-6  # below what rounding makes of it: a layer that begins with MIN_REG learns


class Variant(NamedTuple):
    """How the attention weights are made; d is the head width."""
    operands: str  # '': scores QK^T d^-1/2; 'q', 'qk', 'qkt': S d^-1/2 with S = SOT(Q), SOT(Q, K), SOT(Q, K^T)
    softmax: bool  # whether a softmax over the keys follows
    learned: bool = False  # in place of both, a plan of which the regularization and the marginals are learned


VARIANTS: Dict[str, Variant] = {
    'softmax': Variant('', True),
    'sot_q': Variant('q', True),
    'sot_q_nosoftmax': Variant('q', False),
    'sot_qk': Variant('qk', True),
    'sot_qk_nosoftmax': Variant('qk', False),
    'sot_qkt': Variant('qkt', True),
    'sot_shares': Variant('', False, learned=True),
}


def check_variant(variant: str, reg: float, iters: int, tol: Optional[float], distance: str = 'euclidean') -> None:
    """Raise ValueError for an unknown variant or settings of it that are out of their range."""
    if variant not in VARIANTS:
        raise ValueError(f'variant={variant!r} is unknown; choose one of {tuple(VARIANTS)}.')
    learned = VARIANTS[variant].learned
    check_transform_args(distance, reg, iters, tol, least_iters=0 if learned else 1)
    if not learned:
        return
    if tol is not None:
        raise ValueError(f'tol={tol!r} must be None for variant {variant!r}, which runs exactly iters iterations.')
    if reg < MIN_REG:
        raise ValueError(f'reg={reg!r} must be at least {MIN_REG} for variant {variant!r}; 0.1 is the default.')


@torch.fx.wrap
@register_notrace_function
def sot_attention_weights(
        q: torch.Tensor,
        k: torch.Tensor,
        operands: str,
        softmax: bool,
        distance: str,
        reg: float,
        iters: int,
        tol: Optional[float],
) -> torch.Tensor:
    """SOT attention weights before dropout, (B, H, N, D), (B, H, N, D) -> (B, H, N, N).

    Args:
        q: Queries.
        k: Keys.
        operands: What is matched: 'q' the queries among themselves, 'qk' the queries with the keys, 'qkt' the queries
            (tokens, over channels) with the rows of K^T (channels, over tokens), which exists for N = D only.
        softmax: Apply a softmax over the keys to S d^-1/2, or return S d^-1/2 itself.
        distance: As `self_optimal_transport`; the costs are normalized by row.
        reg: As `self_optimal_transport`.
        iters: As `self_optimal_transport`.
        tol: As `self_optimal_transport`.

    Returns:
        Weights in the dtype of `q`; computed in float32, or float64 for float64, also under autocast.
    """
    if torch.jit.is_scripting():  # TorchScript has no context managers to choose from
        return sot_and_weights(q, k, operands, softmax, distance, reg, iters, tol)[1]
    with autocast_disabled(q.device):
        return sot_and_weights(q, k, operands, softmax, distance, reg, iters, tol)[1]


def sot_and_weights(
        q: torch.Tensor,
        k: torch.Tensor,
        operands: str,
        softmax: bool,
        distance: str,
        reg: float,
        iters: int,
        tol: Optional[float],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """S, in the dtype that it was computed in, and the weights made of it: viz/maps.py shows both."""
    check_operands(q, operands)
    dtype = compute_dtype(q)
    x = q.to(dtype)
    if operands == 'q':
        y = x
    elif operands == 'qk':
        y = k.to(dtype)
    else:
        y = k.to(dtype).transpose(-2, -1)
    sot = sot_matrix(x, y, distance, 'row', reg, iters, tol, None, True, True, True)
    weights = sot * q.shape[-1] ** -0.5
    if softmax:
        weights = weights.softmax(dim=-1)
    return sot, weights.to(q.dtype)


@torch.fx.wrap
@register_notrace_function
def shares_attention_weights(
        q: torch.Tensor,
        k: torch.Tensor,
        log_reg: torch.Tensor,
        share: Optional[torch.Tensor],
        iters: int,
) -> torch.Tensor:
    """Attention weights of 'sot_shares' before dropout, (B, H, N, D), (B, H, N, D) -> (B, H, N, N).

    Args:
        q: Queries.
        k: Keys.
        log_reg: Logarithm of the regularization of each head, (H, 1, 1); what is below MIN_REG counts as MIN_REG.
        share: Vector w_h of each head, (H, D, 1): the shares of the tokens are softmax_j(w_h.k_j); None for softmax in
            the place of the plan.
        iters: Number of Sinkhorn iterations.

    Returns:
        Weights in the dtype of `q`, the rows of which sum to 1; computed in float32, or float64 for float64, also
        under autocast.
    """
    if torch.jit.is_scripting():  # TorchScript has no context managers to choose from
        return _shares_attention_weights(q, k, log_reg, share, iters)
    with autocast_disabled(q.device):
        return _shares_attention_weights(q, k, log_reg, share, iters)


def _shares_attention_weights(
        q: torch.Tensor,
        k: torch.Tensor,
        log_reg: torch.Tensor,
        share: Optional[torch.Tensor],
        iters: int,
        min_log_reg: float = MIN_LOG_REG,  # an argument, for TorchScript
) -> torch.Tensor:
    dtype = compute_dtype(q)
    x, y = q.to(dtype), k.to(dtype)
    reg = log_reg.to(dtype).clamp_min(min_log_reg).exp()
    weights = cosine_scores(x, y, reg).softmax(dim=-1)
    if share is not None:
        weights = scale_to_shares(weights, log_shares(y, share.to(dtype)), iters)
    return weights.to(q.dtype)


def cosine_scores(x: torch.Tensor, y: torch.Tensor, reg: torch.Tensor) -> torch.Tensor:
    """cos(x_i, y_j) / reg up to a constant, (B, H, N, D), (B, H, N, D), (H, 1, 1) -> (B, H, N, N)."""
    if torch.jit.is_scripting():  # autocast, which TorchScript cannot turn off, leaves distances in float32
        return pairwise_cost(x, y, 'cosine', None) / -reg
    elif torch.jit.is_tracing():
        return pairwise_cost(x, y, 'cosine', None) / -reg
    else:
        return product(unit_rows(x) / reg, unit_rows(y).transpose(-2, -1))


@torch.fx.wrap
@register_notrace_function
def shares_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_reg: torch.Tensor,
        share: Optional[torch.Tensor],
        iters: int,
        dropout_p: float = 0.,
) -> torch.Tensor:
    """Attention of 'sot_shares', (B, H, N, D) each, by the fastest means of the device: `kernels.fused.choose_path`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        log_reg, share, iters: As `shares_attention_weights`.
        dropout_p: Dropout probability of the weights.
    """
    if not torch.jit.is_scripting():
        path = attention_path(q, k, v, strips=False)
        if path != 'eager':
            return _fused_shares_attention(q, k, v, log_reg, share, iters, dropout_p, path)
    attn = shares_attention_weights(q, k, log_reg, share, iters)
    return F.dropout(attn, dropout_p, training=dropout_p > 0.) @ v  # a graph of it shall not hold one that trains


def _fused_shares_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_reg: torch.Tensor,
        share: Optional[torch.Tensor],
        iters: int,
        dropout_p: float,
        path: str,
) -> torch.Tensor:
    with autocast_disabled(q.device):
        scale = (-log_reg.float().clamp_min(MIN_LOG_REG)).exp().flatten()
        if share is None:
            shares = k.new_zeros(k.shape[:3], dtype=torch.float32)
        else:
            shares = log_shares(k.float(), share.float()).squeeze(-2)
        return fused_shares_attention(q, k, v, scale, shares, iters, dropout_p, path)


def attention_path(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tol: Optional[float] = None,
        strips: bool = True,
        reg: Optional[float] = None,
) -> str:
    """What computes the attention of these tensors, as `choose_path`; plain torch what broadcasts, or does not fit."""
    if not operators_work() or not q.shape == k.shape == v.shape:
        return 'eager'
    if tol is not None and (torch.compiler.is_compiling() or isinstance(q, FakeTensor)):  # the stop depends on data
        return 'eager'
    return choose_path(q.device, v.dtype, q.shape[-2], q.shape[-1], tol, strips, reg)


def log_shares(k: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Logarithms of the tokens' shares in the attention of each head, (B, H, N, D), (H, D, 1) -> (B, H, 1, N)."""
    return sum_rows(k, share.transpose(-2, -1)).log_softmax(dim=-2).transpose(-2, -1)


def check_operands(q: torch.Tensor, operands: str) -> None:
    N, D = q.shape[-2], q.shape[-1]
    if operands == 'qkt' and N != D:
        raise ValueError(
            f"variant 'sot_qkt' matches N tokens with D channels and needs N = D, got {N} tokens and head width {D}; "
            f"change the image size or the number of heads, or use variant 'sot_qk'.")


@torch.fx.wrap
@register_notrace_function
def sot_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: str,
        softmax: bool,
        distance: str,
        reg: float,
        iters: int,
        tol: Optional[float],
        dropout_p: float = 0.,
) -> torch.Tensor:
    """SOT attention, (B, H, N, D) each, by the fastest means that the device has: `kernels.fused.choose_path`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        operands, softmax, distance, reg, iters, tol: As `sot_attention_weights`.
        dropout_p: Dropout probability of the weights.
    """
    if not torch.jit.is_scripting():
        path = attention_path(q, k, v, tol, reg=reg)
        if path != 'eager':
            check_operands(q, operands)
            return fused_sot_attention(
                q, k, v, operands, softmax, reg, iters, q.shape[-1] ** -0.5, dropout_p, distance, path, tol)
    attn = sot_attention_weights(q, k, operands, softmax, distance, reg, iters, tol)
    return F.dropout(attn, dropout_p, training=dropout_p > 0.) @ v  # a graph of it shall not hold one that trains


class SOTAttention(Attention):
    """Multi-head self-attention whose weights are a Self-Optimal-Transport matrix, (B, N, C) -> (B, N, C).

    SOT is the transform of https://arxiv.org/abs/2204.03065, see :func:`timm_sot.self_optimal_transport`.

    Modifications to timm's Attention:
     - the attention weights are those of `variant`, of head width d:
        'softmax'           softmax(Q K^T d^-1/2), timm's own
        'sot_q'             softmax(S d^-1/2), S = SOT(Q)
        'sot_qk'            softmax(S d^-1/2), S = SOT(Q, K)
        'sot_qkt'           softmax(S d^-1/2), S = SOT(Q, K^T), for as many tokens as the head is wide
        'sot_q_nosoftmax'   S d^-1/2, S = SOT(Q)
        'sot_qk_nosoftmax'  S d^-1/2, S = SOT(Q, K)
        'sot_shares'        the Sinkhorn plan of the kernel exp(cos(q_i, k_j) / reg_h) with rows of mass 1 and columns
                            of mass N softmax_j(w_h.k_j), the shares of the N tokens in the attention; reg_h and w_h
                            are learned for each head h
       The entries of S are in [0, 1] and its diagonal is 1; its rows do not sum to 1, so neither do those of the
       variants without softmax. 'sot_shares' is a plan, but not S: tokens are matched with themselves, too. It ends
       with the rows, which sum to 1 exactly, where its columns come near to their masses. With 0 iterations it is
       softmax_j(cos(q_i, k_j) / reg_h), the same scores and regularization without the plan. What it learns takes part
       in weight decay, as in the study: reg_h is drawn to 1, the shares to equal ones.
     - with `fused_attn` of the layer, set by default as in timm, the output comes from the fused kernels of the device,
       where it has some, and the weights are never in memory. Without it they pass through `attn_drop`, where a hook
       sees them; with it they never do, also where the device has no kernels.
     - attention masks are refused by all variants but 'softmax', with NotImplementedError, and other numbers of tokens
       than the head width by 'sot_qkt', with ValueError.
    """
    tol: Optional[float]

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            *,
            variant: str = 'sot_qk',
            reg: float = 0.1,
            iters: int = 10,
            tol: Optional[float] = None,
            distance: str = 'euclidean',
            **attention_kwargs: Any,
    ) -> None:
        """Initialize the SOTAttention module.

        Args:
            dim: Input dimension of the token embeddings.
            num_heads: Number of attention heads.
            variant: A key of `VARIANTS`, see the class.
            reg: Entropy regularization of the transport plan, in units of the row-normalized cost (0 to 1); for
                'sot_shares', in units of the cosine, what the learned one of each head starts from, at least 0.03.
            iters: Number of Sinkhorn iterations; with `tol` the most that run. 'sot_shares' takes 0, too.
            tol: None runs exactly `iters` iterations, a number stops early as the original experiments did with 0.1;
                it couples the images of a batch and synchronizes a GPU, see :func:`timm_sot.self_optimal_transport`.
                'sot_shares' takes None alone.
            distance: Cost between tokens, 'euclidean' or 'cosine'; unused by 'sot_shares', as by 'softmax'.
            **attention_kwargs: Arguments of :class:`timm.layers.Attention`: qkv_bias, qk_norm, proj_bias, attn_drop,
                proj_drop, norm_layer, device, dtype and what the installed timm has besides.

        Raises:
            ValueError: If one of the SOT arguments is out of its range.
        """
        super().__init__(dim, num_heads=num_heads, **attention_kwargs)
        self.set_variant(variant, reg=reg, iters=iters, tol=tol, distance=distance)

    def set_variant(
            self,
            variant: str,
            *,
            reg: float = 0.1,
            iters: int = 10,
            tol: Optional[float] = None,
            distance: str = 'euclidean',
    ) -> None:
        """Change how the attention weights are made.

        What the layer had learned for 'sot_shares' is dropped, and begins anew with that variant. What timm saves of a
        model does not know of it, see :func:`timm_sot.apply_sot`.

        Args:
            variant, reg, iters, tol, distance: As in the constructor; what is not given gets its default.

        Raises:
            ValueError: If an argument is out of its range; the layer is then unchanged.
        """
        check_variant(variant, reg, iters, tol, distance)
        self.variant = variant
        self.operands, self.softmax, self.learned = VARIANTS[variant]
        self.reg = float(reg)
        self.iters = int(iters)
        self.tol = None if tol is None else float(tol)
        self.distance = distance
        # absent from the Attention of older timm versions
        self.attn_dim = self.num_heads * self.head_dim
        self.gate = getattr(self, 'gate', None)
        weight = self.qkv.weight
        heads, width = self.num_heads, self.head_dim
        # three dimensions: weight decay leaves vectors out, and these were tried with it
        self.log_reg = nn.Parameter(weight.new_empty(heads, 1, 1)) if self.learned else None
        self.share = nn.Parameter(weight.new_empty(heads, width, 1)) if self.learned and self.iters else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give what is learned for the variant its initial values: the regularization `reg`, equal shares."""
        if self.log_reg is not None:
            nn.init.constant_(self.log_reg, math.log(self.reg))
        if self.share is not None:
            nn.init.zeros_(self.share)

    def clear_variant(self) -> None:
        """Remove what `set_variant` added, so that the layer can become timm's Attention."""
        for name in (
                'variant', 'operands', 'softmax', 'learned', 'reg', 'iters', 'tol', 'distance', 'log_reg', 'share'):
            delattr(self, name)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Attend, (B, N, C) -> (B, N, C).

        Args:
            x: Tokens.
            attn_mask: Mask as of `scaled_dot_product_attention`, for variant 'softmax'.
            is_causal: Whether a token sees none after it, for variant 'softmax'.

        Raises:
            NotImplementedError: If another variant is given a mask.
            ValueError: If variant 'sot_qkt' is given another number of tokens than the head is wide.
        """
        B, N, C = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, N, D)
        q, k = self.q_norm(q), self.k_norm(k)

        x = self.attend(q, k, v, attn_mask, is_causal)  # (B, H, N, D)
        x = x.transpose(1, 2).reshape(B, N, self.attn_dim)
        x = self.norm(x)
        if gate is not None:
            x = x * gate
        x = self.proj(x)
        x = self.proj_drop(x)
        return x

    def attend(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """What each query gets from the values, after dropout of the weights, (B, H, N, D) each."""
        if not self.fused_attn:
            attn = self.attention_weights(q, k, attn_mask, is_causal)  # (B, H, N, N)
            attn = self.attn_drop(attn)
            return attn @ v
        dropout_p = self.attn_drop.p if self.training else 0.
        if self.variant == 'softmax':
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)
        q = unmasked(q, attn_mask, is_causal)
        if self.log_reg is not None:
            return shares_attention(q, k, v, self.log_reg, self.share, self.iters, dropout_p)
        return sot_attention(
            q, k, v, self.operands, self.softmax, self.distance, self.reg, self.iters, self.tol, dropout_p)

    def attention_weights(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Attention weights before dropout, (B, H, N, D), (B, H, N, D) -> (B, H, N, N)."""
        if self.variant == 'softmax':
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = maybe_add_mask(attn, additive_mask(attn, attn_mask, is_causal))
            return attn.softmax(dim=-1)
        q = unmasked(q, attn_mask, is_causal)
        if self.log_reg is not None:
            return shares_attention_weights(q, k, self.log_reg, self.share, self.iters)
        return sot_attention_weights(
            q, k, self.operands, self.softmax, self.distance, self.reg, self.iters, self.tol)

    def extra_repr(self) -> str:
        if self.learned:
            return f'variant={self.variant!r}, reg={self.reg}, iters={self.iters}'
        if self.variant == 'softmax':
            return f'variant={self.variant!r}'
        return (f'variant={self.variant!r}, reg={self.reg}, iters={self.iters}, tol={self.tol}, '
                f'distance={self.distance!r}')


def settings_of(layer: Optional[SOTAttention] = None) -> Dict[str, Any]:
    """What a layer was told beside its variant, by the names of the constructor's arguments; without one the defaults.
    """
    if layer is None:
        defaults = SOTAttention.__init__.__kwdefaults__
        return {name: defaults[name] for name in ('reg', 'iters', 'tol', 'distance')}
    return {'reg': layer.reg, 'iters': layer.iters, 'tol': layer.tol, 'distance': layer.distance}


@torch.fx.wrap
@register_notrace_function
def unmasked(q: torch.Tensor, attn_mask: Optional[torch.Tensor], is_causal: bool) -> torch.Tensor:
    """The queries of a variant that takes no mask; they pass through, as FX drops a call whose result nothing uses."""
    if attn_mask is not None or is_causal:
        raise NotImplementedError(
            "attn_mask and is_causal are supported by variant 'softmax' only: a transport plan spreads its mass "
            "over all tokens. Leave them at None and False, or use variant 'softmax'.")
    return q


@torch.fx.wrap
@register_notrace_function
def additive_mask(
        attn: torch.Tensor,
        attn_mask: Optional[torch.Tensor] = None,
        is_causal: bool = False,
) -> Optional[torch.Tensor]:
    """The mask arguments of scaled_dot_product_attention as a bias on the scores `attn`, None for no mask.

    timm's own resolve_self_attn_mask, which the oldest supported timm lacks.
    """
    if is_causal:
        return attn.new_full(attn.shape[-2:], float('-inf')).triu_(1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return torch.zeros_like(attn_mask, dtype=attn.dtype).masked_fill_(~attn_mask, float('-inf'))
    return attn_mask


autoload()  # if this module was the one that imported timm, the models could not be registered before

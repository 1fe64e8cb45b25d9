""" Compact Convolutional Transformer (CCT), with softmax or Self-Optimal-Transport attention

Paper: 'Escaping the Big Data Paradigm with Compact Transformers' - https://arxiv.org/abs/2104.05704
Original code and checkpoints: https://github.com/SHI-Labs/Compact-Transformers

The `cct_*_sot_*` models replace the attention matrix by the Self-Optimal-Transport transform, see attention.py.
"""
import logging
import math
import operator
import re
from functools import partial
from numbers import Integral
from typing import Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    Attention,
    DropPath,
    Mlp,
    _assert,
    calculate_drop_path_rates,
    register_notrace_function,
    resample_abs_pos_embed_nhwc,
    to_2tuple,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    clean_state_dict,
    generate_default_cfgs,
    named_apply,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import nn
from torch.jit import Final

try:
    from timm.models._input import update_model_args, update_model_input_size
except ImportError:  # timm before 1.0.31 keeps no record of what a model was changed to
    update_model_args = update_model_input_size = None

from .attention import SOTAttention, check_variant, settings_of
from .solver import is_exporting, is_number
from .weights import explained, packaged_weights, with_named_source, with_readable_folder

__all__ = ['CCT']  # register_model adds each entry point to this

_logger = logging.getLogger(__name__)

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class ConvStage(nn.Module):
    """Convolution without bias, 3x3 max-pooling and ReLU, (B, C_in, H, W) -> (B, C_out, H', W').

    The original applies ReLU before the pooling; the two commute, gradients included, and pooling first leaves ReLU a
    quarter of the work.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_chs,
            out_chs,
            kernel_size,
            stride=max(1, kernel_size // 2 - 1),
            padding=max(1, kernel_size // 2),
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.reduction = self.conv.stride[0] * self.pool.stride

    def out_size(self, size: int) -> int:
        """Height (or width) of the output for an input of height (or width) `size`."""
        size = (size + 2 * self.conv.padding[0] - self.conv.kernel_size[0]) // self.conv.stride[0] + 1
        return (size + 2 * self.pool.padding - self.pool.kernel_size) // self.pool.stride + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.pool(self.conv(x)))


class ConvTokenizer(nn.Module):
    """Convolutional tokenizer, (B, C, H, W) -> (B, D, H', W'), whose pixels are the tokens.

    All stages but the last have `hidden_dim` channels.
    """

    def __init__(
            self,
            in_chans: int,
            embed_dim: int,
            kernel_size: int,
            n_conv_layers: int,
            hidden_dim: int = 64,
            device=None,
            dtype=None,
    ):
        super().__init__()
        chs = [in_chans] + [hidden_dim] * (n_conv_layers - 1) + [embed_dim]
        self.stages = nn.Sequential(*[
            ConvStage(chs[i], chs[i + 1], kernel_size, device=device, dtype=dtype) for i in range(n_conv_layers)])

    def grid_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Height and width in tokens of an image of `img_size`."""
        h, w = img_size
        for stage in self.stages:
            h, w = stage.out_size(h), stage.out_size(w)
        return h, w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(x)


class ContextConv(nn.Module):
    """Tokens and their neighbours, (B, N, C) -> (B, N, C): what a depthwise 3x3 convolution of their grid adds to them.

    The positional encoding of CPVT (https://arxiv.org/abs/2102.10882), which tells a token where it is by what is
    around it. Channel c is initialized to copy neighbour c mod 9.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the convolution: the neighbours in turn."""
        index = torch.arange(self.weight.shape[0], device=self.weight.device) % 9
        with torch.no_grad():
            self.weight.copy_(F.one_hot(index, 9).view_as(self.weight))

    def forward(self, x: torch.Tensor, grid_size: List[int]) -> torch.Tensor:
        B, N, C = x.shape
        grid = x.transpose(1, 2).reshape(B, C, grid_size[0], grid_size[1])
        return x + F.conv2d(grid, self.weight, padding=1, groups=C).flatten(2).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Transformer layer of CCT: x = norm1(x + attn(pre_norm(x))); x = x + mlp(x).

    Unlike in a ViT block the residual stream itself is normalized between attention and MLP. With `context` the
    attention is that of pre_norm(x) after a `ContextConv`.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float,
            attn: str,
            sot_reg: float,
            sot_iters: int,
            sot_tol: Optional[float],
            sot_distance: str,
            context: bool = False,
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.pre_norm = nn.LayerNorm(dim, **dd)
        self.context = ContextConv(dim, **dd) if context else None
        self.attn = SOTAttention(
            dim,
            num_heads=num_heads,
            variant=attn,
            reg=sot_reg,
            iters=sot_iters,
            tol=sot_tol,
            distance=sot_distance,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, grid_size: List[int]) -> torch.Tensor:
        y = self.pre_norm(x)
        if self.context is not None:
            y = self.context(y, grid_size)
        x = self.norm1(x + self.drop_path1(self.attn(y)))
        x = x + self.drop_path2(self.mlp(x))
        return x


class SequencePool(nn.Module):
    """Sequence pooling, (B, N, D) -> (B, D): the mean of the tokens weighted by a softmax over a learned score."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.score = nn.Linear(dim, 1, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.score(x).softmax(dim=1)  # (B, N, 1)
        # not a matrix product: inductor of torch 2.5 makes one that corrupts memory, in training on a CPU
        return (weights * x).sum(dim=1)


def sine_pos_embed(
        num_tokens: int,
        dim: int,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """The 1-D sine position embedding of Compact Transformers, (1, N, D).

    Channel i of token p is sin (i even) or cos (i odd) of p / 10000^(2 floor(i / 2) / D).
    """
    position = torch.arange(num_tokens, device=device, dtype=torch.float32).unsqueeze(1)
    channel = torch.arange(dim, device=device, dtype=torch.float32)  # integers would be divided in the default dtype
    angle = position / 10000 ** (2 * torch.div(channel, 2, rounding_mode='floor') / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).unsqueeze(0).to(dtype=dtype)


@torch.fx.wrap
@register_notrace_function
def resize_pos_embed(
        pos_embed: torch.Tensor,
        old_size: List[int],
        new_size: List[int],
        sine: bool,
) -> torch.Tensor:
    """Position embedding (1, N, D) of a grid of `old_size` (height, width) for one of `new_size`.

    A learned embedding is interpolated, a sine embedding worked out anew.
    """
    if old_size[0] == new_size[0] and old_size[1] == new_size[1]:
        return pos_embed
    dim = pos_embed.shape[-1]
    if sine:
        return sine_pos_embed(new_size[0] * new_size[1], dim, pos_embed.device, pos_embed.dtype)
    if not torch.jit.is_scripting():
        if (torch.is_grad_enabled() and pos_embed.requires_grad
                and torch.compiler.is_compiling() and not is_exporting()):
            # a graph for each size, as of timm's models: with sizes that are symbols torch cannot differentiate this
            new_size = [operator.index(size) for size in new_size]
    # the NHWC form compares both sides; resample_abs_pos_embed takes 2x8 for 4x4, the number of tokens being equal
    grid = pos_embed.reshape(1, old_size[0], old_size[1], dim)
    return resample_abs_pos_embed_nhwc(grid, new_size).reshape(1, -1, dim)


class CCT(nn.Module):
    """Compact Convolutional Transformer.

    A convolutional tokenizer, a position embedding, transformer layers and sequence pooling; no class token and no
    fixed patches.
    """
    dynamic_img_size: Final[bool]
    sine: Final[bool]

    def __init__(
            self,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'seq',
            embed_dim: int = 384,
            depth: int = 14,
            num_heads: int = 6,
            mlp_ratio: float = 3.,
            kernel_size: int = 7,
            n_conv_layers: int = 2,
            pos_embed: str = 'learn',
            attn: str = 'softmax',
            sot_reg: float = 0.1,
            sot_iters: int = 10,
            sot_tol: Optional[float] = None,
            sot_distance: str = 'euclidean',
            context: bool = False,
            dynamic_img_size: bool = False,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """Initialize the CCT module; the defaults are those of CCT-14/7x2, without dropout.

        Args:
            img_size: Input image size in pixels, one number or (height, width).
            in_chans: Number of image input channels.
            num_classes: Number of classes for the classification head, 0 for none.
            global_pool: How the tokens become one vector: 'seq' (sequence pooling, learned), 'avg', or '' to keep the
                tokens.
            embed_dim: Transformer embedding dimension.
            depth: Number of transformer layers.
            num_heads: Number of attention heads.
            mlp_ratio: Ratio of MLP hidden dim to embedding dim.
            kernel_size: Side of the tokenizer's convolutions; their stride is max(1, kernel_size // 2 - 1), their
                padding max(1, kernel_size // 2).
            n_conv_layers: Number of convolutions in the tokenizer, each followed by ReLU and max-pooling by 2.
            pos_embed: Position embedding, 'learn', 'sine' (fixed, 1-D) or 'none'.
            attn: Attention variant, 'softmax' or one of :class:`timm_sot.SOTAttention`.
            sot_reg: Entropy regularization of SOT attention, for 'sot_shares' what the learned one starts from, at
                least 0.03; unused by softmax attention, as are the next three.
            sot_iters: Number of Sinkhorn iterations of SOT attention, at least 1; 'sot_shares' takes 0, too.
            sot_tol: Early stop of the Sinkhorn iterations, None for none, see :class:`timm_sot.SOTAttention`.
            sot_distance: Cost between tokens, 'euclidean' or 'cosine'; unused by 'sot_shares', too.
            context: Add a depthwise 3x3 convolution of the token grid to the tokens, as in CPVT, before queries, keys
                and values are made of them, see `ContextConv`.
            dynamic_img_size: Take images of any size at run time, the position embedding being resized to each.
            drop_rate: Dropout rate of the head.
            pos_drop_rate: Dropout rate after the position embedding.
            proj_drop_rate: Dropout rate after the attention's projection and in the MLP.
            attn_drop_rate: Dropout rate of the attention weights.
            drop_path_rate: Stochastic depth rate of the last layer; that of the first is 0, linear between.
            device: Device of the parameters.
            dtype: Data type of the parameters.

        Raises:
            ValueError: If an option is unknown or a number is out of its range.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if pos_embed not in ('learn', 'sine', 'none'):
            raise ValueError(f"pos_embed={pos_embed!r} is unknown; choose one of ('learn', 'sine', 'none').")
        check_global_pool(global_pool)
        self.img_size = check_img_size(img_size)
        check_positive_integers(
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            kernel_size=kernel_size,
            n_conv_layers=n_conv_layers,
        )
        if not isinstance(num_classes, Integral):
            raise ValueError(f'num_classes={num_classes!r} must be an integer, 0 for no classification head.')
        if not (is_number(mlp_ratio) and 0 < mlp_ratio < float('inf')):
            raise ValueError(f'mlp_ratio={mlp_ratio!r} must be a positive finite number.')
        if embed_dim % num_heads:
            raise ValueError(f'embed_dim={embed_dim} must be a multiple of num_heads={num_heads}.')
        check_attention(attn, sot_reg, sot_iters, sot_tol, sot_distance)

        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim  # for consistency with other models
        self.dynamic_img_size = dynamic_img_size
        self.sine = pos_embed == 'sine'
        self.grad_checkpointing = False

        self.tokenizer = ConvTokenizer(in_chans, embed_dim, kernel_size, n_conv_layers, **dd)
        self.grid_size = self.tokenizer.grid_size(self.img_size)
        num_tokens = self.grid_size[0] * self.grid_size[1]
        if pos_embed == 'learn':
            self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, embed_dim, **dd))
        elif pos_embed == 'sine':
            self.register_buffer('pos_embed', torch.empty(1, num_tokens, embed_dim, **dd), persistent=False)
        else:
            self.pos_embed = None
        self.pos_drop = nn.Dropout(p=pos_drop_rate)

        dpr = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList([
            EncoderLayer(
                embed_dim,
                num_heads,
                mlp_ratio,
                attn=attn,
                sot_reg=sot_reg,
                sot_iters=sot_iters,
                sot_tol=sot_tol,
                sot_distance=sot_distance,
                context=context,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=dpr[i],
                **dd,
            )
            for i in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, **dd)

        # the tokenizer's stages are feature levels too
        self.feature_info = []
        reduction = 1
        for i, stage in enumerate(self.tokenizer.stages):
            reduction *= stage.reduction
            self.feature_info.append(
                dict(module=f'tokenizer.stages.{i}', num_chs=stage.conv.out_channels, reduction=reduction))
        self.feature_info += [
            dict(module=f'blocks.{i}', num_chs=embed_dim, reduction=reduction) for i in range(depth)]

        self.attn_pool = SequencePool(embed_dim, **dd) if global_pool == 'seq' else None
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.init_weights()

    def init_weights(self) -> None:
        """Initialize the weights as the original does."""
        if self.pos_embed is not None and not self.sine:
            trunc_normal_(self.pos_embed, std=.2)
        named_apply(init_weights_cct, self)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Initialize the sine position embedding, which checkpoints do not carry."""
        if self.pos_embed is not None and self.sine:
            _, N, D = self.pos_embed.shape
            self.pos_embed.copy_(sine_pos_embed(N, D, self.pos_embed.device, self.pos_embed.dtype))

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Set of parameters that should not use weight decay."""
        return {'pos_embed'} if isinstance(self.pos_embed, nn.Parameter) else set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Union[str, List]]:
        """Create regex patterns for parameter grouping.

        Args:
            coarse: Use coarse grouping.

        Returns:
            Dictionary mapping group names to regex patterns.
        """
        return dict(
            stem=r'^tokenizer|^pos_embed',
            blocks=[(r'^blocks\.(\d+)', None), (r'^norm|^attn_pool', (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing of the transformer layers.

        Args:
            enable: Whether to enable gradient checkpointing.
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Get the classifier head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Reset the classifier head.

        Args:
            num_classes: Number of classes for new classifier.
            global_pool: Global pooling type, None to keep the current one.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        check_global_pool(global_pool)
        reference = next(self.parameters())
        dd = {'device': reference.device, 'dtype': reference.dtype}
        self.num_classes = num_classes
        self.global_pool = global_pool
        if global_pool != 'seq':
            self.attn_pool = None
        elif self.attn_pool is None:
            self.attn_pool = SequencePool(self.num_features, **dd).train(self.training)
            named_apply(init_weights_cct, self.attn_pool)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def set_input_size(self, img_size: Optional[Union[int, Tuple[int, int]]] = None) -> None:
        """Update the input image resolution; a learned position embedding is resampled to it.

        Args:
            img_size: New input resolution in pixels, one number or (height, width), None for the current one.

        Raises:
            ValueError: If it is no size; the model is then unchanged.
        """
        old_size = self.grid_size
        if img_size is not None:
            self.img_size = check_img_size(img_size)
        self.grid_size = self.tokenizer.grid_size(self.img_size)
        if self.pos_embed is not None and self.grid_size != old_size:
            with torch.no_grad():
                pos_embed = resize_pos_embed(self.pos_embed, list(old_size), list(self.grid_size), self.sine)
            if not self.sine:
                pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
            self.pos_embed = pos_embed
        if update_model_input_size is not None:
            update_model_input_size(self, self.img_size)

    def record_attention(self) -> None:
        """Record the attention of the layers, where all have the same, among the arguments that timm saves.

        Where they differ timm's own is recorded. :func:`timm_sot.apply_sot` calls it.
        """
        if update_model_args is not None and len(self.blocks):
            update_model_args(self, **attention_args([block.attn for block in self.blocks]))

    def _check_size(self, x: torch.Tensor) -> None:
        if not self.dynamic_img_size:
            H, W = x.shape[-2:]
            _assert(
                H == self.img_size[0],
                f"Input height ({H}) doesn't match model ({self.img_size[0]}); create it with another img_size, or "
                f"with dynamic_img_size=True.")
            _assert(
                W == self.img_size[1],
                f"Input width ({W}) doesn't match model ({self.img_size[1]}); create it with another img_size, or "
                f"with dynamic_img_size=True.")

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """Flatten the token grid and add the position embedding, (B, D, H, W) -> (B, H * W, D)."""
        B, C, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            pos_embed = self.pos_embed
            if self.dynamic_img_size:
                pos_embed = resize_pos_embed(pos_embed, [self.grid_size[0], self.grid_size[1]], [H, W], self.sine)
            x = x + pos_embed
        return self.pos_drop(x)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        The tokenizer's stages come first, then the transformer layers.

        Args:
            x: Input image tensor.
            indices: Take last n levels if int, all if None, select matching indices if sequence.
            norm: Apply norm layer to the intermediates of transformer layers (those of the tokenizer, of other widths,
                are returned as they are).
            stop_early: Stop iterating over levels when last desired intermediate hit; in the tokenizer only without
                final features, which are made of all its stages.
            output_fmt: Shape of intermediate feature outputs, 'NCHW' or 'NLC'.
            intermediates_only: Only return intermediate features.

        Returns:
            List of intermediate features or tuple of (final features, intermediates).
        """
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        reshape = output_fmt == 'NCHW'
        intermediates = []
        num_stages = len(self.tokenizer.stages)
        take_indices, max_index = feature_take_indices(num_stages + len(self.blocks), indices)

        # forward pass
        self._check_size(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice stages and blocks in torchscript
            stages = self.tokenizer.stages
            blocks = self.blocks
        else:
            stages = self.tokenizer.stages[:max_index + 1] if intermediates_only else self.tokenizer.stages
            blocks = self.blocks[:max(0, max_index + 1 - num_stages)]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x if reshape else x.flatten(2).transpose(1, 2))
        if stop_early and intermediates_only and max_index < num_stages:
            return intermediates

        B, _, H, W = x.shape
        x = self._pos_embed(x)
        for i, blk in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(blk, x, [H, W])
            else:
                x = blk(x, [H, W])
            if num_stages + i in take_indices:
                y = self.norm(x) if norm else x
                intermediates.append(y.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous() if reshape else y)

        if intermediates_only:
            return intermediates

        x = self.norm(x)

        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates.

        Args:
            indices: Indices of intermediate levels to keep, as in `forward_intermediates`.
            prune_norm: Whether to prune normalization layer.
            prune_head: Whether to prune the classifier head.

        Returns:
            List of indices that were kept.
        """
        num_stages = len(self.tokenizer.stages)
        take_indices, max_index = feature_take_indices(num_stages + len(self.blocks), indices)
        self.blocks = self.blocks[:max(0, max_index + 1 - num_stages)]
        if max_index < num_stages:  # nothing of the transformer is left: neither what feeds it nor what reads it
            self.tokenizer.stages = self.tokenizer.stages[:max_index + 1]
            self.pos_embed = None
            self.grid_size = self.tokenizer.grid_size(self.img_size)
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
            prune_norm = prune_head = True
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass through tokenizer, transformer layers and final norm, (B, C, H, W) -> (B, N, D)."""
        self._check_size(x)
        x = self.tokenizer(x)
        grid_size = [x.shape[2], x.shape[3]]
        x = self._pos_embed(x)
        for blk in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(blk, x, grid_size)
            else:
                x = blk(x, grid_size)
        x = self.norm(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Forward pass through pooling and classifier.

        Args:
            x: Features (B, N, D).
            pre_logits: Return features before the classifier.

        Returns:
            Logits (B, num_classes), or pooled features (B, D).
        """
        if self.attn_pool is not None:
            x = self.attn_pool(x)
        elif self.global_pool == 'avg':
            x = x.mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def check_global_pool(global_pool: str) -> None:
    """Raise ValueError for a pooling that CCT does not have."""
    if global_pool not in ('seq', 'avg', ''):
        raise ValueError(f"global_pool={global_pool!r} is unknown; choose one of ('seq', 'avg', '').")


def check_img_size(img_size: Union[int, Tuple[int, int]]) -> Tuple[int, int]:
    """Height and width of an image size; raise ValueError for what is none."""
    size = to_2tuple(img_size)
    if len(size) != 2:
        raise ValueError(f'img_size={img_size!r} must be one number or (height, width).')
    for side in size:
        check_positive_integers(img_size=side)
    return size


def check_attention(attn: str, sot_reg: float, sot_iters: int, sot_tol: Optional[float], sot_distance: str) -> None:
    """Raise ValueError for an unknown attention or settings of it that are out of their range."""
    try:
        check_variant(attn, sot_reg, sot_iters, sot_tol, sot_distance)
    except ValueError as e:  # which begins with the name that the argument has in SOTAttention
        name, _, rest = str(e).partition('=')
        raise ValueError(f'{"attn" if name == "variant" else f"sot_{name}"}={rest}') from None


def check_positive_integers(**numbers: int) -> None:
    """Raise ValueError for a number that is no integer of at least 1."""
    for name, value in numbers.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f'{name}={value!r} must be an integer of at least 1.')


def attention_args(layers: Sequence[Attention]) -> Dict[str, Union[str, int, float, None]]:
    """The arguments of CCT that make attention layers like these, those of timm's attention if none do."""
    made = [(layer.variant, settings_of(layer)) if type(layer) is SOTAttention else ('softmax', {}) for layer in layers]
    variant, settings = made[0] if made.count(made[0]) == len(made) else ('softmax', {})
    if variant == 'softmax':
        settings = settings_of()  # those of SOT attention may be out of its range
    return {'attn': variant, **{f'sot_{name}': value for name, value in settings.items()}}


def init_weights_cct(module: nn.Module, name: str = '') -> None:
    """Initialize as Compact Transformers does: Kaiming for convolutions, truncated normal for linear layers."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, ContextConv, SOTAttention)):
        module.reset_parameters()


_ORIGINAL_NAMES = (
    (r'^tokenizer\.conv_layers\.(\d+)\.0\.', r'tokenizer.stages.\1.conv.'),
    (r'^classifier\.positional_emb$', 'pos_embed'),
    (r'^classifier\.attention_pool\.', 'attn_pool.score.'),
    (r'^classifier\.fc\.', 'head.'),
    (r'^classifier\.', ''),
    (r'\.self_attn\.', '.attn.'),
    (r'\.linear([12])\.', r'.mlp.fc\1.'),
)


def checkpoint_filter_fn(
        state_dict: Dict[str, torch.Tensor],
        model: CCT,
        strict: bool = True,
) -> Dict[str, torch.Tensor]:
    """Rename the parameters of original Compact-Transformers checkpoints and fit the position embedding to the model.

    Parameters of a sequence pooling or a position embedding that the model was told not to have are left out.

    Args:
        state_dict: Checkpoint, with the prefixes of DDP and torch.compile or without.
        model: Model to load it into.
        strict: Whether the checkpoint must have the parameters of the model and no others.

    Raises:
        RuntimeError: If `strict` and it has not.
        ValueError: If its position embedding does not fit the model.
    """
    state_dict = state_dict.get('model', state_dict)
    state_dict = state_dict.get('state_dict', state_dict)
    out = {}
    for name, value in clean_state_dict(state_dict).items():
        for pattern, replacement in _ORIGINAL_NAMES:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    if strict:
        check_names(out, model)  # first: the position embedding of another architecture may fail in its own way

    pos_embed = out.get('pos_embed')
    if pos_embed is not None and model.sine:
        # the original stores its fixed embedding as well; a learned one in its place would be lost without a word
        expected = sine_pos_embed(pos_embed.shape[1], pos_embed.shape[2], pos_embed.device, pos_embed.dtype)
        if not torch.allclose(pos_embed, expected, atol=1e-3):
            raise ValueError(
                "the checkpoint carries a learned position embedding, which pos_embed='sine' has no place for (the "
                "original checkpoints called *_sine do, too); create the model with pos_embed='learn'.")
        del out['pos_embed']
    elif pos_embed is not None and model.pos_embed is not None:
        old_size = checkpoint_grid_size(pos_embed.shape[1], model)
        if old_size != model.grid_size:
            _logger.info(f'Resized position embedding: {old_size} to {model.grid_size}.')
        out['pos_embed'] = resize_pos_embed(pos_embed, list(old_size), list(model.grid_size), False)

    # timm goes by the classes that the configuration names, not by those of the checkpoint
    classes = len(out['head.bias']) if 'head.bias' in out else 0
    recorded = getattr(model, 'pretrained_cfg', {}).get('num_classes', classes)
    if recorded != classes == model.num_classes:
        _logger.warning(
            f'The head of the checkpoint, of {classes} classes as the model has, is not loaded, as pretrained_cfg says '
            f'of the weights that they are of {recorded}; say otherwise with '
            f'pretrained_cfg_overlay=dict(num_classes={classes}).')

    unused = [name for name in out if (
        name == 'pos_embed' and model.pos_embed is None or name.startswith('attn_pool.') and model.attn_pool is None)]
    for name in unused:
        del out[name]
    if unused:
        _logger.warning(f'Left out of the checkpoint, the model being without them: {", ".join(unused)}.')
    return out


def check_names(state_dict: Dict[str, torch.Tensor], model: CCT) -> None:
    """Raise RuntimeError unless a checkpoint has the parameters of the model, other than those of an adapted model.

    timm asks for the names itself, but not where the number of classes differs: what is missing would stay random.
    """
    adapted = ('attn_pool.', 'pos_embed')  # which the model may be without
    given, expected = (
        {name for name in names if not name.startswith('head.')} for names in (state_dict, model.state_dict()))
    surplus = {name for name in given - expected if not name.startswith(adapted)}
    problems = [
        f'{problem} {len(names)} parameters ({", ".join(sorted(names)[:3])}{", ..." if len(names) > 3 else ""})'
        for problem, names in (('lacks', expected - given), ('has, unlike the model,', surplus)) if names]
    if problems:
        raise RuntimeError(f'the checkpoint {" and ".join(problems)}')


def checkpoint_grid_size(num_tokens: int, model: CCT) -> Tuple[int, int]:
    """Height and width of the token grid of a checkpoint of which only the number of tokens is known.

    In this order: the grid of the image size that timm recorded for the checkpoint, that of the model itself, a square,
    a grid of the model's aspect ratio.

    Raises:
        ValueError: If none of them has `num_tokens` tokens.
    """
    height, width = model.grid_size
    recorded = getattr(model, 'pretrained_model_args', {}).get('img_size')
    if recorded is None:
        recorded = getattr(model, 'pretrained_cfg', {}).get('input_size', (0, 0, 0))[-2:]
    side = math.isqrt(num_tokens)
    scaled = round(math.sqrt(num_tokens * height / width))
    candidates = (
        model.tokenizer.grid_size(to_2tuple(recorded)),
        (height, width),
        (side, side),
        (scaled, num_tokens // max(1, scaled)),
    )
    for candidate in candidates:
        if candidate[0] * candidate[1] == num_tokens:
            return candidate
    raise ValueError(
        f'the checkpoint has a position embedding of {num_tokens} tokens, which is neither a square nor of the shape '
        f'of the {height} x {width} grid of this model; create the model with the img_size of the checkpoint and call '
        f'set_input_size afterwards.')


def _create_cct(variant: str, pretrained: bool = False, **kwargs) -> CCT:
    out_indices = kwargs.pop('out_indices', 3)
    kwargs = with_named_source(kwargs)
    with explained(variant, pretrained, kwargs):
        return build_model_with_cfg(
            CCT,
            variant,
            pretrained,
            pretrained_filter_fn=partial(checkpoint_filter_fn, strict=kwargs.get('pretrained_strict', True)),
            feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
            **with_readable_folder(kwargs),
        )


def _cfg(url: str = '', **kwargs) -> Dict:
    return {
        'url': url,
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': None,
        'crop_pct': 1., 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': CIFAR10_MEAN, 'std': CIFAR10_STD,
        'first_conv': 'tokenizer.stages.0.conv', 'classifier': 'head',
        'license': 'apache-2.0',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    'cct_2.cifar10': _cfg(file=packaged_weights('cct_2.cifar10')),
    'cct_4': _cfg(),
    'cct_6': _cfg(),
    'cct_7': _cfg(),
    'cct_14': _cfg(
        num_classes=1000, input_size=(3, 224, 224), mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD),
    'cct_2_sot_q.cifar10': _cfg(file=packaged_weights('cct_2_sot_q.cifar10')),
    'cct_2_sot_q_nosoftmax.cifar10': _cfg(file=packaged_weights('cct_2_sot_q_nosoftmax.cifar10')),
    'cct_2_sot_qk.cifar10': _cfg(file=packaged_weights('cct_2_sot_qk.cifar10')),
    'cct_2_sot_qk_nosoftmax.cifar10': _cfg(file=packaged_weights('cct_2_sot_qk_nosoftmax.cifar10')),
    'cct_2_sot_qkt.cifar10': _cfg(file=packaged_weights('cct_2_sot_qkt.cifar10')),
    'cct_2_sot_shares.cifar10': _cfg(file=packaged_weights('cct_2_sot_shares.cifar10')),
    'cct_2_sot_shares.e200_cifar10': _cfg(file=packaged_weights('cct_2_sot_shares.e200_cifar10')),
    'cct_2_sot_shares.e300_cifar10': _cfg(file=packaged_weights('cct_2_sot_shares.e300_cifar10')),
})

# the original's rates
_DROP_RATES = dict(attn_drop_rate=0.1, drop_path_rate=0.1)
_CCT_2 = dict(
    depth=2, num_heads=2, mlp_ratio=1, embed_dim=128, kernel_size=3, n_conv_layers=2, **_DROP_RATES)


@register_model
def cct_2(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-2/3x2, 32x32 pixels."""
    return _create_cct('cct_2', pretrained=pretrained, **dict(_CCT_2, **kwargs))


@register_model
def cct_4(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-4/3x2, 32x32 pixels."""
    model_args = dict(
        depth=4, num_heads=2, mlp_ratio=1, embed_dim=128, kernel_size=3, n_conv_layers=2, **_DROP_RATES)
    return _create_cct('cct_4', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def cct_6(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-6/3x1, 32x32 pixels."""
    model_args = dict(
        depth=6, num_heads=4, mlp_ratio=2, embed_dim=256, kernel_size=3, n_conv_layers=1, **_DROP_RATES)
    return _create_cct('cct_6', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def cct_7(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-7/3x1, 32x32 pixels."""
    model_args = dict(
        depth=7, num_heads=4, mlp_ratio=2, embed_dim=256, kernel_size=3, n_conv_layers=1, **_DROP_RATES)
    return _create_cct('cct_7', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def cct_14(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-14/7x2, 224x224 pixels."""
    model_args = dict(
        depth=14, num_heads=6, mlp_ratio=3, embed_dim=384, kernel_size=7, n_conv_layers=2, **_DROP_RATES)
    return _create_cct('cct_14', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def cct_2_sot_q(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-2/3x2 with softmax(SOT(Q) d^-1/2) attention."""
    model_args = dict(_CCT_2, attn='sot_q')
    return _create_cct('cct_2_sot_q', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def cct_2_sot_q_nosoftmax(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-2/3x2 with SOT(Q) d^-1/2 attention."""
    model_args = dict(_CCT_2, attn='sot_q_nosoftmax')
    return _create_cct('cct_2_sot_q_nosoftmax', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def cct_2_sot_qk(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-2/3x2 with softmax(SOT(Q, K) d^-1/2) attention."""
    model_args = dict(_CCT_2, attn='sot_qk')
    return _create_cct('cct_2_sot_qk', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def cct_2_sot_qk_nosoftmax(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-2/3x2 with SOT(Q, K) d^-1/2 attention."""
    model_args = dict(_CCT_2, attn='sot_qk_nosoftmax')
    return _create_cct('cct_2_sot_qk_nosoftmax', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def cct_2_sot_qkt(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-2/3x2 with softmax(SOT(Q, K^T) d^-1/2) attention, for inputs of as many tokens as a head is wide (64)."""
    model_args = dict(_CCT_2, attn='sot_qkt')
    return _create_cct('cct_2_sot_qkt', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def cct_2_sot_shares(pretrained: bool = False, **kwargs) -> CCT:
    """CCT-2/3x2 with `sot_shares` attention, a plan with learned marginals of 5 iterations, and with `context`."""
    model_args = dict(_CCT_2, attn='sot_shares', sot_iters=5, context=True)
    return _create_cct('cct_2_sot_shares', pretrained=pretrained, **dict(model_args, **kwargs))

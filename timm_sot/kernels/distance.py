""" Euclidean distances as one operator with a backward pass of its own, in plain torch for any device

Equal points are at distance exactly 0 and have gradient 0 there, and points that are close to each other are as exact
as others. As a product of matrices in float32, |x|^2 + |y|^2 - 2xy has neither, and difference by difference it takes
many times as long; in float64 the product has both, up to this: a squared distance has an error of some 1e-16 times
|x|^2 + |y|^2 about the mean of y. Beside an outlier that is 1e7 times as far away as they are from each other,
distances are good to three digits.
"""
from typing import Tuple

import torch

from .operands import WITHOUT_FLOAT64
from .operators import check_one_device, differentiate, operator, register_fake

__all__ = ['distance_by_product', 'euclidean_distance']

# Squared distances below this part of |x|^2 + |y|^2, about the mean, are rounding errors of float64: distances of less
# than half a unit of float32 in the last place.
NEGLIGIBLE = 1e-15
TINY = 1e-300  # below all squares of float32


@operator
def euclidean_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """||x_i - y_j||_2 of points (..., N, D), (..., M, D) in float32 or float64, to (..., N, M); no broadcasting."""
    if x.dtype == torch.float64 or x.device.type != 'cpu':
        return torch.cdist(x, y, compute_mode='donot_use_mm_for_euclid_dist')
    squares, equal = _squares(x, y)
    return squares.masked_fill_(equal, 0.).sqrt_().to(x.dtype)  # float32 has no squares above 1e38


@register_fake(euclidean_distance)
def _(x, y):
    check_one_device(x, y)
    return x.new_empty(*x.shape[:-1], y.shape[-2])


@operator
def euclidean_distance_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        distance: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Gradients for x and y; that of a distance of 0 is 0."""
    return _gradients(grad, x, y, distance)


def _gradients(
        grad: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        distance: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """With w = grad / distance the gradient of x_i is sum_j w_ij (x_i - y_j): with a product, a difference of sums that
    cancel for a small distance, hence float64 where there is one.
    """
    dtype = x.dtype
    x, y = _centered(x, y)
    weights = (grad / distance.masked_fill(distance == 0, float('inf'))).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        grad_x = weights.sum(dim=-1)[..., None] * x - weights @ y
        grad_y = weights.sum(dim=-2)[..., None] * y - weights.transpose(-2, -1) @ x
    return grad_x.to(dtype).contiguous(), grad_y.to(dtype).contiguous()  # as the fake promises to inductor


@register_fake(euclidean_distance_backward)
def _(grad, x, y, distance):
    check_one_device(grad, x, y, distance)
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _differentiate(ctx, grad):
    return euclidean_distance_backward(grad, *ctx.saved_tensors)


def _setup_context_again(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_again(ctx, *grads):
    _, vjp = torch.func.vjp(_gradients, *ctx.saved_tensors)
    return vjp(grads)


differentiate(euclidean_distance, _differentiate, _setup_context)
differentiate(euclidean_distance_backward, _differentiate_again, _setup_context_again)


def distance_by_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same in operations that every format and every transformation of functions knows.

    Also for float64 the squares are those of a product: distances below 3e-8 of |x| + |y| come out as 0.
    """
    squares, equal = _squares(x, y)
    return squares.masked_fill(equal, 1.).sqrt().to(x.dtype).masked_fill(equal, 0.)  # the root has no derivative at 0


def _squares(x: torch.Tensor, y: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Squared distances, (..., N, M) in float64, and whether they are 0 but for rounding; infinite ones are not."""
    x, y = _centered(x, y)
    xx, yy = (z.square().sum(dim=-1, keepdim=True) for z in (x, y))
    left, right = torch.cat([-2. * x, xx, torch.ones_like(xx)], dim=-1), torch.cat([y, torch.ones_like(yy), yy], dim=-1)
    squares = left @ right.transpose(-2, -1)
    return squares, squares < (NEGLIGIBLE * xx + TINY) + NEGLIGIBLE * yy.transpose(-2, -1)


def _centered(x: torch.Tensor, y: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """About the mean of y, in float64 where the device has it."""
    y = y if y.device.type in WITHOUT_FLOAT64 else y.double()
    mean = y.mean(dim=-2, keepdim=True)
    return x - mean, y - mean

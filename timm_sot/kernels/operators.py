""" Registering operators with torch

What torch.library.custom_op does, on the level below. That checks in every call what `torch.library.opcheck` checks once,
in the tests, and reads the schema anew: calls, with their backward passes, then take twice as long until a kernel
begins, and on a GPU, whose kernels are short, everything waits for that.
"""
from typing import Callable, Optional

import torch
from torch.library import Library, infer_schema

__all__ = ['differentiate', 'operator']

_library = Library('timm_sot', 'FRAGMENT')  # what it registers ends with it


def operator(function: Callable) -> torch._ops.OpOverload:
    """Make an operator `timm_sot::NAME` of a function NAME, by its annotations; a decorator.

    The function must neither change its arguments nor return them or parts of them. `torch.library.register_fake` says
    what stands for it where tensors have no data.
    """
    name = function.__name__
    _library.define(name + infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, 'CompositeExplicitAutograd')
    return getattr(torch.ops.timm_sot, name).default


def differentiate(
        op: torch._ops.OpOverload,
        backward: Callable,
        setup_context: Optional[Callable] = None,
) -> None:
    """Give an operator its derivative.

    Args:
        op: What `operator` made.
        backward: From a context and the gradients of the outputs to the gradients of all arguments, None for those that
            have none.
        setup_context: From a context, all arguments as a tuple, and the output: keeps what `backward` needs.
    """
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    name = op.name().split('::')[1]
    function = type(name, (torch.autograd.Function,), dict(
        forward=staticmethod(forward), backward=staticmethod(backward)))

    def call(*args):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, call, 'Autograd')

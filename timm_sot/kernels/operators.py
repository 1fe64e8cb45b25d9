""" Registering operators with torch

What torch.library.custom_op does, on the level below. That checks in every call what `torch.library.opcheck` checks
once, in the tests, and reads the schema anew: a call with its backward pass then takes half as long again until its
kernels begin, and on a GPU, where kernels are short, everything waits for that.
"""
from types import SimpleNamespace
from typing import Callable, Dict, Optional

import torch
from torch.library import Library, infer_schema

__all__ = ['check_one_device', 'differentiate', 'operator', 'refuse_second_derivative', 'register_fake']

# An operator is registered once in a process and calls what is in here: when a module is imported again, it finds its
# operators and gives them its new functions. Hence not in this module, but where the operators are.
_registered: Dict[str, SimpleNamespace] = vars(torch.ops.timm_sot).setdefault('_registered', {})


def operator(function: Callable) -> torch._ops.OpOverload:
    """Make an operator `timm_sot::NAME` of a function NAME, by its annotations; a decorator.

    The function must neither change its arguments nor return them or parts of them, and must have no default values:
    torch leaves out arguments that are equal to them.
    """
    name, schema = function.__name__, infer_schema(function, mutates_args=())
    if name in _registered and _registered[name].schema == schema:
        _registered[name].function = function
        return _registered[name].op
    library = Library('timm_sot', 'FRAGMENT')
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.timm_sot, name).default
    if any(argument.has_default_value() for argument in op._schema.arguments):
        raise ValueError(f'{name} must not have default values: {op._schema}')
    registered = _registered[name] = SimpleNamespace(
        schema=schema, function=function, fake=None, gradient=None, op=op, library=library)
    # where torch.compile leaves a function to Python it would look into what that calls, and into numba
    library.impl(
        name, torch.compiler.disable(lambda *args: registered.function(*args)), 'CompositeExplicitAutograd')
    torch.library.register_fake(op, lambda *args: registered.fake(*args), lib=library)
    library.impl(name, lambda keyset, *args: _call(registered, keyset, args), 'Autograd', with_keyset=True)
    return op


def register_fake(op: torch._ops.OpOverload) -> Callable[[Callable], Callable]:
    """A decorator for what stands for an operator where tensors have no data: it makes outputs of the same shapes,
    strides and dtypes.
    """
    def register(fake: Callable) -> Callable:
        _of(op).fake = fake
        return fake

    return register


def check_one_device(*tensors: torch.Tensor) -> None:
    """For the fakes of operators: one tensor on the meta device is enough to call them, with whatever others."""
    devices = [str(x.device) for x in tensors]
    torch._check(len(set(devices)) == 1, lambda: f'all tensors must be on one device, got {devices}')


def differentiate(
        op: torch._ops.OpOverload,
        backward: Callable,
        setup_context: Optional[Callable] = None,
) -> None:
    """Give an operator its derivative.

    Args:
        op: What `operator` made.
        backward: From a context and the gradients of the outputs to a tuple of the gradients of all arguments, None for
            those that have none.
        setup_context: From a context, all arguments as a tuple, and the output: keeps what `backward` needs.
    """
    def forward(ctx, keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = op.redispatch(keyset, *args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    _of(op).gradient = type(_name(op), (torch.autograd.Function,), dict(
        forward=staticmethod(forward),
        backward=staticmethod(lambda ctx, *grads: (None, *backward(ctx, *grads)))))  # none for the keyset


def refuse_second_derivative(ctx, *grads) -> None:
    """For the autograd of a backward pass."""
    raise RuntimeError(
        'Fused SOT attention has no second derivative. Set fused_attn of the attention layers to False (or call '
        'timm.layers.set_fused_attn(False) before the model is created) to differentiate twice.')


def _call(registered: SimpleNamespace, keyset, args):
    keyset = keyset & torch._C._after_autograd_keyset
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        return registered.gradient.apply(keyset, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return registered.op.redispatch(keyset, *args)


def _name(op: torch._ops.OpOverload) -> str:
    return op.name().split('::')[1]


def _of(op: torch._ops.OpOverload) -> SimpleNamespace:
    return _registered[_name(op)]

import operator as operator_module
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_sot.kernels.operators import differentiate, operator, register_fake


@operator
def weighted_sum_of_a_test(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return x * factor + y


@register_fake(weighted_sum_of_a_test)
def _(x, y, factor):
    return x.new_empty(x.shape)


@operator
def product_of_a_test(x: Tensor, factor: float) -> Tensor:
    return x * factor


@register_fake(product_of_a_test)
def _(x, factor):
    return x.new_empty(x.shape)


def keep_factor(ctx, inputs, output):
    assert len(inputs) == 3 and not output.requires_grad
    ctx.factor = inputs[2]


def gradients(ctx, grad):
    return product_of_a_test(grad, ctx.factor), grad.clone(), None


def refuse(ctx, grad):
    raise RuntimeError('only once')


differentiate(weighted_sum_of_a_test, gradients, keep_factor)
differentiate(product_of_a_test, refuse)


def test_name_and_schema():
    assert weighted_sum_of_a_test is torch.ops.timm_sot.weighted_sum_of_a_test.default
    assert str(weighted_sum_of_a_test._schema) == (
        'timm_sot::weighted_sum_of_a_test(Tensor x, Tensor y, float factor) -> Tensor')


def test_values_and_gradients():
    x, y = torch.tensor([1., 2.], requires_grad=True), torch.tensor([3., 4.], requires_grad=True)
    out = weighted_sum_of_a_test(x, y, 2.)
    assert out.tolist() == [5., 8.]
    grads = torch.autograd.grad(out, (x, y), torch.tensor([1., 10.]))
    assert [grad.tolist() for grad in grads] == [[2., 20.], [1., 10.]]


def test_opcheck():
    x, y = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(weighted_sum_of_a_test, (x, y, 2.))
    torch.library.opcheck(weighted_sum_of_a_test, (x, y.detach(), 2.))


def test_compilers_do_not_look_inside():
    """Not even where they leave the function that calls the operator to Python."""
    called = []

    def backend(module, inputs):
        called.extend(node.target for node in module.graph.nodes if node.op == 'call_function')
        return module.forward

    def function(x):
        try:
            torch._dynamo.graph_break()
            return weighted_sum_of_a_test(torch.sin(x), x, 2.)
        finally:
            print('a function with a break in such a place is not compiled, what it calls is')

    torch._dynamo.reset()
    x = torch.randn(3, requires_grad=True)
    torch.testing.assert_close(torch.compile(function, backend=backend)(x), 2. * x.sin() + x)
    assert operator_module.mul not in called and torch.ops.aten.mul.Tensor not in called


def test_default_values_are_refused():
    """torch would leave out arguments that are equal to them, and their gradients would be those of others."""
    with pytest.raises(ValueError, match='must not have default values'):
        @operator
        def default_of_a_test(x: Tensor, factor: float = 1.) -> Tensor:
            return x * factor


IMPORTED_AGAIN = '''
import importlib
import sys

import torch
import timm_sot.kernels.distance as module
from timm_sot import self_optimal_transport

x = torch.randn(2, 5, 3, requires_grad=True)
before = self_optimal_transport(x)
importlib.reload(module)
assert torch.equal(self_optimal_transport(x), before)
for name in [name for name in sys.modules if name.startswith('timm_sot')]:
    del sys.modules[name]
from timm_sot import self_optimal_transport as again

assert again is not self_optimal_transport
for function in (again, self_optimal_transport):
    assert torch.equal(function(x), before)
    function(x).sum().backward()
import timm
timm.create_model('cct_2_sot_qk')
print('as before')
'''


@pytest.mark.slow
def test_modules_that_are_imported_again():
    done = subprocess.run([sys.executable, '-W', 'error::RuntimeWarning', '-c', IMPORTED_AGAIN],
                          capture_output=True, text=True)
    assert done.stdout == 'as before\n', done.stderr


def test_what_changes_its_argument_is_found():
    """That a function keeps to the rules is not checked when it is called: `opcheck` does."""
    @operator
    def change_of_a_test(x: Tensor) -> Tensor:
        return x.add_(1.)

    with pytest.raises(Exception, match='alias|mutat'):
        torch.library.opcheck(change_of_a_test, (torch.zeros(2),), test_utils='test_schema')


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode):
    x, y = torch.ones(2, requires_grad=True), torch.ones(2)
    with mode():
        assert weighted_sum_of_a_test(x, y, 2.).grad_fn is None
    assert weighted_sum_of_a_test(x.detach(), y, 2.).grad_fn is None
    assert weighted_sum_of_a_test(x, y, 2.).grad_fn.name() == 'weighted_sum_of_a_testBackward'


def test_second_derivative():
    x = torch.ones(2, requires_grad=True)
    grad, = torch.autograd.grad(weighted_sum_of_a_test(x, x.detach(), 2.).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='only once'):
        grad.sum().backward()


def test_compiled():
    x, y = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    out = torch.compile(lambda x, y: weighted_sum_of_a_test(x, y, 2.) * 3, fullgraph=True, backend='aot_eager')(x, y)
    torch.testing.assert_close(out, (2 * x + y) * 3)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], torch.full((2, 3), 6.))


def test_fake_and_meta():
    with FakeTensorMode():
        assert weighted_sum_of_a_test(torch.empty(5, requires_grad=True), torch.empty(5), 1.).shape == (5,)
    assert weighted_sum_of_a_test(*torch.empty(2, 5, device='meta'), 1.).device.type == 'meta'

""" Compiles the Triton kernels of a module for Hopper, without a GPU: python compile_kernels.py onchip

Prints what each needs as JSON: registers, bytes of stack (what does not fit into registers) and of shared memory.
With `iterations` in place of a module: how many instructions a thread executes for an entry of the matrix in a Sinkhorn
iteration, forward, bfloat16; with `ampere`: the shared memory of the largest of `onchip` on Ampere.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_sot.kernels import onchip, onchip_shares, streamed, streamed_shares, strips

POINTERS = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}
INDICES = {'index_ptr', 'row_max_index_ptr', 'largest_i_ptr', 'largest_j_ptr'}
MATRICES = {
    'q_ptr', 'k_ptr', 'x_ptr', 'y_ptr', 'value_ptr', 'grad_out_ptr', 'grad_q_ptr', 'grad_k_ptr', 'grad_value_ptr',
    'grad_x_ptr', 'grad_y_ptr'}
UNIT_STRIDES = {'stride_kd', 'stride_gd', 'stride_yd', 'stride_outd', 'stride_d'}
FLOATS = {'reg', 'scale', 'keep_factor', 'log2_mass'}


def matrices(kernel):
    """Names of the pointers to the inputs' dtype; others are float32."""
    names = set(MATRICES)
    if 'value_ptr' not in kernel.arg_names:  # else v stands for a potential
        names |= {'v_ptr', 'grad_v_ptr'}
    if kernel.__name__ in ('_forward_kernel', '_output_kernel', '_cost_gradient_kernel', '_cosine_gradient_kernel'):
        names.add('out_ptr')
    return names


def compile_kernel(kernel, dtype, constants, strided=False, capability=90, **options):
    """The compiled kernel; strides and pointers are multiples of 16, and rows contiguous, as those of a projection are,
    unless it is to be for any strides.
    """
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in UNIT_STRIDES and not strided:
            signature[name] = 'constexpr'
            constexprs[(i,)] = constants.get(name, 1)
            continue
        if name == 'seed_ptr':
            signature[name] = '*i64'
        elif name in INDICES:
            signature[name] = '*i32'
        elif name.endswith('_ptr'):
            signature[name] = POINTERS[dtype] if name in matrices(kernel) else '*fp32'
        else:
            signature[name] = 'fp32' if name in FLOATS else 'i32'
        if name.endswith('_ptr') or (name.startswith('stride') or name == 'D') and not strided:
            attributes[(i,)] = [['tt.divisibility', 16]]
    return triton.compile(
        ASTSource(kernel, signature, constexprs, attributes), target=GPUTarget('cuda', capability, 32), options=options)


def dump(compiled, option):
    """What cuobjdump, which comes with Triton, says about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as f:
        f.write(compiled.asm['cubin'])
        f.flush()
        cuobjdump = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
        return subprocess.run([cuobjdump, option, f.name], capture_output=True, text=True, check=True).stdout


def needs(kernel, dtype, constants, **options):
    """What the compiled kernel needs."""
    compiled = compile_kernel(kernel, dtype, constants, **options)
    registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', dump(compiled, '-res-usage')).groups())
    return dict(registers=registers, stack=stack, shared=compiled.metadata.shared)


def loops(compiled):
    """Loops of a compiled kernel in their order: first and last address, number of instructions."""
    # /*0a30*/    @P0 BRA 0x1f0 ;
    instructions = [
        (int(address, 16), text)
        for address, text in re.findall(r'/\*([0-9a-f]{4,})\*/\s+([^;]*);', dump(compiled, '-sass'))]
    found = []
    for last, text in instructions:
        target = re.search(r'\bBRA\b.*0x([0-9a-f]+)', text)
        first = int(target[1], 16) if target else last
        if first < last:
            found.append((first, last, sum(first <= address <= last for address, _ in instructions)))
    return sorted(found)


def per_entry():
    """Instructions for an entry in an iteration: of all of strips' loop in a loop, and of both of streamed's passes."""
    points = torch.empty(1, 1, 256, 64, dtype=torch.bfloat16)
    constants = strips._specialized(points, 'qk', True, 0.1, 0., 'euclidean')
    found = loops(compile_kernel(strips._forward_kernel, points.dtype, constants, **strips.FORWARD))
    nested = [count for first, last, count in found if any(a < first and last < b for a, b, _ in found)]
    assert len(nested) == 1, f'expected one loop in a loop, that over the strips in an iteration; got {found}'
    entries = constants['BLOCK_M'] * constants['BLOCK_N'] / (32 * strips.FORWARD['num_warps'])
    yield 'strips', nested[0] / entries

    total = 0
    for axis in (1, 0):
        constants = dict(INIT=True, COSINE=False, PRECISION='tf32', BLOCK=streamed.BLOCK, BLOCK_D=64, AXIS=axis)
        found = loops(compile_kernel(
            streamed._logsumexp_kernel, points.dtype, constants, num_warps=4, num_stages=3))
        assert len(found) == 1, f'expected one loop, that over tiles; got {found}'
        total += found[0][2]
    yield 'streamed', total / (streamed.BLOCK ** 2 / (32 * 4))


def onchip_needs():
    for name, N, D, dtype, operands, dropout_p in (
            ('bf16 16', 16, 64, torch.bfloat16, 'qk', 0.),
            ('bf16 64', 64, 64, torch.bfloat16, 'qk', 0.),
            ('bf16 64 sot_q', 64, 64, torch.bfloat16, 'q', 0.),
            ('bf16 64 dropout', 64, 64, torch.bfloat16, 'qk', 0.1),
            ('f32 64', 64, 64, torch.float32, 'qk', 0.),
            ('f32 128', 128, 64, torch.float32, 'qk', 0.),
            ('bf16 128', 128, 128, torch.bfloat16, 'qk', 0.),
    ):
        q = torch.empty(1, 1, N, D, dtype=dtype)
        constants = onchip._specialize(q, operands, True, 0.1, dropout_p, 'euclidean')
        for way in ('forward', 'backward'):
            options = getattr(onchip, f'_{way}_config')(constants['BLOCK_N'], constants['BLOCK_D'], dtype)
            yield f'{way} {name}', needs(getattr(onchip, f'_{way}_kernel'), dtype, constants, **options)


    for name, change in (
            ('log', dict(reg=0.02)), ('cosine', dict(distance='cosine')), ('nosoftmax', dict(softmax=False)),
            ('sot_qkt', dict(operands='qkt', strided=True)), ('49 tokens', dict(N=49)),
            ('f16', dict(dtype=torch.float16))):
        settings = dict(
            N=64, dtype=torch.bfloat16, operands='qk', softmax=True, reg=0.1, distance='euclidean', strided=False)
        N, dtype, operands, softmax, reg, distance, strided = {**settings, **change}.values()
        q = torch.empty(1, 1, N, 64, dtype=dtype)
        constants = onchip._specialize(q, operands, softmax, reg, 0., distance)
        for way in ('forward', 'backward'):
            options = getattr(onchip, f'_{way}_config')(constants['BLOCK_N'], constants['BLOCK_D'], dtype)
            yield f'{way} {name}', needs(
                getattr(onchip, f'_{way}_kernel'), dtype, constants, strided=strided, **options)


def ampere_needs():
    """Bytes of shared memory for each of its rows x width, for Ampere."""
    for name, N, D, dtype in (
            ('f32 64x64', 64, 64, torch.float32), ('f16 128x64', 128, 64, torch.float16)):
        constants = onchip._specialize(torch.empty(1, 1, N, D, dtype=dtype), 'qk', True, 0.1, 0., 'euclidean')
        options = onchip._backward_config(constants['BLOCK_N'], constants['BLOCK_D'], dtype)
        compiled = compile_kernel(onchip._backward_kernel, dtype, constants, capability=80, **options)
        yield name, compiled.metadata.shared / (N * D)


def onchip_shares_needs():
    for name, N, D, dtype, dropout_p in (
            ('bf16 64', 64, 64, torch.bfloat16, 0.1),
            ('f32 64', 64, 64, torch.float32, 0.),
            ('f32 128', 128, 64, torch.float32, 0.),
            ('bf16 128', 128, 128, torch.bfloat16, 0.),
            ('f16 49', 49, 64, torch.float16, 0.),
    ):
        constants = onchip._tiles(torch.empty(1, 1, N, D, dtype=dtype), dropout_p)
        for way in ('forward', 'backward'):
            options = getattr(onchip, f'_{way}_config')(constants['BLOCK_N'], constants['BLOCK_D'], dtype)
            yield f'{way} {name}', needs(getattr(onchip_shares, f'_{way}_kernel'), dtype, constants, **options)


def strips_needs():
    for name, change in (
            ('bf16', dict()), ('bf16 sot_q dropout', dict(operands='q', dropout_p=0.1)),
            ('f16', dict(dtype=torch.float16)), ('log', dict(reg=0.02)), ('cosine', dict(distance='cosine')),
            ('nosoftmax', dict(softmax=False)), ('strided', dict(strided=True))):
        settings = dict(
            dtype=torch.bfloat16, operands='qk', softmax=True, reg=0.1, dropout_p=0., distance='euclidean',
            strided=False)
        dtype, *specification, strided = {**settings, **change}.values()
        constants = strips._specialized(torch.empty(1, 1, 256, 64, dtype=dtype), *specification)
        for kernel, options in (
                (strips._forward_kernel, strips.FORWARD), (strips._plan_gradient_kernel, strips.BACKWARD),
                (strips._adjoint_kernel, strips.BACKWARD), (strips._cost_gradient_kernel, strips.BACKWARD)):
            yield f'{kernel.__name__} {name}', needs(kernel, dtype, constants, strided=strided, **options)


def needs_by_axis(module, names, constants, dtype=torch.bfloat16, **options):
    """Of each kernel, along each axis where it has one."""
    for name in names:
        kernel = getattr(module, name)
        for axis in (1, 0) if 'AXIS' in kernel.arg_names else (None,):
            yield f'{name} {axis}', needs(kernel, dtype, dict(constants, AXIS=axis), num_warps=4, **options)


def needs_flipped(module, names, constants, flags):
    """Of the kernels that have a flag, with the other value of it."""
    for flag in flags:
        having = [name for name in names if flag in getattr(module, name).arg_names]
        assert having, f'{flag} is of no kernel'
        for name, need in needs_by_axis(module, having, {**constants, flag: not constants[flag]}, num_stages=3):
            yield f'{name} {flag}={not constants[flag]}', need


def streamed_needs():
    constants = dict(
        ADD=False, INIT=True, PLAN=True, SOFTMAX=True, DROPOUT=False, COSINE=False, PRECISION='tf32',
        BLOCK=streamed.BLOCK, BLOCK_D=64)
    names = (
        '_norms_kernel', '_row_max_kernel', '_logsumexp_kernel', '_output_kernel', '_softmax_sums_kernel',
        '_plan_gradient_kernel', '_adjoint_kernel', '_cost_gradient_kernel')
    yield from needs_by_axis(streamed, names, constants, num_stages=3)
    yield from needs_flipped(streamed, names, constants, ('ADD', 'INIT', 'PLAN', 'SOFTMAX', 'DROPOUT', 'COSINE'))
    for name, need in needs_by_axis(streamed, names, constants, torch.float16, strided=True, num_stages=3):
        yield f'{name} f16 strided', need
    # what takes the most shared memory
    constants.update(PRECISION='tf32x3', BLOCK_D=128)
    for name, need in needs_by_axis(streamed, ('_cost_gradient_kernel',), constants, torch.float32, num_stages=1):
        yield f'f32 128 {name}', need


def streamed_shares_needs():
    constants = dict(DROPOUT=True, PRECISION='tf32', BLOCK=streamed.BLOCK, BLOCK_D=64)
    names = (
        '_factors_kernel', '_output_kernel', '_row_sums_kernel', '_value_gradient_kernel', '_adjoint_kernel',
        '_cosine_gradient_kernel')
    yield from needs_by_axis(streamed_shares, names, constants, num_stages=3)
    yield from needs_flipped(streamed_shares, names, constants, ('DROPOUT',))
    for name, need in needs_by_axis(streamed_shares, names, constants, torch.float16, strided=True, num_stages=3):
        yield f'{name} f16 strided', need
    constants.update(PRECISION='tf32x3', BLOCK_D=128)
    largest = ('_value_gradient_kernel', '_cosine_gradient_kernel')
    for name, need in needs_by_axis(streamed_shares, largest, constants, torch.float32, num_stages=1):
        yield f'f32 128 {name}', need


if __name__ == '__main__':
    print(json.dumps(dict(per_entry() if sys.argv[1] == 'iterations' else globals()[f'{sys.argv[1]}_needs']())))

""" The Triton kernels compile for a GPU, here or not, and fit on it """
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_sot.kernels.fused import FLOAT32_BYTES, HALF_BYTES, STRIPS_BYTES

pytest.importorskip('triton')
pytestmark = pytest.mark.slow

SHARED_MEMORY = 227 * 1024  # of one program on Hopper


def needs(which):
    """In a process of its own, as this one may interpret."""
    here = Path(__file__).parent
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    env['PYTHONPATH'] = str(here.parent)
    out = subprocess.run(
        [sys.executable, str(here / 'compile_kernels.py'), which],
        env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout.splitlines()[-1])


def test_onchip():
    for name, need in needs('onchip').items():
        assert need['shared'] <= SHARED_MEMORY, (name, need)
        if name in ('forward bf16 16', 'forward bf16 64', 'backward bf16 64'):
            # a few values to spill are cheaper than fewer programs at a time: 120 bytes by Triton 3.8, 192 by 3.6
            assert need['stack'] <= 256, (name, need)


def test_ampere():
    """What the choice of the path takes its kernels to need."""
    for name, need in needs('ampere').items():
        assert need <= (FLOAT32_BYTES if name.startswith('f32') else HALF_BYTES), (name, need)


def test_onchip_shares():
    for name, need in needs('onchip_shares').items():
        assert need['shared'] <= SHARED_MEMORY, (name, need)
        if name == 'forward bf16 64':
            assert need['stack'] <= 256, (name, need)


def test_strips():
    for name, need in needs('strips').items():
        assert need['shared'] <= STRIPS_BYTES, (name, need)
        if not name.endswith('strided'):  # which needs more for the addresses
            # the gradients' go over the strips once
            assert need['stack'] <= (256 if '_gradient_kernel' in name else 64 if 'log' in name else 0), (name, need)


def test_iterations():
    """README's figures; another Triton may need a few more."""
    instructions = needs('iterations')
    assert instructions['strips'] == pytest.approx(20, rel=0.1), instructions
    assert instructions['streamed'] == pytest.approx(55, rel=0.1), instructions


def test_streamed():
    for name, need in needs('streamed').items():
        assert need['shared'] <= SHARED_MEMORY, (name, need)
        if not name.startswith(('_cost_gradient_kernel', 'f32')) and not name.endswith('strided'):
            assert need['stack'] <= (128 if 'DROPOUT' in name else 0), (name, need)


def test_streamed_shares():
    for name, need in needs('streamed_shares').items():
        assert need['shared'] <= SHARED_MEMORY, (name, need)
        if not name.startswith(('_cosine_gradient_kernel', 'f32')) and not name.endswith('strided'):
            assert need['stack'] == 0, (name, need)

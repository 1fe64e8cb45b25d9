import importlib.util
import json
import os
import re

os.environ.setdefault('OMP_NUM_THREADS', '1')  # the workers of pytest-xdist, and what they start, share the cores

import pytest
import torch
from PIL import Image


def interpret_triton():
    """Run Triton's kernels in Python. To be called before anything imports Triton."""
    os.environ['TRITON_INTERPRET'] = '1'
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot_bfloat16(self, a, b, d, *args):
        """The interpreter keeps bfloat16 as the integers of its bits and would multiply these."""
        def widened(x):
            if x.dtype.scalar != tl.bfloat16:
                return x
            bits = x.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
        return create_dot(self, widened(a), widened(b), d, *args)

    interpreter.InterpreterBuilder.create_dot = create_dot_bfloat16


if importlib.util.find_spec('triton') and not torch.cuda.is_available():
    interpret_triton()


def pytest_sessionfinish(session):
    """Fail where tests were skipped for another reason than those of the pattern ALLOWED_SKIPS, which CI sets.

    What is not installed, or does not import, is skipped: there all of it must run.
    """
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    if 'ALLOWED_SKIPS' not in os.environ or reporter is None or hasattr(session.config, 'workerinput'):
        return
    reasons = {report.longrepr[2].removeprefix('Skipped: ') for report in reporter.stats.get('skipped', [])}
    others = sorted(reason for reason in reasons if not re.match(os.environ['ALLOWED_SKIPS'], reason))
    if others:
        reporter.write_line(f'\nskipped, which ALLOWED_SKIPS does not allow: {"; ".join(others)}', red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
    """ImageFolder of scikit-learn's handwritten digits: train/ 40 and test/ 20 images of each of the ten classes."""
    from sklearn.datasets import load_digits
    root = tmp_path_factory.mktemp('digits')
    images, targets = load_digits(return_X_y=True)
    count = {}
    for i, (image, target) in enumerate(zip(images, targets)):
        n = count[target] = count.get(target, 0) + 1
        if n > 60:
            continue
        folder = root / ('train' if n <= 40 else 'test') / str(target)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15.9).astype('uint8')).resize((32, 32)).save(folder / f'{i}.png')
    return root


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """An image folder of 24 dark and bright training images and 8 test images."""
    root = tmp_path_factory.mktemp('data') / 'tiny'
    for split, count in (('train', 12), ('test', 4)):
        for label in range(2):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (32, 32), (200 * label + i,) * 3).save(root / split / str(label) / f'{i}.png')
    return str(root)


@pytest.fixture(scope='session')
def golden():
    """Reader of the reference files in tests/golden: name -> (tensors, the `meta` entry of its metadata)."""
    from pathlib import Path

    from safetensors import safe_open

    def read(name):
        with safe_open(Path(__file__).parent / 'golden' / f'{name}.safetensors', 'pt') as f:
            return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata().get('meta', '{}'))
    return read

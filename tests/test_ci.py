""" What CI's own scripts let pass """
import subprocess
import sys
from pathlib import Path

import pytest

import timm_sot
from timm_sot.bench.contenders import BATCH, TRAIN
from timm_sot.bench.report import CUDA_CORE, save_report

from bench_rows import fake_report, fake_row

ROOT = Path(__file__).parents[1]

# a report in which nothing is missing
ROWS = {
    'core': fake_row('core', CUDA_CORE, TRAIN, 'sot_qk', 'sdpa', call=1., path='onchip'),
    'sdpa': fake_row('core', CUDA_CORE, TRAIN, 'sdpa', 'sdpa', call=1.),
    'step': fake_row('step', f'batch {BATCH} bfloat16 AMP', 'training step', 'cct_2_sot_qk', call=1.),
    'softmax step': fake_row('step', f'batch {BATCH} bfloat16 AMP', 'training step', 'cct_2', call=1.),
    'saved': fake_row('memory', 'saved for backward 1 float32', '', 'sot_qk iters=100', bytes=1),
    'saved once': fake_row('memory', 'saved for backward 1 float32', '', 'sot_qk iters=1', bytes=1),
    'peak': fake_row('memory', 'peak 1 bfloat16', '', 'sot_qk', bytes=1),
    'sdpa peak': fake_row('memory', 'peak 1 bfloat16', '', 'sdpa', bytes=1),
    'longest': fake_row('memory', 'one step', '', 'sot_qk N=16384', N=16384, bytes=1),
    'too long': fake_row('memory', 'one step', '', 'sot_qk N=32768', error='OutOfMemoryError: no'),
    'unfused': fake_row('core', 'another', TRAIN, 'sot_qk unfused', skipped='needs 200 GiB'),
    'of others': fake_row('core', 'another', TRAIN, 'POT', error='ImportError: no'),
}


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(Path(timm_sot.__file__).parents[1]))

    def run(*command, **options):
        return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    return run


@pytest.mark.slow
def test_bench_report(run, tmp_path):
    def check(rows):
        save_report(fake_report(*rows.values(), device_type='cuda'), str(tmp_path / 'bench.json'))
        done = run(ROOT / '.ci' / 'bench-report', tmp_path / 'bench.json')
        return done.returncode, done.stderr.splitlines()

    assert check(ROWS) == (0, [])
    broken = {
        'core': {**ROWS['core'], 'path': 'eager'},
        'step': fake_row('step', 'batch 2', 'training step', 'cct_2_sot_qk', error='RuntimeError: no'),
        'graph': fake_row('core', 'another', TRAIN, 'sot_q', 'sdpa', call=1., graph_error='RuntimeError: none'),
        'group': fake_row('sinkhorn', 'a third', TRAIN, 'all', error='RuntimeError: no input'),
        'late': fake_row('core', 'a fourth', TRAIN, 'all', skipped='600 s are over'),
        'skipped': fake_row('core', 'a fifth', TRAIN, 'sot_qkt', skipped='needs 200 GiB'),
        'longest': ROWS['too long'],
    }
    assert check({**ROWS, **broken}) == (1, [
        f'core {CUDA_CORE} {TRAIN} sot_qk: no kernel',
        'step batch 2 training step cct_2_sot_qk: RuntimeError: no',
        f'core another {TRAIN} sot_q: RuntimeError: none',
        f'sinkhorn a third {TRAIN} all: RuntimeError: no input',
        f'core a fourth {TRAIN} all: 600 s are over',
        f'core a fifth {TRAIN} sot_qkt: needs 200 GiB',
        'training step of cct_2_sot_qk under AMP against cct_2: not measured',
        'largest N trained on one GPU with sot_qk: not measured'])


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_skips_that_are_not_allowed(run, tmp_path, monkeypatch, workers):
    (tmp_path / 'conftest.py').write_text((ROOT / 'tests' / 'conftest.py').read_text())
    (tmp_path / 'test_skips.py').write_text(
        'import pytest\n\n\n'
        '@pytest.mark.parametrize("reason", ["needs a GPU", "could not import numba"])\n'
        'def test_skip(reason):\n'
        '    pytest.skip(reason)\n')
    command = ('-m', 'pytest', '-q', '-p', 'no:cacheprovider')
    if workers:
        pytest.importorskip('xdist')
        command += ('-n', workers)

    def check():
        done = run(*command, '.', cwd=tmp_path)
        return done.returncode, 'does not allow: could not import numba\n' in done.stdout

    if workers:
        monkeypatch.setenv('ALLOWED_SKIPS', 'needs a GPU|could not import')
    else:
        monkeypatch.delenv('ALLOWED_SKIPS', raising=False)
    assert check() == (0, False)
    monkeypatch.setenv('ALLOWED_SKIPS', 'needs a GPU')
    assert check() == (1, True)

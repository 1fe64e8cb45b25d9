""" The command line """
import json

import pytest
from PIL import Image

from timm_sot.cli import main


@pytest.fixture
def tiny_dir(tmp_path):
    for split, count in (('train', 12), ('test', 4)):
        for label in range(2):
            folder = tmp_path / 'tiny' / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (32, 32), (200 * label + i,) * 3).save(folder / f'{i}.png')
    return str(tmp_path / 'tiny')


def test_study(tiny_dir, tmp_path, capsys):
    out = tmp_path / 'out'
    code = main([
        'study', '--models', 'cct_2', 'cct_2_sot_qk', '--model-kwargs', 'sot_iters=2', 'sot_tol=None', '--epochs', '1',
        '--data-dir', tiny_dir, '--device', 'cpu', '--seed', '3', '--out', str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert 'cct_2_sot_qk' in printed.out and 'tiny: 24 training and 8 test images' in printed.out
    results = [json.loads(line) for line in (out / 'results.jsonl').read_text().splitlines()]
    assert [result['kwargs'] for result in results] == [{'sot_iters': 2, 'sot_tol': None}] * 2


@pytest.mark.parametrize('args, message', [
    ([], 'COMMAND'),
    (['study', '--models', 'cct_22'], 'did you mean cct_2'),
    (['study', '--epochs', '0'], '--epochs: must be at least 1'),
    (['study', '--epochs', 'ten'], "--epochs: invalid int value: 'ten'"),
    (['study', '--lr', '0'], '--lr: must be above 0'),
    (['study', '--weight-decay', 'nan'], '--weight-decay: must be at least 0'),
    (['study', '--seed', '-1'], '--seed'),
    (['study', '--model-kwargs', 'sot_reg'], "key=value pairs, got 'sot_reg'"),
    (['study', '--model-kwargs', 'sot_rag=1'], 'sot_rag'),
    (['study', '--data-dir', 'no/such/folder'], 'no/such/folder is not a folder'),
    (['study', '--device', 'nonsense'], "device 'nonsense'"),
])
def test_user_errors(capsys, args, message):
    assert main(args) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count('\n') == 1 and not printed.out


def test_help(capsys):
    assert main(['--help']) == 0
    printed = capsys.readouterr().out
    assert 'study' in printed and 'bench' in printed
    assert main(['study', '--help']) == 0
    assert '--model-kwargs' in capsys.readouterr().out


def test_interrupt(monkeypatch, tiny_dir, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_sot.study.runner.train', interrupted)
    assert main(['study', '--data-dir', tiny_dir, '--device', 'cpu']) == 130
    assert 'Traceback' not in capsys.readouterr().err

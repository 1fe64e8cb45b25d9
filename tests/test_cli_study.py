""" timm-sot study """
import argparse
import inspect
import json
import sys

import pytest
import torch

from timm_sot.cli import main
from timm_sot.cli.study import add_study
from timm_sot.study.augment import AUGMENTATIONS
from timm_sot.study.engine import PRECISIONS, Recipe
from timm_sot.study.presets import PRESETS


def test_study(folder, tmp_path, capsys):
    out = tmp_path / 'out'
    code = main([
        'study', '--models', 'cct_2', 'cct_2_sot_qk', '--model-kwargs', 'sot_iters=2', 'sot_tol=None', '--epochs', '1',
        '--data-dir', folder, '--device', 'cpu', '--seed', '3', '--out', str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert 'cct_2_sot_qk' in printed.out and 'tiny 24+8' in printed.out
    results = [json.loads(line) for line in (out / 'results.jsonl').read_text().splitlines()]
    assert [result['kwargs'] for result in results] == [{'sot_iters': 2, 'sot_tol': None}] * 2

    baseline = 'cct_2_sot_qk sot_iters=2 sot_tol=None'
    assert main(['study', 'report', str(out), '--baseline', baseline, '--out', str(tmp_path / 'report')]) == 0
    assert capsys.readouterr().out == f'{tmp_path}/report/report.md\n'
    report = (tmp_path / 'report' / 'report.md').read_text()
    assert f'minus `{baseline}`' in report and f"report {out} --baseline '{baseline}' --out" in report
    gap, = (1 - entropy for entropy in results[0]['entropy']['blocks.1'][:1])
    assert f'| `blocks.1` | {gap:.2g}, ' in report
    assert {path.name for path in out.iterdir()} >= {'results.jsonl', 'study.json'} and not (out / 'report.md').exists()


@pytest.mark.parametrize('package', ['scipy', 'matplotlib'])
def test_report_without_an_extra(package, monkeypatch, tmp_path, capsys):
    own = [f'timm_sot.study.{name}' for name in ('report', 'statistics', 'figures')]
    for name in [*sys.modules]:
        if name.split('.')[0] == package or name in own:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr('timm_sot.study.figures', raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(['study', 'report', str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert f"needs the package {package}; install it with: pip install 'timm-sot[study]'" in printed
    assert printed.count('\n') == 1


@pytest.mark.parametrize('args, message', [
    (['study', '--models', 'cct_22'], 'did you mean cct_2'),
    (['study', '--epochs', '0'], '--epochs: must be at least 1'),
    (['study', '--epochs', 'ten'], "--epochs: invalid int value: 'ten'"),
    (['study', '--lr', '0'], '--lr: must be above 0'),
    (['study', '--weight-decay', 'nan'], '--weight-decay: must be at least 0'),
    (['study', '--seed', '-1'], '--seed'),
    (['study', '--model-kwargs', 'sot_reg'], "key=value pairs, got 'sot_reg'"),
    (['study', '--model-kwargs', 'sot_rag=1'], 'sot_rag'),
    (['study', '--model-kwargs', 'pos_embed={[]}'], "got 'pos_embed={[]}': unhashable type: 'list'"),
    (['study', '--model-kwargs', 'pos_embed={1}'], 'numbers, text, or lists of them, to be written down with the runs'),
    (['study', '--grid', 'pos_embed=b,{[]}'], "create cct_2 with {'pos_embed': 'b'}"),
    (['study', '--model-kwargs', 'img_size=True'], 'img_size=True of cct_2 must be one number, or height and width'),
    (['study', '--data-dir', 'no/such/folder'], 'no/such/folder is not a folder'),
    (['study', '--device', 'nonsense'], "device 'nonsense'"),
    (['study', '--preset', 'none'], '--preset'),
    (['study', '--ray', '127.0.0.1:1', '--cpus-per-run', '0'], '--cpus-per-run: must be above 0'),
    (['study', '--ray', '--gpus-per-run', '2'], '--gpus-per-run must be above 0 and at most 1'),
    (['study', '--ray', '--device', 'cuda:0'], "device 'cuda:0' cannot be used with Ray"),
    (['study', '--fraction', '2'], '--fraction: must be above 0 and at most 1'),
    (['study', '--holdout', '1'], '--holdout: must be at least 0 and below 1'),
    (['study', '--smoothing', '5'], '--smoothing: must be at least 0 and below 1'),
    (['study', '--preset', 'seed'], '--preset seed is a study of CIFAR-10; name the folder of its images with '),
    (['study', '--dataset-download'], '--dataset-download needs --dataset'),
    (['study', '--dataset', 'torch/cifar11'], "dataset 'torch/cifar11' cannot be read"),
    (['study', '--time-limit', '10'], '--time-limit stops a study that the same command continues; it needs --out'),
    (['study', '--models', 'cct_2', '--grid', 'sot_reg=[]'], "at least one value of each argument, got {'sot_reg"),
    (['study', '--rows', 'cct_2_sot'],
     "--rows 'cct_2_sot' is none of the 3 rows; there are cct_2, cct_2_sot_q, cct_2_sot_qk."),
    (['study', '--models', 'cct_2_sot_q', '--grid', 'sot_reg=0.1,0.5', '--rows', 'cct_2_sot_q'],
     "--rows 'cct_2_sot_q' is none of the 2 rows; there are cct_2_sot_q sot_reg=0.1, cct_2_sot_q sot_reg=0.5."),
    (['study', '--ray', '--gpus-per-run', '0.5', '--device', 'cpu'], 'the device is to be cpu; leave one of them out'),
    (['study', '--cpus-per-run', '2'], '--cpus-per-run and --gpus-per-run are of runs on a Ray cluster'),
    (['study', 'reports'], "invalid choice: 'reports'"),
    (['study', 'report'], 'required: DIR'),
    (['study', '--epochs', '3', '--out', 'run', 'report', '.'], '--epochs, --out before report'),
    (['study', 'report', 'no/such/folder'], 'no/such/folder/results.jsonl cannot be read'),
    (['study', '--seed', '1', '4294967296'], '--seed: must be at least 0 and below 2^32, got 4294967296'),
])
def test_user_errors(capsys, args, message):
    assert main(args) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count('\n') == 1 and not printed.out


def test_choices_are_those_of_the_study():
    """The help names them without importing the study, which imports torch."""
    parser = argparse.ArgumentParser()
    add_study(parser.add_subparsers())
    study = parser._subparsers._group_actions[0].choices['study']
    choices = {action.dest: action.choices for action in study._actions}
    assert choices['preset'] == [*PRESETS]
    assert choices['augment'] == [*AUGMENTATIONS]
    assert choices['precision'] == [*PRECISIONS]
    for schedule in choices['schedule']:
        assert len(Recipe(epochs=2, schedule=schedule).learning_rates(3)) == 6


def test_grid(monkeypatch):
    asked = {}

    def run_study(study, recipe, *args):
        asked.update(study=study, recipe=recipe)
        return []

    monkeypatch.setattr('timm_sot.study.runner.run_study', run_study)
    assert main(['study', '--preset', 'seed', '--models', 'cct_2_sot_qk', '--grid', 'sot_reg=0.1,0.5', 'sot_iters=3,5',
                 '--model-kwargs', 'pos_embed=sine', '--seed', '7', '8', '--epochs', '2', '--device', 'cpu',
                 '--data-dir', 'x']) == 0
    assert asked['study'].rows == [
        ('cct_2_sot_qk', {'sot_reg': reg, 'sot_tol': 0.1, 'pos_embed': 'sine', 'sot_iters': iters})
        for reg in (0.1, 0.5) for iters in (3, 5)]
    assert asked['study'].seeds == [7, 8]
    assert asked['recipe'].epochs == 2 and asked['recipe'].batch_size == 128 and asked['recipe'].schedule == 'original'
    assert asked['study'].holdout == 0.

    assert main(['study', '--models', 'cct_2', 'cct_2_sot_qk', '--grid', 'sot_reg=0.1,0.5', 'attn=softmax,sot_q',
                 '--model-kwargs', 'sot_iters=2']) == 0
    assert asked['study'].rows == [
        ('cct_2', {'sot_iters': 2, 'attn': 'softmax'}),
        ('cct_2', {'sot_iters': 2, 'sot_reg': 0.1, 'attn': 'sot_q'}),
        ('cct_2', {'sot_iters': 2, 'sot_reg': 0.5, 'attn': 'sot_q'}),
        *(('cct_2_sot_qk', {'sot_iters': 2, 'sot_reg': reg, 'attn': attn})
          for reg in (0.1, 0.5) for attn in ('softmax', 'sot_q'))]

    assert main(['study', '--preset', 'seed', '--models', 'cct_4', 'cct_2_sot_q', '--data-dir', 'x']) == 0
    assert asked['study'].rows == [('cct_4', {}), ('cct_2_sot_q', {'sot_reg': 0.1, 'sot_tol': 0.1})]
    assert main(['study', '--preset', 'shares', '--rows', 'cct_2_sot_shares sot_iters=0', 'cct_2', '--holdout', '0.1',
                 '--data-dir', 'x']) == 0
    assert asked['study'].rows == [('cct_2_sot_shares', {'sot_iters': 0}), ('cct_2', {})]
    assert asked['study'].holdout == 0.1 and asked['recipe'].epochs == 30


@pytest.mark.parametrize('options, expected', [
    ('--batch-size 7', ('recipe', 'batch_size', 7)),
    ('--lr 0.3', ('recipe', 'lr', 0.3)),
    ('--weight-decay 0.2', ('recipe', 'weight_decay', 0.2)),
    ('--smoothing 0.3', ('recipe', 'smoothing', 0.3)),
    ('--schedule original', ('recipe', 'schedule', 'original')),
    ('--precision bfloat16', ('recipe', 'precision', 'bfloat16')),
    ('--augment autoaugment flip', ('recipe', 'augment', ('autoaugment', 'flip'))),
    ('--augment', ('recipe', 'augment', ())),
    ('--fraction 0.5', ('study', 'fraction', 0.5)),
    ('--holdout 0.25', ('study', 'holdout', 0.25)),
    ('--data-dir x', ('study', 'data_dir', 'x')),
    ('--dataset torch/x', ('study', 'dataset', 'torch/x')),
    ('--dataset torch/x --dataset-download', ('study', 'download', True)),
    ('--out x', ('out', 'x')),
    ('--parallel 3', ('parallel', 3)),
    ('--workers 4', ('workers', 4)),
    ('--no-graphs', ('graphs', False)),
    ('--out x --time-limit 10', ('time_limit', 10.)),
])
def test_options_arrive(monkeypatch, options, expected):
    from timm_sot.study import runner
    asked = []
    signature = inspect.signature(runner.run_study)

    def run_study(*args):
        asked.append(signature.bind(*args).arguments)
        return []

    def value(arguments):
        found = arguments
        for name in path:
            found = found[name] if isinstance(found, dict) else getattr(found, name)
        return found

    monkeypatch.setattr(runner, 'run_study', run_study)
    assert main(['study', '--device', 'cpu', *options.split()]) == main(['study', '--device', 'cpu']) == 0
    *path, wanted = expected
    assert value(asked[0]) == wanted != value(asked[1])


def test_ray(monkeypatch, capsys):
    """What --ray hands on, and what becomes of a run that fails."""
    from timm_sot.study.cluster import Cluster
    from timm_sot.study.runner import RunsFailed
    from timm_sot.study.store import KINDS
    asked = []
    result = dict(zip(KINDS, ['cct_2', {}, 0, 1, 50., 50., [50.], [1.], 1., 'cpu, float32', {}, '', 'tiny']))

    def run_study(study, recipe, device, *args):
        asked.append((device, args[-1]))
        raise RunsFailed('1 of 2 runs failed: cct_4', [result])

    monkeypatch.setattr('timm_sot.study.runner.run_study', run_study)
    assert main(['study', '--ray']) == 2
    printed = capsys.readouterr()
    assert 'cct_2' in printed.out and printed.err == 'timm-sot: error: 1 of 2 runs failed: cct_4\n'
    main(['study', '--ray', 'head:6379', '--device', 'cuda', '--cpus-per-run', '3', '--gpus-per-run', '0.25'])
    main(['study', '--device', 'cpu'])
    assert asked == [
        (None, Cluster()), (None, Cluster('head:6379', 'cuda', 3., 0.25)), (torch.device('cpu'), None)]

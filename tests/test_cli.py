""" The command line """
import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from study_lines import make_line, write

import timm_sot
from timm_sot.cli import main
from timm_sot.study.store import Run


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
    ([], 'COMMAND'),
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
    (['study', '--models', 'cct_2', '--grid', 'sot_reg=0.1,0.5', '--rows', 'cct_2'],
     "--rows 'cct_2' is none of the 2 rows; there are cct_2 sot_reg=0.1, cct_2 sot_reg=0.5."),
    (['study', '--ray', '--gpus-per-run', '0.5', '--device', 'cpu'], 'the device is to be cpu; leave one of them out'),
    (['study', '--cpus-per-run', '2'], '--cpus-per-run and --gpus-per-run are of runs on a Ray cluster'),
    (['attention', 'compare', '--checkpoint', 'a', 'b', '--untrained'], 'leave one of them out'),
    (['study', 'reports'], "invalid choice: 'reports'"),
    (['study', 'report'], 'required: DIR'),
    (['study', '--epochs', '3', '--out', 'run', 'report', '.'], '--epochs, --out before report'),
    (['study', 'report', 'no/such/folder'], 'no/such/folder/results.jsonl cannot be read'),
    (['attention'], 'FIGURE'),
    (['attention', 'heat'], "invalid choice: 'heat'"),
    (['attention', 'compare', '--models', 'cct_22'], 'did you mean cct_2'),
    (['attention', 'compare', '--models', 'local-dir:no/such/folder'], 'no/such/folder is not a folder with a config'),
    (['attention', 'compare', '--models', 'resnet10t', '--untrained'], 'ResNet) has no timm.layers.Attention'),
    (['attention', 'compare', '--models', 'cct_2', 'cct_2'], 'cct_2 is named twice'),
    (['study', '--seed', '1', '4294967296'], '--seed: must be at least 0 and below 2^32, got 4294967296'),
    (['attention', 'compare', '--seed', '-1'], '--seed: must be at least 0 and below 2^32, got -1'),
    (['attention', 'compare', '--model-kwargs', 'attn=sot_x'], "'sot_shares').\n"),
    (['attention', 'compare', '--model-kwargs', 'sot_rag=1'], "unexpected keyword argument 'sot_rag'\n"),
    (['attention', 'compare', '--checkpoint', 'none'], 'a checkpoint is needed for each model, got 1 for 2'),
    (['attention', 'heads', '--models', 'cct_2', '--checkpoint', 'none.safetensors'], 'there is no checkpoint none'),
    (['attention', 'heads', '--models', 'cct_2', '--checkpoint', __file__], f'cct_2 with the weights in {__file__}: '),
    (['attention', 'compare', '--image', 'no/such.png'], 'there is no image no/such.png'),
    (['attention', 'compare', '--image', __file__], f'{__file__} is not an image that can be read'),
    (['attention', 'compare', '--index', '5000'], '--index 5000: there are 1797 images'),
    (['attention', 'compare', '--layer', '2'], 'no attention layer 2; choose a number from -2 to 1'),
    (['attention', 'compare', '--layer', 'blocks.2'], 'no attention layer blocks.2; '),
    (['attention', 'compare', '--head', '2'], 'no head 2 in blocks.1; choose one from 0 to 1'),
    (['attention', 'heads', '--matrix', 'sot'], 'cct_2 has no SOT matrix'),
    (['attention', 'patches', '--queries', '8,0'], 'patch 8,0 is not in the grid'),
    (['attention', 'patches', '--queries', '8'], "--queries: invalid ROW,COLUMN value: '8'"),
    (['attention', 'reg', '--regs', '0'], '--regs: must be above 0'),
    (['attention', 'entropy', '--num-images', '0'], '--num-images: must be at least 1'),
    (['attention', 'compare', '--out', 'figure.gif'], 'figure.gif must end in .png, .svg or .pdf'),
    (['attention', 'heads', '--out', 'no/such/folder/figure.png'], 'no/such/folder/figure.png'),
    (['attention', 'heads', '--models', 'cct_2_sot_qkt', '--model-kwargs', 'img_size=48'], 'N = D, got 144 tokens'),
])
def test_user_errors(capsys, args, message):
    assert main(args) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count('\n') == 1 and not printed.out


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

    assert main(['study', '--preset', 'seed', '--models', 'cct_4', 'cct_2_sot_q', '--data-dir', 'x']) == 0
    assert asked['study'].rows == [('cct_4', {}), ('cct_2_sot_q', {'sot_reg': 0.1, 'sot_tol': 0.1})]
    assert main(['study', '--preset', 'shares', '--rows', 'cct_2_sot_shares sot_iters=0', 'cct_2', '--holdout', '0.1',
                 '--data-dir', 'x']) == 0
    assert asked['study'].rows == [('cct_2_sot_shares', {'sot_iters': 0}), ('cct_2', {})]
    assert asked['study'].holdout == 0.1 and asked['recipe'].epochs == 30


def test_ray(monkeypatch, capsys):
    """What --ray hands on, and what becomes of a run that fails."""
    from timm_sot.study.cluster import Cluster
    from timm_sot.study.runner import RunsFailed
    from timm_sot.study.store import KEYS
    asked = []
    result = dict(zip(KEYS, ['cct_2', {}, 0, 1, 50., 50., [50.], [1.], 1., 'cpu, float32', {}, '', 'tiny']))

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


def test_help(capsys):
    assert main(['--help']) == 0
    printed = capsys.readouterr().out
    assert 'study' in printed and 'bench' in printed
    assert main(['study', '--help']) == 0
    assert '--model-kwargs' in capsys.readouterr().out


def test_interrupt(monkeypatch, folder, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_sot.study.runner.train_epoch', interrupted)
    assert main(['study', '--data-dir', folder, '--device', 'cpu']) == 130
    assert 'Traceback' not in capsys.readouterr().err


@pytest.mark.parametrize('figure', ['compare', 'heads', 'patches', 'entropy', 'reg'])
def test_attention(figure, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'figure.svg'
    args = ['--num-images', '2'] if figure == 'entropy' else []
    assert main(['attention', figure, '--out', str(out), *args]) == 0
    assert capsys.readouterr().out == f'{out}\n'
    assert [*tmp_path.iterdir()] == [out]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Arguments of the last figure function that the command line called, in place of a figure."""
    from timm_sot.viz import figures
    seen = {}

    class Figure:
        def savefig(self, *args, **kwargs):
            seen.update(saved=(args, kwargs))

    def draw(models, images, **options):
        seen.update(models=models, images=images, options=options)
        return Figure()

    for name in figures.__all__:
        monkeypatch.setattr(figures, name, draw)
    monkeypatch.chdir(tmp_path)
    return seen


def test_attention_options(drawn, folder):
    image = f'{folder}/test/1/3.png'
    assert main(['attention', 'patches', '--image', image, '--layer', '-2', '--head', '1', '--queries', '0,1', '7,7',
                 '--matrix', 'sot', '--dropout', '--out', 'a.pdf', '--dpi', '90', '--untrained']) == 0
    assert list(drawn['models']) == ['cct_2 (untrained)', 'cct_2_sot_qk (untrained)']
    assert not any(model.training for model in drawn['models'].values())
    assert drawn['images'].getpixel((0, 0)) == (203, 203, 203)
    assert drawn['options'] == dict(
        image_name='1/3.png', layer=-2, head=1, queries=[(0, 1), (7, 7)], matrix='sot', dropout=True)
    assert drawn['saved'] == (('a.pdf',), {'dpi': 90})

    assert main(['attention', 'compare', '--layer', 'blocks.0', '--head', 'mean', '--model-kwargs', 'sot_reg=0.5',
                 'pos_embed=sine', '--untrained']) == 0
    assert drawn['options'] == dict(image_name='0 of the digits, a 0', layer='blocks.0', head='mean', dropout=False)
    assert list(drawn['models'])[1] == 'cct_2_sot_qk (pos_embed=sine, untrained)'
    assert {block.attn.reg for block in drawn['models'].popitem()[1].blocks} == {0.5}
    assert drawn['saved'][0] == ('compare.png',)


def test_attention_of_a_folder(drawn, folder):
    test = f'{folder}/test'
    assert main(['attention', 'heads', '--image', test, '--index', '5']) == 0
    assert drawn['options']['image_name'] == '1/1.png' and drawn['images'].getpixel((0, 0)) == (201,) * 3
    assert main(['attention', 'entropy', '--image', test, '--num-images', '4']) == 0
    assert [image.getpixel((0, 0))[0] for image in drawn['images']] == [0, 2, 200, 202], 'spread over the classes'
    assert drawn['options']['images_name'] == f'4 images of {test}'
    assert main(['attention', 'entropy', '--image', test]) == 0
    assert len(drawn['images']) == 8


def test_attention_of_an_empty_folder(tmp_path, capsys):
    assert main(['attention', 'compare', '--image', str(tmp_path)]) == 2
    assert capsys.readouterr().err == f'timm-sot: error: {tmp_path} holds no images.\n'


def test_attention_of_a_model_that_has_none(monkeypatch, capsys):
    """It is said before any weights are asked for."""
    asked = []
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda *args, **kwargs: asked.append(args))
    assert main(['attention', 'compare', '--models', 'resnet10t']) == 2
    assert 'model (ResNet) has no timm.layers.Attention' in capsys.readouterr().err and not asked
    assert main(['attention', 'compare', '--models', 'cct_2', '--layer', '5']) == 2 and asked


def test_attention_of_checkpoints(drawn, tmp_path):
    states = [timm.create_model('cct_2').state_dict() for _ in range(2)]
    save_file(states[0], tmp_path / 'a.safetensors')
    torch.save({'state_dict': states[1]}, tmp_path / 'b.pth.tar')
    files = ['a.safetensors', 'b.pth.tar']
    assert main(['attention', 'compare', '--models', 'cct_2', 'cct_2', '--checkpoint', *files]) == 0
    assert list(drawn['models']) == ['cct_2 (a.safetensors)', 'cct_2 (b.pth.tar)']
    for model, state in zip(drawn['models'].values(), states):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_attention_of_a_checkpoint_of_a_study(drawn, tmp_path, capsys):
    kwargs = dict(sot_reg=1., sot_tol=0.1)
    write(tmp_path, [make_line('cct_2_sot_qk', kwargs, 0, 70.)])
    file = f'{Run("cct_2_sot_qk", kwargs, 0, 30).name}.safetensors'
    save_file(timm.create_model('cct_2_sot_qk').state_dict(), tmp_path / file)
    assert main(['attention', 'compare', '--models', 'cct_2_sot_qk', '--checkpoint', file]) == 0
    model, = drawn['models'].values()
    assert (model.blocks[0].attn.reg, model.blocks[0].attn.tol) == (1., 0.1)
    assert main(['attention', 'compare', '--models', 'cct_2_sot_q', '--checkpoint', file]) == 2
    assert f'{file} is of cct_2_sot_qk, as the study says that wrote it, not of cct_2_sot_q' in capsys.readouterr().err


def test_attention_of_a_folder_of_weights(drawn, tmp_path):
    from timm.models import save_for_hf
    model = timm.create_model('cct_2_sot_qk', sot_reg=0.3)
    save_for_hf(model, tmp_path / 'saved', model_args=dict(sot_reg=0.3), safe_serialization=True)
    assert main(['attention', 'reg', '--models', 'local-dir:saved']) == 0
    (name, loaded), = drawn['models'].items()
    assert name == 'local-dir:saved' and loaded.blocks[0].attn.reg == 0.3
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_attention_seed(drawn):
    weights = []
    for seed in ('0', '0', '1'):
        assert main(['attention', 'heads', '--models', 'cct_2', '--seed', seed, '--untrained']) == 0
        weights.append(drawn['models'].popitem()[1].head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize('package', ['matplotlib', 'sklearn'])
def test_attention_without_its_extra(package, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split('.')[0] == package or name == 'timm_sot.viz.figures']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr('timm_sot.viz.figures', raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(['attention', 'compare']) == 2
    printed = capsys.readouterr().err
    assert "pip install 'timm-sot[viz]'" in printed and printed.count('\n') == 1


@pytest.mark.slow
def test_module():
    done = subprocess.run([sys.executable, '-m', 'timm_sot', '--version'], capture_output=True, text=True)
    assert done.stdout == f'timm-sot {timm_sot.__version__}\n' and done.returncode == 0


def test_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'timm-sot {timm_sot.__version__}\n'

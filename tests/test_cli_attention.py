""" timm-sot attention """
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from study_lines import make_line, write

from timm_sot.cli import main
from timm_sot.study.store import Run


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
    assert list(drawn['models']) == ['cct_2_sot_qk (untrained)'], 'softmax attention has no such matrix'
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


def test_figure_that_does_not_fit_into_memory(drawn, monkeypatch, capsys):
    from timm_sot.viz import figures

    def too_large(*args, **kwargs):
        raise MemoryError('64 TiB')

    monkeypatch.setattr(figures, 'compare', too_large)
    assert main(['attention', 'compare', '--untrained']) == 2
    assert capsys.readouterr().err == 'timm-sot: error: 64 TiB\n'


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
    assert main(['attention', 'compare', '--models', 'cct_2_sot_qk.cifar10', '--checkpoint', file]) == 0
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


@pytest.mark.parametrize('args, message', [
    (['attention', 'compare', '--checkpoint', 'a', 'b', '--untrained'], 'leave one of them out'),
    (['attention'], 'FIGURE'),
    (['attention', 'heat'], "invalid choice: 'heat'"),
    (['attention', 'compare', '--models', 'cct_22'], 'did you mean cct_2'),
    (['attention', 'compare', '--models', 'local-dir:no/such/folder'], 'no/such/folder is not a folder with a config'),
    (['attention', 'compare', '--models', 'resnet10t', '--untrained'], 'ResNet) has no timm.layers.Attention'),
    (['attention', 'compare', '--models', 'cct_2', 'cct_2'], 'cct_2 is named twice'),
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
    (['attention', 'heads', '--models', 'cct_2', '--matrix', 'sot'], 'cct_2 has no SOT matrix'),
    (['attention', 'patches', '--queries', '8,0'], 'patch 8,0 is not in the grid'),
    (['attention', 'patches', '--queries', '8'], "--queries: invalid ROW,COLUMN value: '8'"),
    (['attention', 'reg', '--regs', '0'], '--regs: must be above 0'),
    (['attention', 'entropy', '--num-images', '0'], '--num-images: must be at least 1'),
    (['attention', 'compare', '--out', 'figure.gif'], 'figure.gif must end in .png, .svg or .pdf'),
    (['attention', 'heads', '--out', 'no/such/folder/figure.png'], 'no/such/folder/figure.png'),
    (['attention', 'heads', '--models', 'cct_2_sot_qkt', '--model-kwargs', 'img_size=48'], 'N = D, got 144 tokens'),
])
def test_user_errors(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)  # where a figure that should not be drawn would lie
    assert main(args) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count('\n') == 1 and not printed.out

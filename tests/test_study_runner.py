""" The models of a study """
import builtins
import json

import pytest
import torch

import timm_sot  # noqa: F401
from test_study_engine import make_data
from timm_sot.study import runner
from timm_sot.study.engine import Recipe
from timm_sot.study.errors import StudyError

DEVICE = torch.device('cpu')
# as issue trackers and plots read them
KEYS = 'model kwargs seed epochs best final top1 loss seconds device versions commit data'.split()


def test_models_share_their_initial_values():
    vit = dict(img_size=32)
    cct, other, sot = runner.build_models(['vit_tiny_patch16_224', 'deit_tiny_patch16_224', 'vit_small_patch16_224'],
                                          vit, 10, seed=3)
    state, same, small = cct.state_dict(), other.state_dict(), sot.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in state.items())
    assert torch.equal(state['head.bias'], small['head.bias'])
    assert state['pos_embed'].shape != small['pos_embed'].shape

    first, second = runner.build_models(['cct_2', 'cct_2_sot_qk'], dict(sot_reg=0.5), 7, seed=3)
    assert second.blocks[0].attn.reg == 0.5 and second.head.out_features == 7
    for (name, value), (other_name, other_value) in zip(first.named_parameters(), second.named_parameters()):
        assert name == other_name and torch.equal(value, other_value)
    again = runner.build_models(['cct_2'], {}, 7, seed=3)[0]
    assert torch.equal(again.head.weight, first.head.weight)
    assert not torch.equal(runner.build_models(['cct_2'], {}, 7, seed=4)[0].head.weight, first.head.weight)


@pytest.mark.parametrize('names, kwargs, message', [
    (['cct_2', 'cct2_sot_qk'], {}, 'did you mean cct_2_sot_qk'),
    (['cct_2', '!'], {}, 'list_models'),
    (['cct_2', 'cct_14'], {}, 'cct_2 32x32, cct_14 224x224'),
])
def test_input_size_errors(names, kwargs, message):
    with pytest.raises(StudyError, match=message):
        runner.input_size(names, kwargs)


def test_input_size():
    assert runner.input_size(['cct_2', 'cct_7'], {}) == (32, 32)
    assert runner.input_size(['cct_2', 'cct_14'], dict(img_size=64)) == (64, 64)


@pytest.mark.parametrize('kwargs', [dict(no_such=1), dict(sot_reg=-1.)])
def test_model_errors(kwargs):
    with pytest.raises(StudyError, match='cannot create cct_2 with .*(no_such|reg=-1)'):
        runner.build_models(['cct_2'], kwargs, 10, seed=0)


@pytest.mark.parametrize('name', ['nonsense', 'cuda:99'])
def test_device_errors(name):
    with pytest.raises(StudyError, match=f'device {name!r} cannot be used'):
        runner.resolve_device(name)


def test_run_study(tmp_path, capsys):
    data = make_data()
    names = ['cct_2', 'cct_2_sot_q']
    results = runner.run_study(names, data, Recipe(epochs=2), 5, DEVICE, dict(sot_iters=2))
    assert [result['model'] for result in results] == names
    for result in results:
        assert list(result) == KEYS
        assert result['seed'] == 5 and result['epochs'] == 2 and result['kwargs'] == dict(sot_iters=2)
        assert len(result['top1']) == len(result['loss']) == 2
        assert result['final'] == result['top1'][-1] and result['best'] == max(result['top1'])
        assert result['versions']['torch'] == torch.__version__ and result['data'].startswith('brightness ')
    assert results[0]['loss'] != results[1]['loss']
    bars = capsys.readouterr().err
    assert all(name in bars for name in names) and '4/4' in bars

    table = runner.format_table(results, data)
    assert 'top-1' in table and f'{results[1]["final"]:.2f}' in table
    for part in ('n = 1', '2 epochs', 'seed 5', 'brightness', '32 training and 16 test', 'cpu'):
        assert part in table

    for _ in range(2):
        runner.append_results(str(tmp_path / 'new'), results)
    lines = (tmp_path / 'new' / 'results.jsonl').read_text().splitlines()
    assert [json.loads(line) for line in lines] == results * 2


def test_fingerprint():
    data = make_data()
    assert runner.fingerprint(data) == runner.fingerprint(make_data())
    data.test.images[0, 0, 0, 0] += 1
    assert runner.fingerprint(data) != runner.fingerprint(make_data())


def test_without_tqdm(monkeypatch):
    real_import = builtins.__import__

    def no_tqdm(name, *args, **kwargs):
        if name == 'tqdm':
            raise ModuleNotFoundError("No module named 'tqdm'", name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', no_tqdm)
    with pytest.raises(StudyError, match=r"needs the package tqdm.*pip install 'timm-sot\[study\]'"):
        runner.run_study(['cct_2'], make_data(), Recipe(), 0, DEVICE)

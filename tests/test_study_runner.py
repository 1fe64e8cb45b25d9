""" The runs of a study """
import contextlib
import json
import multiprocessing
import re
import shutil
import subprocess
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from study_process import kill_after_an_epoch, start

from timm_sot import machine
from timm_sot.study import runner
from timm_sot.errors import UserError
from timm_sot.study.data import Images, StudyData
from timm_sot.study.engine import Recipe
from timm_sot.study.presets import Study
from timm_sot.study.store import KINDS, Run, Store

DEVICE = torch.device('cpu')
RECIPE = Recipe(epochs=2, batch_size=10, augment=('crop', 'flip'))
ROWS = [('cct_2', {}), ('cct_2_sot_q', dict(sot_iters=2))]


def run(folder, out='', rows=ROWS, seeds=(5,), recipe=RECIPE, **kwargs):
    return runner.run_study(Study(rows, seeds, folder), recipe, DEVICE, str(out), workers=0, **kwargs)


def numbers(results):
    return [(result['model'], result['seed'], result['top1'], result['loss']) for result in results]


def test_a_run_whose_attention_does_not_fit_is_kept(folder, tmp_path, monkeypatch):
    def too_much(self):
        raise torch.OutOfMemoryError('64 TiB')

    monkeypatch.setattr(runner.Trainer, 'attention_statistics', too_much)
    with pytest.warns(UserWarning, match='cct_2 seed 5: its attention is not looked at: 64 TiB'):
        result, = run(folder, tmp_path, rows=ROWS[:1])
    assert set(result) == {*KINDS, 'processor'}


def test_models_share_their_initial_values():
    first, row = ('vit_tiny_patch16_224', dict(img_size=32)), ('vit_small_patch16_224', dict(img_size=32))
    state = runner.build_model(first, 10, seed=3).state_dict()
    shared = runner.initial_state(row, first, 10, seed=3)
    own = runner.build_model(row, 10, seed=3).state_dict()
    assert torch.equal(shared['head.bias'], state['head.bias'])
    assert shared['pos_embed'].shape == own['pos_embed'].shape and torch.equal(shared['pos_embed'], own['pos_embed'])

    state = runner.build_model(('cct_2', {}), 7, seed=3).state_dict()
    shared = runner.initial_state(('cct_2_sot_qk', dict(sot_reg=0.5)), ('cct_2', {}), 7, seed=3)
    assert state.keys() == shared.keys() and all(torch.equal(state[name], shared[name]) for name in state)
    assert not torch.equal(runner.build_model(('cct_2', {}), 7, seed=4).head.weight, state['head.weight'])


def test_what_no_seed_draws_stays_as_the_arguments_say():
    first, row = ('cct_2_sot_shares', {}), ('cct_2_sot_shares', dict(sot_reg=0.5, mlp_ratio=2.))
    given, own = (runner.build_model(each, 7, seed=3).state_dict() for each in (first, row))
    state = runner.initial_state(row, first, 7, seed=3)
    assert state.keys() == own.keys() and all(state[name].shape == value.shape for name, value in own.items())
    assert torch.equal(state['blocks.0.attn.log_reg'], own['blocks.0.attn.log_reg'])
    assert not torch.equal(own['blocks.0.attn.log_reg'], given['blocks.0.attn.log_reg'])
    assert torch.equal(state['pos_embed'], given['pos_embed']) and given['pos_embed'].any()


def test_what_is_drawn_for_one_of_two_is_not_shared():
    zeros, draws = (('vit_tiny_patch16_224', dict(img_size=32, depth=1, weight_init=init)) for init in ('', 'jax'))
    for row, first in ((zeros, draws), (draws, zeros)):
        state = runner.initial_state(row, first, 7, seed=3)
        assert torch.equal(
            state['blocks.0.mlp.fc1.bias'], runner.build_model(row, 7, seed=3).blocks[0].mlp.fc1.bias)
        assert state['blocks.0.mlp.fc1.bias'].any() == (row == draws)
        assert torch.equal(state['pos_embed'], runner.build_model(first, 7, seed=3).pos_embed)


@pytest.mark.parametrize('rows, message', [
    (['cct_2', 'cct2_sot_qk'], 'did you mean cct_2_sot_qk'),
    (['cct_2', '!'], 'list_models'),
    (['cct_2', 'cct_14'], 'cct_2 32x32, cct_14 224x224'),
])
def test_input_size_errors(rows, message):
    with pytest.raises(UserError, match=message):
        runner.common_size([(name, {}) for name in rows])


@pytest.mark.parametrize('size', ['x', 0, (32, -4), (32, 32, 3), 2.5])
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match='img_size=.* of cct_2 must be one number, or height and width, in pixels'):
        runner.common_size([('cct_2', dict(img_size=size))])


def test_input_size():
    assert runner.common_size([('cct_2', {}), ('cct_7', {})]) == (32, 32)
    assert runner.common_size([('cct_2', dict(img_size=64)), ('cct_14', dict(img_size=64))]) == (64, 64)


@pytest.mark.parametrize('kwargs', [dict(no_such=1), dict(sot_reg=-1.)])
def test_model_errors_come_first(folder, kwargs):
    with pytest.raises(UserError, match='cannot create cct_2 with .*(no_such|reg=-1)'):
        run(folder, rows=[('cct_2_sot_q', {}), ('cct_2', kwargs)])


def test_results(folder, capsys):
    results = run(folder)
    assert [(result['model'], result['kwargs']) for result in results] == ROWS
    for result in results:
        assert set(result) == {*KINDS, 'processor', 'entropy', 'common'} and json.loads(json.dumps(result)) == result
        assert result['seed'] == 5 and result['epochs'] == len(result['top1']) == len(result['loss']) == 2
        assert result['final'] == result['top1'][-1] and result['best'] == max(result['top1'])
        assert result['versions']['torch'] == torch.__version__ and result['data'].startswith('tiny 24+8 sha256:')
        assert result['device'].endswith('float32') and result['seconds'] > 0
        for key in ('entropy', 'common'):
            assert {name: len(heads) for name, heads in result[key].items()} == {'blocks.0': 2, 'blocks.1': 2}
    assert results[0]['loss'] != results[1]['loss']
    assert 'cct_2_sot_q sot_iters=2 seed 5: top-1' in capsys.readouterr().err


@pytest.mark.parametrize('parallel', [1, 6])
def test_a_run_that_fails_leaves_the_others(folder, tmp_path, monkeypatch, capsys, parallel):
    """What was trained of them is kept, and they have the same numbers."""
    whole = run(folder, seeds=(5, 6))
    train_epoch = runner.train_epoch

    def fails(trainers, seed, epoch, **kwargs):
        sot = [trainer.model.blocks[0].attn.variant == 'sot_q' for trainer in trainers]
        if seed == 5 and epoch == 1 and any(sot):
            raise torch.OutOfMemoryError('64 TiB')
        return train_epoch(trainers, seed, epoch, **kwargs)

    held = []
    run_group = runner.Session.run_group
    monkeypatch.setattr(runner.Session, 'run_group', lambda self, *args: (
        held.append([*self.trainers]), run_group(self, *args))[1])
    monkeypatch.setattr(runner, 'train_epoch', fails)
    with pytest.raises(runner.RunsFailed, match='1 of 4 runs failed.*cct_2_sot_q .* seed 5: OutOfMemoryError: 64') as e:
        run(folder, tmp_path, seeds=(5, 6), parallel=parallel)
    kept = [result for result in whole if (result['model'], result['seed']) != ('cct_2_sot_q', 5)]
    assert numbers(e.value.results) == numbers(kept)
    said = capsys.readouterr().err
    assert held[1] == [], 'models of the group that failed, or of no use any more, take no memory'
    assert parallel == 1 or not any(held), 'nor do others from then on'
    assert 'Traceback' in said and ('goes on with one run at a time' in said) == (parallel > 1)
    monkeypatch.undo()
    assert numbers(run(folder, tmp_path, seeds=(5, 6))) == numbers(whole)


def test_dataset_is_recorded(folder, tmp_path, monkeypatch):
    """For the command of a card; the same images from elsewhere continue the study."""
    load_data = runner.load_data
    monkeypatch.setattr(runner, 'load_data', lambda source, size, *others: load_data(source, size))
    study = Study(ROWS[:1], (5,), folder, dataset='torch/x')
    first = runner.run_study(study, RECIPE, DEVICE, str(tmp_path), workers=0)
    assert json.loads((tmp_path / 'study.json').read_text())['dataset'] == 'torch/x'
    assert run(folder, tmp_path, rows=ROWS[:1]) == first


def test_grouping_changes_nothing(folder, tmp_path):
    whole = run(folder, seeds=(1, 0))
    assert [(result['seed'], result['model']) for result in whole] == [
        (1, 'cct_2'), (1, 'cct_2_sot_q'), (0, 'cct_2'), (0, 'cct_2_sot_q')]
    assert numbers(run(folder, seeds=(1, 0), parallel=1)) == numbers(whole)
    assert numbers(run(folder, tmp_path, rows=ROWS[:1], seeds=(0,))) == numbers(whole[2:3])
    assert numbers(run(folder, tmp_path, rows=ROWS[1:], seeds=(0,))) == numbers(whole[3:])


def test_continues(folder, tmp_path, capsys):
    whole = run(folder)
    assert run(folder, tmp_path, time_limit=0.) == []  # stops after an epoch
    assert 'time limit' in capsys.readouterr().err
    assert len(list((tmp_path / 'checkpoints').glob('*.pt'))) == 2
    done = run(folder, tmp_path)
    assert numbers(done) == numbers(whole)
    assert sorted(path.suffix for path in (tmp_path / 'checkpoints').iterdir()) == ['.safetensors'] * 2

    model = timm.create_model('cct_2', num_classes=2)
    from safetensors.torch import load_file
    model.load_state_dict(load_file(tmp_path / 'checkpoints' / 'cct_2-seed-5-epochs-2.safetensors'))

    def never(*args, **kwargs):
        raise AssertionError('a finished run was run again')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, 'train_epoch', never)
        assert run(folder, tmp_path) == done


def test_every_row_begins_with_the_values_of_the_first(folder, tmp_path, monkeypatch):
    """Also where its model draws others by itself; in a folder, with those of the row that came first to it."""
    seen = {}
    train_epoch = runner.train_epoch

    def look(trainers, seed, epoch, **kwargs):
        if epoch == 0:
            for trainer in trainers:
                seen[len(trainer.model.blocks), seed] = {
                    name: value.clone() for name, value in trainer.model.state_dict().items()}
        return train_epoch(trainers, seed, epoch, **kwargs)

    monkeypatch.setattr(runner, 'train_epoch', look)
    rows, recipe = [('cct_2', {}), ('cct_2', dict(depth=3))], Recipe(epochs=1, batch_size=12)

    def shared(seed):
        return [torch.equal(seen[3, seed][name], value) for name, value in seen[2, seed].items()]

    run(folder, rows=rows, recipe=recipe)
    assert all(shared(5))
    own = runner.build_model(rows[1], 2, 5).state_dict()
    assert not all(torch.equal(own[name], value) for name, value in seen[2, 5].items()), 'by itself it draws others'
    run(folder, tmp_path, rows=rows[:1], recipe=recipe, seeds=(6,))
    run(folder, tmp_path, rows=rows[1:], recipe=recipe, seeds=(6,))
    assert all(shared(6))


def test_seconds_add_up(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'train_epoch', lambda trainers, seed, epoch, **kwargs: [
        (50. + (epoch == 0), 1., 2. + epoch) for _ in trainers])
    run(folder, tmp_path, rows=ROWS[:1], time_limit=0.)
    result, = run(folder, tmp_path, rows=ROWS[:1])
    assert (result['seconds'], result['best'], result['final'], result['top1']) == (5., 51., 50., [51., 50.])


def test_process_is_prepared(folder, monkeypatch):
    called = []
    monkeypatch.setattr(runner, 'set_precision', called.append)
    monkeypatch.setattr(runner, 'keep_memory', lambda: called.append('memory'))
    run(folder, rows=ROWS[:1], recipe=Recipe(epochs=1, batch_size=12, precision='bfloat16'))
    assert sorted(called) == ['bfloat16', 'memory']


def as_if_captured(monkeypatch):
    """Sessions that hold models as those do that capture their steps."""
    init = runner.Session.__init__
    monkeypatch.setattr(runner.Session, '__init__', lambda self, *args, **kwargs: (
        init(self, *args, **kwargs), setattr(self, 'captures', True))[0])


@pytest.mark.parametrize('captured', [False, True])
def test_trainers_that_are_of_no_use_are_dropped(folder, monkeypatch, captured):
    held = []
    run_group = runner.Session.run_group
    monkeypatch.setattr(runner.Session, 'run_group', lambda self, *args: (
        held.append(len(self.trainers)), run_group(self, *args))[1])
    if captured:
        as_if_captured(monkeypatch)
    run(folder, seeds=(5, 6), parallel=1)
    assert len(ROWS) == 2 and held == ([0, 1, 2, 1] if captured else [0] * 4)


def test_a_run_without_room_beside_models_of_others_is_done_again(folder, tmp_path, monkeypatch, capsys):
    def room_for_one(self, run):
        if {*self.trainers} - {run.row}:
            raise torch.OutOfMemoryError('64 TiB')
        return trainer_of(self, run)

    whole = run(folder, seeds=(5, 6))
    trainer_of = runner.Session._trainer
    monkeypatch.setattr(runner.Session, '_trainer', room_for_one)
    as_if_captured(monkeypatch)
    assert numbers(run(folder, tmp_path, seeds=(5, 6), parallel=1)) == numbers(whole)
    assert capsys.readouterr().err.count('goes on with one run at a time') == 1


@pytest.mark.parametrize('damage', [
    lambda state: state['model'].pop('head.bias'),
    lambda state: state['model'].update({'head.bias': torch.zeros(())}),  # would be broadcast
    lambda state: state['model'].update({'head.bias': None}),
    lambda state: state['optimizer'].pop(),
    lambda state: state.update(optimizer=[None] * len(state['optimizer'])),
    lambda state: state.pop('step'),
])
def test_checkpoint_of_another_model(folder, tmp_path, damage):
    whole = run(folder, rows=ROWS[:1])
    run(folder, tmp_path, rows=ROWS[:1], time_limit=0.)
    path, = (tmp_path / 'checkpoints').glob('*.pt')
    checkpoint = torch.load(path)
    damage(checkpoint['state'])
    torch.save(checkpoint, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert numbers(run(folder, tmp_path, rows=ROWS[:1])) == numbers(whole)
    assert any('does not fit the model, its run begins anew' in str(each.message) for each in caught)


def test_another_device_is_not_mixed_in_without_a_word(folder, tmp_path, monkeypatch):
    run(folder, tmp_path, rows=ROWS[:1])
    monkeypatch.setattr(machine, 'device_name', lambda device, precision: 'B')
    with pytest.warns(UserWarning, match='those to come are of B: the report does not compare them'):
        results = run(folder, tmp_path)
    lines = runner.format_results(results).splitlines()
    rows = [re.split(' {2,}', line)[:2] for line in lines[1:3]]
    assert rows == [[f'cct_2 on {results[0]["device"]}', '1'], ['cct_2_sot_q sot_iters=2 on B', '1']]


def test_other_versions_are_named(folder, tmp_path, monkeypatch):
    run(folder, tmp_path, rows=ROWS[:1])
    monkeypatch.setattr(machine, 'versions', lambda: {'torch': '9', 'timm': timm.__version__})
    with pytest.warns(UserWarning, match=rf'runs of torch {re.escape(str(torch.__version__))}, those to come are of 9'):
        run(folder, tmp_path)


def test_a_run_that_diverges(folder, tmp_path):
    recipe = replace(RECIPE, lr=1e30)
    with pytest.warns(UserWarning, match='cct_2 seed 5 diverged, its loss is nan'):
        results = run(folder, tmp_path, rows=ROWS[:1], seeds=(5, 6), recipe=recipe)
    assert '±nan' in runner.format_results(results)
    again = run(folder, tmp_path, rows=ROWS[:1], seeds=(5, 6), recipe=recipe)
    assert [result['seconds'] for result in again] == [result['seconds'] for result in results]  # it is finished


def test_augmenting_process_that_dies(folder, monkeypatch):
    def killed(*args, **kwargs):
        raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. \nmore')

    monkeypatch.setattr(runner, 'train_epoch', killed)
    with pytest.raises(UserError, match=r'worker \(pid 7\) is killed .* The same command continues'):
        run(folder)


def test_first_row_that_is_not_there_any_more(folder, tmp_path):
    run(folder, tmp_path, rows=ROWS[:1])
    settings = json.loads((tmp_path / 'study.json').read_text())
    (tmp_path / 'study.json').write_text(json.dumps({**settings, 'first': ['cct_2', {'candidate': 'gone'}]}))
    with pytest.raises(UserError, match='names cct_2 candidate=gone as the row whose initial values .* choose another'):
        run(folder, tmp_path)


def test_continues_where_runs_are_apart(folder, tmp_path):
    """Killed between the checkpoints of two runs of a group."""
    whole = run(folder, recipe=Recipe(epochs=3, batch_size=10))
    run(folder, tmp_path, recipe=Recipe(epochs=3, batch_size=10), time_limit=0.)
    (tmp_path / 'checkpoints' / 'cct_2-seed-5-epochs-3.pt').unlink()
    assert numbers(run(folder, tmp_path, recipe=Recipe(epochs=3, batch_size=10))) == numbers(whole)


def test_continues_elsewhere(folder, tmp_path, monkeypatch):
    """The result names every device, commit and version that had a part in it."""
    monkeypatch.setattr(machine, 'device_name', lambda device, precision: 'A')
    run(folder, tmp_path, rows=ROWS[:1], time_limit=0.)
    monkeypatch.setattr(machine, 'device_name', lambda device, precision: 'B')
    monkeypatch.setattr(machine, 'versions', lambda: {'torch': '9', 'timm': timm.__version__})
    with pytest.warns(UserWarning, match='cct_2 seed 5 was begun on A and goes on, after epoch 1, on B'):
        result, = run(folder, tmp_path, rows=ROWS[:1])
    assert result['device'] == 'A then B'
    assert result['versions'] == {'torch': f'{torch.__version__} then 9', 'timm': timm.__version__}


def test_a_folder_holds_one_set_of_images(folder, tmp_path):
    """Weights of other images would replace those that are there; another name of the folder changes nothing."""
    first = run(folder, tmp_path / 'out', rows=ROWS[:1])
    moved = shutil.copytree(folder, tmp_path / 'moved')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, 'train_epoch', None)
        assert run(str(moved), tmp_path / 'out', rows=ROWS[:1]) == first
    with pytest.raises(UserError, match=r'other settings \(data tiny 24\+8 sha256:.* there, tiny 12\+8 .* here'):
        runner.run_study(Study(ROWS[:1], (5,), folder, fraction=0.5), RECIPE, DEVICE, str(tmp_path / 'out'), workers=0)


def test_a_row_or_seed_named_twice_is_one(folder):
    result, = run(folder, rows=[ROWS[0], ROWS[0]], seeds=(5, 5))
    assert (result['model'], result['seed']) == ('cct_2', 5)


@pytest.mark.parametrize('rows, message', [
    ([('cct_2', {'in_chans': 1})], r'cct_2 with .*in_chans.* does not train on .* \(3, 32, 32\): .*channels'),
    ([('cct_2', {'img_size': 32}), ('cct_2', {'img_size': 48})], 'cct_2 32x32, cct_2 48x48'),
    ([('cct_2_sot_qkt', {'img_size': 48})], 'does not train on images of shape .*needs N = D'),
    ([('cct_2', {}), ('cct_2', {'global_pool': ''})], r'output for 2 images is of shape \(2, 64, 2\), that of a class'),
    ([('cct_2', {}), ('cct_2', {'drop_path_rate': 1.5})], 'cct_2 with .* does not train on .*[Bb]ernoulli'),
    ([('vit_tiny_patch16_224', {'img_size': 32, 'num_heads': 5})], 'cannot create vit_tiny_patch16_224 .*AssertionE'),
])
def test_rows_that_do_not_fit(folder, rows, message):
    with pytest.raises(UserError, match=message):
        run(folder, rows=rows)


def test_corrupt_line_is_redone(folder, tmp_path):
    whole = run(folder, tmp_path)
    path = tmp_path / 'results.jsonl'
    lines = path.read_text().splitlines()
    path.write_text(lines[0][:-20] + '\n' + lines[1] + '\n')
    with pytest.warns(UserWarning, match='1 unreadable lines'):
        assert numbers(run(folder, tmp_path)) == numbers(whole)


def test_other_recipe_in_the_same_folder(folder, tmp_path):
    run(folder, tmp_path, rows=ROWS[:1])
    with pytest.raises(UserError, match='other settings'):
        run(folder, tmp_path, recipe=Recipe(epochs=2, batch_size=12))


@pytest.mark.slow
def test_killed(folder, tmp_path):
    """SIGKILL while training; the same command then ends with the numbers of an undisturbed study."""
    checkpoint = tmp_path / 'checkpoints' / 'cct_2-seed-0-epochs-12.pt'
    kill_after_an_epoch([
        '--models', 'cct_2', '--epochs', '12', '--batch-size', '10', '--data-dir', folder, '--device', 'cpu',
        '--workers', '1', '--out', str(tmp_path)], checkpoint)
    recipe = Recipe(epochs=12, batch_size=10, augment=('crop', 'flip'))
    resumed = run(folder, tmp_path, rows=ROWS[:1], seeds=(0,), recipe=recipe)
    assert numbers(resumed) == numbers(run(folder, rows=ROWS[:1], seeds=(0,), recipe=recipe))


def hold(folder, run, data, ready):
    with Store(folder).claim([run], data) as taken:
        ready.put(taken)
        time.sleep(600)


@pytest.fixture
def other_process(folder, tmp_path):
    """A process that has the run of the first row with seed 0."""
    run(folder, tmp_path, rows=ROWS[:1], seeds=(9,))
    settings = json.loads((tmp_path / 'study.json').read_text())
    context = multiprocessing.get_context('fork')
    ready = context.SimpleQueue()
    mine = Run(*ROWS[0], 0, RECIPE.epochs)
    process = context.Process(target=hold, args=(str(tmp_path), mine, settings['data'], ready))
    process.start()
    assert ready.get() == [mine]
    yield process
    process.kill()
    process.join()


def test_runs_of_another_process(folder, tmp_path, other_process, capsys):
    """They are left to it, the others are run, also those of the same seed."""
    results = run(folder, tmp_path, seeds=(0, 1), parallel=1)
    assert [(result['model'], result['seed']) for result in results] == [
        ('cct_2_sot_q', 0), ('cct_2', 1), ('cct_2_sot_q', 1)]
    assert 'runs left to other processes, which work on them: 1;' in capsys.readouterr().err
    other_process.kill()
    other_process.join()
    assert numbers(run(folder, tmp_path, seeds=(0, 1))) == numbers(run(folder, seeds=(0, 1)))


def test_runs_of_a_process_that_is_killed_are_taken(folder, tmp_path, other_process, capsys, monkeypatch):
    train_epoch, seeds = runner.train_epoch, []

    def kill(trainers, seed, *args, **kwargs):
        other_process.kill()
        other_process.join()
        seeds.append(seed)
        return train_epoch(trainers, seed, *args, **kwargs)

    monkeypatch.setattr(runner, 'train_epoch', kill)
    results = run(folder, tmp_path, seeds=(0, 1), parallel=1)
    assert len(results) == 4 and 'left to' not in capsys.readouterr().err
    assert seeds == [0, 0, 0, 0, 1, 1, 1, 1], 'the run that was held came second'
    assert numbers(results) == numbers(run(folder, seeds=(0, 1)))


@pytest.mark.slow
def test_two_processes_share_a_study(folder, tmp_path, capsys):
    """Each run is one process's, both have some, and the numbers are those of one process."""
    recipe = Recipe(epochs=4, batch_size=10, augment=('crop', 'flip'))
    path, seeds = tmp_path / 'results.jsonl', range(8)
    other = start([
        '--models', 'cct_2', '--epochs', '4', '--batch-size', '10', '--data-dir', folder, '--device', 'cpu',
        '--workers', '0', '--parallel', '1', '--seed', *map(str, seeds), '--out', str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while other.poll() is None and not path.exists():
        time.sleep(0.02)
    run(folder, tmp_path, rows=ROWS[:1], seeds=seeds, recipe=recipe, parallel=1)
    printed = [capsys.readouterr().err, other.communicate()[1]]
    finished = [re.findall('seed ([0-9]+): top-1', text) for text in printed]
    assert all(finished) and sorted(map(int, sum(finished, []))) == [*seeds] and other.returncode == 0
    shared = sorted(map(json.loads, path.read_text().splitlines()), key=lambda result: result['seed'])
    assert numbers(shared) == numbers(run(folder, rows=ROWS[:1], seeds=seeds, recipe=recipe))


@pytest.mark.parametrize('device, threads, cores, given, expected', [
    ('cpu', 1, 2, None, (1, True)), ('cpu', 2, 2, None, (2, False)), ('cpu', 2, 2, 1, (1, False)),
    ('cpu', 2, 2, 0, (0, False)), ('cpu', 1, 8, None, (7, True)), ('cpu', 1, 1, None, (1, False)),
    ('cuda', 2, 2, None, (1, True)), ('cuda', 1, 1, None, (1, True)), ('cuda', 8, 8, 3, (3, True))])
def test_who_makes_epochs_and_when(monkeypatch, device, threads, cores, given, expected):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    monkeypatch.setattr(runner, 'available_cores', lambda: cores)
    assert runner.augmenters(given, torch.device(device)) == expected


@pytest.mark.parametrize('chosen', [(2, False), (1, True)])
def test_epochs_are_made_as_chosen(folder, monkeypatch, chosen):
    asked = []
    make_epochs = runner.make_epochs
    monkeypatch.setattr(runner, 'augmenters', lambda workers, device: chosen)
    monkeypatch.setattr(runner, 'make_epochs', lambda *args: asked.append((args[4], args[7])) or make_epochs(*args))
    run(folder, rows=ROWS[:1])
    assert asked == [chosen]


def test_epochs_are_made_once_for_a_seed(folder, monkeypatch):
    asked = []
    make_epochs = runner.make_epochs
    monkeypatch.setattr(runner, 'make_epochs', lambda train, augment, seed, epochs, workers, kept, room, ahead: (
        asked.append((seed, len(kept), room > 0)),
        make_epochs(train, augment, seed, epochs, workers, kept, room, ahead))[1])
    run(folder, seeds=(0, 1), rows=[*ROWS, ('cct_2_sot_qk', {})], parallel=2)
    assert asked == [(0, 0, True), (0, 2, False), (1, 0, True), (1, 2, False)]


@pytest.mark.parametrize('limit, epochs', [(21., 1), (23., 2), (39., 3)])
def test_no_epoch_begins_that_would_end_after_the_time_limit(folder, tmp_path, monkeypatch, limit, epochs):
    """An epoch takes 10 s, and as much and a fifth of it is what the next is expected to take."""
    clock = [0.]

    def train_epoch(trainers, seed, epoch, on_step):
        clock[0] += 10.
        return [(50., 1., 10.)]

    monkeypatch.setattr(runner, 'time', SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(runner, 'train_epoch', train_epoch)
    run(folder, tmp_path, rows=ROWS[:1], recipe=replace(RECIPE, epochs=9), time_limit=limit)
    path, = (tmp_path / 'checkpoints').glob('*.pt')
    assert torch.load(path)['epoch'] == epochs


def test_an_epoch_of_more_runs_is_expected_to_take_longer():
    said = []
    session = SimpleNamespace(
        duration=10., deadline=time.monotonic() + 30., progress=SimpleNamespace(write=said.append))
    assert not runner.Session._is_late(session, 2) and not said
    assert runner.Session._is_late(session, 3) and said == [runner.TIME_LIMIT]


def test_time_limit_between_runs(folder, tmp_path, capsys):
    """Nothing is left to do once all is done."""
    recipe = Recipe(epochs=1, batch_size=10)
    assert len(run(folder, tmp_path, rows=ROWS[:1], recipe=recipe, time_limit=0.)) == 1
    assert 'time limit' not in capsys.readouterr().err
    assert len(run(folder, tmp_path, seeds=(6,), recipe=recipe, time_limit=0., parallel=1)) == 1
    assert 'time limit' in capsys.readouterr().err


def test_the_device_is_the_current_one(monkeypatch):
    """Streams, copies and waiting for them are of the same GPU, also where it is not the first."""
    entered = []
    monkeypatch.setattr(torch.cuda, 'device', lambda device: entered.append(device) or contextlib.nullcontext())
    empty = Images(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    setting = runner.Setting(ROWS[0], StudyData('', empty, empty, 2), '', RECIPE)
    session = runner.Session(setting, Store(''), None, 0., DEVICE)
    session.device = torch.device('cuda:1')
    with session:
        assert entered == [session.device]


def test_table():
    def result(model, seed, final):
        return dict(zip(KINDS, [
            model, {'sot_reg': 0.5}, seed, 2, final + 1, final, [final + 1, final], [1., 0.5], 12.34, 'cpu, float32',
            {}, '', 'tiny 24+8 sha256:0']))

    table = runner.format_results([result('a', 0, 70.), result('b', 0, 80.), result('a', 1, 72.)])
    lines = table.splitlines()
    assert lines[0].split() == ['model', 'n', 'top-1', 'best', 'loss', 'seconds']
    assert lines[1].split() == 'a sot_reg=0.5 2 71.00 ±1.41 72.00 ±1.41 0.5000 ±0.0000 12.3'.split()
    assert lines[2].split() == ['b', 'sot_reg=0.5', '1', '80.00', '81.00', '0.5000', '12.3']
    for part in ('2 epochs', 'seed 0, 1', 'tiny 24+8', 'cpu, float32'):
        assert part in table

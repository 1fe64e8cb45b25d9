""" What a study has done, in a folder """
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from timm_sot.errors import UserError
from timm_sot.study import store as module
from timm_sot.study.store import Run, Store, find_result

RUN = Run('cct_2', {'sot_reg': 0.5}, 3, 2)


def make_result(run=RUN, data='images', device='cpu'):
    values = dict(best=1., final=1., seconds=1., device=device, versions={}, commit='')
    return {**run._asdict(), **values, 'top1': [1.] * run.epochs, 'loss': [1.] * run.epochs, 'data': data}


def test_files_are_on_disk_before_they_have_their_names(tmp_path, monkeypatch):
    done = []

    def watch(name, of):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: done.append((name, of(*args))) or call(*args))

    watch('fsync', lambda file: os.fstat(file).st_ino)
    watch('replace', lambda source, target: os.stat(source).st_ino)
    store = Store(str(tmp_path))
    store.settle(dict(first=['cct_2', {}]))
    store.save(RUN, dict(data='images'))
    store.finish(RUN, make_result(), dict(w=torch.ones(2)))
    for i, (name, file) in enumerate(done):
        assert name == 'fsync' or done[i - 1] == ('fsync', file)
    assert sum(name == 'replace' for name, _ in done) == 3


def test_run_names():
    assert RUN.row == 'cct_2 sot_reg=0.5' and RUN.name == 'cct_2-sot_reg-0.5-seed-3-epochs-2'
    assert Run('a-b', {'x': [8, 4], 'y': 'c-d'}, 0, 1).name == 'a-b-x-8-4-y-c-d-seed-0-epochs-1'
    models = ['a-b', 'a/b', 'a:b', 'hf-hub:a/b', 'hf-hub:a-b', 'hf-hub-a-b']
    assert len({Run(model, {}, 0, 1).name for model in models}) == len(models)
    values = [
        0.5, -0.5, 1e-05, -1e-05, (8, 4), (-8, 4), (8, -4), 1e-16, 1e16, 'b-c', 'b/c', 'b c', 'b=c', 'b+c', ['b/c', 4]]
    names = [Run('a', {'x': value}, 0, 1).name for value in values]
    assert len({*names}) == len(values) and names[:3:2] == ['a-x-0.5-seed-0-epochs-1', 'a-x-1e-05-seed-0-epochs-1']
    for index, value in ((5, [-8, 4]), (-1, ('b/c', 4))):
        assert Run('a', {'x': value}, 0, 1).name == names[index], 'as it comes back from JSON'


def test_results(tmp_path):
    store = Store(str(tmp_path / 'new'))
    assert store.finished('images') == {}
    other = make_result(RUN._replace(seed=4))
    for result in (make_result(), other, make_result(data='others')):
        store.append(result)
    finished = Store(str(tmp_path / 'new')).finished('images')
    assert finished == {RUN.name: make_result(), RUN._replace(seed=4).name: other}
    assert len((tmp_path / 'new' / 'results.jsonl').read_text().splitlines()) == 3


def test_corrupt_lines_are_kept_aside(tmp_path):
    store = Store(str(tmp_path))
    store.append(make_result())
    path = tmp_path / 'results.jsonl'
    incomplete = [{**make_result(), key: [1.]} for key in ('top1', 'loss')]
    kinds = dict(model=5, kwargs=None, seed='1', final='x', top1=['a', 'b'], versions=None, data=3)
    incomplete += [{**make_result(), key: value} for key, value in kinds.items()]
    incomplete += [{**make_result(), 'epochs': 0, 'top1': [], 'loss': []}]
    layers = {'blocks.0': [1., 1.]}
    incomplete += [{**make_result(), **values} for values in (
        dict(final=2.), dict(best=2.), dict(versions={'torch': 3}), dict(entropy=None, common=layers),
        dict(entropy=layers, common={}), dict(entropy={'blocks.0': 1.}, common={'blocks.0': 1.}))]
    bad = [b'{"model": "cct', b'\xff\xfe', b'[]', b'7', *(json.dumps(line).encode() for line in incomplete)]
    path.write_bytes(path.read_bytes() + b'\n'.join(bad))  # the last without its end
    store.append(make_result(RUN._replace(seed=4)))
    with pytest.warns(UserWarning, match=f'{len(bad)} unreadable lines'):
        assert sorted(result['seed'] for result in store.finished('images').values()) == [3, 4]
    assert (tmp_path / 'results.corrupt').read_bytes().splitlines() == bad
    assert len(path.read_text().splitlines()) == 2
    assert sorted(result['seed'] for result in store.finished('images').values()) == [3, 4]  # no warning


def append_many(folder, seed):
    store = Store(folder)
    for i in range(50):
        store.append(make_result(RUN._replace(seed=seed * 1000 + i)))


def test_two_processes_append(tmp_path):
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=append_many, args=(str(tmp_path), seed)) for seed in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(Store(str(tmp_path)).finished('images')) == 100


def test_no_line_is_lost_while_others_are_put_aside(tmp_path, monkeypatch):
    """Another process finishes a run between the reading and the writing of the file."""
    store = Store(str(tmp_path))
    store.append(make_result())
    with open(tmp_path / 'results.jsonl', 'a') as f:
        f.write('{"model": "cct_2", "kwa\n')
    other = multiprocessing.get_context('fork').Process(target=append_many, args=(str(tmp_path), 1))
    write_file = module.write_file

    def slowly(path, content):
        other.start()
        other.join(0.5)  # it has to wait
        write_file(path, content)

    monkeypatch.setattr(module, 'write_file', slowly)
    with pytest.warns(UserWarning, match='1 unreadable lines'):
        assert len(store.finished('images')) == 1
    other.join()
    assert len(store.finished('images')) == 51


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_runs_no_code(tmp_path):
    store = Store(str(tmp_path))
    evil = Evil(str(tmp_path / 'ran'))
    torch.save({'data': 'images', 'evil': evil}, tmp_path / 'checkpoints' / (RUN.name + '.pt'))
    with pytest.warns(UserWarning, match='begins anew'):
        assert store.load(RUN, 'images') is None
    assert not (tmp_path / 'ran').exists()


def test_checkpoints(tmp_path):
    store = Store(str(tmp_path))
    assert store.load(RUN, 'images') is None
    store.save(RUN, {'data': 'images', 'epoch': 1, 'state': {'weight': torch.ones(2)}})
    assert store.load(RUN, 'images')['state']['weight'].tolist() == [1, 1]
    assert store.load(RUN, 'others') is None
    path = tmp_path / 'checkpoints' / (RUN.name + '.pt')
    for content in ({}, [1.], {'data': 3}):
        torch.save(content, path)
        with pytest.warns(UserWarning, match='begins anew'):
            assert store.load(RUN, 'images') is None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match='begins anew'):
        assert store.load(RUN, 'images') is None

    shared = torch.ones(3)  # as some models have them
    store.finish(RUN, make_result(), {'weight': torch.ones(4, 2).t(), 'one': shared, 'other': shared})
    assert not path.exists()
    assert load_file(tmp_path / 'checkpoints' / (RUN.name + '.safetensors'))['weight'].shape == (2, 4)
    assert store.finished('images') == {RUN.name: make_result()}


def test_the_line_of_a_run_comes_after_its_weights(tmp_path, monkeypatch):
    """Killed between the two, it is run again, and has not lost them."""
    store = Store(str(tmp_path))
    seen = []
    monkeypatch.setattr(store, 'append', lambda result: seen.extend((tmp_path / 'checkpoints').glob('*.safetensors')))
    store.finish(RUN, make_result(), {'weight': torch.ones(2)})
    assert [path.stem for path in seen] == [RUN.name]


RUNS = [Run('a', {}, seed, 2) for seed in (0, 0, 1)]
RUNS[1] = RUNS[1]._replace(model='b')


def try_claim(folder, runs, at_most, answers):
    with Store(folder).claim(runs, 'images', at_most) as taken:
        answers.put(taken)


def test_claims(tmp_path):
    context = multiprocessing.get_context('fork')

    def theirs(at_most=None):
        answers = context.SimpleQueue()
        process = context.Process(target=try_claim, args=(str(tmp_path), RUNS, at_most, answers))
        process.start()
        process.join()
        return answers.get()

    store = Store(str(tmp_path))
    with store.claim(RUNS, 'images', 1) as mine:
        assert mine == RUNS[:1] and theirs() == RUNS[1:] and theirs(2) == RUNS[1:2]
        store.finish(mine[0], make_result(mine[0]), {})
        assert theirs() == RUNS[1:], 'what is finished is not taken'
        with store.claim(RUNS, 'images') as rest:
            assert rest == RUNS[1:] and theirs() == []
    assert theirs() == RUNS[1:]


def test_a_run_that_is_finished_while_it_is_claimed(tmp_path, monkeypatch):
    """Another process ends it, and lets it go, between our look at the results and at its lock."""
    store = Store(str(tmp_path))
    claim = store._claim

    def late(run):
        if run == RUNS[0]:
            store.append(make_result(run))
        return claim(run)

    monkeypatch.setattr(store, '_claim', late)
    with store.claim(RUNS, 'images', 1) as taken:
        assert taken == RUNS[1:2]


def test_the_first_line_of_a_run_counts(tmp_path):
    """As in a report."""
    store = Store(str(tmp_path))
    for final in (1, 2):
        store.append({**make_result(), 'final': final})
    assert store.finished('images')[RUN.name]['final'] == 1


def test_settings(tmp_path):
    store = Store(str(tmp_path))
    settings = {'lr': 0.1, 'augment': ('crop',), 'first': ('cct_2', {})}
    assert store.settle(settings)['first'] == ['cct_2', {}]
    assert store.settle({**settings, 'first': ('cct_4', {})})['first'] == ['cct_2', {}]
    with pytest.raises(UserError, match=r'other settings \(lr 0.1 there, 0.2 here\)'):
        store.settle({**settings, 'lr': 0.2})
    with pytest.raises(UserError, match=r'other settings \(lr 0.1 there, None here\)'):  # of a version without it
        store.settle({name: value for name, value in settings.items() if name != 'lr'})


def test_settings_that_are_gone(tmp_path):
    """Runs of another recipe would be taken for those of this one."""
    for name, use in (
            ('results', lambda store: store.append(make_result())),
            ('checkpoint', lambda store: store.save(RUN, {'data': 'images', 'epoch': 1}))):
        store = Store(str(tmp_path / name))
        settings = {'lr': 0.1, 'first': ('cct_2', {})}
        store.settle(settings)
        (tmp_path / name / 'study.json').unlink()
        store.settle(settings)  # nothing was trained with it
        use(store)
        (tmp_path / name / 'study.json').unlink()
        with pytest.raises(UserError, match='holds runs, but study.json, .*, is gone; put it back, or choose another'):
            store.settle(settings)


def test_in_memory():
    store = Store('')
    with store.claim([RUN], 'images') as mine:
        assert mine == [RUN] and store.settle({'lr': 1}) == {'lr': 1}
        store.save(RUN, {})
        assert store.load(RUN, 'images') is None
        store.finish(RUN, make_result(), {})
    assert store.finished('images') == {RUN.name: make_result()}


def test_unusable_folder(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot write to .*file.*choose another folder'):
        Store(str(tmp_path / 'file'))


@pytest.mark.parametrize('text', ['{', '[]', 'null', '{"lr": 0.1}', '{"first": 1}', '{"first": ["a", {}], "data": 5}'])
def test_settings_that_are_none(tmp_path, text):
    (tmp_path / 'study.json').write_text(text)
    with pytest.raises(UserError, match='study.json is not what a study wrote .* choose another folder'):
        Store(str(tmp_path)).settle({'lr': 0.1, 'first': ('cct_2', {})})


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is full')
@pytest.mark.parametrize('name', [f'checkpoints/{RUN.name}.pt.tmp', 'results.jsonl'])
def test_no_room(tmp_path, name):
    store = Store(str(tmp_path))
    (tmp_path / name).symlink_to('/dev/full')
    with pytest.raises(UserError, match=f'cannot write to {tmp_path}.*make room in it: the same command'):
        store.save(RUN, {'data': 'images', 'epoch': 1})
        store.finish(RUN, make_result(), {'weight': torch.ones(2)})


@pytest.mark.parametrize('name', ['results.lock', f'checkpoints/{RUN.name}.lock', f'checkpoints/{RUN.name}.tmp'])
def test_a_file_that_cannot_be_made(tmp_path, name):
    """As in a folder that is read-only."""
    store = Store(str(tmp_path))
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match='cannot write to'), store.claim([RUN], 'images'):
        store.finish(RUN, make_result(), {'weight': torch.ones(2)})


def test_a_finished_study_that_nobody_can_write_to(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    settings = store.settle({'lr': 0.1, 'first': ('cct_2', {})})
    store.append(make_result())
    (tmp_path / 'results.lock').unlink()
    monkeypatch.setattr(os, 'access', lambda path, mode: mode != os.W_OK)
    assert store.settle(settings) == settings and [*store.finished('images')] == [RUN.name]
    assert not (tmp_path / 'results.lock').exists()


def test_find_result(tmp_path):
    settings = {'lr': 0.1, 'first': ['cct_2', {}]}
    store = Store(str(tmp_path))
    store.settle(settings)
    weights = tmp_path / 'checkpoints' / f'{RUN.name}.safetensors'
    assert find_result(str(weights)) is None  # no run is finished
    mine, second = make_result(), make_result(RUN._replace(seed=4))
    elsewhere = make_result(RUN._replace(seed=5), device='another')
    for result in (mine, second, elsewhere, {**mine, 'commit': 'of a line that repeats the run'}):
        store.append(result)
    with open(tmp_path / 'results.jsonl', 'ab') as f:
        f.write(b'\xff\n')
    assert find_result(str(weights)) == (mine, [mine, second], settings)
    assert find_result(str(tmp_path / weights.name)) == (mine, [mine, second], settings)
    assert find_result(str(tmp_path / 'checkpoints' / 'other.safetensors')) is None
    assert find_result(str(weights.with_suffix('.pth'))) is None
    (tmp_path / 'study.json').unlink()
    assert find_result(str(weights)) == (mine, [mine, second], {})


def test_weights_are_as_readable_as_the_rest(tmp_path):
    store = Store(str(tmp_path))
    store.settle({'first': ('cct_2', {})})
    store.finish(RUN, make_result(), {'weight': torch.ones(1)})
    weights = tmp_path / 'checkpoints' / f'{RUN.name}.safetensors'
    assert weights.stat().st_mode == (tmp_path / 'study.json').stat().st_mode


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    code = "import sys; from timm_sot.study.store import write_file; write_file(sys.argv[1], '\\u2212')"
    ascii_only = {**os.environ, 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    subprocess.run([sys.executable, '-c', code, tmp_path / 'report.md'], env=ascii_only, check=True)
    assert (tmp_path / 'report.md').read_text(encoding='utf-8') == '\u2212'

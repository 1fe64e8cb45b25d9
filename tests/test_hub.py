"""Models on a Hub: the installed timm and huggingface_hub against a server of the tests, and all that can break."""
import base64
import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from hub_client import request
from packaging.version import Version
from safetensors.torch import load as parse
from safetensors.torch import save

TESTS = Path(__file__).parent
HUB = TESTS.parent / 'hub'
MODELS = sorted(path.name for path in HUB.glob('cct_*')) if HUB.is_dir() else []
NAME = 'cct_2_sot_qk.cifar10'
BLOB = '^/[0-9a-f]{64}'  # a large file, on the server's second port

VERSION = Version(huggingface_hub.__version__)
since_1 = pytest.mark.skipif(VERSION < Version('1'), reason='huggingface_hub before 1.0 does not do that')

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='the client forks')


def model_files(name=NAME, **changes):
    files = {path.name: path.read_bytes() for path in (HUB / name).iterdir()}
    return {path: content for path, content in {**files, **changes}.items() if content is not None}


class Hub:
    """The server and a client, as a test sees them."""

    def __init__(self, url, socket, env):
        self.url, self.socket, self.env = url, socket, env

    def control(self, what, body):
        with urllib.request.urlopen(urllib.request.Request(
                f'{self.url}/_test/{what}', data=json.dumps(body).encode())) as response:
            return json.load(response)

    def put(self, repo, files, **kwargs):
        """Commit files to a repository behind the client's back; returns the commit."""
        content = {path: base64.b64encode(content).decode() for path, content in files.items()}
        return self.control('repo', {'name': repo, 'files': content, **kwargs})['sha']

    @contextlib.contextmanager
    def faults(self, *faults):
        self.control('faults', faults)
        yield
        self.control('faults', [])

    def log(self):
        return [(entry['method'], entry['path']) for entry in self.control('log', {})]

    def ask(self, call, arguments, **options):
        return request(self.socket, call, arguments, **options)

    def load(self, model_id, cache_dir=None, model_kwargs=(), pretrained=True, **options):
        cache_dir = cache_dir and str(cache_dir)
        return self.ask('load', dict(name=f'hf-hub:{model_id}', cache_dir=cache_dir, pretrained=pretrained,
                                     model_kwargs=dict(model_kwargs)), **options)

    @functools.lru_cache
    def folder_logits(self, name, model_kwargs=()):
        """Outputs of the model in a folder of hub/, or elsewhere."""
        return self.ask('load', dict(name=f'local-dir:{HUB / name}', model_kwargs=dict(model_kwargs)))['logits']


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hub')
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith('HF_')},
        'HF_HOME': str(folder / 'home'), 'HF_TOKEN': 'hf_test', 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_UPDATE_CHECK': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1',
        'NO_PROXY': '*',
    }
    with contextlib.ExitStack() as stack:
        def start(*command):
            process = stack.enter_context(subprocess.Popen(
                [sys.executable, *map(str, command)], env=env, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE))
            stack.callback(process.kill)
            return process.stdout.readline().strip()

        env['HF_ENDPOINT'] = start(TESTS / 'hub_server.py')
        # a socket's path has about 100 bytes
        socket = os.path.relpath(folder / 'socket')
        assert start(TESTS / 'hub_client.py', socket) == 'ready'
        hub = Hub(env['HF_ENDPOINT'], socket, env)
        hub.put('USER/good', model_files())
        yield hub


@pytest.fixture
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


def half_written(answer):
    """Files of the cache that are neither locks nor whole: every blob that is left must be one that was asked for.

    Before 1.0 huggingface_hub leaves what it has of a file, under a name of its own, to continue there.
    """
    ends = ('.incomplete', '.tmp') if VERSION >= Version('1') else '.tmp'
    return [path for path in answer['files'] if path.endswith(ends) or '/tmp' in path]


def text(answer):
    return '\n'.join([answer['message'], *answer['causes']])


# ---- what works


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[] if name == NAME else pytest.mark.slow) for name in MODELS])
def test_hub_folder_and_package_agree_bit_for_bit(hub, cache, name):
    hub.put(f'USER/{name}', model_files(name))
    from_hub = hub.load(f'USER/{name}', cache)
    assert from_hub['logits'] == hub.folder_logits(name)
    assert hub.ask('load', dict(name=name))['logits'] == from_hub['logits']


def test_upload_with_hf(hub, cache, tmp_path):
    """The command of the README."""
    weights = parse(model_files()['model.safetensors'])
    new = model_files(**{'model.safetensors': save({**weights, 'head.bias': weights['head.bias'] + 2})})
    for name, content in new.items():  # that the server does not have
        (tmp_path / name).write_bytes(content)
    hub.control('faults', [])
    result = subprocess.run(
        [sys.executable, '-m', 'huggingface_hub.cli.hf', 'upload', f'USER/{NAME}-cli', str(tmp_path)],
        env=hub.env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    log = hub.log()
    for step in ('/api/repos/create', '/api/validate-yaml', '/preupload/main', '.git/info/lfs/objects/batch',
                 '.git/info/lfs/objects/verify', '/commit/main'):
        assert any(path.endswith(step) for method, path in log if method == 'POST'), step
    assert any(method == 'PUT' for method, _ in log)
    assert hub.load(f'USER/{NAME}-cli', cache)['logits'] == hub.folder_logits(tmp_path)


@pytest.mark.parametrize('safe', [True, 'both'])
def test_upload_with_timm(hub, cache, safe):
    repo = f'USER/pushed-{safe}'
    pushed = hub.ask('push', dict(repo_id=repo, source=NAME, safe_serialization=safe, private=True))
    assert 'oid' in pushed, pushed
    assert hub.load(f'{repo}@{pushed["oid"]}', cache)['logits'] == hub.folder_logits(NAME)


def test_token_stays_with_the_hub(hub, cache):
    hub.put('USER/private', model_files(), private=True)
    hub.control('faults', [])
    assert 'logits' in hub.load('USER/private', cache)
    auth = {entry['path'].startswith('/USER'): entry['auth'] for entry in hub.control('log', {})
            if not entry['path'].startswith('/api')}
    assert auth == {True: 'Bearer hf_test', False: None}


def test_cache_and_revisions(hub, cache):
    weights = parse(model_files()['model.safetensors'])
    old = hub.put('USER/versions', model_files())
    changed = save({**weights, 'head.bias': weights['head.bias'] + 1})
    new = hub.put('USER/versions', {'model.safetensors': changed})
    hub.control('faults', [])
    first = hub.load(f'USER/versions@{old}', cache)
    assert first['logits'] == hub.folder_logits(NAME)
    latest = hub.load('USER/versions', cache)
    assert latest['logits'] != first['logits']
    assert latest['logits'] == hub.load(f'USER/versions@{new}', cache)['logits']

    # neither sends a file again, and a revision that is a commit needs no Hub at all
    hub.control('faults', [])
    assert hub.load('USER/versions', cache)['logits'] == latest['logits']
    assert hub.load(f'USER/versions@{old}', cache)['logits'] == first['logits']
    assert {method for method, _ in hub.log()} == {'HEAD'} and not any(old in path for _, path in hub.log())

    missing = hub.load('USER/versions@v9', cache)
    assert missing['error'] == 'RevisionNotFoundError' and 'USER/versions/resolve/v9' in missing['message']


@pytest.mark.parametrize('kwargs', [
    dict(num_classes=5), dict(in_chans=1), dict(img_size=48), dict(num_classes=0, global_pool='avg'),
], ids=str)
def test_adapts_as_timm_does(hub, cache, kwargs):
    adapted = hub.load('USER/good', cache, kwargs)
    assert 'error' not in adapted, adapted
    if 'num_classes' not in kwargs:
        assert adapted['logits'] == hub.folder_logits(NAME, model_kwargs=tuple(kwargs.items()))
    assert adapted['shape'] == [2, {5: 5, 0: 128}.get(kwargs.get('num_classes'), 10)]


def test_config_rebuilds_the_network(hub, cache, tmp_path):
    """Arguments that differ from the entry point's defaults travel in config.json."""
    torch.manual_seed(0)
    model = timm.create_model('cct_2', attn='sot_q', sot_reg=0.7, sot_iters=3, img_size=48, num_classes=4).eval()
    args = dict(attn='sot_q', sot_reg=0.7, sot_iters=3, img_size=48)
    timm.models.save_for_hf(model, tmp_path / 'model', model_args=args, safe_serialization=True)
    hub.put('USER/other', {path.name: path.read_bytes() for path in (tmp_path / 'model').iterdir()})
    loaded = hub.load('USER/other', cache)
    assert loaded['shape'] == [2, 4]
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(torch.randn(2, 3, 48, 48))
    logits = torch.frombuffer(bytearray.fromhex(loaded['logits']), dtype=torch.float32).reshape(2, 4)
    torch.testing.assert_close(logits, expected)


def test_pickle_is_loaded_as_weights_only(hub, cache, tmp_path):
    weights = parse(model_files()['model.safetensors'])
    torch.save(weights, tmp_path / 'weights.bin')
    pickled = model_files(**{'model.safetensors': None, 'pytorch_model.bin': (tmp_path / 'weights.bin').read_bytes()})
    hub.put('USER/pickle', pickled)
    assert hub.load('USER/pickle', cache)['logits'] == hub.folder_logits(NAME)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    torch.save({**weights, 'evil': Evil()}, tmp_path / 'evil.bin')
    hub.put('USER/evil', {**pickled, 'pytorch_model.bin': (tmp_path / 'evil.bin').read_bytes()})
    answer = hub.load('USER/evil', cache)
    assert 'USER/evil' in answer['message'] and 'weights_only' in answer['message']
    assert not (tmp_path / 'ran').exists()

    # safetensors are read where there are both
    hub.put('USER/both', model_files(**{'pytorch_model.bin': (tmp_path / 'evil.bin').read_bytes()}))
    assert hub.load('USER/both', cache)['logits'] == hub.folder_logits(NAME)


@since_1
@pytest.mark.parametrize('name', MODELS)
def test_cards_pass_the_validation_of_huggingface_hub(hub, name):
    data = hub.ask('validate_card', dict(path=str(HUB / name / 'README.md')))
    assert 'error' not in data, data
    assert data['library_name'] == 'timm' and data['pipeline_tag'] == 'image-classification'
    assert data['license'] == 'apache-2.0' and data['datasets'] == ['cifar10'] and data['metrics'] == ['accuracy']


@since_1
def test_the_server_would_refuse_a_bad_card(hub, tmp_path):
    (tmp_path / 'README.md').write_text('---\nlicense: [1]\n---\n# Card\n')
    assert 'must be a string' in hub.ask('validate_card', dict(path=str(tmp_path / 'README.md')))['message']


# ---- what breaks on the way: an error, a clean cache, and the next try succeeds

CONNECTION = 'check your connection and try again'
FAULTS = {
    # name: faults, words of the error (of timm and huggingface_hub where config.json fails, which no plugin sees)
    # what httpx and requests, which huggingface_hub used before 1.0, say differently is cut to what both say
    'config 401': ([dict(path='config.json', status=401)], ['USER/good', '401', 'Unauthorized']),
    'config 403': ([dict(path='config.json', status=403)], ['USER/good', 'your token has the correct permissions']),
    'config 404': ([dict(path='config.json', status=404)], ['USER/good', '404', 'Not Found']),
    'config 500s': ([dict(path='config.json', status=500)], ['USER/good', '500', 'Internal Server Error', CONNECTION]),
    'weights 401': ([dict(path='model.safetensors', status=401)], ['USER/good', '401', 'your token']),
    'weights 403': ([dict(path='model.safetensors', status=403)], ['USER/good on the Hub', 'could not be downloaded']),
    'weights 500s': ([dict(path='safetensors', status=500)], ['USER/good on the Hub', 'could not be downloaded']),
    'CDN 403': ([dict(path=BLOB, status=403)], ['USER/good on the Hub', '403', 'Forbidden']),
    'CDN 500': ([dict(path=BLOB, status=500)], ['USER/good on the Hub', '500', 'Internal Server Error', 'try again']),
    'dropped': ([dict(path='.', drop=True)], ['isconnected']),
    'cut': ([dict(path=BLOB, cut=500000, times=1), dict(path=BLOB, cut=0)],
            ['USER/good on the Hub', 'onnection', 'try again']),
    'wrong etag': ([dict(path='safetensors', etag='0' * 64)],
                   ['USER/good on the Hub', 'not the one that the Hub announced', 'try again']),
    'changed bytes': ([dict(path=BLOB, flip=900000)],
                      ['USER/good on the Hub', 'not the one that the Hub announced', 'try again']),
    'changed header': ([dict(path=BLOB, flip=10)],
                       ['USER/good on the Hub', 'not the one that the Hub announced', 'try again']),
}


@pytest.mark.parametrize('name', FAULTS)
def test_fault_of_the_hub(hub, cache, name):
    faults, words = FAULTS[name]
    with hub.faults(*faults):
        answer = hub.load('USER/good', cache)
    for word in words:
        assert word in text(answer), text(answer)
    assert not half_written(answer)
    assert hub.load('USER/good', cache)['logits'] == hub.folder_logits(NAME)


def test_repository_in_the_place_of_the_package(hub, cache):
    """Its weights are checked and its name is said, as where it is the model's."""
    hub.put('USER/bare', model_files(**{'config.json': None}))
    hub.put('USER/else', with_weights(lambda w: w.pop('norm.bias')))

    def load(repo):
        overlay = dict(pretrained_cfg_overlay=dict(hf_hub_id=repo))
        return hub.ask('load', dict(name='cct_2_sot_qk', cache_dir=str(cache), model_kwargs=overlay))

    with hub.faults(dict(path=BLOB, flip=900000)):
        answer = load('USER/bare')
    assert 'USER/bare on the Hub: ' in answer['message'] and 'not the one that the Hub announced' in answer['message']
    assert load('USER/bare')['logits'] == hub.folder_logits(NAME)
    message = load('USER/else')['message']
    assert 'USER/else on the Hub: ' in message and 'norm.bias' in message and 'create the model with the arg' in message
    message = load('USER/nosuch')['message']
    assert 'USER/nosuch on the Hub: ' in message and 'could not be downloaded' in message


@since_1
@pytest.mark.parametrize('endpoint', ['http://127.0.0.1:9', 'http://hub.invalid'], ids=['refused', 'unreachable'])
def test_no_hub(hub, cache, endpoint):
    answer = hub.load('USER/good', cache, endpoint=endpoint)
    assert answer['error'] == 'LocalEntryNotFoundError' and CONNECTION in answer['message']
    assert answer['waits'] and not answer['files']
    assert hub.load('USER/good', cache)['logits'] == hub.folder_logits(NAME)
    # and what is in the cache loads without a Hub
    assert hub.load('USER/good', cache, endpoint=endpoint)['logits'] == hub.folder_logits(NAME)


def test_missing_repository_or_token(hub, cache):
    answer = hub.load('USER/none', cache)
    assert answer['error'] == 'RepositoryNotFoundError'
    assert 'USER/none' in answer['message'] and 'make sure you are authenticated' in answer['message']
    assert not answer['files']
    hub.put('USER/none', model_files())
    assert hub.load('USER/none', cache)['logits'] == hub.folder_logits(NAME)


@since_1
@pytest.mark.parametrize('status, wait', [(429, 4), (503, 1)])
def test_retries_then_succeeds(hub, cache, status, wait):
    with hub.faults(dict(path='.', status=status, times=2, headers={'Retry-After': '3'} if status == 429 else {})):
        answer = hub.load('USER/good', cache)
    assert answer['logits'] == hub.folder_logits(NAME) and answer['waits'][0] == wait


@since_1
def test_cut_file_is_resumed(hub, cache):
    with hub.faults(dict(path=BLOB, cut=500000, times=1)):
        answer = hub.load('USER/good', cache, chunk=100000)  # the client keeps whole chunks, by default of 10 MB
        ranges = [entry['range'] for entry in hub.control('log', {}) if entry['range']]
    assert answer['logits'] == hub.folder_logits(NAME) and ranges == ['bytes=500000-']


def test_offline(hub, cache):
    answer = hub.load('USER/good', cache, offline=True)
    assert 'USER/good' in text(answer) and 'unset the `HF_HUB_OFFLINE`' in text(answer) and not answer['files']
    hub.load('USER/good', cache)
    hub.control('faults', [])
    assert hub.load('USER/good', cache, offline=True)['logits'] == hub.folder_logits(NAME)
    assert hub.log() == []


def test_two_processes_download_at_once(hub, cache):
    answers = []
    with hub.faults():
        threads = [threading.Thread(target=lambda: answers.append(hub.load('USER/good', cache))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [answer['logits'] for answer in answers] == [hub.folder_logits(NAME)] * 2
    assert not half_written(hub.load('USER/good', cache))


# ---- what is wrong in a repository


def with_weights(change):
    weights = parse(model_files()['model.safetensors'])
    change(weights)
    return {'model.safetensors': save(weights)}


def with_config(change):
    config = json.loads(model_files()['config.json'])
    change(config)
    return {'config.json': json.dumps(config).encode()}


BROKEN = {
    'truncated': (lambda: {'model.safetensors': model_files()['model.safetensors'][:700000]}, 'damaged, cut off'),
    'empty': (lambda: {'model.safetensors': b''}, 'damaged, cut off'),
    'shape': (lambda: with_weights(lambda w: w.update({'norm.bias': torch.zeros(64)})), 'size mismatch for norm.bias'),
    'extra key': (lambda: with_weights(lambda w: w.update({'more.weight': torch.zeros(1)})), '(more.weight)'),
    'missing key': (lambda: with_weights(lambda w: w.pop('norm.bias')), 'lacks 1 parameters (norm.bias)'),
    'missing head': (lambda: with_weights(lambda w: w.pop('head.bias')), 'head.bias'),
    'no weights': (lambda: {'model.safetensors': None}, 'could not be downloaded'),
    'argument': (lambda: with_config(lambda c: c['model_args'].update(sot_rag=1)), 'sot_rag'),
    'argument of the cfg': (lambda: with_config(lambda c: c['pretrained_cfg'].update(sot_rag=1)), 'sot_rag'),
    'value': (lambda: with_config(lambda c: c['model_args'].update(attn='sot_x')), 'sot_x'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_repository(hub, cache, name):
    change, message = BROKEN[name]
    repo = f'USER/broken-{name.replace(" ", "-")}'
    hub.put(repo, model_files(**change()))
    answer = hub.load(repo, cache)
    assert f'{repo} on the Hub: ' in answer['message'] and message in answer['message'], answer['message']
    assert ';' in answer['message'].rpartition(message)[2], 'no way out'
    assert not half_written(answer)
    hub.put(repo, model_files())  # its owner mends it
    assert hub.load(repo, cache)['logits'] == hub.folder_logits(NAME)


@pytest.mark.parametrize('name', ['extra key', 'missing key'])
def test_other_keys_are_errors_with_another_number_of_classes(hub, cache, name):
    """timm loads these without asking for the names."""
    change, message = BROKEN[name]
    hub.put('USER/keys-' + name[:5], model_files(**change()))
    assert message in hub.load('USER/keys-' + name[:5], cache, dict(num_classes=5))['message']


@pytest.mark.parametrize('content, words', [
    (b'not JSON', 'JSONDecodeError: Expecting value'),
    (b'{"architecture": "cct_99", "pretrained_cfg": {}}', 'Unknown model (cct_99)'),
])
def test_broken_config_that_only_timm_sees(hub, cache, content, words):
    """These name no repository: timm reads config.json before it calls a model's entry point."""
    repo = f'USER/config-{len(content)}'
    hub.put(repo, model_files(**{'config.json': content}))
    assert words in text(hub.load(repo, cache))
    hub.put(repo, model_files())
    assert hub.load(repo, cache)['logits'] == hub.folder_logits(NAME)


# ---- what is wrong on this machine


def mounted(answer):
    if answer.get('error') == 'PermissionError' and 'mounting is not allowed' in answer['message']:
        pytest.skip('mounting takes root: ' + answer['message'])
    return answer


def test_full_disk(hub, cache):
    answer = mounted(hub.load('USER/good', cache, full_disk=600_000))
    assert 'USER/good on the Hub: No space left on device; free space' in answer['message']
    assert not half_written(answer) and not any(path.endswith('safetensors') for path in answer['files'])
    assert answer['next']['logits'] == hub.folder_logits(NAME)


def test_file_size_limit(hub, cache):
    answer = hub.load('USER/good', cache, file_size=600_000)
    assert 'USER/good on the Hub: File too large; free space, or choose another cache' in answer['message']
    assert not half_written(answer)
    assert hub.load('USER/good', cache)['logits'] == hub.folder_logits(NAME)


def test_read_only_cache(hub, cache):
    answer = mounted(hub.load('USER/good', cache, read_only=True))
    assert 'Read-only file system' in answer['message'] and str(cache) in answer['message']
    assert 'USER--good' in answer['message'] and not answer['files']
    assert hub.load('USER/good', cache)['logits'] == hub.folder_logits(NAME)
    assert hub.load('USER/good', cache, read_only=True)['logits'] == hub.folder_logits(NAME)


def test_read_only_cache_without_the_weights(hub, cache):
    hub.load('USER/good', cache, pretrained=False)  # leaves config.json there
    answer = mounted(hub.load('USER/good', cache, read_only=True))
    assert 'USER/good on the Hub: Read-only file system; free space, or choose another cache' in answer['message']

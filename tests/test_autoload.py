""" How `import timm` finds the models; every case in an interpreter of its own """
import compileall
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    'timm_sot' not in {entry_point.name for entry_point in importlib.metadata.entry_points(group='torch.backends')},
    reason='timm-sot is not installed (pip install .): torch finds it by the entry point of the installed package')]

MODELS = ['cct_2', 'cct_2_sot_q', 'cct_2_sot_q_nosoftmax', 'cct_2_sot_qk', 'cct_2_sot_qk_nosoftmax', 'cct_2_sot_qkt',
          'cct_2_sot_shares']

# what a registration must leave behind, for scripts that have imported timm and may use it
REGISTERED = f'''
import sys
import timm
assert timm.list_models('cct_2*') == {MODELS!r}, timm.list_models('cct_2*')
assert not [finder for finder in sys.meta_path if 'timm_sot' in repr(finder)], sys.meta_path
'''


@pytest.fixture
def python(tmp_path):
    """Runs a script in a fresh interpreter, away from the checkout, and returns what it wrote to stderr.

    With `strict`, a failed or repeated registration is an error.
    """
    def run(*code, autoload=True, site=None, strict=True):
        env = {
            k: v for k, v in os.environ.items()
            if k not in ('TORCH_DEVICE_BACKEND_AUTOLOAD', 'PYTHONWARNINGS')}
        env['PYTHONDONTWRITEBYTECODE'] = '1'  # some cases edit source files faster than the clock of bytecode ticks
        if not autoload:
            env['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'
        if site is not None:
            env['PYTHONPATH'] = os.pathsep.join(filter(None, [str(site), env.get('PYTHONPATH')]))
        flags = ['-W', 'error::RuntimeWarning', '-W', 'error:Overwriting:UserWarning'] if strict else []
        result = subprocess.run(
            [sys.executable, *flags, '-c', '\n'.join(map(textwrap.dedent, code))],
            env=env, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stderr
    return run


def test_create_model_without_other_import(python):
    python('''
        import timm
        model = timm.create_model('cct_2_sot_qk', num_classes=10)
        assert model.blocks[0].attn.variant == 'sot_qk'

        # timm.models is what it would be without us
        import importlib.resources, inspect
        from importlib.machinery import SourceFileLoader
        source = open(timm.models.__file__).read()
        assert inspect.getsource(timm.models) == source
        assert importlib.resources.files('timm.models').joinpath('__init__.py').read_text() == source
        assert type(timm.models.__loader__) is type(timm.models.__spec__.loader) is SourceFileLoader
        assert 'exec_module' not in vars(SourceFileLoader)
    ''', REGISTERED)


def test_from_timm_models_import(python):
    stderr = python('''
        from timm.models import create_model
        create_model('cct_2_sot_qk', num_classes=10)
    ''', REGISTERED)
    assert 'timm-sot' not in stderr


def test_torch_alone_imports_no_timm(python):
    python('''
        import sys
        import torch
        assert 'timm_sot' in sys.modules
        loaded = [name for name in sys.modules if name.split('.')[0] == 'timm']
        assert not loaded, loaded
        rooms = [name for name in sys.modules if name.startswith('timm_sot.')]
        assert rooms == ['timm_sot._autoload'], rooms
        import timm
        timm.create_model('cct_2_sot_qk', num_classes=10)
    ''', REGISTERED)


def test_autoload_off_then_timm_sot(python):
    python('''
        import sys
        import timm
        assert not timm.is_model('cct_2_sot_qk') and 'timm_sot' not in sys.modules
        try:
            timm.create_model('cct_2_sot_qk')
        except RuntimeError as e:
            assert 'Unknown model' in str(e)
        else:
            raise AssertionError('known without timm_sot')

        import timm_sot
        timm.create_model('cct_2_sot_qk')
        import timm_sot  # twice
        import importlib
        importlib.reload(timm_sot)
        importlib.reload(timm_sot._autoload)
    ''', REGISTERED, autoload=False)


@pytest.mark.parametrize('autoload', [True, False])
def test_timm_sot_before_timm(python, autoload):
    python('''
        import importlib, sys
        import timm_sot
        assert 'torch' not in sys.modules and 'timm' not in sys.modules
        import timm_sot  # twice
        importlib.reload(timm_sot)
        importlib.reload(timm_sot._autoload)
        importlib.reload(timm_sot)  # now with the finder of two loads of _autoload in the way
        import timm
        timm.create_model('cct_2_sot_qk')
        import timm_sot
        importlib.reload(timm_sot)
    ''', REGISTERED, autoload=autoload)


@pytest.mark.parametrize('statement,autoload', [
    ('from timm_sot import SOTAttention', True),
    ('import timm_sot.attention', True),
    ('import timm_sot.attention', False),
    ('import timm_sot.patch', True),
    ('import timm_sot.weights', True),
    ('import timm_sot.cct', True),
])
def test_any_room_may_come_first(python, statement, autoload):
    # each of these imports timm half way through itself
    stderr = python(f'''
        {statement}
        import timm
        timm.create_model('cct_2_sot_qk')
    ''', REGISTERED, autoload=autoload)
    assert 'timm-sot' not in stderr


def test_public_names(python):
    python('''
        import sys
        import timm_sot
        assert set(timm_sot.__all__) <= set(dir(timm_sot))
        try:
            timm_sot.no_such_name
        except AttributeError as e:
            assert "'timm_sot'" in str(e) and "'no_such_name'" in str(e)
        else:
            raise AssertionError('any name is found')
        assert 'torch' not in sys.modules
        for name in timm_sot.__all__:
            value = getattr(timm_sot, name)
            assert value.__name__ == name and value.__module__.startswith('timm_sot.'), value
        assert vars(timm_sot)['sinkhorn'] is timm_sot.solver.sinkhorn  # looked up once
    ''')


@pytest.fixture
def site(tmp_path):
    """A folder with a copy of the package and of its entry points, to be put first on the path."""
    source = Path(importlib.util.find_spec('timm_sot').origin).parent
    shutil.copytree(source, tmp_path / 'site' / 'timm_sot', ignore=shutil.ignore_patterns('__pycache__'))
    installed = importlib.metadata.distribution('timm-sot')
    info = tmp_path / 'site' / f'timm_sot-{installed.version}.dist-info'
    info.mkdir()
    for name in ('METADATA', 'entry_points.txt'):
        (info / name).write_text(installed.read_text(name))
    return tmp_path / 'site'


def test_startup_cost(python, site):
    compileall.compile_dir(site, quiet=1)  # as an installer does
    code = f'''
        import sys, time
        start = time.perf_counter()
        import timm_sot
        timm_sot.autoload()
        seconds = time.perf_counter() - start
        assert 'torch' not in sys.modules and 'timm' not in sys.modules
        assert timm_sot.__file__.startswith({str(site)!r})
        print(seconds, file=sys.stderr)
    '''
    best = min(float(python(code, site=site)) for _ in range(10))
    assert best < 5e-3, f'{best * 1e3:.1f} ms'


# A broken package


def rooms_of_models(python, site):
    """The files of the package that registering the models runs, by their names."""
    stderr = python('''
        import sys
        import timm_sot.cct
        import timm_sot.layers
        for name, module in list(sys.modules.items()):
            if name.split('.')[0] == 'timm_sot':
                print('room', module.__file__, file=sys.stderr)
    ''', site=site)
    files = [Path(line.removeprefix('room ')) for line in stderr.splitlines() if line.startswith('room ')]
    assert all(site in file.parents for file in files), files
    return {file.relative_to(site / 'timm_sot').as_posix(): file for file in files}


def test_broken_room_of_the_models(python, site):
    rooms = rooms_of_models(python, site)
    for name in ('layers.py', 'cct.py', 'kernels/fused.py'):  # what is imported first, last and by others
        room = rooms[name]
        sound = room.read_text()
        room.write_text('def broken(:\n')
        stderr = python(f'''
            import sys, warnings
            from pathlib import Path
            room = Path({str(room)!r})

            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                import torch
                assert not [w for w in caught if 'timm-sot' in str(w.message)]
                import timm
                import timm_sot
                assert timm_sot.__file__.startswith({str(site)!r})

                def warning():
                    found = [str(w.message) for w in caught if w.category is RuntimeWarning]
                    caught.clear()
                    assert len(found) == 1 and 'timm-sot could not register' in found[0], found
                    return found[0]

                message = warning()
                assert 'SyntaxError' in message and room.name in message, message
                assert timm.is_model('resnet18') and not timm.is_model('cct_2')
                try:
                    import timm_sot.layers
                    import timm_sot.cct
                except SyntaxError:
                    pass
                else:
                    raise AssertionError('not broken')

                room.write_text('raise ImportError("libsomething.so: no such file")')
                timm_sot.autoload()
                assert 'ImportError: libsomething.so: no such file' in warning()

                room.write_text({sound!r})
                timm_sot.autoload()
                assert not [w for w in caught if w.category in (RuntimeWarning, UserWarning)], caught
                assert timm.is_model('cct_2_sot_qk')
        ''', site=site, strict=False)
        assert 'timm-sot' not in stderr, stderr
        room.write_text(sound)


def test_broken_room_shows_in_stderr(python, site):
    (site / 'timm_sot' / 'cct.py').write_text('raise ImportError("libsomething.so: no such file")')
    stderr = python('''
        import torch
        import timm
        timm.create_model('test_resnet')
    ''', site=site, strict=False)
    assert 'RuntimeWarning: timm-sot could not register its models with timm' in stderr
    assert 'ImportError: libsomething.so: no such file' in stderr


def test_other_rooms_may_all_be_broken(python, site):
    keep = rooms_of_models(python, site).values()
    broken = [file for file in (site / 'timm_sot').rglob('*.py') if file not in keep]
    assert 'patch.py' in {file.name for file in broken}
    for file in broken:
        file.write_text('def broken(:\n')
    python(f'''
        import torch
        import timm
        timm.create_model('cct_2_sot_qk')
        import timm_sot
        assert timm_sot.__file__.startswith({str(site)!r})
        timm_sot.SOTAttention
    ''', REGISTERED, site=site)


# The finder among other finders and loaders, with a stand-in for timm that costs nothing to import

@pytest.fixture
def fake_timm(tmp_path):
    models = tmp_path / 'fake' / 'timm' / 'models'
    models.mkdir(parents=True)
    (models.parent / '__init__.py').write_text('from . import models\nfrom . import last')
    (models.parent / 'last.py').write_text('')
    (models / '__init__.py').write_text('from . import first\nfrom . import second')
    (models / 'first.py').write_text('')
    (models / 'second.py').write_text('')
    return tmp_path / 'fake'


ONCE_AT_THE_END = '''
import timm
assert registered == [['timm.models', 'timm.models.first', 'timm.models.second']], registered
assert autoload._TimmFinder not in sys.meta_path
'''


def listen(path):
    return f'''
import sys
sys.path.insert(0, {str(path)!r})
import timm_sot._autoload as autoload
registered = []
autoload._register = lambda: registered.append(sorted(name for name in sys.modules if name.startswith('timm.')))
'''


def test_finder_beside_old_finder(python, fake_timm):
    stderr = python(listen(fake_timm), '''
        class Old:  # the protocol before PEP 451
            def find_module(self, name, path=None):
                return None
        sys.meta_path.insert(0, Old())
    ''', ONCE_AT_THE_END)
    assert 'timm-sot' not in stderr


def test_finder_with_loader_shared_by_modules(python, fake_timm):
    archive = shutil.make_archive(str(fake_timm.parent / 'timm'), 'zip', fake_timm)
    python(listen(archive), ONCE_AT_THE_END, '''
        assert timm.last.__loader__ is timm.models.__loader__, 'a loader for each, nothing was tested'
    ''')


def test_finder_with_loader_that_cannot_be_hooked(python, fake_timm):
    stderr = python(listen(fake_timm), '''
        from importlib.machinery import PathFinder

        class Loader:
            __slots__ = 'loader'

            def __init__(self, loader):
                self.loader = loader

            def create_module(self, spec):
                return None

            def exec_module(self, module):
                self.loader.exec_module(module)

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                spec = PathFinder.find_spec(name, path, target)
                if name.split('.')[0] == 'timm':
                    spec.loader = Loader(spec.loader)
                return spec

        sys.meta_path.insert(1, Finder)
        import timm
        assert timm.models.second and not registered
    ''', strict=False)
    assert 'RuntimeWarning: timm-sot could not register its models with timm' in stderr and 'AttributeError' in stderr


def test_finder_waits_for_a_timm_that_loads(python, fake_timm):
    second = fake_timm / 'timm' / 'models' / 'second.py'
    second.write_text('raise OSError("disk")')
    python(listen(fake_timm), f'''
        import pathlib
        try:
            import timm
        except OSError:
            pass
        else:
            raise AssertionError('not broken')
        assert not registered and autoload._TimmFinder in sys.meta_path
        pathlib.Path({str(second)!r}).write_text('ok = True')
    ''', ONCE_AT_THE_END)


def test_finder_without_timm_models(python):
    python('''
        import sys
        import timm_sot._autoload
        sys.meta_path[:] = [timm_sot._autoload._TimmFinder]
        sys.modules['timm'] = type(sys)('timm')
        sys.modules['timm'].__path__ = []
        try:
            import timm.models
        except ModuleNotFoundError as e:
            assert e.name == 'timm.models'
        else:
            raise AssertionError('found')
    ''')

""" Registers the models, and names of attention layers, with timm without being asked

timm has no plugin hook, but it imports torch, and torch >= 2.5 calls every entry point of the group `torch.backends` at
the end of `import torch`; ours is `autoload`. It must not raise, which would break `import torch`, and must not import
timm, which most programs that use torch do not need: it waits for it.
"""
import importlib
import sys
import warnings

_TARGET = 'timm.models'  # once this has loaded, timm's registry is there to be added to
_registering = []  # not empty while `_register` is at work
# rooms that the models need, and which may be the first to import timm, with a name that they define after that; they
# call `autoload` when they are done
_IMPORTING_TIMM = {'attention': 'SOTAttention', 'weights': 'check_download'}


class _TimmFinder:
    """Meta-path finder that lets others find `timm.models` and registers our models once it has loaded."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != _TARGET:
            return None
        finders = (getattr(finder, 'find_spec', None) for finder in sys.meta_path if not _is_ours(finder))
        specs = (find_spec(name, path, target) for find_spec in finders if find_spec is not None)
        spec = next(filter(None, specs), None)
        if spec is None or spec.loader is None:
            return None
        try:
            exec_module = spec.loader.exec_module
            # on the instance: the loader's class stays what it is for everybody else
            spec.loader.exec_module = lambda module: _exec_and_register(exec_module, module)
        except (AttributeError, TypeError) as e:  # a loader of the old protocol, or one that takes no attributes
            _warn(e)
        return spec


def _exec_and_register(exec_module, module):
    exec_module(module)
    if module.__name__ == _TARGET:  # one loader may serve many modules, that of a zip file does
        sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(finder)]
        _register()


def _is_ours(finder):
    return getattr(finder, '__module__', None) == __name__  # and not `is _TimmFinder`: this module may be reloaded


def _register():
    for room, last in _IMPORTING_TIMM.items():
        module = sys.modules.get(f'timm_sot.{room}')
        if module is not None and not hasattr(module, last):
            return  # it is from there that timm is being imported
    if _registering:  # that call, where it is from here that attention.py is imported
        return
    _registering.append(True)
    try:
        for room in ('layers', 'cct'):
            importlib.import_module(f'timm_sot.{room}')
    except Exception as e:
        _warn(e)
    finally:
        _registering.clear()


def _warn(e):
    warnings.warn(
        f'timm-sot could not register its models with timm, they will be unknown to timm.create_model: '
        f'{type(e).__name__}: {e}', RuntimeWarning)


def autoload():
    """Register timm-sot's models with timm: at once if timm is loaded, else as soon as it is."""
    if _TARGET in sys.modules:
        _register()
    elif not any(map(_is_ours, sys.meta_path)):
        sys.meta_path.insert(0, _TimmFinder)

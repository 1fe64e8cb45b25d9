"""Self-Optimal-Transport attention for timm.

Importing this package registers its models with timm, now or as soon as timm is imported, and imports neither timm nor
torch itself: torch loads it as one of its `torch.backends` entry points, in the middle of `import torch`. The public
names are resolved when they are first used.
"""
import importlib

from ._autoload import autoload

TYPE_CHECKING = False  # type checkers know the name; importing typing would cost a bare interpreter milliseconds
if TYPE_CHECKING:
    from .attention import SOTAttention
    from .patch import apply_sot
    from .solver import sinkhorn
    from .transform import self_optimal_transport
    from .viz.maps import attention_maps

__version__ = '0.1.0'

__all__ = ['SOTAttention', 'apply_sot', 'attention_maps', 'self_optimal_transport', 'sinkhorn']

_MODULES = {
    'SOTAttention': 'attention',
    'apply_sot': 'patch',
    'attention_maps': 'viz.maps',
    'self_optimal_transport': 'transform',
    'sinkhorn': 'solver',
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(importlib.import_module(f'.{_MODULES[name]}', __name__), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})


autoload()

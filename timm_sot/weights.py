""" Where pretrained weights come from, and what to do when they do not load

The errors of timm and its libraries often name neither the repository nor the file. Those that pass through the entry
points of our models are told here where the weights came from and what would work; their type stays what it is.
"""
import contextlib
import hashlib
import os
import re
import traceback
from pathlib import Path
from typing import Any, Dict, Iterator, Optional
from urllib.error import HTTPError, URLError

import timm
from safetensors import SafetensorError
from timm.models import resolve_pretrained_cfg

from ._autoload import autoload

__all__ = ['explained', 'packaged_weights', 'with_named_source', 'with_readable_folder']

WEIGHTS_FILE = 'model.safetensors'


def packaged_weights(name: str) -> str:
    """Path of the weights that ship with this package as `name`, a model and its tag."""
    return str(hub_folder() / name / WEIGHTS_FILE)


def hub_folder() -> Path:
    """The folder of packaged weights: in the wheel a part of the package, else beside it, in the repository."""
    package = Path(__file__).resolve().parent
    return package / 'hub' if (package / 'hub').is_dir() else package.parent / 'hub'


def with_named_source(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments for timm, in which a repository or address that the caller names comes before the packaged file."""
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    if 'file' in overlay or not (overlay.get('hf_hub_id') or overlay.get('url')):
        return kwargs
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'file': None}}


def with_readable_folder(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments for timm, in which the file takes the place of a `local-dir:` folder that timm would unpickle.

    timm before 1.0.26 reads folders of safetensors as pickles, and fails.
    """
    cfg = kwargs.get('pretrained_cfg')
    if tuple(map(int, re.findall(r'\d+', timm.__version__)[:3])) >= (1, 0, 26):
        return kwargs
    if isinstance(cfg, dict) and cfg.get('source') == 'local-dir' and (Path(cfg['file']) / WEIGHTS_FILE).is_file():
        return {**kwargs, 'pretrained_cfg': {**cfg, 'source': None, 'file': str(Path(cfg['file']) / WEIGHTS_FILE)}}
    return kwargs


@contextlib.contextmanager
def explained(variant: str, pretrained: bool, kwargs: Dict[str, Any]) -> Iterator[None]:
    """Add the source of the weights, and the way out, to the errors of building a model.

    Args:
        variant: Name of the entry point.
        pretrained: Whether weights are loaded; if not, arguments that came with them may still be wrong.
        kwargs: What the entry point passes on to timm.
    """
    cfg = kwargs.get('pretrained_cfg')
    if not isinstance(cfg, dict):  # a dict may hold what timm does not take, which is then timm's error
        cfg = resolve_pretrained_cfg(variant, cfg).to_dict()
    cfg = {**cfg, **(kwargs.get('pretrained_cfg_overlay') or {})}
    with_config = cfg.get('source') in ('hf-hub', 'local-dir')  # and so with arguments of the model
    cfg['source'] = source = weights_source(cfg)
    hub_id = cfg['hf_hub_id'] if pretrained and source == 'hf-hub' else ''
    try:
        yield
    except Exception as e:
        check_download(hub_id, kwargs.get('cache_dir'), e)  # changed bytes can show themselves as any error
        if was_loading(e):
            if source not in ('', 'state_dict'):
                explain(e, cfg, with_config)
        elif with_config and isinstance(e, (AssertionError, RuntimeError, TypeError, ValueError)):
            advice = 'an argument that is not yours is of config.json, which may be of another version of timm-sot'
            e.args = (f'{source_of(cfg)}: {str(e).rstrip(".")}; {advice}.',)
        raise
    check_download(hub_id, kwargs.get('cache_dir'))


def weights_source(cfg: Dict[str, Any]) -> str:
    """What timm takes the weights of a configuration from: 'hf-hub', 'local-dir', 'state_dict', 'file', 'url' or ''."""
    if cfg.get('source') in ('hf-hub', 'local-dir'):
        return cfg['source']
    order = (('state_dict', 'state_dict'), ('file', 'file'), ('hf_hub_id', 'hf-hub'), ('url', 'url'))
    return next((source for key, source in order if cfg.get(key)), '')


def was_loading(error: Exception) -> bool:
    """Whether an error came up while timm loaded weights, and not while it made the model."""
    return came_through(error, 'load_pretrained')


def came_through(error: Exception, function: str) -> bool:
    """Whether an error was raised in a function of that name, or in what it called."""
    return any(frame.name == function for frame in traceback.extract_tb(error.__traceback__))


def source_of(cfg: Dict[str, Any]) -> str:
    """Where weights come from, in words."""
    if cfg['source'] == 'hf-hub':
        return f'{cfg["hf_hub_id"]} on the Hub'
    if cfg['source'] == 'local-dir':
        return f'folder {cfg["file"]}'
    if cfg['source'] == 'url':
        return cfg['url']
    return f'file {cfg["file"]}{" of timm-sot" if Path(cfg["file"]).parent.parent == hub_folder() else ""}'


def explain(error: Exception, cfg: Dict[str, Any], with_config: bool) -> None:
    """Put the source of the weights, and what would work, into the message of an error.

    Args:
        error: The error.
        cfg: The configuration of the weights, its `source` that of `weights_source`.
        with_config: Whether the arguments of the model came with the weights.
    """
    # torch says of a pickle that is cut off that its zip archive has no end, or no beginning, or of another zip archive
    # that it lacks the files of a pickle
    damaged = (
        isinstance(error, (SafetensorError, EOFError))
        or any(reader in str(error) for reader in ('PytorchStreamReader', 'inline_container'))
        or isinstance(error, KeyError) and isinstance(error.args[0], int))  # an opcode that no pickle has
    file = WEIGHTS_FILE
    if cfg['source'] == 'hf-hub' and with_config:
        repo_id = cfg['hf_hub_id'].partition('@')[0]
        advice = f'config.json and weights of the repository must go together, hf-hub:{repo_id}@REVISION has older ones'
    elif cfg['source'] == 'local-dir':
        advice = 'its config.json and weights must go together, export or copy it anew'
    else:
        if cfg['source'] != 'hf-hub':
            file = Path(cfg[cfg['source']]).name
        packaged = cfg['source'] == 'file' and Path(cfg['file']).parent.parent == hub_folder()
        if damaged or isinstance(error, FileNotFoundError):
            advice = 'install timm-sot again' if packaged else 'check its path, or copy it anew'
        elif packaged and set(re.findall(r'size mismatch for (\w+)', str(error))) == {'head'}:
            advice = 'leave num_classes out of pretrained_cfg_overlay: it says of how many classes the weights are'
        elif packaged:
            advice = (
                'leave depth, embed_dim, mlp_ratio, kernel_size, n_conv_layers and context at their defaults, attn at '
                'that of the model or at another than sot_shares, and of sot_shares num_heads and sot_iters, too; or '
                'create the model without pretrained weights')
        elif 'head.' in str(error):
            advice = (
                'say of how many classes the weights are, with pretrained_cfg_overlay=dict(file=..., num_classes=...), '
                'and create the model with the arguments that they were trained with')
        elif isinstance(error, AttributeError):
            advice = 'it holds something else than weights by their names, which is what a checkpoint holds'
        else:
            advice = 'create the model with the arguments that the weights were trained with'

    source, message = source_of(cfg), str(error).rstrip('.')
    if isinstance(error, ValueError) and came_through(error, 'checkpoint_filter_fn'):  # it says itself what would work
        error.args = (f'{source}: {message}.',)
        return
    if isinstance(error, OSError) and error.errno is not None:
        if cfg['source'] in ('hf-hub', 'url'):
            advice = 'free space, or choose another cache with cache_dir or HF_HOME'
        error.strerror = f'{source}: {error.strerror}; {advice}'
        return
    if isinstance(error, FileNotFoundError) and not message:
        message = 'there is no such file'
        if cfg['source'] == 'file' and Path(cfg['file']).is_dir():
            message = 'this is a folder'
            advice = f'name a file in it, or, with a config.json in it, local-dir:{cfg["file"]} in place of the model'
    elif damaged:
        message = f'{file} is damaged, cut off or no checkpoint ({message.partition(". ")[0] or type(error).__name__})'
    elif 'weights_only' in message:  # timm has refused a pickle, and goes on to say how to load it nevertheless
        message = message.partition('. ')[0]
        advice = 'it holds more than weights, or none, have them saved as safetensors'
    elif type(error).__module__.partition('.')[0] in (
            'huggingface_hub', 'httpx', 'httpx2', 'requests', 'urllib'):
        message = f'{file} could not be downloaded ({message})'
        token = '' if cfg['source'] == 'url' else ' and that your token may read it'
        advice = f'check that it is there{token}, or try again'
    error.args = (f'{source}: {message}; {advice}.',)
    if isinstance(error, URLError):  # which says something else than its arguments
        setattr(error, 'msg' if isinstance(error, HTTPError) else 'reason', *error.args)


class DamagedDownload(RuntimeError):
    """A file in the Hub's cache is not the one that the Hub announced."""


def check_download(model_id: str, cache_dir: Optional[str], error: Optional[Exception] = None) -> None:
    """Compare the downloaded weights of a Hub model with their SHA-256, which huggingface_hub does not.

    The cache names a large file by the hash under which the Hub announced it. A file that differs is removed, so that
    the next try downloads it again.

    Raises:
        DamagedDownload: If it differs.
    """
    if not model_id:
        return
    from huggingface_hub import try_to_load_from_cache

    repo_id, _, revision = model_id.partition('@')
    pointer = try_to_load_from_cache(repo_id, WEIGHTS_FILE, cache_dir=cache_dir, revision=revision or None)
    if not isinstance(pointer, str):
        return
    blob = os.path.realpath(pointer)
    announced = os.path.basename(blob)
    if not re.fullmatch('[0-9a-f]{64}', announced):  # no hash, or a cache without links
        return
    actual = hashlib.sha256(Path(blob).read_bytes()).hexdigest()
    if actual == announced:
        return
    try:
        os.remove(pointer)
        os.remove(blob)
        advice = 'it has been removed from the cache, try again'
    except OSError:
        advice = f'remove {blob} and try again'
    raise DamagedDownload(
        f'{model_id} on the Hub: the {WEIGHTS_FILE} that came is not the one that the Hub announced (SHA-256 '
        f'{actual[:12]}..., announced {announced[:12]}...); {advice}.') from error


autoload()  # if this module was the one that imported timm, the models could not be registered before

""" The models of a study, trained one after another on the same draw """
import difflib
import hashlib
import json
import os
import platform
import subprocess
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from timm.layers import to_2tuple
from torch import nn

from .. import __version__
from .data import StudyData
from .engine import Recipe, train
from .errors import StudyError, missing_extra

__all__ = ['append_results', 'build_models', 'format_table', 'input_size', 'resolve_device', 'run_study']


def resolve_device(name: str = '') -> torch.device:
    """The device called `name`, by default a GPU if there is one."""
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # unknown to torch, or absent
        raise StudyError(f'device {name!r} cannot be used: {str(e).splitlines()[0]}') from e
    return device


def input_size(names: Sequence[str], model_kwargs: Dict[str, Any]) -> Tuple[int, int]:
    """Height and width of the images that the named models take, of which there must be one for all.

    Raises:
        StudyError: If a model is unknown or the models disagree.
    """
    for name in names:
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), n=5)
            hint = f'did you mean {", ".join(close)}?' if close else 'timm.list_models() has the names.'
            raise StudyError(f'unknown model {name!r}; {hint}')
    if 'img_size' in model_kwargs:
        return to_2tuple(model_kwargs['img_size'])
    sizes = {name: timm.get_pretrained_cfg(name).input_size[-2:] for name in names}
    if len(set(sizes.values())) > 1:
        listed = ', '.join(f'{name} {height}x{width}' for name, (height, width) in sizes.items())
        raise StudyError(
            f'the models of a study see the same images, these differ in size: {listed}; '
            f'choose models of one size, or one for all with --model-kwargs img_size=32.')
    return sizes[names[0]]


def build_models(
        names: Sequence[str],
        model_kwargs: Dict[str, Any],
        num_classes: int,
        seed: int,
) -> List[nn.Module]:
    """Create the models with the same initial values in all parameters that they share with the first one by name."""
    models = []
    for name in names:
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, num_classes=num_classes, **model_kwargs)
        except (TypeError, ValueError) as e:
            raise StudyError(f'cannot create {name} with {model_kwargs or "its defaults"}: {e}') from e
        if models:
            own = model.state_dict()
            shared = {k: v for k, v in models[0].state_dict().items() if k in own and v.shape == own[k].shape}
            model.load_state_dict(shared, strict=False)
        models.append(model)
    return models


def run_study(
        names: Sequence[str],
        data: StudyData,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> List[Dict[str, Any]]:
    """Train the named models with the same seed, data order, augmentation and shared initial weights.

    Returns:
        For each model what there is to know of its run, ready for JSON; `top1` (percent) and `loss` are those on the
        test images after each epoch, `best` and `final` the highest and the last top-1.
    """
    try:
        from tqdm import tqdm
    except ImportError as e:
        raise missing_extra(e) from e

    model_kwargs = model_kwargs or {}
    about = {'versions': versions(), 'commit': commit(), 'data': f'{data.name} {fingerprint(data)}'}
    results = []
    width = max(map(len, names))
    for name, model in zip(names, build_models(names, model_kwargs, data.num_classes, seed)):
        model.to(device)
        top1s, losses = [], []
        start = time.perf_counter()
        with tqdm(total=recipe.epochs * recipe.steps(data), desc=f'{name:{width}}', unit='step') as bar:
            for top1, loss in train(model, data, recipe, seed, device, on_step=bar.update):
                top1s.append(round(top1, 4))
                losses.append(round(loss, 6))
                bar.set_postfix({'top-1': f'{top1:.2f}'})
        results.append({
            'model': name, 'kwargs': model_kwargs, 'seed': seed, 'epochs': recipe.epochs,
            'best': max(top1s), 'final': top1s[-1], 'top1': top1s, 'loss': losses,
            'seconds': round(time.perf_counter() - start, 2), 'device': device_name(device), **about})
    return results


def format_table(results: Sequence[Dict[str, Any]], data: StudyData) -> str:
    """The results as a table, with what they were got on under it."""
    width = max(len('model'), *(len(result['model']) for result in results))
    lines = [f'{"model":{width}}  {"top-1":>6}  {"loss":>6}  {"seconds":>7}']
    for result in results:
        lines.append(
            f'{result["model"]:{width}}  {result["final"]:6.2f}  {result["loss"][-1]:6.4f}  {result["seconds"]:7.1f}')
    first = results[0]
    lines.append(
        f'n = 1 run a model, {first["epochs"]} epochs, seed {first["seed"]}; {data.name}: {len(data.train.labels)} '
        f'training and {len(data.test.labels)} test images; {first["device"]}')
    return '\n'.join(lines)


def append_results(folder: str, results: Sequence[Dict[str, Any]]) -> None:
    """Append the results to `results.jsonl` in `folder`, one line each."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'results.jsonl'), 'a') as f:
        f.writelines(json.dumps(result) + '\n' for result in results)


def device_name(device: torch.device) -> str:
    """The device as a reader would call it."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type}, {torch.get_num_threads()} threads' if device.type == 'cpu' else str(device)


def fingerprint(data: StudyData) -> str:
    """A short hash of all pixels and labels."""
    digest = hashlib.sha256()
    for tensor in (*data.train, *data.test):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> Dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
        'timm_sot': __version__}


def commit() -> str:
    """Commit of the source tree this runs from, with a + where it has changes; empty for an installed package."""
    folder = os.path.dirname(os.path.abspath(__file__))
    git = ['git', '-C', folder]
    try:
        described = subprocess.run(
            [*git, 'describe', '--always', '--dirty=+', '--abbrev=12', '--exclude=*'],
            capture_output=True, text=True, check=True)
        tracked = subprocess.run([*git, 'ls-files', '--error-unmatch', '../__init__.py'], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ''
    return described.stdout.strip() if tracked.returncode == 0 else ''

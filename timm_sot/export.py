""" From a checkpoint to a folder that timm and the Hub read: config.json, model.safetensors, README.md

Everything in the folder is taken from the checkpoint, from what was recorded beside it, or measured here.
"""
import argparse
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import clean_state_dict, save_for_hf
from torch import nn

from . import __version__
from .errors import UserError
from .study.data import TEST_SPLITS, same_images
from .study.original import JPEG
from .study.store import NOT_RECIPE, find_result

__all__ = ['Checkpoint', 'Score', 'evaluate', 'export', 'read_checkpoint']

PROJECT = 'Self-Optimal-Transport attention and these models to ' \
          '[timm](https://github.com/huggingface/pytorch-image-models)'
FILES = ('config.json', 'model.safetensors', 'README.md')

# how a card calls what its own name would not explain
_LABELS = {
    'augment': 'Augmentation',
    'lr': 'Learning rate',
    'schedule': 'Learning rate schedule, see `timm-sot study --help`',
    'smoothing': 'Label smoothing',
    'weight_decay': 'Weight decay, of all parameters',
}

# of train.py's arguments: where it ran and what it wrote, not how it trained
_PLACES = {
    'checkpoint_hist', 'config', 'data', 'data_dir', 'dist_backend', 'distributed', 'eval_checkpoint', 'experiment',
    'local_rank', 'log_interval', 'log_wandb', 'output', 'pin_mem', 'rank', 'recovery_interval',
    'resume', 'save_images', 'wandb_project', 'wandb_resume_id', 'wandb_tags', 'workers', 'world_size',
}


class Checkpoint(NamedTuple):
    """A trained network with what is known of its training."""
    model: str
    kwargs: Dict[str, Any]  # arguments of the model other than its defaults
    weights: Dict[str, torch.Tensor]
    data: str  # what it was trained on
    facts: List[Tuple[str, str]]  # of the training, for the card
    command: str
    limits: List[str]
    data_config: Dict[str, Any] = {}  # preprocessing other than the model's default
    by_study: bool = True  # else by timm's train.py


class Score(NamedTuple):
    """Accuracy on a folder of images."""
    top1: float  # percent
    split: str
    images: int
    digest: str  # of the files
    classes: List[str]


def export(
        checkpoint: str,
        out: str,
        data_dir: str = '',
        device: Optional[torch.device] = None,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> Optional[Score]:
    """Write the folder of a checkpoint.

    Args:
        checkpoint: A checkpoint of timm's train.py, or the safetensors of a finished run of a study.
        out: The folder, named <model>.<tag>; the tag names the data.
        data_dir: Images to evaluate on, in val/<class>/, or else test/<class>/, or else <class>/.
        device: Where to evaluate, None for the CPU.
        model_kwargs: Arguments to use in place of those of the training, None for the model's default; the card names
            them.

    Returns:
        What was measured, None without `data_dir`.

    Raises:
        UserError: If the checkpoint or the images cannot be read, the folder cannot be written, or its name is none
            for the Hub.
    """
    folder = Path(out).resolve()
    try:
        validate_repo_id(folder.name)
    except HFValidationError as e:
        raise UserError(f'{out}: the name of the folder is that of the model in its card and on the Hub, which does '
                        f'not take {folder.name!r}; choose one like cct_2_sot_qk.cifar10, of letters, digits, -, _ '
                        f'and .') from e
    source = read_checkpoint(checkpoint)
    changed = {key: value for key, value in (model_kwargs or {}).items() if source.kwargs.get(key) != value}
    if changed:
        trained = plain([f'{key}={source.kwargs.get(key)}' for key in changed])
        now = plain([f'{key}={value}' for key, value in changed.items()])
        kwargs = {key: value for key, value in {**source.kwargs, **changed}.items() if value is not None}
        source = source._replace(kwargs=kwargs, facts=[
            *source.facts, ('Changed since training', f'{trained} in training, {now} in this model and its result')])
    if checkpoint.endswith('.safetensors'):  # of a study, whose command leaves it in the folder `run`
        words = ['timm-sot', 'export', f'run/checkpoints/{Path(checkpoint).name}', '--out', f'hub/{folder.name}']
        words += ['--data-dir', 'DIR'] * bool(data_dir)
        words += ['--model-kwargs', *(f'{key}={value}' for key, value in changed.items())] * bool(changed)
        source = source._replace(command=f'{source.command}\n{shlex.join(words)}')
    strangers = sorted(p.name for p in folder.iterdir() if p.name not in FILES) if folder.is_dir() else []
    if strangers:
        raise UserError(f'{out} holds other files ({", ".join(strangers[:3])}); choose a folder of its own.')
    model = build(source, checkpoint)
    model.pretrained_cfg['tag'] = folder.name.partition('.')[2] or None
    score = evaluate(model, data_dir, device) if data_dir else None
    card = format_card(folder.name, model, source, score)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}.') as partial:
            save_for_hf(
                model, partial, model_config=dict(label_names=score.classes) if score else None,
                model_args=source.kwargs, safe_serialization=True)
            Path(partial, 'README.md').write_text(card, encoding='utf-8')
            shutil.copymode(Path(partial, 'README.md'), Path(partial, 'model.safetensors'))  # others may read it, too
            folder.mkdir(exist_ok=True)
            for name in FILES:  # each whole or not at all
                os.replace(Path(partial, name), folder / name)
    except (OSError, SafetensorError) as e:  # safetensors reports a full disk as an error of its own
        raise UserError(f'cannot write {out}: {getattr(e, "strerror", None) or e}') from e
    return score


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint of train.py or of a study, running no code that it may hold."""
    if not os.path.isfile(path):
        raise UserError(f'{path} is not a file; give a checkpoint of train.py (model_best.pth.tar) or of a study '
                         f'(checkpoints/NAME.safetensors).')
    try:
        if path.endswith('.safetensors'):
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of train.py
                content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:
        # the first sentence: that of torch is followed by how to run what a pickle holds
        reason = str(e).strip().splitlines()[0].partition('. ')[0] if str(e).strip() else type(e).__name__
        raise UserError(f'{path} is damaged or no checkpoint of weights and plain values: {reason}') from e
    if path.endswith('.safetensors'):
        return read_study(path, content)
    keys = set(content) if isinstance(content, dict) else set()
    if {'state_dict', 'epoch', 'args'} <= keys and hasattr(content['args'], 'model'):
        return read_train(content)
    if 'state' in keys:
        raise UserError(f'{path} is a run of a study in progress; its weights appear as .safetensors at its end.')
    raise UserError(f'{path} records no training arguments; export takes checkpoints of train.py and of studies.')


def read_study(path: str, weights: Dict[str, torch.Tensor]) -> Checkpoint:
    """The run of a study whose weights these are; its result is in results.jsonl, beside or above them."""
    found = find_result(path)
    if found is None:
        raise UserError(f'there is no result of {Path(path).stem} in a results.jsonl beside {path} or above its '
                        f'folder; export takes the weights of a study from the folder that the study wrote.')
    result, seeds, settings = found
    model, kwargs = result['model'], result['kwargs']
    first, _ = settings.get('first', (model, kwargs))
    options = {key: value for key, value in settings.items() if key not in NOT_RECIPE}
    options.update(
        (key, settings[key]) for key, default in (('fraction', 1.), ('holdout', 0.))
        if settings.get(key, default) != default)
    words = ['timm-sot', 'study', '--models', *dict.fromkeys((first, model))]
    if kwargs:
        words += ['--model-kwargs', *(f'{key}={value}' for key, value in kwargs.items())]
    words += ['--seed', str(result['seed']), '--epochs', str(result['epochs'])]
    for key, value in options.items():
        words += ['--' + key.replace('_', '-'), *map(str, value if isinstance(value, (list, tuple)) else [value])]
    name = result['data'].split()[0]
    spread = []
    if len(seeds) > 1:
        finals = [each['final'] for each in seeds]
        mean = f'{fmean(finals):.2f} ± {stdev(finals):.2f} after the last epoch'
        spread = [(f'Mean of {len(seeds)} seeds', mean)]
    facts = [
        ('Epochs', result['epochs']),
        ('Seed', result['seed']),
        ('Data', result['data']),
        ('Top-1 during training', f'{result["final"]:.2f} after the last epoch, {result["best"]:.2f} after the best'),
        *spread,
        ('Device', '; '.join(result[key] for key in ('device', 'processor') if key in result)),
        ('Training time', f'{result["seconds"]:.0f} s'),
        ('Versions', ', '.join(f'{key} {value}' for key, value in result['versions'].items())),
        ('Commit of timm-sot', result['commit'] or 'not recorded'),
        *((_LABELS.get(key, key.replace('_', ' ').capitalize()), value) for key, value in options.items()),
    ]
    command = ' '.join(map(shlex.quote, words)) + ('' if name == 'digits' else ' --data-dir DIR') + ' --out run'
    limits = [f'One run of {result["epochs"]} epochs with one seed, its last epoch; another seed gives another number.']
    if same_images(result['data'], JPEG):
        limits.append('The images of CIFAR-10 were JPEG files of quality 75 (4:2:0), which costs accuracy: compare it '
                      'only with what was trained and measured on the same files.')
    return Checkpoint(
        model, kwargs, weights, name, [(key, plain(value)) for key, value in facts], command, limits)


def read_train(content: Dict[str, Any]) -> Checkpoint:
    """A checkpoint of timm's train.py; of averaged weights and trained ones the averaged, as timm's validate.py."""
    args = vars(content['args'])
    averaged = content.get('state_dict_ema') is not None
    weights = clean_state_dict(content['state_dict_ema' if averaged else 'state_dict'])
    kwargs = dict(args.get('model_kwargs') or {})
    if args.get('input_size'):
        kwargs['in_chans'] = args['input_size'][0]
    for option, argument in (('in_chans', 'in_chans'), ('num_classes', 'num_classes'), ('gp', 'global_pool')):
        if args.get(option) is not None:
            kwargs[argument] = args[option]
    data_config = {
        key: tuple(args[key]) if isinstance(args[key], list) else args[key]
        for key in ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode') if args.get(key) is not None}
    if data_config.get('interpolation') == 'random':
        del data_config['interpolation']
    # of the images alone: train.py leaves it to model_kwargs what size the model is of
    if args.get('input_size'):
        data_config['input_size'] = tuple(args['input_size'])
    elif args.get('img_size') is not None:
        data_config['input_size'] = (args.get('in_chans') or 3, args['img_size'], args['img_size'])

    data = args.get('dataset') or os.path.basename(os.path.abspath(args.get('data_dir') or args.get('data') or 'data'))
    epochs = content['epoch'] + 1
    options = {key: value for key, value in sorted(args.items())
               if key not in _PLACES and value is not None and value is not False and value not in ('', [], {})}
    origin = [key for key in ('initial_checkpoint', 'pretrained_path') if key in options]
    options.update((key, os.path.basename(options[key])) for key in origin)
    facts = [
        ('Epochs', f'{epochs} of {args.get("epochs", "?")}'),
        ('Seed', args.get('seed', 'not recorded')),
        ('Data', data),
        ('Validation during training', content.get('metric', 'not recorded')),
        ('Device', args.get('device', 'not recorded')),
        *(('Began with the weights in', options[key]) for key in origin),
        ('Weights', 'averaged (EMA)' if averaged else 'as trained'),
        ('Commit of timm-sot', f'not recorded by train.py; exported with timm-sot {__version__}'),
    ]
    config = ''.join(f'{key}: {json.dumps(value, default=str)}\n' for key, value in options.items())
    command = f'cat > args.yaml << END\n{config}END\npython train.py --config args.yaml --data-dir DIR'
    return Checkpoint(
        args['model'], kwargs, weights, data, [(key, plain(value)) for key, value in facts], command,
        [f'One run with one seed, taken after {epochs} epochs.'], data_config, by_study=False)


def needs_timm_sot(model: nn.Module) -> bool:
    """Whether anything of the model is of this package."""
    return any(type(module).__module__.partition('.')[0] == 'timm_sot' for module in model.modules())


def plain(value: Any) -> str:
    """A value as a cell of a table."""
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def build(source: Checkpoint, path: str) -> nn.Module:
    """The network of a checkpoint, in float32."""
    try:
        model = timm.create_model(source.model, **source.kwargs)
        model.load_state_dict(source.weights)
    except (RuntimeError, TypeError, ValueError) as e:
        arguments = ' '.join(f'{key}={value}' for key, value in source.kwargs.items())
        raise UserError(f'{path} was recorded as {source.model} {arguments}, which does not fit: '
                         f'{" ".join(str(e).split())}') from e
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UserError(f'{path} holds values that are not finite, in {bad[0]}; its training diverged.')
    # what the images must be; newer versions of timm see to the sizes themselves when they save
    cfg = model.pretrained_cfg
    cfg.update(num_classes=model.num_classes, input_size=(
        getattr(model, 'in_chans', cfg['input_size'][0]), *getattr(model, 'img_size', cfg['input_size'][1:])))
    cfg.update(source.data_config)
    if 'input_size' in source.data_config:
        cfg.pop('test_input_size', None)
    return model.float().eval()


@torch.inference_mode()
def evaluate(model: nn.Module, data_dir: str, device: Optional[torch.device] = None) -> Score:
    """Top-1 on a folder of images, with the calls of timm's validate.py and its batch size."""
    device = device or torch.device('cpu')
    root = Path(data_dir)
    splits = [split for split in TEST_SPLITS if (root / split).is_dir()]
    folder = root / splits[0] if splits else root
    try:
        dataset = create_dataset(
            '', root=str(folder), input_img_mode='L' if model.pretrained_cfg['input_size'][0] == 1 else 'RGB')
    except (RuntimeError, OSError, AssertionError) as e:
        reason = f': {e}' if str(e) else ''
        raise UserError(f'{folder} is no folder with images in folders of their classes{reason}') from e
    classes = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)
    if len(classes) != model.num_classes:
        raise UserError(f'{folder} has {len(classes)} classes, the model {model.num_classes}; give it images like '
                         f'those that it was trained on.')
    files = sorted(dataset.filenames())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.encode() + b'\0' + (folder / file).read_bytes())

    config = resolve_data_config({}, model=model, use_test_size=True)
    loader = create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=256,
        use_prefetcher=True,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        num_workers=0,
        persistent_workers=False,  # older versions of timm ask for them even where there are no workers
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        device=device,
    )
    model = model.to(device).eval()
    correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    model.cpu()
    return Score(round(100 * correct / len(files), 4), folder.name, len(files), digest.hexdigest()[:16], classes)


def format_card(name: str, model: nn.Module, source: Checkpoint, score: Optional[Score]) -> str:
    """The README.md of a folder, with the metadata that the Hub asks for."""
    data = name.partition('.')[2] or source.data
    cfg = model.pretrained_cfg
    results = [EvalResult(
        task_type='image-classification', dataset_type=data, dataset_name=data, dataset_split=score.split,
        metric_type='accuracy', metric_name='Top-1 accuracy', metric_value=score.top1)] if score else None
    metadata = ModelCardData(
        license=cfg.get('license') or 'apache-2.0', library_name='timm', pipeline_tag='image-classification',
        tags=['timm', *['timm-sot'] * needs_timm_sot(model), 'image-classification'],
        datasets=[data], metrics=['accuracy'],
        model_name=name, eval_results=results)
    attn = getattr(getattr(next(iter(getattr(model, 'blocks', [])), None), 'attn', None), 'variant', None)
    size = 'x'.join(map(str, cfg['input_size'][1:]))
    parameters = sum(p.numel() for p in model.parameters())
    arguments = ' '.join(f'{key}={value}' for key, value in source.kwargs.items())
    measured = (
        f'Top-1 **{score.top1:.2f} %** on the {score.images:,} images of `{score.split}/` (SHA-256 of their names and '
        f'bytes: {score.digest}), in float32, by `timm-sot export`, which makes the calls of timm\'s validate.py.'
        if score else 'Not evaluated when it was exported.')
    limits = [
        *source.limits,
        f'Trained for {model.num_classes} classes on images of {size} pixels; on other images it is a starting point '
        f'for training, not a classifier.',
    ]
    if attn == 'sot_qkt':
        limits.append('Its attention needs as many tokens as a head is wide: the image size cannot be changed.')
    kind = f'A Compact Convolutional Transformer with `{attn}` attention' if attn else f'`{type(model).__name__}`'
    facts = '\n'.join(f'| {key} | {value} |' for key, value in source.facts)
    origin = f'with timm-sot, which adds {PROJECT}.' if source.by_study else "by timm's train.py."
    install = ''
    if needs_timm_sot(model):
        install = 'timm loads the weights, timm-sot brings the model; nothing needs to be imported from it:\n\n' \
            '```bash\npip install timm-sot\n```\n\n'
        origin += '' if source.by_study else f' timm-sot adds {PROJECT}.'
    return f'''---
{metadata.to_yaml()}
---
# Model card for {name}

{kind}, trained on {data} {origin}

- Architecture: `{cfg["architecture"]}`{f" with {arguments}" if arguments else ""}
- Parameters: {parameters:,}
- Input: {size} pixels, {cfg["input_size"][0]} channels
- Classes: {model.num_classes}{f" ({', '.join(score.classes)})" if score and len(score.classes) <= 20 else ""}

## Result

{measured}

## Use

{install}```python
import timm
import torch

model = timm.create_model('hf-hub:USER/{name}', pretrained=True).eval()  # or local-dir:PATH for a folder
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)  # from a PIL image to the model's input
logits = model(torch.zeros(1, *config['input_size']))
```

## Training

| | |
| --- | --- |
{facts}

```bash
{source.command}
```

## Limits

{chr(10).join(f"- {limit}" for limit in limits)}
'''

""" From a checkpoint to a folder that timm and the Hub read: config.json, model.safetensors, README.md

Everything in the folder is taken from the checkpoint, from what was recorded beside it, or measured here.
"""
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import timm
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import save_for_hf
from torch import nn

from ..errors import UserError, first_line
from ..study.store import row_name
from ..viz.inputs import fit_channels, input_size
from .card import format_card
from .checkpoint import Checkpoint, plain, read_checkpoint
from .score import Score, evaluate

__all__ = ['export']

FILES = ('config.json', 'model.safetensors', 'README.md')


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
        out: The folder, named <model>.<tag>; the tag names the data, after e<epochs>_ if other weights have it, too.
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
    if source.by_study:  # whose command leaves it in the folder `run`
        words = ['timm-sot', 'export', f'run/checkpoints/{Path(checkpoint).name}', '--out', f'hub/{folder.name}']
        words += ['--data-dir', 'DIR'] * bool(data_dir)
        words += ['--model-kwargs', *(f'{key}={value}' for key, value in changed.items())] * bool(changed)
        source = source._replace(command=f'{source.command}\n{shlex.join(words)}')
    strangers = sorted(p.name for p in folder.iterdir() if p.name not in FILES) if folder.is_dir() else []
    if strangers:
        raise UserError(f'{out} holds other files ({", ".join(strangers[:3])}); choose a folder of its own.')
    model, source = build(source, checkpoint)
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
    # safetensors reports a full disk as an error of its own, and tensors that share memory as the last
    except (OSError, SafetensorError, RuntimeError) as e:
        raise UserError(f'cannot write {out}: {getattr(e, "strerror", None) or first_line(e)}') from e
    return score


def build(source: Checkpoint, path: str) -> Tuple[nn.Module, Checkpoint]:
    """The network of a checkpoint, in float32, and the checkpoint with all arguments that make it."""
    sources = [source]
    size = source.data_args.get('img_size') or (source.data_args.get('input_size') or [])[-2:]
    cfg = timm.get_pretrained_cfg(source.model)  # None for local-dir: and hf-hub:
    if size and 'img_size' not in source.kwargs and (cfg is None or cfg.fixed_input_size):
        # the size of the images alone in train.py of older timm, from 1.0.31 on that of the model, too
        sources.insert(0, source._replace(kwargs={**source.kwargs, 'img_size': size}))
    for source in sources:
        try:
            model = timm.create_model(source.model, **source.kwargs)
            model.load_state_dict(source.weights)
            break
        except Exception as e:  # timm asserts, too
            error = e
    else:
        raise UserError(f'{path} was recorded as {row_name(source.model, source.kwargs)}, which does not fit: '
                        f'{" ".join(str(error).split()) or type(error).__name__}') from error
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UserError(f'{path} holds values that are not finite, in {bad[0]}; its training diverged.')
    # what the images must be; newer versions of timm see to the sizes themselves when they save
    cfg = model.pretrained_cfg
    cfg.update(num_classes=model.num_classes, input_size=input_size(model, cfg['input_size']))
    cfg.update(resolve_data_config(source.data_args, model=model))
    fit_channels(cfg)  # as newer versions of timm do
    if 'input_size' in source.data_args or 'img_size' in source.data_args:
        cfg.pop('test_input_size', None)
    return model.float().eval(), source

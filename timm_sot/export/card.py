""" The model card of a folder """
import re
from typing import Optional

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from ..cct import CCT
from .checkpoint import Checkpoint
from .score import Score

__all__ = ['format_card']

PROJECT = 'Self-Optimal-Transport attention and these models to ' \
          '[timm](https://github.com/huggingface/pytorch-image-models)'


def format_card(name: str, model: nn.Module, source: Checkpoint, score: Optional[Score]) -> str:
    """The README.md of a folder, with the metadata that the Hub asks for."""
    # of a tag like timm's e200_in12k, 200 epochs on in12k, the data
    data = re.sub(r'^e\d+_', '', name.partition('.')[2]) or source.data
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
    kind = 'A Compact Convolutional Transformer' if isinstance(model, CCT) else f'`{type(model).__name__}`'
    kind += f' with `{attn}` attention' if attn else ''
    facts = '\n'.join(f'| {key} | {value} |' for key, value in source.facts)
    origin = f'with timm-sot, which adds {PROJECT}.' if source.by_study else "by timm's train.py."
    install = ''
    if needs_timm_sot(model):
        install = 'timm-sot provides the model; timm finds it without an import, once it is installed:\n\n' \
            '```bash\npip install .  # in a clone of timm-sot\n```\n\n'
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


def needs_timm_sot(model: nn.Module) -> bool:
    """Whether anything of the model is of this package."""
    return any(type(module).__module__.partition('.')[0] == 'timm_sot' for module in model.modules())

""" How good a model is, on a folder of images """
import hashlib
from pathlib import Path
from typing import List, NamedTuple, Optional

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import nn
from tqdm import tqdm

from ..errors import UserError
from ..study.data import TEST_SPLITS, Files
from ..study.engine import set_precision

__all__ = ['Score', 'evaluate']


class Score(NamedTuple):
    """Accuracy on a folder of images."""
    top1: float  # percent
    split: str
    images: int
    digest: str  # of the files
    classes: List[str]


@torch.inference_mode()
def evaluate(model: nn.Module, data_dir: str, device: Optional[torch.device] = None) -> Score:
    """Top-1 on a folder of images, in float32, with the calls of timm's validate.py and its batch size."""
    device = device or torch.device('cpu')
    root = Path(data_dir)
    splits = [split for split in TEST_SPLITS if (root / split).is_dir()]
    folder = root / splits[0] if splits else root
    try:
        dataset = create_dataset('', root=str(folder))
    except (RuntimeError, OSError, AssertionError) as e:
        reason = f': {e}' if str(e) else ''
        raise UserError(f'{folder} is no folder with images in folders of their classes{reason}') from e
    classes = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)
    if len(classes) != model.num_classes:
        raise UserError(f'{folder} has {len(classes)} classes, the model {model.num_classes}; give it images like '
                         f'those that it was trained on.')
    files = sorted(dataset.filenames())
    digest = hashlib.sha256()
    for file in tqdm(files, desc='reading', unit='file', delay=1., leave=False, disable=None):
        digest.update(file.encode() + b'\0' + (folder / file).read_bytes())

    config = resolve_data_config({}, model=model, use_test_size=True)
    images = Files(dataset, mode='L' if config['input_size'][0] == 1 else 'RGB')
    loader = create_loader(
        images,
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
    set_precision('float32')  # torch's default are convolutions in TensorFloat-32, on a GPU
    model = model.to(device).eval()
    guesses, labels = [], []
    for batch, label in tqdm(loader, desc='evaluating', unit='batch', delay=1., leave=False, disable=None):
        guesses.append(model(batch).argmax(1).cpu())
        labels.append(label.cpu())
    model.cpu()
    labels = torch.cat(labels)
    images.check(labels)
    top1 = 100 * (torch.cat(guesses) == labels).double().mean().item()
    return Score(round(top1, 4), folder.name, len(files), digest.hexdigest()[:16], classes)

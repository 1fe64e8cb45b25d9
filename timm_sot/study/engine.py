""" Training of one model of a study """
from dataclasses import dataclass
from typing import Callable, Iterator, Tuple

import torch
from timm.data import resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn

from .data import Images, StudyData, augmented_batches, epoch_seed, normalizer

__all__ = ['Recipe', 'evaluate', 'train']


@dataclass(frozen=True)
class Recipe:
    """How every model of a study is trained: AdamW, a short linear warm-up, cosine decay to zero."""
    epochs: int = 4
    batch_size: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.03
    smoothing: float = 0.1

    def steps(self, data: StudyData) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(data.train.labels) // self.batch_size)


def train(
        model: nn.Module,
        data: StudyData,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        on_step: Callable[[], None] = lambda: None,
) -> Iterator[Tuple[float, float]]:
    """Train a model, which must be on `device`; yields test top-1 in percent and test loss after each epoch.

    Args:
        model: Any timm classifier.
        data: Images to train and to test on.
        recipe: How to train.
        seed: Decides data order, augmentation and dropout.
        device: Where the model is.
        on_step: Called after each optimizer step.
    """
    config = resolve_model_data_config(model)
    normalize = normalizer(config['mean'], config['std'], device)
    criterion = LabelSmoothingCrossEntropy(recipe.smoothing)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.steps(data)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=recipe.epochs, warmup_epochs=0.25, warmup_lr=recipe.lr / 100,
        step_on_epochs=False, updates_per_epoch=steps)

    for epoch in range(recipe.epochs):
        model.train()
        torch.manual_seed(epoch_seed(seed, epoch))  # dropout and stochastic depth
        for step, (images, labels) in enumerate(augmented_batches(data, recipe.batch_size, seed, epoch)):
            scheduler.step_update(epoch * steps + step)
            loss = criterion(model(normalize(images)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            on_step()
        yield evaluate(model, data.test, normalize)


@torch.inference_mode()
def evaluate(model: nn.Module, test: Images, normalize, batch_size: int = 500) -> Tuple[float, float]:
    """Top-1 in percent and mean cross-entropy on the test images."""
    model.eval()
    top1, loss = AverageMeter(), AverageMeter()
    for images, labels in zip(test.images.split(batch_size), test.labels.split(batch_size)):
        logits = model(normalize(images))
        labels = labels.to(logits.device)
        top1.update(accuracy(logits, labels)[0].item(), len(labels))
        loss.update(nn.functional.cross_entropy(logits.float(), labels).item(), len(labels))
    return top1.avg, loss.avg

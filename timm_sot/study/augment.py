""" Augmented epochs

An epoch is made once, in the order in which it will be trained on, and serves every model of its seed. Worker processes
make it in chunks, ahead of need where training leaves them cores; what a chunk holds depends on seed, epoch and its
place alone.
"""
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Dict, Iterator, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from ..machine import free_memory, shared_memory
from .data import Images

__all__ = ['AUGMENTATIONS', 'augment', 'epoch_seed', 'make_epochs', 'room_for_epochs']

CHUNK = 1000  # images
AHEAD = 3  # epochs that may lie ready


class _AutoAugment(AutoAugment):
    """torchvision's AutoAugment, its table of magnitudes made once for an image size and not for every operation."""

    @lru_cache(maxsize=None)
    def _augmentation_space(self, *args, **kwargs):
        return super()._augmentation_space(*args, **kwargs)


_BLACK = _AutoAugment(AutoAugmentPolicy.CIFAR10)
_GRAY = _AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[128, 128, 128])


def auto_augment(images: torch.Tensor, policy: AutoAugment = _BLACK) -> torch.Tensor:
    """AutoAugment with the CIFAR-10 policy, on PIL images, (B, 3, H, W) -> (B, 3, H, W)."""
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    out = [np.asarray(policy(Image.fromarray(image))) for image in pixels]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def random_crop(images: torch.Tensor, padding: int = 4) -> torch.Tensor:
    """Shift each image by up to `padding` pixels, black moving in, (B, C, H, W) -> (B, C, H, W)."""
    B, _, H, W = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, H, 1).unfold(3, W, 1)  # (B, C, top, left, H, W)
    top, left = torch.randint(0, 2 * padding + 1, (2, B))
    return windows[torch.arange(B), :, top, left]


def random_flip(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image with probability 1/2, (B, C, H, W) -> (B, C, H, W)."""
    mirrored = torch.rand(len(images)) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


AUGMENTATIONS = {
    'autoaugment': auto_augment,
    # what moves in is gray, as in the training script of Compact Transformers; in torchvision it is black
    'autoaugment-gray': partial(auto_augment, policy=_GRAY),
    'crop': random_crop,
    'flip': random_flip,
}


def augment(images: torch.Tensor, names: Sequence[str], seed: int) -> torch.Tensor:
    """Apply augmentations to uint8 images, (B, C, H, W) -> (B, C, H, W); the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            images = AUGMENTATIONS[name](images)
    return images


def epoch_seed(seed: int, epoch: int) -> int:
    """One seed for each epoch, so that a run can be taken up at any of them."""
    return seed * 100_003 + epoch


class _Chunks(Dataset):
    """The chunks of epochs of a seed, one after another."""

    def __init__(self, train: Images, augmentations: Sequence[str], seed: int, epochs: Sequence[int]):
        self.train = train
        self.augmentations = augmentations
        self.seeds = [epoch_seed(seed, epoch) for epoch in epochs]
        self.per_epoch = -(-len(train.labels) // CHUNK)

    def __len__(self) -> int:
        return len(self.seeds) * self.per_epoch

    def __getitem__(self, i: int) -> Images:
        seed, chunk = self.seeds[i // self.per_epoch], i % self.per_epoch
        order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(seed))
        images, labels = self.train.select(order[chunk * CHUNK:(chunk + 1) * CHUNK])
        return Images(augment(images, self.augmentations, seed * 1009 + chunk), labels)


def make_epochs(
        train: Images,
        augmentations: Sequence[str],
        seed: int,
        epochs: Sequence[int],
        workers: int = 0,
        kept: Optional[Dict[int, Images]] = None,
        room: int = 0,
        ahead: bool = True,
) -> Iterator[Images]:
    """Make shuffled, augmented epochs of a seed, one after another; to be closed where not all are asked for.

    Args:
        train: Images to augment.
        augmentations: Keys of `AUGMENTATIONS`, in the order of their application.
        seed: Seed of the epochs.
        epochs: Which, in this order.
        workers: Number of processes, 0 to work in this one.
        kept: Epochs of that seed that were made before, by number; those made now are added.
        room: Number of epochs in `kept` from which on no more are added.
        ahead: Have the processes work ahead, while an epoch is trained on, or only when the next is asked for: beside
            training on all cores they would take longer, and so would training.

    Yields:
        The images of an epoch in the order of training.
    """
    kept = {} if kept is None else kept
    to_make = [epoch for epoch in epochs if epoch not in kept]
    chunks = _Chunks(train, augmentations, seed, to_make)
    workers = min(workers, len(chunks))
    options = {}
    if workers:
        most = min((AHEAD if ahead else 1) * chunks.per_epoch, shared_memory() / 2 // (CHUNK * train.images[0].nbytes))
        options = dict(num_workers=workers, prefetch_factor=max(1, int(most // workers)), persistent_workers=not ahead)
    indices = [*range(len(chunks))] if ahead else []
    loader = DataLoader(chunks, batch_size=None, sampler=indices, **options)
    made = iter(loader) if ahead else iter(())
    not_wanted = threading.Event()  # an epoch may take minutes, for which nothing that ends the study should wait

    def make(epoch: int) -> Images:
        nonlocal made
        if epoch in kept:
            return kept[epoch]
        if not ahead:
            place = to_make.index(epoch) * chunks.per_epoch
            indices[:] = range(place, place + chunks.per_epoch)
            made = iter(loader)
        images, labels = torch.empty_like(train.images), torch.empty_like(train.labels)
        for i in range(chunks.per_epoch):  # workers hand them over in shared memory
            if not_wanted.is_set():
                raise CancelledError
            part = slice(i * CHUNK, (i + 1) * CHUNK)
            images[part], labels[part] = next(made)
        if len(kept) < room:
            kept[epoch] = Images(images, labels)
        return Images(images, labels)

    if not workers or not ahead:  # nor a thread: the random state is that of the process
        yield from map(make, epochs)
        return
    pool = ThreadPoolExecutor(1)  # puts the chunks of the next epoch together while one is trained on
    try:
        coming = pool.submit(make, epochs[0])
        for after in [*epochs[1:], None]:
            ready = coming.result()
            if after is not None:
                coming = pool.submit(make, after)
            yield ready
    finally:
        not_wanted.set()
        pool.shutdown(cancel_futures=True)


def room_for_epochs(train: Images) -> int:
    """How many epochs to keep in memory: what fits into a quarter of what is free of it, and into 8 GiB."""
    return int(min(8 << 30, free_memory() / 4)) // max(1, train.images.nbytes)

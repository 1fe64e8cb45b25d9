""" Augmented epochs

An epoch is made once, in the order in which it will be trained on, and serves every model of its seed. Worker processes
make it ahead of need, in chunks; what a chunk holds depends on seed, epoch and its place alone.
"""
import math
import shutil
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Dict, Iterator, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from .data import Images

__all__ = ['AUGMENTATIONS', 'Epochs', 'augment', 'epoch_seed']

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
    B, C, H, W = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, B, 1))
    rows = (top + torch.arange(H))[:, None, :, None]
    cols = (left + torch.arange(W))[:, None, None, :]
    return padded[torch.arange(B)[:, None, None, None], torch.arange(C)[:, None, None], rows, cols]


def random_flip(images: torch.Tensor) -> torch.Tensor:
    """Mirror every other image."""
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
    """The chunks of the epochs `wanted`, one after another."""

    def __init__(self, train: Images, augmentations: Sequence[str], wanted: Sequence[Tuple[int, int]]):
        self.train = train
        self.augmentations = augmentations
        self.wanted = wanted
        self.per_epoch = -(-len(train.labels) // CHUNK)

    def __len__(self) -> int:
        return len(self.wanted) * self.per_epoch

    def __getitem__(self, i: int) -> Images:
        (seed, epoch), chunk = self.wanted[i // self.per_epoch], i % self.per_epoch
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(len(self.train.labels), generator=generator)
        images, labels = self.train.select(order[chunk * CHUNK:(chunk + 1) * CHUNK])
        return Images(augment(images, self.augmentations, epoch_seed(seed, epoch) * 1009 + chunk), labels)


class Epochs:
    """The shuffled, augmented epochs of a study, to be asked for in the planned order.

    An epoch that is planned again is kept in memory, as far as `cache_bytes` allows, or made anew.
    """

    def __init__(
            self,
            train: Images,
            augmentations: Sequence[str],
            plan: Sequence[Tuple[int, int]],
            workers: int = 0,
            cache_bytes: int = 8 << 30,
    ):
        """Initialize the epochs and start the workers.

        Args:
            train: Images to augment.
            augmentations: Keys of `AUGMENTATIONS`, in the order of their application.
            plan: The (seed, epoch) pairs that will be asked for, in this order; some may be left out.
            workers: Number of processes, 0 to work in this one.
            cache_bytes: Memory for epochs that are planned more than once.
        """
        self.train = train
        self.augmentations = augmentations
        self.plan = list(plan)
        self.uses = Counter(plan)
        self.cache: Dict[Tuple[int, int], Images] = {}
        # the first of a kind are cached until the room is taken, the others are made as often as they are planned
        room = cache_bytes // max(1, train.images.nbytes)
        self.cached = set([pair for pair in dict.fromkeys(plan) if self.uses[pair] > 1][:room])
        self.wanted, seen = [], set()
        for pair in plan:
            if pair not in seen or pair not in self.cached:
                self.wanted.append(pair)
            seen.add(pair)
        self.made = 0
        chunks = _Chunks(train, augmentations, self.wanted)
        self.per_epoch = chunks.per_epoch
        workers = min(workers, len(chunks))
        options = {}
        if workers:
            ahead = min(AHEAD * chunks.per_epoch, shared_memory() / 2 // (CHUNK * train.images[0].nbytes))
            options = dict(num_workers=workers, prefetch_factor=max(1, int(ahead // workers)))
        self.chunks: Iterator[Images] = iter(DataLoader(chunks, batch_size=None, **options))
        # puts the chunks of the next epoch together while one is trained on
        self.thread = ThreadPoolExecutor(1) if workers else None
        self.coming: Optional[Tuple[Tuple[int, int], Future]] = None

    def get(self, seed: int, epoch: int) -> Images:
        """The images of an epoch in the order of training."""
        pair = (seed, epoch)
        made = None
        if self.coming is not None:
            ready, future = self.coming
            self.coming = None
            made = future.result()  # also where it is not the one: the workers' chunks come in order
            made = made if ready == pair else None
        if made is None:
            made = self._make(pair)
        if pair in self.plan:
            del self.plan[:self.plan.index(pair) + 1]
        if self.thread is not None and self.plan:
            self.coming = self.plan[0], self.thread.submit(self._make, self.plan[0])
        return made

    def close(self) -> None:
        """Stop working ahead."""
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
        self.chunks = iter(())

    def _make(self, pair: Tuple[int, int]) -> Images:
        """An epoch from the cache, from the workers, or, where it was not planned, from here."""
        if pair not in self.cache:
            try:
                skip = self.wanted.index(pair, self.made) - self.made
            except ValueError:
                chunks = _Chunks(self.train, self.augmentations, [pair])
                return self._collect(chunks[i] for i in range(self.per_epoch))
            for _ in range(skip * self.per_epoch):
                next(self.chunks)
            self.made += skip + 1
            made = self._collect(self.chunks)
            if pair not in self.cached:
                return made
            self.cache[pair] = made
        self.uses[pair] -= 1
        return self.cache[pair] if self.uses[pair] > 0 else self.cache.pop(pair)

    def _collect(self, chunks: Iterator[Images]) -> Images:
        """One epoch from its chunks, which workers hand over in shared memory."""
        images, labels = torch.empty_like(self.train.images), torch.empty_like(self.train.labels)
        for i in range(self.per_epoch):
            part = slice(i * CHUNK, (i + 1) * CHUNK)
            images[part], labels[part] = next(chunks)
        return Images(images, labels)


def shared_memory() -> float:
    """Bytes free for what processes hand to each other; containers may have little."""
    try:
        return shutil.disk_usage('/dev/shm').free
    except OSError:
        return math.inf

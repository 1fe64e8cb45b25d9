""" Images of a study

All images are decoded once and kept in memory as uint8; the training ones are augmented a batch at a time. It is made
for sets the size of CIFAR; larger ones are for timm's own train.py.
"""
import os
from typing import Iterator, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_transform

from .errors import StudyError, missing_extra

__all__ = ['Images', 'StudyData', 'augmented_batches', 'load_data', 'normalizer']

TRAIN_SPLITS = ('train', 'training')
TEST_SPLITS = ('val', 'valid', 'validation', 'eval', 'evaluation', 'test')


class Images(NamedTuple):
    """Images with their labels."""
    images: torch.Tensor  # uint8, (n, 3, H, W)
    labels: torch.Tensor  # int64, (n,)


class StudyData(NamedTuple):
    """What a study trains on and what it is measured on."""
    name: str
    train: Images
    test: Images
    num_classes: int
    flip: bool  # whether a mirrored training image is still one of its class


def load_data(data_dir: str, img_size: Tuple[int, int]) -> StudyData:
    """Load an image folder, or the digits of scikit-learn where `data_dir` is empty, resized to `img_size`."""
    return load_folder(data_dir, img_size) if data_dir else load_digits(img_size)


def load_digits(img_size: Tuple[int, int]) -> StudyData:
    """The 1,797 handwritten digits that scikit-learn ships, four fifths of each class for training."""
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise missing_extra(e) from e
    images, labels = datasets.load_digits(return_X_y=True)  # (1797, 64), 0 to 16
    images = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, img_size, mode='bicubic').round().clamp(0, 255)
    images = images.to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(labels).long()
    train, test = (
        torch.from_numpy(index) for index in
        train_test_split(torch.arange(len(labels)).numpy(), test_size=0.2, stratify=labels.numpy(), random_state=0))
    return StudyData('digits', Images(images[train], labels[train]), Images(images[test], labels[test]), 10, False)


def load_folder(root: str, img_size: Tuple[int, int]) -> StudyData:
    """An image folder as timm reads them: `train/<class>/*` and `val/<class>/*` or `test/<class>/*`."""
    if not os.path.isdir(root):
        raise StudyError(f'{root} is not a folder; --data-dir takes one that holds train/<class>/ and val/<class>/.')
    folders = []
    for splits in (TRAIN_SPLITS, TEST_SPLITS):
        found = [os.path.join(root, split) for split in splits if os.path.isdir(os.path.join(root, split))]
        if not found:
            raise StudyError(f'{root} has no folder {" or ".join(splits)}; --data-dir takes one that holds both '
                             f'train/<class>/ and val/<class>/ or test/<class>/.')
        folders.append(found[0])
    try:
        train, test = (create_dataset('', root=folder) for folder in folders)
    except RuntimeError as e:  # no images
        raise StudyError(f'{root}: {e}') from e
    classes = train.reader.class_to_idx
    if test.reader.class_to_idx != classes:
        differ = sorted(set(classes) ^ set(test.reader.class_to_idx))
        raise StudyError(f'{folders[0]} and {folders[1]} hold different classes: {", ".join(differ[:5])}.')
    name = os.path.basename(os.path.abspath(root))
    return StudyData(name, decode(train, img_size), decode(test, img_size), len(classes), True)


def decode(dataset, img_size: Tuple[int, int]) -> Images:
    """Decode the images of a timm dataset, scaled and cropped to `img_size`."""
    dataset.transform = create_transform((3, *img_size), normalize=False, crop_pct=1.)  # uint8 tensors
    images = torch.empty(len(dataset), 3, *img_size, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.int64)
    for i in range(len(dataset)):
        images[i], labels[i] = dataset[i]
    return Images(images, labels)


def augmented_batches(
        data: StudyData,
        batch_size: int,
        seed: int,
        epoch: int,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """The training batches (images, labels) of one epoch, shuffled and augmented, the last one smaller if it must be.

    They depend on the arguments alone: two models given the same ones see the same pixels in the same order.
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    images, labels = data.train
    for index in torch.randperm(len(labels), generator=generator).split(batch_size):
        batch = random_crop(images[index], generator)
        if data.flip:
            mirrored = torch.rand(len(index), generator=generator) < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
        yield batch, labels[index]


def epoch_seed(seed: int, epoch: int) -> int:
    """One seed for each epoch, so that a run can be taken up at any of them."""
    return seed * 100_003 + epoch


def random_crop(images: torch.Tensor, generator: torch.Generator, padding: int = 4) -> torch.Tensor:
    """Shift each image by up to `padding` pixels, black moving in, (B, C, H, W) -> (B, C, H, W)."""
    B, C, H, W = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, B, 1), generator=generator)
    rows = (top + torch.arange(H))[:, None, :, None]
    cols = (left + torch.arange(W))[:, None, None, :]
    return padded[torch.arange(B)[:, None, None, None], torch.arange(C)[:, None, None], rows, cols]


def normalizer(mean: Tuple[float, ...], std: Tuple[float, ...], device: torch.device):
    """The function from uint8 images, anywhere, to normalized float ones on `device`."""
    mean = torch.tensor(mean, device=device)[:, None, None] * 255
    std = torch.tensor(std, device=device)[:, None, None] * 255
    return lambda images: (images.to(device, non_blocking=True).float() - mean) / std

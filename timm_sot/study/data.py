""" Images of a study

All images are decoded once and kept in memory as uint8. It is made for sets the size of CIFAR; larger ones are for
timm's own train.py.
"""
import errno
import hashlib
import lzma
import os
import re
import sys
import tarfile
import tempfile
import zlib
from typing import Callable, NamedTuple, Optional, Tuple

import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from ..digits import load_digits
from ..errors import UserError, first_line, missing_extra

__all__ = [
    'HELD_OUT', 'VAL_FOLDER', 'Files', 'Images', 'StudyData', 'fingerprint_of', 'load_data', 'normalizer',
    'same_images', 'subset',
]

# in the name of data that are not measured on test images but on some of train/, or on those of val/
HELD_OUT, VAL_FOLDER = ' (validation)', ' (val/)'
UNREADABLE = -1  # in the place of a label
TRAIN_SPLITS = ('train', 'training')
TEST_SPLITS = ('val', 'valid', 'validation', 'eval', 'evaluation', 'test')


class Images(NamedTuple):
    """Images with their labels."""
    images: torch.Tensor  # uint8, (n, 3, H, W)
    labels: torch.Tensor  # int64, (n,)

    def to(self, device: torch.device) -> 'Images':
        return Images(*(tensor.to(device) for tensor in self))

    def select(self, index: torch.Tensor) -> 'Images':
        return Images(*(tensor[index] for tensor in self))


class StudyData(NamedTuple):
    """What a study trains on and what it is measured on."""
    name: str
    train: Images
    test: Images
    num_classes: int


def load_data(
        source: str,
        img_size: Tuple[int, int],
        workers: int = 0,
        dataset: str = '',
        download: bool = False,
) -> StudyData:
    """Load images and resize them to `img_size`.

    Args:
        source: An image folder, a tar archive of one (of any compression), or '' for the digits of scikit-learn.
        img_size: Height and width.
        workers: Number of processes that decode.
        dataset: A dataset as timm names it, such as 'torch/cifar10', which is then in the folder `source`.
        download: Download the dataset where it is not there.
    """
    if dataset:
        return load_dataset(dataset, source, img_size, workers, download)
    if not source:
        return split_digits(img_size)
    if os.path.isfile(source):
        return load_archive(source, img_size, workers)
    return load_folder(source, img_size, workers)


def split_digits(img_size: Tuple[int, int]) -> StudyData:
    """The handwritten digits that scikit-learn ships, four fifths of each class for training."""
    try:
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(img_size)
    except ImportError as e:
        raise missing_extra(e) from e
    digits = Images(images.repeat(1, 3, 1, 1), labels)
    train, test = train_test_split(torch.arange(len(labels)).numpy(), test_size=0.2, stratify=labels, random_state=0)
    return StudyData('digits', *(digits.select(torch.from_numpy(index)) for index in (train, test)), 10)


def load_archive(path: str, img_size: Tuple[int, int], workers: int = 0) -> StudyData:
    """An image folder in a tar archive, see `load_folder`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(path) as archive:
                members = tqdm(archive, desc='unpacking', unit='file', delay=1., leave=False, disable=None)
                archive.extractall(folder, members, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
                archive.fileobj.seek(archive.offset)
                if any(archive.fileobj.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                    raise tarfile.ReadError(f'damaged after {len(archive.getmembers())} files')
        except (tarfile.TarError, OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as e:
            if getattr(e, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f'no room in {tempfile.gettempdir()} to unpack {path}: {first_line(e)}. Unpack it '
                                f'elsewhere and name the folder, or name another place for temporary files in '
                                f'TMPDIR.') from e
            raise UserError(f'{path} cannot be unpacked: {first_line(e)}. --data-dir takes a folder, or a tar archive '
                            f'of one: if it is one, make or download it again.') from e
        entries = os.listdir(folder)
        inner = os.path.join(folder, entries[0]) if len(entries) == 1 else folder
        data = load_folder(inner if os.path.isdir(inner) else folder, img_size, workers)
    suffix = VAL_FOLDER if data.name.endswith(VAL_FOLDER) else ''
    return data._replace(name=os.path.basename(path).split('.')[0] + suffix)


def load_folder(root: str, img_size: Tuple[int, int], workers: int = 0) -> StudyData:
    """An image folder as timm reads them: `train/<class>/*` and `val/<class>/*`, or else `test/<class>/*`."""
    if not os.path.isdir(root):
        raise UserError(f'{root} is not a folder; --data-dir takes one that holds train/<class>/ and val/<class>/, or '
                        f'else test/<class>/, or a tar archive of one.')
    folders = []
    for splits in (TRAIN_SPLITS, TEST_SPLITS):
        found = [os.path.join(root, split) for split in splits if os.path.isdir(os.path.join(root, split))]
        if not found:
            raise UserError(f'{root} has no folder {" or ".join(splits)}; --data-dir takes one that holds both '
                             f'train/<class>/ and val/<class>/, or else test/<class>/.')
        folders.append(found[0])
    try:
        train, test = (create_dataset('', root=folder) for folder in folders)
    except RuntimeError as e:  # no images
        raise UserError(f'{root}: {e}') from e
    classes = train.reader.class_to_idx
    if test.reader.class_to_idx != classes:
        differ = sorted(set(classes) ^ set(test.reader.class_to_idx))
        raise UserError(f'{folders[0]} and {folders[1]} hold different classes: {", ".join(differ[:5])}.')
    name = os.path.basename(os.path.abspath(root))
    if os.path.basename(folders[1]) != 'test':
        name += VAL_FOLDER
    return StudyData(name, decode(train, img_size, workers), decode(test, img_size, workers), len(classes))


def load_dataset(
        name: str,
        root: str,
        img_size: Tuple[int, int],
        workers: int = 0,
        download: bool = False,
) -> StudyData:
    """A dataset that timm can create, with a split for training and one, or a test set, for validation."""
    try:
        train, test = (
            create_dataset(name, root=root or None, split=split, download=download)
            for split in ('train', 'validation'))
        images = decode(train, img_size, workers), decode(test, img_size, workers)
    except Exception as e:
        raise UserError(
            f'dataset {name!r} cannot be read from {root or "the default folder"}: '
            f'{first_line(e)} (--dataset takes what timm does, e.g. '
            f'torch/cifar10, --data-dir the folder, and --dataset-download downloads it)') from e
    # timm takes the test set for a validation split where torchvision has no other
    suffix = '' if re.fullmatch(r'torch/\w*(cifar|mnist)\w*', name) else VAL_FOLDER
    return StudyData(name.split('/')[-1] + suffix, *images, int(images[0].labels.max()) + 1)


class Files(Dataset):
    """The images of a folder, as timm's dataset would have them, which takes the next for one that it cannot read."""

    def __init__(self, dataset, transform: Optional[Callable] = None, mode: str = 'RGB'):
        self.dataset = dataset
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> Tuple[torch.Tensor, int]:
        file, label = self.dataset.reader[i]
        with file:
            return self.transform(Image.open(file).convert(self.mode)), label

    def __getitem__(self, i: int) -> Tuple[torch.Tensor, int]:
        try:
            return self.read(i)
        except Exception:  # of which nothing but its text would come out of a worker process
            return self.transform(Image.new(self.mode, (1, 1))), UNREADABLE

    def check(self, labels: torch.Tensor) -> None:
        """Raise a UserError that names the first of the images that could not be read, by the labels of all."""
        for i in (labels == UNREADABLE).nonzero().flatten().tolist():
            try:
                self.read(i)
            except Exception as e:
                file = self.dataset.filename(i, absolute=True)
                raise UserError(
                    f'{file} cannot be read as an image ({first_line(e)}); replace it, or take it away.') from e


def decode(dataset, img_size: Tuple[int, int], workers: int = 0) -> Images:
    """Decode the images of a timm dataset, scaled and cropped to `img_size`."""
    transform = create_transform((3, *img_size), normalize=False, crop_pct=1.)  # uint8 tensors
    if hasattr(dataset, 'reader') and not isinstance(dataset, IterableDataset):  # images that have a number
        dataset = Files(dataset, transform)
    else:
        dataset.transform = transform
    # workers would mix what is read in order, and as many as there are would be seen in the fingerprint
    workers = workers if len(dataset) > 2000 and not isinstance(dataset, IterableDataset) else 0
    batches = []
    with tqdm(total=len(dataset), desc='reading', unit='image', delay=1., leave=False,
              mininterval=0.5 if sys.stderr.isatty() else 10.) as bar:
        for batch in DataLoader(dataset, batch_size=256, num_workers=workers):
            batches.append(batch)
            bar.update(len(batch[1]))
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    if isinstance(dataset, Files):
        dataset.check(labels)
    elif (labels < 0).any():
        raise UserError('it has images without a label, choose a split that has labels.')
    return Images(images.expand(-1, 3, -1, -1).contiguous(), labels)  # of gray ones three equal channels


def subset(data: StudyData, fraction: float = 1., holdout: float = 0.) -> StudyData:
    """A fixed random part of the training images.

    Args:
        data: The whole.
        fraction: Share of the training images to keep.
        holdout: Share of the training images that takes the place of the test images, for choosing among models; the
            rest is trained on. The test images then play no part.
    """
    train = data.train
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    if holdout:
        held, order = order.tensor_split([max(1, round(holdout * len(order)))])
        if not len(order):
            raise UserError(
                f'--holdout {holdout} leaves none of {len(held)} training images to train on; hold fewer out.')
        data = data._replace(test=train.select(held), name=data.name.removesuffix(VAL_FOLDER) + HELD_OUT)
    kept = order[:max(1, round(fraction * len(order)))]
    return data._replace(train=train.select(kept.sort().values)) if holdout or fraction < 1 else data


def fingerprint_of(data: StudyData) -> str:
    """Name, number of images and a short hash of all pixels and labels."""
    digest = hashlib.sha256()
    for tensor in (*data.train, *data.test):
        digest.update(tensor.contiguous().numpy().data)
    return f'{data.name} {len(data.train.labels)}+{len(data.test.labels)} sha256:{digest.hexdigest()[:16]}'


def same_images(fingerprint: str, other: str) -> bool:
    """Whether two fingerprints are of the same images; a folder may have another name elsewhere."""
    return fingerprint.split()[-2:] == other.split()[-2:]


def normalizer(mean: Tuple[float, ...], std: Tuple[float, ...], device: torch.device):
    """The function from uint8 images on `device` to normalized float ones."""
    scale = 1 / (255 * torch.tensor(std, device=device)[:, None, None])
    shift = -torch.tensor(mean, device=device)[:, None, None] / torch.tensor(std, device=device)[:, None, None]
    return lambda images: images.float() * scale + shift

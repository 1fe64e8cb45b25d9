""" Images of a study """
import builtins
import errno
import pickle
import shutil
import tarfile

import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset, create_dataset
from torch.utils.data import DataLoader, get_worker_info
from torchvision import datasets

from timm_sot.errors import UserError
from timm_sot.study.data import (
    HELD_OUT,
    VAL_FOLDER,
    Images,
    StudyData,
    decode,
    fingerprint_of,
    load_data,
    normalizer,
    same_images,
    subset,
)


def make_data(num_train=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (num_train, 3, 8, 8), dtype=torch.uint8, generator=generator)
    train = Images(images, torch.arange(num_train))
    return StudyData('noise', train, train, num_train)


def test_digits():
    data = load_data('', (32, 32))
    assert data.train.images.shape == (1437, 3, 32, 32) and data.test.images.shape == (360, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8 and data.num_classes == 10
    assert data.test.labels.bincount().min() >= 34
    again = load_data('', (32, 32))
    assert torch.equal(data.train.labels, again.train.labels) and torch.equal(data.test.images, again.test.images)


def test_folder(digits_dir):
    data = load_data(str(digits_dir), (16, 24))
    assert data.train.images.shape == (400, 3, 16, 24) and data.test.images.shape == (200, 3, 16, 24)
    assert data.num_classes == 10 and data.train.labels.bincount().tolist() == [40] * 10


def test_folder_pixels_are_those_of_the_files(tmp_path):
    images = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8)
    for i, split in enumerate(['train', 'train', 'val', 'val']):
        (tmp_path / split / f'class{i % 2}').mkdir(parents=True)
        Image.fromarray(images[i].numpy()).save(tmp_path / split / f'class{i % 2}' / 'image.png')
    data = load_data(str(tmp_path), (8, 8))
    assert torch.equal(torch.cat([data.train.images, data.test.images]), images.permute(0, 3, 1, 2))
    assert data.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize('content', [b'', b'text', 'cut off'])
@pytest.mark.parametrize('workers', [0, 1])
def test_damaged_images_are_not_replaced_by_others(digits_dir, tmp_path, monkeypatch, content, workers):
    monkeypatch.setattr('timm_sot.study.data.DataLoader', lambda dataset, batch_size, num_workers: DataLoader(
        dataset, batch_size, num_workers=workers))
    shutil.copytree(digits_dir, tmp_path / 'images')
    file = sorted((tmp_path / 'images' / 'train' / '3').iterdir())[2]
    Image.effect_noise((32, 32), 90).save(file)
    file.write_bytes(file.read_bytes()[:400] if content == 'cut off' else content)
    with pytest.raises(UserError, match=rf'{file} cannot be read as an image \(.*\); replace it, or take it away'):
        load_data(str(tmp_path / 'images'), (32, 32))


@pytest.mark.parametrize('splits, message', [
    ([], 'is not a folder'),
    (['train/a'], 'no folder val or valid'),
    (['test/a'], 'no folder train or training'),
    (['train/a', 'test/a'], 'images'),
    (['train/a/*', 'val/b/*'], 'different classes: a, b'),
])
def test_folder_errors(tmp_path, splits, message):
    root = tmp_path / 'data'
    for split in splits:
        folder = root / split.removesuffix('/*')
        folder.mkdir(parents=True)
        if split.endswith('*'):
            Image.new('RGB', (8, 8)).save(folder / 'image.png')
    with pytest.raises(UserError, match=message):
        load_data(str(root), (8, 8))


def test_without_scikit_learn(monkeypatch):
    real_import = builtins.__import__

    def no_sklearn(name, *args, **kwargs):
        if name.startswith('sklearn'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', no_sklearn)
    with pytest.raises(UserError, match=r"pip install 'timm-sot\[study\]'"):
        load_data('', (32, 32))


def test_archive(digits_dir, tmp_path):
    expected = load_data(str(digits_dir), (8, 8))
    for name, inner in (('digits.tar.xz', '.'), ('digits.tar', 'folder')):
        with tarfile.open(tmp_path / name, 'w:xz' if name.endswith('xz') else 'w') as archive:
            archive.add(digits_dir, inner)
        data = load_data(str(tmp_path / name), (8, 8))
        assert data.name == 'digits'
        assert fingerprint_of(data._replace(name=expected.name)) == fingerprint_of(expected)


@pytest.mark.parametrize('compression', ('', 'gz', 'bz2', 'xz'))
def test_damaged_archive(digits_dir, tmp_path, compression):
    path = tmp_path / 'digits.tar'
    with tarfile.open(path, f'w:{compression}') as archive:
        archive.add(digits_dir, '.')
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (
            b'nothing', whole[:middle], whole[:middle] + bytes(b ^ 90 for b in whole[middle:middle + 2000])
            + whole[middle + 2000:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match='digits.tar cannot be unpacked: .*. --data-dir takes'):
            load_data(str(path), (8, 8))


@pytest.mark.parametrize('error, message', [
    (OSError(errno.ENOSPC, 'No space left on device'), 'no room in .* TMPDIR'),
    (ValueError('bad name'), 'cannot be unpacked: bad name'),
])
def test_archive_that_cannot_be_unpacked(digits_dir, tmp_path, monkeypatch, error, message):
    path = tmp_path / 'digits.tar'
    with tarfile.open(path, 'w') as archive:
        archive.add(digits_dir, '.')

    def extractall(*args, **kwargs):
        raise error

    monkeypatch.setattr(tarfile.TarFile, 'extractall', extractall)
    with pytest.raises(UserError, match=message):
        load_data(str(path), (8, 8))


def test_images_without_a_number():
    """Datasets that are read in order, such as those of tfds and webdataset."""
    class Reader:
        def __init__(self, labels):
            self.labels = labels

        def __len__(self):
            return len(self.labels)

        def __iter__(self):
            worker = get_worker_info()
            first, step = (worker.id, worker.num_workers) if worker else (0, 1)
            return ((Image.new('RGB', (2, 2), (i % 256,) * 3), i) for i in self.labels[first::step])

    for number in (3, 2600):
        decoded = decode(IterableImageDataset('stub', reader=Reader(range(number))), (2, 2), workers=2)
        assert decoded.labels.tolist() == [*range(number)], 'in their order, whatever the number of workers'
        assert decoded.images[:, 0, 0, 0].tolist() == [i % 256 for i in range(number)]
    with pytest.raises(UserError, match='images without a label'):
        decode(IterableImageDataset('stub', reader=Reader([0, -1])), (2, 2))


def test_the_part_is_that_of_earlier_versions():
    """What was held out must stay so."""
    images = Images(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.arange(10))
    held = subset(StudyData('x', images, images, 10), holdout=0.3)
    assert held.test.labels.tolist() == [4, 1, 7] and held.train.labels.tolist() == [0, 2, 3, 5, 6, 8, 9]
    assert subset(StudyData('x', images, images, 10), fraction=0.5).train.labels.tolist() == [1, 3, 4, 5, 7]


def test_subset():
    data = make_data(20)
    assert subset(data) is data
    half = subset(data, fraction=0.5)
    assert len(half.train.labels) == 10 and half.test is data.test
    assert torch.equal(half.train.images, data.train.images[half.train.labels])
    quarter = subset(data, fraction=0.25)
    assert set(quarter.train.labels.tolist()) < set(half.train.labels.tolist())

    held = subset(data, holdout=0.2)
    assert len(held.train.labels) == 16 and len(held.test.labels) == 4
    assert sorted(held.train.labels.tolist() + held.test.labels.tolist()) == list(range(20))
    assert 'validation' in held.name


def test_fingerprint():
    data = make_data()
    assert fingerprint_of(data) == fingerprint_of(make_data()) and fingerprint_of(data).startswith('noise 10+10 ')
    data.test.images[0, 0, 0, 0] += 1
    assert fingerprint_of(data) != fingerprint_of(make_data())


def test_normalizer():
    images = make_data().train.images
    normalized = normalizer((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), torch.device('cpu'))(images)
    expected = (images.double() / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) \
        / torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized.double(), expected, atol=1e-5, rtol=1e-5)


def test_same_images():
    data = make_data()
    assert same_images(fingerprint_of(data), fingerprint_of(data._replace(name='a name with spaces')))
    other = make_data()
    other.test.images[0, 0, 0, 0] += 1
    assert not same_images(fingerprint_of(data), fingerprint_of(other))


def test_images_of_val_are_validation_images(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'tiny')
    (tmp_path / 'tiny' / 'test').rename(tmp_path / 'tiny' / 'val')
    data = load_data(str(tmp_path / 'tiny'), (8, 8))
    assert data.name == 'tiny' + VAL_FOLDER and load_data(folder, (8, 8)).name == 'tiny'
    assert subset(data, holdout=0.1).name == 'tiny' + HELD_OUT


def test_val_comes_before_test(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'tiny')
    shutil.copytree(tmp_path / 'tiny' / 'train', tmp_path / 'tiny' / 'val')
    data = load_data(str(tmp_path / 'tiny'), (8, 8))
    assert data.name == 'tiny' + VAL_FOLDER and len(data.test.labels) == 24


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with ten images of each set in the files of CIFAR-10, which are not asked for their checksums."""
    monkeypatch.setattr(datasets.CIFAR10, '_check_integrity', lambda self: True)
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    for names, scale in ((datasets.CIFAR10.train_list, 1), (datasets.CIFAR10.test_list, 20)):
        for i, (name, _) in enumerate(names):
            pixels = torch.full((2, 3072), scale * (i + 1), dtype=torch.uint8).numpy()
            (folder / name).write_bytes(pickle.dumps({'data': pixels, 'labels': [0, 9]}))
    meta = datasets.CIFAR10.meta
    (folder / meta['filename']).write_bytes(pickle.dumps({meta['key']: [*'abcdefghij']}))
    monkeypatch.setitem(meta, 'md5', None)
    return str(tmp_path)


def test_named_dataset(cifar10):
    data = load_data(cifar10, (32, 32), dataset='torch/cifar10')
    assert data.name == 'cifar10' and data.num_classes == 10
    assert data.train.images.shape == (10, 3, 32, 32) and data.test.images.shape == (2, 3, 32, 32)
    assert data.train.images[:, 0, 0, 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert data.test.labels.tolist() == [0, 9] and (data.test.images == 20).all()


@pytest.mark.parametrize('dataset, message', [
    ('torch/cifar10', 'Dataset not found or corrupted.*--dataset-download downloads it'),
    ('torch/cifar11', 'Unknown torchvision dataset'),
])
def test_named_dataset_that_is_not_there(tmp_path, dataset, message):
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path), (32, 32), dataset=dataset)


def test_all_images_held_out():
    with pytest.raises(UserError, match='--holdout 0.99 leaves none of 10 training images to train on'):
        subset(make_data(), holdout=0.99)


@pytest.mark.parametrize('name, called', [
    ('torch/cifar10', 'cifar10'), ('torch/fashion_mnist', 'fashion_mnist'), ('torch/imagenet', 'imagenet' + VAL_FOLDER),
    ('hfds/user/cifar10', 'cifar10' + VAL_FOLDER)])
def test_a_validation_split_is_no_test_set(folder, monkeypatch, name, called):
    monkeypatch.setattr('timm_sot.study.data.create_dataset', lambda name, root, split, download: create_dataset(
        '', root=f'{root}/test'))
    assert load_data(folder, (8, 8), dataset=name).name == called

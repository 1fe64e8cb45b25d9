""" Images of a study """
import builtins

import pytest
import torch
from PIL import Image

from timm_sot.study.data import Images, StudyData, augmented_batches, load_data, normalizer, random_crop
from timm_sot.study.errors import StudyError


def make_data(num_train=10, flip=True):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (num_train, 3, 8, 8), dtype=torch.uint8, generator=generator)
    train = Images(images, torch.arange(num_train))
    return StudyData('noise', train, train, num_train, flip)


def test_digits():
    data = load_data('', (32, 32))
    assert data.train.images.shape == (1437, 3, 32, 32) and data.test.images.shape == (360, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8 and data.num_classes == 10 and not data.flip
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
    with pytest.raises(StudyError, match=message):
        load_data(str(root), (8, 8))


def test_without_scikit_learn(monkeypatch):
    real_import = builtins.__import__

    def no_sklearn(name, *args, **kwargs):
        if name.startswith('sklearn'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', no_sklearn)
    with pytest.raises(StudyError, match=r"pip install 'timm-sot\[study\]'"):
        load_data('', (32, 32))


def test_batches_depend_on_seed_and_epoch_alone():
    data = make_data()
    first, again = (list(augmented_batches(data, 4, seed=1, epoch=2)) for _ in range(2))
    torch.rand(5)
    assert [len(labels) for _, labels in first] == [4, 4, 2]
    for (images, labels), (images_again, labels_again) in zip(first, again):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    order = torch.cat([labels for _, labels in first])
    assert order.sort().values.tolist() == list(range(10))
    for seed, epoch in [(1, 3), (2, 2)]:
        other = torch.cat([labels for _, labels in augmented_batches(data, 4, seed, epoch)])
        assert not torch.equal(order, other)


def test_random_crop_shifts_each_image():
    images = make_data(64).train.images
    cropped = random_crop(images, torch.Generator().manual_seed(0), padding=1)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    shifts = [
        [(top, left) for top in range(3) for left in range(3)
         if torch.equal(crop, whole[:, top:top + 8, left:left + 8])]
        for crop, whole in zip(cropped, padded)]
    assert all(len(shift) == 1 for shift in shifts)
    assert len({shift[0] for shift in shifts}) == 9


def test_flip_only_where_the_data_allows_it():
    def mirrored(data):
        """Number of images of an epoch whose brighter half has changed sides."""
        return sum(
            int(image[..., :16].float().mean() > image[..., 16:].float().mean())
            for images, _ in augmented_batches(data, 16, seed=0, epoch=0) for image in images)

    images = torch.cat([torch.zeros(64, 3, 8, 16), torch.full((64, 3, 8, 16), 255)], -1).to(torch.uint8)
    data = make_data(64)
    data = data._replace(train=Images(images, data.train.labels))
    assert 16 < mirrored(data) < 48
    assert mirrored(data._replace(flip=False)) == 0


def test_normalizer():
    images = make_data().train.images
    normalized = normalizer((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), torch.device('cpu'))(images)
    expected = (images.double() / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) \
        / torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized.double(), expected, atol=1e-5, rtol=1e-5)

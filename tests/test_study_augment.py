""" Augmented epochs """
import pytest
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from timm_sot.study import augment as module
from timm_sot.study.augment import Epochs, augment, random_crop, random_flip
from timm_sot.study.data import Images


def make_images(n=10, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(n))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, 'CHUNK', 4)


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_random_crop_shifts_each_image():
    images = make_images(64).images
    cropped = random_crop(images, padding=1)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    shifts = [
        [(top, left) for top in range(3) for left in range(3)
         if torch.equal(crop, whole[:, top:top + 8, left:left + 8])]
        for crop, whole in zip(cropped, padded)]
    assert all(len(shift) == 1 for shift in shifts)
    assert len({shift[0] for shift in shifts}) == 9


def test_random_flip_mirrors_half():
    images = make_images(64).images
    flipped = random_flip(images)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images)]
    kept = [torch.equal(a, b) for a, b in zip(flipped, images)]
    assert all(a != b for a, b in zip(mirrored, kept)) and 16 < sum(mirrored) < 48


def test_augment_depends_on_its_seed_alone():
    images = make_images(32, 32).images
    names = ('autoaugment', 'crop', 'flip')
    before = torch.random.get_rng_state()
    first = augment(images, names, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(first, augment(images, names, seed=1))
    assert not torch.equal(first, augment(images, names, seed=2))
    assert first.dtype == torch.uint8 and first.shape == images.shape
    assert torch.equal(augment(images, (), seed=1), images)


def test_gray_moves_in_where_black_did():
    images = torch.full((200, 3, 16, 16), 200, dtype=torch.uint8)  # only what moves in, and inversions, change it
    black, gray = (augment(images, (name,), seed=1) for name in ('autoaugment', 'autoaugment-gray'))
    differ = (black != gray).all(dim=1)
    assert 0.02 < differ.float().mean() < 0.2
    moved = (black == 0).all(dim=1) & (gray == 128).all(dim=1)
    assert moved.any() and (moved | (black == gray).all(dim=1)).float().mean() > 0.8


def test_autoaugment_is_torchvisions():
    images = make_images(100, 16).images
    torch.manual_seed(0)
    expected = torch.stack([
        pil_to_tensor(AutoAugment(AutoAugmentPolicy.CIFAR10)(to_pil_image(image))) for image in images])
    assert torch.equal(augment(images, ('autoaugment',), seed=0), expected)


def test_autoaugment_keeps_what_its_policy_leaves_alone():
    images = make_images(200, 16).images
    changed = augment(images, ('autoaugment',), seed=0)
    kept = [torch.equal(a, b) for a, b in zip(changed, images)]
    assert 0 < sum(kept) < 100


@pytest.mark.parametrize('workers', [0, 2])
def test_epochs(small_chunks, workers):
    train = make_images()
    plan = [(0, 0), (0, 1), (1, 0)]
    epochs = Epochs(train, ('crop', 'flip'), plan, workers)
    made = [epochs.get(*pair) for pair in plan]
    epochs.close()
    for epoch in made:
        assert epoch.labels.sort().values.tolist() == list(range(10))
    assert not any(torch.equal(a.labels, b.labels) for a, b in [made[:2], made[1:], made[::2]])
    # whoever makes it and whenever
    for pair, epoch in zip(plan, made):
        alone = Epochs(train, ('crop', 'flip'), [pair])
        assert equal(alone.get(*pair), epoch)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('room', [0, 1, 9])
def test_epochs_planned_again(small_chunks, workers, room):
    train = make_images()
    pairs = [(0, 0), (0, 1), (0, 2)]
    epochs = Epochs(train, ('crop',), pairs * 2, workers, cache_bytes=room * train.images.nbytes)
    first = [epochs.get(*pair) for pair in pairs]
    assert len(epochs.cache) <= room
    again = [epochs.get(*pair) for pair in pairs]
    assert all(map(equal, first, again)) and not epochs.cache
    assert epochs.made == {0: 6, 1: 5, 9: 3}[room]
    epochs.close()


@pytest.mark.parametrize('workers', [0, 1])
def test_epochs_left_out_or_not_planned(small_chunks, workers):
    train = make_images()
    epochs = Epochs(train, (), [(0, 0), (0, 1), (0, 2), (0, 3)], workers)
    reference = Epochs(train, (), [])
    for pair in [(0, 0), (0, 2), (5, 5), (0, 3), (0, 1)]:
        assert equal(epochs.get(*pair), reference.get(*pair))
    epochs.close()


def test_unaugmented_epoch_is_a_permutation():
    train = make_images()
    epoch = Epochs(train, (), []).get(3, 4)
    assert torch.equal(epoch.images, train.images[epoch.labels])

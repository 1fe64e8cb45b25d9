""" Augmented epochs """
import hashlib
import multiprocessing
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from timm_sot.study import augment as module
from timm_sot.study.augment import augment, make_epochs, random_crop, random_flip, room_for_epochs
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


@pytest.mark.parametrize('ahead', [True, False])
@pytest.mark.parametrize('workers', [0, 2])
def test_epochs(small_chunks, workers, ahead):
    train = make_images()
    made = [*make_epochs(train, ('crop', 'flip'), 7, range(1, 4), workers, ahead=ahead)]
    assert len(made) == 3
    for epoch in made:
        assert epoch.labels.sort().values.tolist() == list(range(10))
    assert not any(torch.equal(a.labels, b.labels) for a, b in [made[:2], made[1:], made[::2]])
    # whoever makes it and whenever
    for number, epoch in enumerate(made, 1):
        alone, = make_epochs(train, ('crop', 'flip'), 7, [number])
        assert equal(alone, epoch)
    other, = make_epochs(train, ('crop', 'flip'), 8, [1])
    assert not torch.equal(other.labels, made[0].labels)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('room', [0, 1, 9])
@pytest.mark.parametrize('ahead', [True, False])
def test_epochs_are_kept(small_chunks, workers, room, ahead, monkeypatch):
    train, kept, chunks = make_images(), {}, module._Chunks
    first = [*make_epochs(train, ('crop',), 0, range(3), workers, kept, room, ahead)]
    assert [*kept] == [*range(min(room, 3))]
    wanted = []
    monkeypatch.setattr(module, '_Chunks', lambda *args: wanted.extend(args[-1]) or chunks(*args))
    again = [*make_epochs(train, ('crop',), 0, range(3), workers, kept, room, ahead)]
    assert all(map(equal, first, again)) and wanted == [*range(min(room, 3), 3)]


def test_epochs_are_those_of_earlier_versions():
    """Runs are continued, and paired by seed, across versions: another order, or other shifts, must be a decision."""
    images = (torch.arange(10 * 3 * 8 * 8) % 251).to(torch.uint8).view(10, 3, 8, 8)
    epoch, = make_epochs(Images(images, torch.arange(10)), ('crop', 'flip'), 3, [4])
    assert epoch.labels.tolist() == [8, 3, 9, 7, 4, 6, 5, 2, 0, 1]
    assert hashlib.sha256(epoch.images.numpy().tobytes()).hexdigest()[:16] == 'ffd81675e7e3ad03'


@pytest.mark.parametrize('ahead', [True, False])
def test_epochs_that_are_not_asked_for(small_chunks, ahead):
    """No process or thread stays."""
    before = set(threading.enumerate())
    epochs = make_epochs(make_images(), ('crop',), 0, range(50), workers=1, ahead=ahead)
    next(epochs)
    assert multiprocessing.active_children()
    epochs.close()
    assert not multiprocessing.active_children()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)  # that which feeds a queue of torch's loader ends by itself, a moment after its queue is closed
        assert not thread.is_alive(), thread


@pytest.mark.parametrize('ahead', [True, False])
def test_epochs_are_made_ahead(small_chunks, ahead, monkeypatch):
    """Or not before they are asked for."""
    made = torch.zeros(1, dtype=torch.int64).share_memory_()  # three chunks are an epoch

    def count(images, names, seed):
        made.add_(1)
        return images

    monkeypatch.setattr(module, 'augment', count)
    epochs = make_epochs(make_images(), ('crop',), 0, range(2), workers=1, ahead=ahead)
    next(epochs)
    deadline = time.monotonic() + (60 if ahead else 0.5)
    while made.item() < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made.item() == (6 if ahead else 3)
    epochs.close()


def test_an_epoch_that_is_not_wanted_is_not_finished(monkeypatch):
    """What ends a study need not wait for it."""
    images = make_images(1000)
    taken = []

    def slowly(chunks, **kwargs):
        for i in range(len(chunks)):
            time.sleep(0.01)
            taken.append(i)
            yield chunks[i]

    monkeypatch.setattr(module, 'CHUNK', 1)
    monkeypatch.setattr(module, 'DataLoader', slowly)
    epochs = make_epochs(images, (), 0, range(2), workers=1, kept={0: images})
    next(epochs)  # the other is being made
    epochs.close()
    assert len(taken) < 500


def test_chunks_are_augmented_each_by_itself(small_chunks):
    """Equal images of one chunk are not changed as those of the next are."""
    same = Images(torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8).expand(12, -1, -1, -1), torch.arange(12))
    epoch, = make_epochs(same, ('crop',), 0, [0])
    chunks = epoch.images.split(module.CHUNK)
    assert len(chunks) >= 3 and len(chunks[0]) == len(chunks[1]) and not torch.equal(chunks[0], chunks[1])


def test_room_for_epochs(monkeypatch):
    """With 4 GiB free six epochs of CIFAR-10 are kept, on a server 55."""
    train = SimpleNamespace(images=SimpleNamespace(nbytes=50_000 * 3 * 32 * 32))
    for gigabytes, room in ((4, 6), (16, 27), (512, 55), (0, 0)):
        monkeypatch.setattr(module, 'free_memory', lambda: gigabytes * 2. ** 30)
        assert room_for_epochs(train) == room


def test_unaugmented_epoch_is_a_permutation():
    train = make_images()
    epoch, = make_epochs(train, (), 3, [4])
    assert torch.equal(epoch.images, train.images[epoch.labels])

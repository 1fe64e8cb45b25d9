""" The digits of scikit-learn """
import torch
from sklearn import datasets

from timm_sot.digits import load_digits
from timm_sot.study.data import load_data
from timm_sot.viz.inputs import digits


def test_digits():
    images, labels = load_digits((8, 8))
    pixels, expected = datasets.load_digits(return_X_y=True)
    assert torch.equal(labels, torch.from_numpy(expected)) and images.dtype == torch.uint8
    assert torch.equal(images.flatten(1), (torch.from_numpy(pixels) * 255 / 16).round().to(torch.uint8))
    images, _ = load_digits((32, 24))
    assert images.shape == (1797, 1, 32, 24) and images.max() == 255


def test_a_study_has_the_images_that_it_had():
    """Other ones, or others to test on, would be another study in the folder of one that was begun."""
    study = load_data('', (32, 32))
    assert study.test.labels[:16].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6, 6, 4, 5, 8]
    assert study.train.labels[:16].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8, 3, 5, 1, 1, 9, 3]
    row = torch.tensor([
        0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 11, 34, 64, 98, 123, 143, 166, 198, 230, 253, 255, 248, 218, 176, 129, 82, 50,
        28, 9, 0, 0])
    assert (study.test.images[0, :, 14] - row).abs().max() <= 1  # which a rounding may make


def test_figures_show_the_digits_that_a_study_trains_on():
    study = load_data('', (32, 32))
    trained = {image.numpy().tobytes() for image in (*study.train.images[:, 0], *study.test.images[:, 0])}
    assert {image.convert('L').tobytes() for _, image in digits()} == trained

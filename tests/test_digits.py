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


def test_figures_show_the_digits_that_a_study_trains_on():
    study = load_data('', (32, 32))
    trained = {image.numpy().tobytes() for image in (*study.train.images[:, 0], *study.test.images[:, 0])}
    assert {image.convert('L').tobytes() for _, image in digits()} == trained

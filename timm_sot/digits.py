""" The handwritten digits that scikit-learn ships: images that need no download """
from typing import Tuple

import torch
import torch.nn.functional as F

__all__ = ['load_digits']


def load_digits(img_size: Tuple[int, int]) -> Tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 digits of 8x8 pixels, resized.

    Args:
        img_size: Height and width.

    Returns:
        Images, uint8, (1797, 1, H, W), and their labels, int64, (1797,).

    Raises:
        ImportError: Without scikit-learn.
    """
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)  # (1797, 64), 0 to 16
    images = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, img_size, mode='bicubic').round().clamp(0, 255)
    return images.to(torch.uint8), torch.from_numpy(labels).long()

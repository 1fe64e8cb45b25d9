import json

import pytest
from PIL import Image


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory):
    """ImageFolder of scikit-learn's handwritten digits: train/ 40 and test/ 20 images of each of the ten classes."""
    from sklearn.datasets import load_digits
    root = tmp_path_factory.mktemp('digits')
    images, targets = load_digits(return_X_y=True)
    count = {}
    for i, (image, target) in enumerate(zip(images, targets)):
        n = count[target] = count.get(target, 0) + 1
        if n > 60:
            continue
        folder = root / ('train' if n <= 40 else 'test') / str(target)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15.9).astype('uint8')).resize((32, 32)).save(folder / f'{i}.png')
    return root


@pytest.fixture(scope='session')
def golden():
    """Reader of the reference files in tests/golden: name -> (tensors, the `meta` entry of its metadata)."""
    from pathlib import Path

    from safetensors import safe_open

    def read(name):
        with safe_open(Path(__file__).parent / 'golden' / f'{name}.safetensors', 'pt') as f:
            return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata().get('meta', '{}'))
    return read

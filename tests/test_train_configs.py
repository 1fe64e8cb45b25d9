import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.scheduler import create_scheduler_v2
from timm_scripts import TRAIN_OPTIONS, VALIDATE_OPTIONS

CONFIGS = {
    path.stem: yaml.safe_load(path.read_text()) for path in Path(__file__).parents[1].glob('train_configs/*.yaml')}


@pytest.mark.parametrize('name', CONFIGS)
def test_keys_are_options_of_train_py(name):
    # train.py takes any key without a word: a misspelt one would be a default in disguise
    assert {'--' + key.replace('_', '-') for key in CONFIGS[name]} <= TRAIN_OPTIONS


@pytest.mark.parametrize('name', CONFIGS)
def test_values_are_numbers_where_numbers_are_meant(name):
    # YAML reads 55e-5 as a string
    strings = {key for key, value in CONFIGS[name].items() if isinstance(value, str)}
    assert strings <= {'aa', 'device', 'opt', 'sched', 'train_split', 'val_split'}


@pytest.mark.parametrize('name', CONFIGS)
def test_every_recipe_registers_the_models_itself(name):
    assert CONFIGS[name]['device_modules'] == ['timm_sot']


def test_the_300_epoch_recipe_is_the_published_one():
    published = dict(
        opt='adamw', lr=55e-5, weight_decay=6e-2, sched='cosine', min_lr=1e-5, warmup_epochs=10, warmup_lr=1e-5,
        cooldown_epochs=10, mixup=0.8, cutmix=1.0, mixup_switch_prob=0.5, smoothing=0.1,
        scale=[0.8, 1.0], batch_size=128, epochs=300)
    config = CONFIGS['cifar10-300ep']
    assert {key: config[key] for key in published} == published
    assert config['aa'].replace('-mmax9', '') == 'rand-m9-mstd0.5-inc1', 'published, but for what the file says of it'


@pytest.mark.parametrize('name', CONFIGS)
def test_augmentations_take_every_image(name):
    """Without the bound on the magnitude timm asks Pillow 13 for what it refuses, once in some hundred images."""
    config = CONFIGS[name]
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)
    transform = timm.data.create_transform(
        (3, 32, 32), is_training=True, auto_augment=config.get('aa'), scale=config.get('scale'))
    image = Image.fromarray(np.random.randint(0, 256, (32, 32, 3), dtype=np.uint8))
    for _ in range(3000):
        assert transform(image).shape == (3, 32, 32)


@pytest.mark.parametrize('name, epochs', [('cifar10-30ep', 30), ('cifar10-300ep', 310), ('cifar10-smoke-cpu', 1)])
def test_length_of_the_schedule(name, epochs):
    from torch import nn, optim
    config = CONFIGS[name]
    keys = ('min_lr', 'warmup_lr', 'warmup_epochs', 'cooldown_epochs')
    _, num_epochs = create_scheduler_v2(
        optim.AdamW(nn.Linear(1, 1).parameters(), lr=config['lr']), sched=config.get('sched', 'cosine'),
        num_epochs=config['epochs'], **{key: config[key] for key in keys if key in config})
    assert num_epochs == epochs


@pytest.mark.skipif(
    'TIMM_SCRIPTS' not in os.environ,
    reason='timm does not ship train.py and validate.py: set TIMM_SCRIPTS to a folder that holds them')
@pytest.mark.parametrize('script, options', [('train.py', TRAIN_OPTIONS), ('validate.py', VALIDATE_OPTIONS)])
def test_options_exist_in_timms_scripts(script, options):
    source = (Path(os.environ['TIMM_SCRIPTS']) / script).read_text()
    assert options <= set(re.findall(r"'(--[\w-]+)'", source))

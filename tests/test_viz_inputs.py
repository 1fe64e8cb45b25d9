""" Models and images for the figures; what a user names is in test_cli_attention.py """
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from timm_sot.errors import UserError
from timm_sot.viz.inputs import ImageFiles, digits, find_images, load_models, model_input, shown_pixels, token_grid


def make_image(size=(32, 32)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_input_is_that_of_timms_own_transform():
    from timm.data import create_transform, resolve_model_data_config
    image = make_image((40, 50))
    for name in ('cct_2', 'vit_tiny_patch16_224'):
        model = timm.create_model(name)
        transform = create_transform(**resolve_model_data_config(model))
        assert torch.equal(model_input(model, image), transform(image))


@pytest.mark.parametrize('make, shape', [
    (lambda: timm.create_model('cct_2', img_size=(48, 64)), (3, 48, 64)),
    (lambda: timm.create_model('cct_2', img_size=48, in_chans=1), (1, 48, 48)),
    (lambda: timm.create_model('vit_tiny_patch16_224', img_size=64), (3, 64, 64)),
    (lambda: timm.create_model('vit_tiny_patch16_224', in_chans=1), (1, 224, 224)),
])
def test_input_is_what_the_model_was_built_for(make, shape):
    model = make()
    x = model_input(model, make_image())
    assert x.shape == shape
    model(x[None])
    assert shown_pixels(model, x).shape == (*shape[1:], shape[0])


def test_pixels_are_those_of_the_image():
    image = make_image()
    model = timm.create_model('cct_2')
    np.testing.assert_allclose(shown_pixels(model, model_input(model, image)), np.asarray(image) / 255, atol=1e-6)


@pytest.mark.parametrize('name, kwargs, tokens, grid', [
    ('cct_2', {}, 64, (8, 8)),
    ('cct_2', {'img_size': (32, 64)}, 128, (8, 16)),
    ('vit_tiny_patch16_224', {}, 197, (14, 14)),
    ('deit_tiny_distilled_patch16_224', {}, 198, (14, 14)),
])
def test_token_grid(name, kwargs, tokens, grid):
    model = timm.create_model(name, **kwargs)
    assert token_grid(model, tokens) == grid
    with pytest.raises(ValueError, match=f'where in the image the {tokens + 1} tokens'):
        token_grid(model, tokens + 1)


def test_digits():
    found = digits()
    assert len(found) == 1797 and found[4][0] == '4 of the digits, a 4'
    assert {(image.size, image.mode) for _, image in found} == {((32, 32), 'RGB')}
    assert np.asarray(found[4][1]).max() > 200


def test_find_images(tmp_path):
    for name in ('b/2.png', 'a/10.JPG', 'a/notes.txt', '1.jpeg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [name for name, _ in find_images(str(tmp_path))] == ['1.jpeg', 'a/10.JPG', 'b/2.png']
    assert find_images(str(tmp_path / 'b/2.png')) == [('b/2.png', str(tmp_path / 'b/2.png'))]


def test_files_are_read_when_they_are_asked_for(tmp_path):
    paths = [str(tmp_path / f'{i}.png') for i in range(3)]
    for i in (0, 1):
        make_image((i + 1, 4)).save(paths[i])
    images = ImageFiles(paths)
    assert len(images) == 3 and [image.size for image in images[0:2]] == [(4, 1), (4, 2)] and images[1].size == (4, 2)
    with pytest.raises(UserError, match='there is no image .*2.png'):
        images[1:]


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'local-dir'])
def test_checkpoint_in_place_of_the_weights_of_the_model(tmp_path, name):
    """Which may be in a folder, or in a format of their own."""
    model = timm.create_model('cct_2' if name == 'local-dir' else name, num_classes=1000)
    if name == 'local-dir':
        save_for_hf(timm.create_model('cct_2', num_classes=1000), tmp_path, safe_serialization=True)
        name = f'local-dir:{tmp_path}'
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    loaded, = load_models([name], [str(tmp_path / 'weights.safetensors')]).values()
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_recorded_arguments_are_named(tmp_path):
    """As far as no figure says them by itself, nor do the images."""
    weights = str(tmp_path / 'weights.safetensors')
    save_file(timm.create_model('cct_2', context=True, num_classes=3).state_dict(), weights)
    recorded = [dict(context=True, sot_reg=1., num_classes=3)]
    models = load_models(['cct_2'], [weights], recorded_kwargs=recorded)
    assert list(models) == ['cct_2 (context=True)']
    assert torch.equal(models['cct_2 (context=True)'].head.weight, load_file(weights)['head.weight'])
    models = load_models(['cct_2'], [weights], False, dict(pos_embed='learn', num_classes=5), 0, recorded)
    assert list(models) == ['cct_2 (context=True, pos_embed=learn)']


def test_weights_that_are_not_finite(tmp_path):
    state = timm.create_model('cct_2').state_dict()
    state['head.bias'][0] = torch.inf
    save_file(state, tmp_path / 'weights.safetensors')
    with pytest.raises(UserError, match='weights.safetensors holds values that are not finite, in head.bias'):
        load_models(['cct_2'], [str(tmp_path / 'weights.safetensors')])


def test_recorded_arguments(tmp_path):
    """The model is made as it was trained, unless arguments say otherwise."""
    weights = tmp_path / 'weights.safetensors'
    save_file(timm.create_model('cct_2_sot_qk').state_dict(), weights)
    recorded = [dict(sot_reg=1., sot_tol=0.1)]
    model, = load_models(['cct_2_sot_qk'], [str(weights)], recorded_kwargs=recorded).values()
    assert (model.blocks[0].attn.reg, model.blocks[0].attn.tol) == (1., 0.1)
    model, = load_models(['cct_2_sot_qk'], [str(weights)], False, dict(sot_reg=0.5), 0, recorded).values()
    assert (model.blocks[0].attn.reg, model.blocks[0].attn.tol) == (0.5, 0.1)

""" Models and images for the figures, from what a user can name """
import os
from itertools import repeat
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from PIL import Image
from timm.data import create_transform, get_img_extensions, resolve_model_data_config
from timm.layers import to_2tuple
from torch import nn

from ..digits import load_digits
from ..errors import UserError, first_line, missing_extra, one_line, unknown_model
from ..patch import attention_layers

__all__ = [
    'ImageFiles',
    'digits',
    'find_images',
    'fit_channels',
    'input_size',
    'load_models',
    'model_input',
    'shown_pixels',
    'token_grid',
]


def load_models(
        names: Sequence[str],
        checkpoints: Sequence[str] = (),
        untrained: bool = False,
        model_kwargs: Optional[Dict[str, Any]] = None,
        seed: int = 0,
        recorded_kwargs: Sequence[Dict[str, Any]] = (),
) -> Dict[str, nn.Module]:
    """Create models for figures.

    Args:
        names: timm models, or folders (`local-dir:DIR`) or Hub repositories (`hf-hub:OWNER/NAME`) that hold one.
        checkpoints: Files of their weights, one for each or none, converted as timm converts pretrained ones.
        untrained: Without checkpoints, take random weights also where there are pretrained ones.
        model_kwargs: Arguments of all models.
        seed: Of random weights.
        recorded_kwargs: What is known of the arguments of each model in its training, one for each checkpoint or none;
            `model_kwargs` go before them.

    Returns:
        The models in evaluation mode, by what a figure calls them: their names, with what is not evident from those.

    Raises:
        UserError: If there is no such model or file, or they do not fit.
    """
    if checkpoints and len(checkpoints) != len(names):
        raise UserError(f'a checkpoint is needed for each model, got {len(checkpoints)} for {len(names)} models.')
    models = {}
    for name, checkpoint, recorded in zip(names, checkpoints or [''] * len(names), recorded_kwargs or repeat({})):
        torch.manual_seed(seed)
        model, trained = load_model(name, checkpoint, untrained, model_kwargs or {}, recorded)
        # the figures themselves say the settings of SOT attention
        notes = [
            f'{key}={value}' for key, value in {**recorded, **(model_kwargs or {})}.items()
            if not key.startswith('sot_') and not (key == 'num_classes' and key in recorded)]
        if names.count(name) > 1 and checkpoint:
            notes.append(checkpoint)
        if not trained:
            notes.append('untrained')
        label = f'{name} ({", ".join(notes)})' if notes else name
        if label in models:
            raise UserError(f'{label} is named twice.')
        models[label] = model
    return models


def load_model(
        name: str,
        checkpoint: str,
        untrained: bool,
        model_kwargs: Dict[str, Any],
        recorded: Dict[str, Any],
) -> Tuple[nn.Module, bool]:
    """A model in evaluation mode, and whether it has been trained; the arguments are those of `load_models`."""
    source, _, place = name.partition(':')
    if source == 'local-dir' and not os.path.isfile(os.path.join(place, 'config.json')):
        raise UserError(f'{place} is not a folder with a config.json; local-dir: takes what timm saves for the Hub.')
    if not place and not timm.is_model(name):
        raise unknown_model(name)
    if checkpoint and not os.path.isfile(checkpoint):
        raise UserError(f'there is no checkpoint {checkpoint}.')

    overlay = {}
    if checkpoint:
        # of the model's own weights timm would go by the source, and by the format
        overlay['pretrained_cfg_overlay'] = dict(file=checkpoint, source=None, custom_load=False)
        if 'num_classes' in recorded:  # else timm takes the head for one of other classes
            overlay['pretrained_cfg_overlay']['num_classes'] = recorded['num_classes']
    model_kwargs = {**recorded, **model_kwargs}
    default = bool(place) or timm.models.is_model_pretrained(name)
    trained = bool(checkpoint) or default and not untrained
    if trained and not checkpoint and not place:
        require_attention(name, model_kwargs)
    try:
        model = timm.create_model(name, pretrained=trained, **overlay, **model_kwargs)
    except Exception as e:  # of any of the libraries by which timm reads files and makes requests
        what = 'its pretrained weights' if trained else 'random weights'
        what = f'the weights in {checkpoint}' if checkpoint else what
        also = f' and {model_kwargs}' if model_kwargs else ''
        hint = ''
        if trained and not checkpoint and not isinstance(e, (TypeError, ValueError)):  # those are about arguments
            hint = ' (--checkpoint or --untrained do without them)'
        raise UserError(f'cannot create {name} with {what}{also}: {one_line(e)}{hint}') from e
    bad = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UserError(f'{checkpoint or name} holds values that are not finite, in {bad[0]}; its training diverged.')
    return model.eval(), trained


def require_attention(name: str, model_kwargs: Dict[str, Any]) -> None:
    """Raise a UserError for a model without attention layers before its weights are asked for, perhaps of the Hub."""
    try:
        with torch.device('meta'):
            model = timm.create_model(name, **model_kwargs)
    except Exception:  # what is wrong with it is said when it is made with its weights
        return
    try:
        attention_layers(model)
    except ValueError as e:
        raise UserError(e) from e


def load_image(path: str) -> Image.Image:
    """Read an image file."""
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except FileNotFoundError as e:
        raise UserError(f'there is no image {path}.') from e
    except (OSError, SyntaxError, ValueError) as e:  # what PIL raises for what it cannot read
        raise UserError(f'{path} is not an image that can be read: {first_line(e)}') from e


class ImageFiles(Sequence):
    """Images of files, read when they are asked for: all of them may be more than memory holds."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [load_image(path) for path in self.paths[index]]
        return load_image(self.paths[index])


def find_images(path: str) -> List[Tuple[str, str]]:
    """Names and paths of the images in a folder, in the order of their names, or of the one image at `path`."""
    if not os.path.isdir(path):
        return [('/'.join(os.path.abspath(path).split(os.sep)[-2:]), path)]
    extensions = tuple(get_img_extensions())
    found = sorted(
        os.path.join(folder, file) for folder, _, files in os.walk(path) for file in files
        if file.lower().endswith(extensions))
    if not found:
        raise UserError(f'{path} holds no images.')
    return [(os.path.relpath(file, path), file) for file in found]


def digits() -> List[Tuple[str, Image.Image]]:
    """Names and images of the handwritten digits that scikit-learn ships, 32x32 pixels."""
    try:
        images, labels = load_digits((32, 32))
    except ImportError as e:
        raise UserError(f'without --image the images are digits of scikit-learn; {missing_extra(e, "viz")}') from e
    return [
        (f'{i} of the digits, a {label}', Image.fromarray(image.numpy()).convert('RGB'))
        for i, (label, (image,)) in enumerate(zip(labels.tolist(), images))]


def model_input(model: nn.Module, image: Image.Image) -> torch.Tensor:
    """The image as the model takes it: scaled, cropped and normalized, (C, H, W)."""
    config = data_config(model)
    # of a black and white digit as of a photograph
    return create_transform(**config)(image.convert('L' if config['input_size'][0] == 1 else 'RGB'))


def shown_pixels(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The pixels of a model's input, (C, H, W) -> (H, W, C) in [0, 1]."""
    config = data_config(model)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    return (x * std + mean).clamp(0, 1).permute(1, 2, 0)


def data_config(model: nn.Module) -> Dict[str, Any]:
    """timm's data config of a model, with the image size and channels that it was really built for."""
    model = getattr(model, '_orig_mod', model)  # of torch.compile, which timm asks for a length
    config = resolve_model_data_config(model)
    config['input_size'] = input_size(model, config['input_size'])
    fit_channels(config)
    return config


def fit_channels(config: Dict[str, Any]) -> None:
    """Give a data config a mean and a standard deviation for each channel, of other ones the average."""
    channels = config['input_size'][0]
    if channels != len(config['mean']):
        config.update((name, (sum(config[name]) / len(config[name]),) * channels) for name in ('mean', 'std'))


def input_size(model: nn.Module, configured: Tuple[int, int, int]) -> Tuple[int, int, int]:
    """Channels, height and width that a model was really built for, as far as it says, or else as configured."""
    channels, *size = configured
    patch_embed = getattr(model, 'patch_embed', None)
    for module in (model, patch_embed):
        size = to_2tuple(getattr(module, 'img_size', None) or size)
    first = getattr(patch_embed, 'proj', None)  # older versions of timm do not say it of a ViT
    return getattr(model, 'in_chans', getattr(first, 'in_channels', channels)), *size


def token_grid(model: nn.Module, num_tokens: int) -> Tuple[int, int]:
    """Height and width in tokens of the image, where the last of the model's `num_tokens` tokens are those of it."""
    patch_embed = getattr(model, 'patch_embed', None)
    grid = getattr(model, 'grid_size', None) or getattr(patch_embed, 'grid_size', None)
    prefix = getattr(model, 'num_prefix_tokens', 0)
    if grid is None or grid[0] * grid[1] + prefix != num_tokens:
        raise ValueError(
            f'cannot tell where in the image the {num_tokens} tokens of {type(model).__name__} are: it has no '
            f'grid_size that they fill; the figures compare, heads, entropy and reg do not need to know.')
    return grid[0], grid[1]

""" The Compact Convolutional Transformer as a timm model """
import copy
import io
import logging
import math
import pickle
import re
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import timm_sot.cct
from reference import error
from timm_sot import SOTAttention
from timm_sot.cct import ConvTokenizer, checkpoint_filter_fn, sine_pos_embed

# name: depth, heads, MLP ratio, width, kernel, convolutions, image size, classes, parameters (the original program's)
SIZES = {
    'cct_2': (2, 2, 1, 128, 3, 2, 32, 10, 283_723),
    'cct_4': (4, 2, 1, 128, 3, 2, 32, 10, 482_123),
    'cct_6': (6, 4, 2, 256, 3, 1, 32, 10, 3_233_803),
    'cct_7': (7, 4, 2, 256, 3, 1, 32, 10, 3_760_139),
    'cct_14': (14, 6, 3, 384, 7, 2, 224, 1000, 22_367_273),
}
SOT = {f'cct_2_{variant}': variant for variant in ('sot_q', 'sot_q_nosoftmax', 'sot_qk', 'sot_qk_nosoftmax', 'sot_qkt')}
SMALL = ['cct_2', *SOT, 'cct_2_sot_shares']
NAMES = [*SIZES, *SMALL[1:]]
NO_DROP = dict(attn_drop_rate=0., drop_path_rate=0.)

GRID = {(32, 32): (8, 8), (48, 48): (12, 12), (24, 40): (6, 10), (16, 64): (4, 16), (29, 35): (8, 9)}  # of cct_2


def create(name='cct_2', *, seed=0, train=False, **kwargs):
    """A model in evaluation mode; one without weights of its own gets attention as far from flat as a trained one's."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs).train(train)
    if not kwargs.keys() & {'pretrained', 'checkpoint_path'}:
        with torch.no_grad():
            for block in model.blocks:
                for layer in (block.attn.qkv, block.attn.proj):  # from a deviation of 0.02, whatever the width
                    layer.weight *= 75 / math.sqrt(model.embed_dim)
    return model


def images(*size, batch=2, seed=1, **kwargs):
    return torch.randn(batch, 3, *(size or (32, 32)), generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def gradients(model, x, seed=2):
    """Loss and gradients of a training step, with the given randomness of dropout."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(x).square().sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected, tol):
    largest = max(grad.abs().max() for grad in expected.values())
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        # by the largest of all: that of attn_pool.score.bias is 0 but for rounding
        assert (actual[name] - grad).abs().max() <= tol * largest, name


@pytest.fixture(scope='module')
def original(golden):
    """State dict of the original program, its input, tokens and logits."""
    tensors, meta = golden('cct_2_3x2_32')
    state_dict = {name.removeprefix('sd.'): t for name, t in tensors.items() if name.startswith('sd.')}
    assert meta['params'] == sum(t.numel() for t in state_dict.values()) == SIZES['cct_2'][-1]
    return state_dict, tensors['x'], tensors['tokens'], tensors['logits']


# The original program


def test_golden_through_filter(original):
    state_dict, x, tokens, logits = original
    model = create()
    model.load_state_dict(checkpoint_filter_fn(state_dict, model))
    with torch.no_grad():
        assert error(model.tokenizer(x).flatten(2).transpose(1, 2), tokens) < 1e-5
        assert error(model(x), logits) < 1e-5


@pytest.mark.parametrize('wrap', [
    lambda state_dict: state_dict,
    lambda state_dict: {f'module.{name}': t for name, t in state_dict.items()},
    lambda state_dict: {f'_orig_mod.{name}': t for name, t in state_dict.items()},
    lambda state_dict: {'epoch': 3, 'state_dict': state_dict},
    lambda state_dict: {'epoch': 3, 'model': state_dict},
], ids=['plain', 'DataParallel', 'compile', 'state_dict', 'model'])
@pytest.mark.parametrize('source', ['state_dict', 'file'])
def test_golden_through_create_model(original, tmp_path, source, wrap):
    state_dict, x, _, logits = original
    overlay = dict(state_dict=wrap(state_dict))
    if source == 'file':
        torch.save(overlay['state_dict'], tmp_path / 'model.pth')
        overlay = dict(file=str(tmp_path / 'model.pth'))
    model = create(pretrained=True, pretrained_cfg_overlay=overlay)
    with torch.no_grad():
        assert error(model(x), logits) < 1e-5


def test_golden_through_safetensors(original, tmp_path):
    state_dict, x, _, logits = original
    save_file(state_dict, tmp_path / 'model.safetensors')
    overlay = dict(file=str(tmp_path / 'model.safetensors'))
    model = create(pretrained=True, pretrained_cfg_overlay=overlay)
    with torch.no_grad():
        assert error(model(x), logits) < 1e-5


def test_golden_loads_into_sot_models(original):
    # the attention variants have the same parameters
    for name in SOT:
        model = create(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=original[0]))
        assert torch.equal(model.blocks[1].attn.qkv.weight, original[0]['classifier.blocks.1.self_attn.qkv.weight'])


# Registry


def test_registered():
    assert timm.list_models('cct_*') == sorted(NAMES, key=lambda name: int(name.split('_')[1]))
    assert set(timm.list_models(module='cct')) == {*NAMES}
    assert {*NAMES} <= set(timm_sot.cct.__all__)


@pytest.mark.parametrize('name', NAMES)
def test_pretrained_cfg(name, caplog):
    with caplog.at_level(logging.DEBUG):
        model = timm.create_model(name, device='meta')
    assert not caplog.records, 'timm knows no cfg: defined after the entry point?'
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.architecture == name and cfg.fixed_input_size and cfg.license == 'apache-2.0'

    data = resolve_data_config({}, model=model)
    assert data == resolve_data_config({}, pretrained_cfg=cfg.to_dict())
    assert data['crop_pct'] == 1. and data['interpolation'] == 'bicubic'
    if name == 'cct_14':
        assert data['input_size'] == (3, 224, 224) and model.num_classes == cfg.num_classes == 1000
        assert data['mean'] == IMAGENET_DEFAULT_MEAN and data['std'] == IMAGENET_DEFAULT_STD
    else:
        assert data['input_size'] == (3, 32, 32) and model.num_classes == cfg.num_classes == 10
        assert data['mean'] == (0.4914, 0.4822, 0.4465) and data['std'] == (0.2470, 0.2435, 0.2616)

    first_conv = model.get_submodule(cfg.first_conv)
    assert isinstance(first_conv, nn.Conv2d) and first_conv.in_channels == 3
    assert model.get_submodule(cfg.classifier) is model.get_classifier() is model.head


# Architecture


@pytest.mark.parametrize('name', SIZES)
def test_sizes(name):
    depth, heads, mlp_ratio, dim, kernel, convs, img_size, classes, params = SIZES[name]
    model = timm.create_model(name, device='meta')
    assert len(model.blocks) == depth and model.num_features == model.embed_dim == model.head_hidden_size == dim

    chs = [3] + [64] * (convs - 1) + [dim]
    assert len(model.tokenizer.stages) == convs
    for stage, in_chs, out_chs in zip(model.tokenizer.stages, chs, chs[1:]):
        assert (stage.conv.in_channels, stage.conv.out_channels) == (in_chs, out_chs)
        assert stage.conv.kernel_size == (kernel, kernel) and stage.conv.bias is None
        assert stage.conv.stride == ((1, 1) if kernel == 3 else (2, 2))
        assert stage.conv.padding == ((1, 1) if kernel == 3 else (3, 3))
    for block in model.blocks:
        assert block.attn.num_heads == heads and block.attn.variant == 'softmax' and block.attn.qkv.bias is None
        assert block.mlp.fc1.out_features == mlp_ratio * dim
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}

    # every stage of a 3x3 convolution halves the image, of a 7x7 quarters it
    tokens = (img_size // (2 if kernel == 3 else 4) ** convs) ** 2
    expected = (
        kernel ** 2 * sum(i * o for i, o in zip(chs, chs[1:]))
        + tokens * dim
        + depth * (
            2 * 2 * dim  # norms
            + 4 * dim ** 2 + dim  # attention: qkv without bias, projection with
            + 2 * mlp_ratio * dim ** 2 + mlp_ratio * dim + dim)
        + 2 * dim
        + dim + 1  # sequence pooling
        + dim * classes + classes
    )
    assert sum(p.numel() for p in model.parameters()) == expected == params
    assert model(torch.empty(1, 3, img_size, img_size, device='meta')).shape == (1, classes)


@pytest.mark.parametrize('name', SOT)
def test_sot_models(name):
    model = create(name)
    assert sum(p.numel() for p in model.parameters()) == SIZES['cct_2'][-1]
    for block in model.blocks:
        assert type(block.attn) is SOTAttention and block.attn.variant == SOT[name]
        assert (block.attn.reg, block.attn.iters, block.attn.tol) == (0.1, 10, None)
    # the same model as cct_2 with attn=, and another one than cct_2
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), create('cct_2', attn=SOT[name])(x))
        assert error(model(x), create('cct_2')(x)) > 1e-2


def test_sot_shares():
    model = create('cct_2_sot_shares')
    # a filter of 9, a regularization and shares for each layer
    assert sum(p.numel() for p in model.parameters()) == SIZES['cct_2'][-1] + 2 * (9 * 128 + 2 * (1 + 64))
    for block in model.blocks:
        assert (block.attn.variant, block.attn.reg, block.attn.iters) == ('sot_shares', 0.1, 5)
    x = images()
    with torch.no_grad():
        assert torch.equal(model(x), create('cct_2', attn='sot_shares', sot_iters=5, context=True)(x))
    control = create('cct_2_sot_shares', sot_iters=0)
    expected = create()
    for ours, theirs in zip((model, control), (control, expected)):
        shared = ours.state_dict().keys() & theirs.state_dict().keys()
        assert all(torch.equal(ours.state_dict()[key], theirs.state_dict()[key]) for key in shared)
        assert theirs.state_dict().keys() <= ours.state_dict().keys()


def test_context():
    model = create(context=True)
    conv = model.blocks[0].context
    x = images(12, 20, batch=3).repeat(1, 43, 1, 1)[:, :128]
    tokens = x.flatten(2).transpose(1, 2)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    shifted = torch.stack([padded[:, c, c % 9 // 3:c % 9 // 3 + 12, c % 3:c % 3 + 20] for c in range(128)], 1)
    assert torch.equal(conv(tokens, [12, 20]), tokens + shifted.flatten(2).transpose(1, 2))
    # the attention is that of the tokens after it, and nothing else sees it
    block, seen = model.blocks[0], {}
    block.attn.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    block(tokens[:, :64], [8, 8])
    assert torch.equal(seen['tokens'], conv(block.pre_norm(tokens[:, :64]), [8, 8]))
    with torch.no_grad():
        for each in model.blocks:
            each.context.weight.zero_()
        assert error(model(images()), create()(images())) < 1e-6
    model.init_weights()
    assert torch.equal(conv(tokens, [12, 20]), tokens + shifted.flatten(2).transpose(1, 2))


@pytest.mark.parametrize('size', GRID)
def test_context_at_other_sizes(size):
    fixed = create('cct_2_sot_shares', img_size=size, pos_embed='none')
    dynamic = create('cct_2_sot_shares', dynamic_img_size=True, pos_embed='none')
    scripted = torch.jit.script(dynamic)
    with torch.no_grad():
        expected = fixed(images(*size))
        assert error(dynamic(images(*size)), expected) < 1e-6 and error(scripted(images(*size)), expected) < 1e-6
        final, _ = dynamic.forward_intermediates(images(*size))
        assert error(final, fixed.forward_features(images(*size))) < 1e-6


@pytest.mark.parametrize('seed', range(3))
def test_what_attention_adds_before_training(seed):
    """How it varies over the tokens, relative to the tokens: next to nothing, as hub/study/README.md says."""
    torch.manual_seed(seed)
    model = timm.create_model('cct_2').eval()
    block, seen = model.blocks[0], {}
    block.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    block.attn.register_forward_hook(lambda module, args, out: seen.update(added=out))
    with torch.no_grad():
        model(nn.functional.interpolate(torch.randn(16, 3, 8, 8), 32, mode='bicubic'))
    tokens, added = ((x - x.mean(dim=1, keepdim=True)).std().item() for x in (seen['tokens'], seen['added']))
    assert 0 < added / tokens < 1e-3


@pytest.mark.parametrize('name', ['cct_2', 'cct_7', 'cct_2_sot_q'])
def test_sot_arguments(name):
    model = timm.create_model(
        name, device='meta', attn='sot_qk', sot_reg=0.8, sot_iters=3, sot_tol=0.1, sot_distance='cosine')
    for block in model.blocks:
        attn = block.attn
        assert (attn.variant, attn.reg, attn.iters, attn.tol, attn.distance) == ('sot_qk', 0.8, 3, 0.1, 'cosine')


def test_tokenizer_arguments():
    model = create(kernel_size=5, n_conv_layers=3)
    assert [stage.conv.kernel_size for stage in model.tokenizer.stages] == [(5, 5)] * 3
    assert model(images()).shape == (2, 10)


def test_initialization():
    torch.manual_seed(3)
    model = timm.create_model('cct_14', num_classes=400)
    assert model.pos_embed.std().item() == pytest.approx(0.2, rel=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if module.out_features > 1:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)


@pytest.mark.parametrize('pos_embed', ['learn', 'sine'])
def test_init_weights_after_to_empty(pos_embed):
    model = timm.create_model('cct_2', pos_embed=pos_embed, device='meta').to_empty(device='cpu').eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float('nan'))
    torch.manual_seed(0)
    model.init_weights()
    assert torch.isfinite(model(images())).all()


# Arguments


def test_drop_rates():
    rates = dict(drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4, drop_path_rate=0.6)
    model = timm.create_model('cct_4', device='meta', **rates)
    assert model.head_drop.p == 0.1 and model.pos_drop.p == 0.2
    for block, rate in zip(model.blocks, (0., 0.2, 0.4, 0.6)):
        assert block.attn.proj_drop.p == block.mlp.drop1.p == block.mlp.drop2.p == 0.3
        assert block.attn.attn_drop.p == 0.4
        for drop_path in (block.drop_path1, block.drop_path2):
            if rate == 0.:
                assert isinstance(drop_path, nn.Identity)
            else:
                assert isinstance(drop_path, DropPath) and drop_path.drop_prob == pytest.approx(rate)


@pytest.mark.parametrize('name', NAMES)
def test_default_drop_rates(name):
    model = timm.create_model(name, device='meta')
    assert model.head_drop.p == model.pos_drop.p == 0.
    assert [block.attn.attn_drop.p for block in model.blocks] == [0.1] * len(model.blocks)
    assert {m.p for block in model.blocks for m in (block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2)} == {0.}
    assert model.blocks[-1].drop_path2.drop_prob == pytest.approx(0.1)


def test_class_defaults_are_zero():
    model = timm_sot.cct.CCT(device='meta')
    assert not [m for m in model.modules() if isinstance(m, DropPath) or isinstance(m, nn.Dropout) and m.p > 0.]


def test_class_defaults_are_those_of_cct_14():
    model, expected = timm_sot.cct.CCT(device='meta'), timm.create_model('cct_14', device='meta')
    assert str(model.tokenizer) == str(expected.tokenizer) and model.img_size == expected.img_size
    assert [block.attn.num_heads for block in model.blocks] == [6] * 14
    assert {name: p.shape for name, p in model.state_dict().items()} == {
        name: p.shape for name, p in expected.state_dict().items()}


def test_drop_path_reaches_training():
    model = create(train=True, **dict(NO_DROP, drop_path_rate=0.5))
    still = create(train=True, **NO_DROP)
    x = images(batch=32)  # that none of them is dropped twice, or all are, has a chance of 2^-30
    assert torch.equal(still(x), still(x)) and not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), still.eval()(x))


@pytest.mark.parametrize('name', NAMES)
def test_unknown_argument(name):
    with pytest.raises(TypeError, match='not_an_argument'):
        timm.create_model(name, device='meta', not_an_argument=1)


@pytest.mark.parametrize('kwargs,match', [
    (dict(pos_embed='sinus'), r"pos_embed='sinus' is unknown; choose one of \('learn', 'sine', 'none'\)"),
    (dict(attn='sot'), r"attn='sot' is unknown; choose one of \('softmax', 'sot_q'"),
    (dict(global_pool='token'), r"global_pool='token' is unknown; choose one of \('seq', 'avg', ''\)"),
    (dict(sot_reg=0.), r'^sot_reg=0\.0 must be a positive finite number'),
    (dict(sot_reg='0.1'), r"^sot_reg='0\.1' must be a positive finite number"),
    (dict(sot_iters=0), r'^sot_iters=0 must be an integer of at least 1'),
    (dict(sot_tol='none'), r"^sot_tol='none' must be None"),
    (dict(sot_tol=False), r'^sot_tol=False must be None'),
    (dict(sot_distance='l2'), r"^sot_distance='l2' is unknown; choose one of"),
    *((dict([(name, value)]), rf'^{name}={value} must be an integer of at least 1')
      for name in ('in_chans', 'embed_dim', 'depth', 'num_heads', 'kernel_size', 'n_conv_layers')
      for value in (0, -1, 2.5)),
    (dict(img_size=(32, 0)), r'img_size=0 must be an integer of at least 1'),
    (dict(img_size='32'), r"img_size='32' must be an integer of at least 1"),
    (dict(num_classes=1.5), r'num_classes=1\.5 must be an integer, 0 for no classification head'),
    (dict(mlp_ratio='a'), r"mlp_ratio='a' must be a positive finite number"),
    (dict(mlp_ratio=-1), r'mlp_ratio=-1 must be a positive finite number'),
    (dict(img_size=(32, 32, 3)), r'img_size=\(32, 32, 3\) must be one number or \(height, width\)'),
    (dict(num_heads=3), r'embed_dim=128 must be a multiple of num_heads=3'),
])
def test_argument_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        timm.create_model('cct_2_sot_qk', device='meta', **kwargs)


@pytest.mark.parametrize('name', ['cct_2', 'cct_2_sot_qk'])
@pytest.mark.parametrize('pos_embed', ['learn', 'sine'])
def test_device_and_dtype(name, pos_embed):
    model = timm.create_model(name, pos_embed=pos_embed, device='meta', dtype=torch.float64)
    for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == 'meta' and tensor.dtype == torch.float64
    for dtype in (torch.float64, torch.bfloat16):
        model = create(name, pos_embed=pos_embed, dtype=dtype)
        assert {t.dtype for t in [*model.parameters(), *model.buffers()]} == {dtype}
        out = model(images(dtype=dtype))
        assert out.dtype == dtype and torch.isfinite(out).all()
        model.reset_classifier(3, 'avg')
        model.reset_classifier(3, 'seq')
        assert {t.dtype for t in model.parameters()} == {dtype}


# Position embedding


def test_sine_formula():
    N, D = 196, 384
    expected = torch.tensor([
        [(math.sin if i % 2 == 0 else math.cos)(p / 10000 ** (2 * (i // 2) / D)) for i in range(D)] for p in range(N)
    ], dtype=torch.float64)
    actual = sine_pos_embed(N, D)
    assert actual.shape == (1, N, D) and actual.dtype == torch.float32
    assert (actual[0] - expected).abs().max() < 5e-5  # float32 has so much of an angle of 196


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_sine_has_nothing_of_the_default_dtype(dtype):
    expected = sine_pos_embed(64, 128)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        actual = sine_pos_embed(64, 128)
        model = create(pos_embed='sine')
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(actual, expected) and torch.equal(model.pos_embed, expected.to(dtype))


def test_sine_is_no_parameter():
    model = create(pos_embed='sine')
    assert 'pos_embed' not in model.state_dict() and 'pos_embed' not in dict(model.named_parameters())
    assert torch.equal(dict(model.named_buffers())['pos_embed'], sine_pos_embed(64, 128))
    assert model.double().pos_embed.dtype == torch.float64
    assert model.no_weight_decay() == set()
    assert sum(p.numel() for p in model.parameters()) == SIZES['cct_2'][-1] - 64 * 128


def test_position_embeddings_differ():
    # what they add: the same weights, other embeddings, and none that makes the model blind to the order of the tokens
    learn, sine, none = create(), create(pos_embed='sine'), create(pos_embed='none')
    weights = learn.state_dict()
    del weights['pos_embed']
    sine.load_state_dict(weights)
    none.load_state_dict(weights)
    x = images()
    with torch.no_grad():
        logits = [model(x) for model in (learn, sine, none)]
        learn.pos_embed.copy_(sine_pos_embed(64, 128))
        assert torch.equal(learn(x), logits[1])
        learn.pos_embed.zero_()
        assert torch.equal(learn(x), logits[2])
        assert min(error(logits[0], logits[2]), error(logits[1], logits[2]), error(logits[0], logits[1])) > 1e-2
        # flipped images have flipped tokens (this tokenizer is symmetric if its kernels are)
        for stage in none.tokenizer.stages:
            stage.conv.weight.copy_(stage.conv.weight + stage.conv.weight.flip(-1))
            stage.pool = nn.AvgPool2d(2)
        assert error(none(x.flip(-1)), none(x)) < 1e-5


def test_original_sine_checkpoint_with_learned_embedding(original):
    # the original's entry points called *_sine build a learned embedding, and their checkpoints carry it
    state_dict, x, _, logits = original
    overlay = dict(state_dict=state_dict)
    with torch.no_grad():
        assert error(create(pretrained=True, pretrained_cfg_overlay=overlay, pos_embed='learn')(x), logits) < 1e-5
    with pytest.raises(ValueError, match=r"learned position embedding.*pos_embed='sine'.*pos_embed='learn'"):
        create(pretrained=True, pretrained_cfg_overlay=overlay, pos_embed='sine')


@pytest.mark.parametrize('img_size', [32, 48])
def test_true_sine_checkpoint(original, img_size):
    state_dict, x, _, _ = original
    overlay = dict(state_dict={**state_dict, 'classifier.positional_emb': sine_pos_embed(64, 128)})
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, pos_embed='sine', img_size=img_size)
    assert torch.equal(model.pos_embed, sine_pos_embed((img_size // 4) ** 2, 128))
    with torch.device('meta'):  # the default device is not that of the checkpoint
        checkpoint_filter_fn(overlay['state_dict'], model)
    if img_size == 32:
        learn = create(pretrained=True, pretrained_cfg_overlay=overlay)
        with torch.no_grad():
            assert error(model(x), learn(x)) < 1e-5


@pytest.mark.parametrize('num_classes', [10, 5])
@pytest.mark.parametrize('kwargs, names', [
    (dict(global_pool='avg'), 'attn_pool.score.weight, attn_pool.score.bias'),
    (dict(global_pool=''), 'attn_pool.score.weight, attn_pool.score.bias'),
    (dict(pos_embed='none'), 'pos_embed'),
    (dict(global_pool='avg', pos_embed='none'), 'pos_embed, attn_pool.score.weight, attn_pool.score.bias'),
    (dict(pos_embed='learn'), None),
])
def test_checkpoint_with_more_than_the_model_was_told_to_have(original, caplog, kwargs, names, num_classes):
    overlay = dict(state_dict=original[0])
    full = create(pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes, **kwargs)
    assert model(images()).isfinite().all()
    for name, value in model.state_dict().items():
        assert torch.equal(value, full[name]) or name.startswith('head.') and num_classes == 5, name
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    if names is None:
        assert not warnings
    else:
        message, = warnings
        left_out = message.removeprefix('Left out of the checkpoint, the model being without them: ').removesuffix('.')
        assert sorted(left_out.split(', ')) == sorted(names.split(', '))


def test_checkpoint_with_less_than_the_model():
    for kwargs, name in ((dict(global_pool='avg'), 'attn_pool.score.weight'), (dict(pos_embed='none'), 'pos_embed')):
        overlay = dict(state_dict=create(**kwargs).state_dict())
        with pytest.raises(RuntimeError, match=rf'the checkpoint lacks [12] parameters .*{name}'):
            create(pretrained=True, pretrained_cfg_overlay=overlay)
        with pytest.raises(RuntimeError, match=rf'the checkpoint lacks [12] parameters .*{name}'):
            create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)  # for which timm does not ask


def test_part_of_a_checkpoint():
    model = create(pretrained=True, pretrained_strict=False, depth=3)
    weights = create(pretrained=True).state_dict()
    for name, value in model.state_dict().items():
        assert name.startswith('blocks.2.') or torch.equal(value, weights[name]), name


def test_sine_after_to_empty():
    model = create(pos_embed='sine')
    other = timm.create_model('cct_2', pos_embed='sine', device='meta').to_empty(device='cpu').eval()
    other.pos_embed.fill_(float('nan'))
    other.load_state_dict(model.state_dict())
    other.init_non_persistent_buffers()
    assert torch.equal(other(images()), model(images()))


# Image size


@pytest.mark.parametrize('kernel_size,n_conv_layers', [(3, 1), (3, 2), (3, 3), (5, 2), (7, 1), (7, 2)])
def test_grid_size(kernel_size, n_conv_layers):
    tokenizer = ConvTokenizer(3, 16, kernel_size, n_conv_layers, hidden_dim=8, device='meta')
    for height, width in [(32, 32), (33, 47), (96, 7), (1, 224)]:
        out = tokenizer(torch.empty(1, 3, height, width, device='meta'))
        assert tuple(out.shape[-2:]) == tokenizer.grid_size((height, width))


@pytest.mark.parametrize('pos_embed', ['learn', 'sine', 'none'])
@pytest.mark.parametrize('size', GRID)
def test_img_size(size, pos_embed):
    model = create(img_size=size, pos_embed=pos_embed)
    assert model.grid_size == GRID[size]
    with torch.no_grad():
        assert model(images(*size)).shape == (2, 10)
        height, width = size
        advice = 'create it with another img_size, or with dynamic'
        message = rf"height \({height + 4}\) doesn't match model \({height}\); {advice}"
        with pytest.raises(AssertionError, match=message):
            model(images(height + 4, width))
        message = rf"width \({width + 4}\) doesn't match model \({width}\); {advice}"
        with pytest.raises(AssertionError, match=message):
            model(images(height, width + 4))


def resampled(pos_embed, old_size, new_size):
    """timm's own resampling (which must not be called for two grids of as many tokens: it returns its input)."""
    assert math.prod(old_size) != math.prod(new_size)
    return resample_abs_pos_embed(pos_embed, new_size, old_size, num_prefix_tokens=0)


@pytest.mark.parametrize('size', [(48, 48), (24, 40), (29, 35)])
def test_set_input_size(size):
    model = create()
    embedding = model.pos_embed.detach().clone()
    model.pos_embed.requires_grad_(False)
    model.set_input_size(size)
    assert (model.img_size, model.grid_size) == (size, GRID[size])
    assert isinstance(model.pos_embed, nn.Parameter) and not model.pos_embed.requires_grad
    assert error(model.pos_embed, resampled(embedding, (8, 8), GRID[size])) < 1e-6
    assert model(images(*size)).shape == (2, 10)
    model.set_input_size(img_size=size[0])
    assert model(images(size[0], size[0])).shape == (2, 10)


def test_set_input_size_to_the_current_one():
    model = create(img_size=(24, 40))
    embedding = model.pos_embed
    model.set_input_size()
    assert (model.img_size, model.grid_size) == ((24, 40), GRID[24, 40]) and model.pos_embed is embedding


def test_set_input_size_to_as_many_tokens():
    # 4 x 16 tokens are as many as 8 x 8, in other places: a slope from top to bottom stays one
    model = create()
    with torch.no_grad():
        model.pos_embed.copy_(torch.arange(8.).repeat_interleave(8).reshape(1, 64, 1).expand(-1, -1, 128))
    model.set_input_size((16, 64))
    grid = model.pos_embed.detach().reshape(4, 16, 128)
    assert error(grid, grid[:, :1].expand(-1, 16, -1)) < 1e-6
    assert (grid[1:] - grid[:-1] > 1.).all()


def test_set_input_size_sine():
    model = create(pos_embed='sine')
    model.set_input_size((24, 40))
    assert torch.equal(model.pos_embed, sine_pos_embed(60, 128)) and 'pos_embed' not in model.state_dict()
    assert model(images(24, 40)).shape == (2, 10)


@pytest.mark.parametrize('size, match', [
    (0, r'img_size=0 must be an integer of at least 1'),
    ((48, 33.5), r'img_size=33\.5 must be an integer of at least 1'),
    ((48, None), r'img_size=None must be an integer of at least 1'),
    ((3, 48, 48), r'img_size=\(3, 48, 48\) must be one number or \(height, width\)'),
])
def test_set_input_size_to_what_is_no_size(size, match):
    model = create()
    with pytest.raises(ValueError, match=match):
        model.set_input_size(size)
    assert (model.img_size, model.grid_size) == ((32, 32), (8, 8)) and model(images()).shape == (2, 10)


def test_set_input_size_is_recorded():
    if timm_sot.cct.update_model_input_size is None:
        pytest.skip(f'timm {timm.__version__} keeps no record of the size of a model')
    from timm.data.model_config import resolve_input_data_config
    model = create()
    model.set_input_size((24, 40))
    assert resolve_input_data_config(model)['input_size'] == (3, 24, 40)


@pytest.mark.parametrize('pos_embed', ['learn', 'sine', 'none'])
@pytest.mark.parametrize('name', ['cct_2', 'cct_2_sot_qk'])
def test_dynamic_img_size(name, pos_embed):
    model = create(name, pos_embed=pos_embed, dynamic_img_size=True)
    fixed = create(name, pos_embed=pos_embed)
    for size in GRID:
        fixed.set_input_size(32)
        fixed.load_state_dict(model.state_dict())
        fixed.set_input_size(size)
        with torch.no_grad():
            assert error(model(images(*size)), fixed(images(*size))) < 1e-5
    _, grads = gradients(model.train(), images(24, 40))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert pos_embed != 'learn' or grads['pos_embed'].any()


def test_qkt_needs_as_many_tokens_as_channels():
    model = create('cct_2_sot_qkt')
    model.set_input_size((16, 64))
    assert model(images(16, 64)).shape == (2, 10)
    model.set_input_size(48)  # legal, to look at a model or go on resizing it
    with pytest.raises(ValueError, match=r'got 144 tokens and head width 64'):
        model(images(48, 48))


@pytest.mark.parametrize('size', [(48, 48), (24, 40), (16, 64)])
def test_checkpoint_of_another_size(tmp_path, caplog, size):
    # --pretrained-path: weights of 32 x 32 images for a model of `size`
    source = create(seed=5)
    save_file(source.state_dict(), tmp_path / 'model.safetensors')
    overlay = dict(file=str(tmp_path / 'model.safetensors'))
    with caplog.at_level(logging.INFO, logger='timm_sot'):
        model = create(pretrained=True, pretrained_cfg_overlay=overlay, img_size=size)
    assert f'Resized position embedding: (8, 8) to {GRID[size]}' in caplog.text
    source.set_input_size(size)
    assert model.pos_embed.shape[1] == math.prod(GRID[size])
    with torch.no_grad():
        assert torch.equal(model(images(*size)), source(images(*size)))


@pytest.mark.parametrize('size', [(24, 40), (16, 64)])
def test_checkpoint_of_recorded_size(size):
    # and the other way round, where the cfg says of what size the weights are
    source = create(seed=5, img_size=size)
    overlay = dict(state_dict=source.state_dict(), input_size=(3, *size))
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, img_size=32)
    source.set_input_size(32)
    with torch.no_grad():
        assert torch.equal(model(images()), source(images()))


def test_checkpoint_of_unrecorded_size():
    def load(source_size, size, **kwargs):
        source = create(seed=5, img_size=source_size)
        model = create(pretrained=True, pretrained_cfg_overlay=dict(state_dict=source.state_dict()), img_size=size)
        source.set_input_size(size)
        return torch.equal(model.pos_embed, source.pos_embed)

    assert load((24, 40), (24, 40))  # the model's own grid
    assert load(48, (24, 40))  # a square
    assert load((16, 32), (48, 96))  # the model's aspect ratio
    with pytest.raises(ValueError, match='60 tokens.*8 x 8 grid.*set_input_size'):
        load((24, 40), 32)


def test_checkpoint_of_another_architecture():
    # whose position embedding, of 16 patches and a class token, is the least of what does not fit
    vit = timm.create_model('vit_tiny_patch16_224', img_size=64, depth=1)
    with pytest.raises(RuntimeError, match=r'lacks \d+ parameters .*blocks.* and has, unlike the model, \d+'):
        create(pretrained=True, pretrained_cfg_overlay=dict(state_dict=vit.state_dict()))


@pytest.mark.parametrize('size', [(24, 40), (16, 64)])
def test_folder_round_trip(tmp_path, size):
    if timm_sot.cct.update_model_input_size is None:
        pytest.skip(f'timm {timm.__version__} does not save what a model was resized to')
    model = create('cct_2_sot_qk', seed=5, sot_reg=0.8)
    model.set_input_size(size)
    model.reset_classifier(7, 'avg')
    timm.models.save_for_hf(model, tmp_path / 'model', model_args=dict(global_pool='avg'), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    assert loaded.blocks[0].attn.reg == 0.8 and resolve_data_config({}, model=loaded)['input_size'] == (3, *size)
    with torch.no_grad():
        assert torch.equal(loaded(images(*size)), model(images(*size)))


# Adapting weights


def test_pretrained_in_chans(original):
    for in_chans in (1, 5):
        model = create(pretrained=True, pretrained_cfg_overlay=dict(state_dict=original[0]), in_chans=in_chans)
        assert model.in_chans == in_chans and model(torch.randn(2, in_chans, 32, 32)).shape == (2, 10)
        weight = model.tokenizer.stages[0].conv.weight
        if in_chans == 1:
            expected = original[0]['tokenizer.conv_layers.0.0.weight'].sum(dim=1, keepdim=True)
            assert error(weight, expected) < 1e-6
        assert torch.equal(model.head.weight, original[0]['classifier.fc.weight'])


@pytest.mark.parametrize('num_classes', [5, 0])
def test_pretrained_num_classes(original, num_classes):
    state_dict, x, _, _ = original
    model = create(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict), num_classes=num_classes)
    reference = create(pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))
    with torch.no_grad():
        features = reference.forward_head(reference.forward_features(x), pre_logits=True)
        assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), features)
        assert model(x).shape == (len(x), num_classes or 128)
        if num_classes == 0:
            assert torch.equal(model(x), features)


# Head


def test_pools():
    x = images()
    model = create()
    with torch.no_grad():
        tokens = model.forward_features(x)
        score = model.attn_pool.score
        weights = (tokens @ score.weight.T + score.bias).exp()  # (B, N, 1)
        pooled = {
            'seq': (weights * tokens).sum(dim=1) / weights.sum(dim=1),
            'avg': tokens.mean(dim=1),
            '': tokens,
        }
        assert tokens.shape == (2, 64, 128)
        for pool, expected in pooled.items():
            reset = copy.deepcopy(model)
            reset.reset_classifier(10, pool)
            assert reset.global_pool == pool and ('attn_pool.score.weight' in reset.state_dict()) == (pool == 'seq')
            built = create(global_pool=pool, num_classes=0)
            built.load_state_dict({k: v for k, v in reset.state_dict().items() if not k.startswith('head.')})
            for other in (reset, built):
                assert error(other.forward_head(other.forward_features(x), pre_logits=True), expected) < 1e-5
            assert error(built(x), expected) < 1e-5
            assert error(reset(x), expected @ reset.head.weight.T + reset.head.bias) < 1e-5


def test_reset_classifier():
    model = create('cct_2_sot_qk', train=True)
    score = model.attn_pool.score.weight
    model.reset_classifier(5)
    assert model.num_classes == 5 and model.head.weight.shape == (5, 128) and model.attn_pool.score.weight is score
    model.reset_classifier(0)
    assert isinstance(model.head, nn.Identity) and model.global_pool == 'seq' and model(images()).shape == (2, 128)
    model.reset_classifier(0, '')
    assert model.attn_pool is None and model(images()).shape == (2, 64, 128)
    model.reset_classifier(3)
    assert model.global_pool == '' and model(images()).shape == (2, 64, 3)
    with pytest.raises(ValueError, match="global_pool='token' is unknown"):
        model.reset_classifier(4, 'token')
    assert model.num_classes == 3 and model.global_pool == ''
    model.reset_classifier(3, 'seq')
    assert model(images()).shape == (2, 3) and not model.attn_pool.score.bias.any()
    assert all(module.training for module in model.modules())
    model.eval().reset_classifier(4, 'avg')
    model.reset_classifier(4, 'seq')
    assert not any(module.training for module in model.modules())


def test_head_dropout_is_before_the_classifier():
    model = create(train=True, drop_rate=0.5, **NO_DROP)
    features = model.forward_head(torch.ones(1, 64, 128), pre_logits=True)
    assert set(features.unique().tolist()) == {0., 2.}


# Features


LEVELS = {
    'cct_2': [('tokenizer.stages.0', 64, 2), ('tokenizer.stages.1', 128, 4)] + [
        (f'blocks.{i}', 128, 4) for i in range(2)],
    'cct_7': [('tokenizer.stages.0', 256, 2)] + [(f'blocks.{i}', 256, 2) for i in range(7)],
    'cct_14': [('tokenizer.stages.0', 64, 4), ('tokenizer.stages.1', 384, 16)] + [
        (f'blocks.{i}', 384, 16) for i in range(14)],
}


@pytest.mark.parametrize('name', LEVELS)
def test_feature_info(name):
    model = timm.create_model(name, device='meta')
    assert model.feature_info == [dict(module=m, num_chs=c, reduction=r) for m, c, r in LEVELS[name]]


@pytest.mark.parametrize('recorded, num_classes, warned', [
    (None, 100, True), (100, 100, False), (None, 10, False), (None, 7, False)])
def test_head_that_timm_does_not_load(tmp_path, caplog, recorded, num_classes, warned):
    """Though it fits: timm goes by the number of classes of the configuration, 10."""
    torch.save(create(num_classes=num_classes if num_classes != 7 else 10).state_dict(), tmp_path / 'w.pth')
    overlay = dict(file=str(tmp_path / 'w.pth'), **({} if recorded is None else dict(num_classes=recorded)))
    model = timm.create_model('cct_2', pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)
    head = torch.load(tmp_path / 'w.pth')['head.weight']
    assert torch.equal(model.head.weight, head) == (not warned and num_classes != 7)
    message = 'of 100 classes as the model has, is not loaded, .* are of 10; .*overlay=dict\\(num_classes=100\\)'
    assert bool(re.search(message, caplog.text)) == warned and ('is not loaded' in caplog.text) == warned


@pytest.mark.parametrize('size', [(32, 32), (24, 40)])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_forward_intermediates(size, checkpointing):
    model = create(img_size=size)
    model.set_grad_checkpointing(checkpointing)
    seen = []
    for name, _, _ in LEVELS['cct_2']:
        model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
    x, (H, W) = images(*size), GRID[size]
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        expected = seen[:2] + [y.transpose(1, 2).reshape(2, 128, H, W) for y in seen[2:]]
        assert len(maps) == 4 and all(map(torch.equal, maps, expected))
        assert maps[0].shape == (2, 64, 2 * H, 2 * W)
        assert torch.equal(final, model.forward_features(x))

        tokens = model.forward_intermediates(x, output_fmt='NLC', intermediates_only=True)
        assert all(torch.equal(t, m.flatten(2).transpose(1, 2)) for t, m in zip(tokens, maps))

        normed = model.forward_intermediates(x, norm=True, output_fmt='NLC', intermediates_only=True)
        assert torch.equal(normed[0], tokens[0]) and torch.equal(normed[1], tokens[1])
        assert torch.equal(normed[2], model.norm(tokens[2])) and torch.equal(normed[3], final)

        for indices, levels in ((1, [3]), (3, [1, 2, 3]), ([0], [0]), ([1, -1], [1, 3]), ([2], [2])):
            del seen[:]
            picked = model.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True)
            assert len(picked) == len(levels) and all(torch.equal(p, maps[i]) for p, i in zip(picked, levels))
            assert len(seen) == levels[-1] + 1  # the rest of the layers did not run
        del seen[:]
        final, picked = model.forward_intermediates(x, indices=[0], stop_early=True)
        assert torch.equal(picked[0], maps[0]) and final.shape == (2, H * W, 128) and len(seen) == 2
        with pytest.raises(AssertionError, match='NCHW or NLC'):
            model.forward_intermediates(x, output_fmt='NHWC')


def test_prune_intermediate_layers():
    # timm's own contract for it, which the timm suite runs for every model, and what is left
    x = images()
    for index, (_, chs, _) in enumerate(LEVELS['cct_2']):
        model = create()
        expected = model.forward_intermediates(x, indices=[index], intermediates_only=True)[0]
        assert model.prune_intermediate_layers([index], prune_norm=True) == [index]
        assert len(model.blocks) == max(0, index - 1) and len(model.tokenizer.stages) == min(index + 1, 2)
        assert isinstance(model.norm, nn.Identity) and isinstance(model.head, nn.Identity) and model.attn_pool is None
        assert torch.equal(model.forward_features(x), expected.flatten(2).transpose(1, 2))
        assert model.num_features == model.head_hidden_size == chs
        model.reset_classifier(7, 'seq')
        assert model(x).shape == (2, 7)
    # without a transformer there is nothing that norm and head fit, whatever is asked for
    model = create()
    model.prune_intermediate_layers([0], prune_norm=False, prune_head=False)
    assert {name.split('.')[0] for name, _ in model.named_parameters()} == {'tokenizer'}
    model = create()
    logits = model(x)
    assert model.prune_intermediate_layers(1, prune_head=False) == [3]
    assert torch.equal(model(x), logits)


@pytest.mark.parametrize('name', SMALL)
def test_features_only(name):
    backbone = timm.create_model(name, features_only=True)  # the last three levels
    assert backbone.feature_info.channels() == [128, 128, 128] and backbone.feature_info.reduction() == [4, 4, 4]
    assert [tuple(f.shape) for f in backbone(images())] == [(2, 128, 8, 8)] * 3
    backbone = timm.create_model(name, features_only=True, out_indices=(0, 2))
    assert backbone.feature_info.channels() == [64, 128] and backbone.feature_info.reduction() == [2, 4]
    assert [tuple(f.shape) for f in backbone(images())] == [(2, 64, 16, 16), (2, 128, 8, 8)]


def test_features_only_pretrained(original):
    state_dict, x, tokens, _ = original
    backbone = timm.create_model(
        'cct_2', pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict), features_only=True,
        out_indices=(1, 3)).eval()
    with torch.no_grad():
        assert error(backbone(x)[0].flatten(2).transpose(1, 2), tokens) < 1e-5


# Training


@pytest.mark.parametrize('name', ['cct_2_sot_qk', 'cct_2_sot_shares'])
def test_no_weight_decay(name):
    """What 'sot_shares' learns is decayed, as the class says, and so is the convolution."""
    model = create(name)
    assert model.no_weight_decay() == {'pos_embed'} and create(pos_embed='none').no_weight_decay() == set()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05)
    plain = {id(p) for group in optimizer.param_groups if group['weight_decay'] == 0. for p in group['params']}
    names = {name for name, p in model.named_parameters() if id(p) in plain}
    assert names == {'pos_embed'} | {name for name, p in model.named_parameters() if p.ndim == 1}


def test_group_matcher():
    model = create()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert {name: groups[name] for name in ('tokenizer.stages.1.conv.weight', 'pos_embed')} == {
        'tokenizer.stages.1.conv.weight': 0, 'pos_embed': 0}
    assert {groups[name] for name in groups if name.startswith('blocks.0.')} == {1}
    assert {groups[name] for name in groups if name.startswith(('blocks.1.', 'norm.', 'attn_pool.'))} == {2}
    assert groups['head.weight'] == groups['head.bias'] == 3
    assert set(groups) == {name for name, _ in model.named_parameters()}

    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()):
        for p in group['params']:
            scales[id(p)] = group['lr_scale']
    scales = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert scales['head.weight'] == 1. and scales['blocks.1.attn.qkv.weight'] == 0.5
    assert scales['blocks.0.attn.qkv.weight'] == 0.25 and scales['pos_embed'] == 0.125


# Every registered model, in all the ways that timm and torch run a model


@pytest.fixture(params=[
    pytest.param(name, marks=pytest.mark.slow) if name in ('cct_6', 'cct_7', 'cct_14') else name for name in NAMES])
def name(request):
    return request.param


def inputs(name, **kwargs):
    return images(224, 224, batch=1, **kwargs) if name == 'cct_14' else images(**kwargs)


@pytest.mark.parametrize('name', SMALL)
def test_images_are_independent(name):
    # in float64: float32 kernels round differently for another number of images
    model, x = create(name, dtype=torch.float64), images(batch=5, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        assert error(model(x[2:3]), logits[2:3]) < 1e-12
        x[3:] *= 1e3
        assert error(model(x)[:3], logits[:3]) < 1e-12


def test_compile(name):
    model, x = create(name, train=True), inputs(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    loss, grads = gradients(model, x)  # dropout and drop path are on
    torch.manual_seed(2)
    model.zero_grad()
    compiled_loss = compiled(x).square().sum()
    compiled_loss.backward()
    assert error(compiled_loss.detach(), loss) < 1e-5
    assert_same_gradients({k: p.grad for k, p in model.named_parameters()}, grads, 1e-5)


@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='inductor needs a C++ compiler')
def test_compile_inductor():
    # one layer and two iterations: the C++ compiler takes half a minute for a whole model
    model, x = create('cct_2_sot_qk', train=True, depth=1, sot_iters=2, **NO_DROP), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    loss, grads = gradients(model, x)
    model.zero_grad()
    compiled_loss = compiled(x).square().sum()
    compiled_loss.backward()
    assert error(compiled_loss.detach(), loss) < 1e-5
    assert_same_gradients({k: p.grad for k, p in model.named_parameters()}, grads, 1e-4)


@pytest.mark.slow
def test_compile_dynamic_img_size():
    model = create('cct_2_sot_qk', dynamic_img_size=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for size in ((32, 32), (24, 40), (40, 48)):
        assert error(compiled(images(*size)), model(images(*size))) < 1e-5
        grads = []
        for function in (compiled, model):
            model.zero_grad()
            function(images(*size)).sum().backward()
            grads.append(model.pos_embed.grad)
        assert error(*grads) < 1e-5


def test_compile_dynamic_img_size_for_inference():
    """Without gradients the sizes are symbols, and more of them are taken than there may be graphs."""
    model = create('cct_2_sot_qk', dynamic_img_size=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    with torch.no_grad(), torch._dynamo.config.patch(cache_size_limit=2):
        for height in (24, 36, 40, 44):
            x = images(height, 40)
            assert error(compiled(x), model(x)) < 1e-5


def test_export(name):
    model, x = create(name), inputs(name)
    x = torch.cat([x, x.flip(-1), x.flip(-2)])
    # of a batch of 1, export would make a constant
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim('batch')},))
    for x in (x[:2], x):
        assert error(exported.module()(x), model(x)) < 1e-5


def test_script(name):
    model, x = create(name), inputs(name)
    scripted = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    with torch.no_grad():
        assert error(scripted(x), model(x)) < 1e-5 and error(loaded(x), model(x)) < 1e-5


@pytest.mark.parametrize('pos_embed', ['learn', 'sine', 'none'])
def test_script_dynamic_img_size(pos_embed):
    model = create('cct_2_sot_qk', pos_embed=pos_embed, dynamic_img_size=True)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        for size in GRID:
            assert error(scripted(images(*size)), model(images(*size))) < 1e-5


def test_bfloat16_autocast(name):
    model, x = create(name, train=True, **NO_DROP), inputs(name)
    expected = model(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16 and error(logits, expected) < 0.03
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_channels_last(name):
    model, x = create(name), inputs(name)
    with torch.no_grad():
        expected, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
        model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        assert error(model(x), expected) < 1e-5
        for actual, expected in zip(model.forward_intermediates(x, intermediates_only=True), maps):
            assert error(actual, expected) < 1e-5


def test_grad_checkpointing(name):
    model, x = create(name, train=True), inputs(name)
    runs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: runs.append(module))
    loss, grads = gradients(model, x)
    depth = len(model.blocks)
    assert len(runs) == depth
    model.set_grad_checkpointing()
    checkpointed_loss, checkpointed_grads = gradients(model, x)
    assert len(runs) == 3 * depth  # again in the backward pass
    assert torch.equal(checkpointed_loss, loss)
    assert_same_gradients(checkpointed_grads, grads, 1e-6)
    del runs[:]
    sum(y.square().sum() for y in model.forward_intermediates(x, intermediates_only=True)).backward()
    assert len(runs) == 2 * depth
    model.set_grad_checkpointing(False)
    del runs[:]
    gradients(model, x)
    assert len(runs) == depth


def test_deepcopy_and_pickle(name):
    model, x = create(name, sot_reg=0.3), inputs(name)
    expected = model(x).detach()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for other in others:
            assert torch.equal(other(x), expected) and other.blocks[0].attn.reg == 0.3
            assert not other.training and other.pretrained_cfg == model.pretrained_cfg


def test_state_dict_round_trip(name, tmp_path):
    model, x = create(name, seed=7), inputs(name)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    file = str(tmp_path / 'model.safetensors')
    other = create(name)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(load_file(file))
    for loaded in (
            other,
            create(name, checkpoint_path=file),
            create(name, pretrained=True, pretrained_cfg_overlay=dict(file=file)),
    ):
        assert torch.equal(loaded(x), model(x))

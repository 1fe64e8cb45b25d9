""" Training of one model of a study """
import copy
import math

import pytest
import timm
import torch

from timm_sot import attention_maps
from timm_sot.study.coupled import capturable
from timm_sot.study.data import Images, StudyData
from timm_sot.study.engine import PRECISIONS, Recipe, Trainer, batch_sizes, set_precision, train_epoch
from timm_sot.viz.maps import common_part, row_entropy

DEVICE = torch.device('cpu')


def make_data(num_train=32, num_test=16):
    """Dark images against bright ones."""
    def images(n):
        labels = torch.arange(n) % 2
        noise = torch.randint(0, 100, (n, 3, 32, 32), generator=torch.Generator().manual_seed(n))
        return Images((noise + 150 * labels[:, None, None, None]).to(torch.uint8), labels)
    return StudyData('brightness', images(num_train), images(num_test), 2)


def make_trainer(
        recipe=Recipe(epochs=2, batch_size=12), name='cct_2', data=make_data(), device=DEVICE, graphs=True,
        **model_kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2, **model_kwargs)
    initial = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, recipe, data.train.to(device), data.test.to(device), device, graphs)
    trainer.reset(initial)
    return trainer, initial


def train(trainer, epochs=(0, 1), seed=0):
    return [train_epoch([trainer], seed, epoch)[0][:2] for epoch in epochs]


def test_learns():
    steps = []
    trainer, _ = make_trainer(Recipe(epochs=3, batch_size=12))
    results = [train_epoch([trainer], 0, epoch, on_step=steps.append)[0] for epoch in range(3)]
    assert steps == [0] * 9 and trainer.step.item() == 9
    assert results[-1][0] == 100. and results[-1][1] < results[0][1] and results[-1][2] > 0


def test_matches_a_plain_loop():
    recipe = Recipe(epochs=2, batch_size=12, augment=())
    trainer, initial = make_trainer(recipe)
    model = timm.create_model('cct_2', num_classes=2, attn_drop_rate=0., drop_path_rate=0.)
    model.load_state_dict(initial)
    for module in trainer.model.modules():
        for rate in ('p', 'drop_prob'):
            if hasattr(module, rate):
                setattr(module, rate, 0.)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    rates = recipe.learning_rates(3)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ('mean', 'std'))
    train_images, test_images = ((images.images / 255 - mean) / std for images in make_data()[1:3])
    for step in range(3):
        part = slice(12 * step, 12 * step + 12)
        optimizer.param_groups[0]['lr'] = rates[step]
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model.train()(train_images[part]), make_data().train.labels[part], label_smoothing=recipe.smoothing)
        loss.backward()
        optimizer.step()
    (top1, loss), = train(trainer, epochs=[0])
    for (name, parameter), expected in zip(trainer.model.named_parameters(), model.parameters()):
        if name != 'attn_pool.score.bias':  # has no gradient but rounding, which AdamW makes a step of
            torch.testing.assert_close(parameter, expected, atol=2e-5, rtol=1e-3)
    with torch.no_grad():
        logits = model.eval()(test_images)
    labels = make_data().test.labels
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-4)
    assert top1 == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())


def test_tests_without_dropout():
    trainer, _ = make_trainer(Recipe(epochs=1, batch_size=12, lr=1e-9))
    trainer.begin_epoch(0, 0)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        trainer.evaluate()
        results.append(trainer.result())
    assert results[0] == results[1] and not trainer.model.training


def test_dropout_of_every_epoch_is_its_own():
    trainer, initial = make_trainer(Recipe(epochs=2, batch_size=12, lr=1e-9))
    drawn = []
    for epoch in (0, 1, 0):
        trainer.begin_epoch(0, epoch)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_weight_decay_is_that_of_all_parameters():
    trainer, _ = make_trainer(Recipe(epochs=1, batch_size=12, weight_decay=0.25))
    decayed = {id(p): group['weight_decay'] for group in trainer.optimizer.param_groups for p in group['params']}
    assert [decayed[id(p)] for p in trainer.model.parameters()] == [0.25] * len(decayed)


def test_reset_and_load_state():
    trainer, initial = make_trainer()
    addresses = [tensor.data_ptr() for tensor in trainer.model.state_dict().values()]
    whole = train(trainer)
    trainer.reset(initial)
    assert train(trainer, epochs=[0]) == whole[:1]
    state = copy.deepcopy(trainer.state())
    trainer.reset(initial)
    assert train(trainer, seed=1) != whole  # another order of dropout
    trainer.load_state(state)
    assert train(trainer, epochs=[1]) == whole[1:]
    assert [tensor.data_ptr() for tensor in trainer.model.state_dict().values()] == addresses


def test_attention_statistics():
    """That of the model as it is, at even spacing over the test images, and training goes on as if it had not been."""
    data = make_data(num_test=16)
    trainer, _ = make_trainer(Recipe(epochs=2, batch_size=3), name='cct_2_sot_q', data=data)
    first = train(trainer, epochs=[0])
    trainer.model.train()  # it must look at the model in evaluation mode
    found = trainer.attention_statistics(num_images=8)
    assert first + train(trainer, epochs=[1]) == train(make_trainer(
        Recipe(epochs=2, batch_size=3), name='cct_2_sot_q', data=data)[0])

    trainer, initial = make_trainer(Recipe(epochs=2, batch_size=3), name='cct_2_sot_q', data=data)
    train(trainer, epochs=[0])
    maps = attention_maps(trainer.model.eval(), trainer.normalize(data.test.images[::2]))
    for name, record in maps.items():
        expected = row_entropy(record['weights']).mean(dim=(0, 2)).tolist()
        assert found['entropy'][name] == pytest.approx(expected, abs=2e-9)
        assert all(1 - 1e-3 < value < 1 for value in found['entropy'][name])
        assert found['common'][name] == pytest.approx(common_part(record['weights']).mean(dim=0).tolist(), abs=1e-6)


def test_attention_statistics_take_the_batches_of_training():
    """With `tol` the plan of an image depends on the rest of its batch."""
    data = make_data(num_test=16)
    values = []
    for batch_size in (1, 16):
        recipe = Recipe(epochs=1, batch_size=batch_size)
        trainer, _ = make_trainer(recipe, name='cct_2_sot_q_nosoftmax', data=data, sot_tol=0.05)
        values.append(trainer.attention_statistics()['entropy']['blocks.0'])
    assert values[0] != pytest.approx(values[1], abs=1e-5)


def test_attention_statistics_are_not_rounded_to_bfloat16():
    """In which nearly uniform weights would have the rounding in common."""
    found = [
        make_trainer(Recipe(epochs=1, batch_size=4, precision=precision), name='cct_2_sot_q')[0].attention_statistics()
        for precision in ('float32', 'bfloat16')]
    assert found[0] == found[1]


def test_attention_statistics_of_a_model_that_folds_patches_into_the_batch():
    trainer, _ = make_trainer(name='mobilevit_xxs')
    found = trainer.attention_statistics()
    maps = attention_maps(trainer.model.eval(), trainer.normalize(trainer.test.images))
    for name, record in maps.items():
        assert record['weights'].shape[0] > len(trainer.test.images)
        expected = row_entropy(record['weights']).mean(dim=(0, 2)).tolist()
        assert found['entropy'][name] == pytest.approx(expected, nan_ok=True)  # it has none for a single token
    assert any(map(math.isfinite, sum(found['entropy'].values(), [])))


def test_attention_statistics_of_a_model_without_attention():
    trainer, _ = make_trainer(name='resnet10t')
    assert trainer.attention_statistics() == {'entropy': {}, 'common': {}}


def test_models_do_not_disturb_each_other():
    alone = train(make_trainer()[0])
    trainers = [make_trainer()[0], make_trainer(name='cct_2_sot_q')[0]]
    together = [train_epoch(trainers, 0, epoch) for epoch in range(2)]
    assert [epoch[0][:2] for epoch in together] == alone


@pytest.fixture
def process_precision():
    """What a test sets of it is set back."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@pytest.mark.parametrize('precision, products, convolutions, dtype', [
    ('float32', False, False, torch.float32), ('conv-tf32', False, True, torch.float32),
    ('bfloat16', False, True, torch.bfloat16)])
def test_precisions(process_precision, precision, products, convolutions, dtype):
    set_precision(precision)
    assert torch.backends.cuda.matmul.allow_tf32 is products  # of SOT attention, too
    assert torch.backends.cudnn.allow_tf32 is convolutions
    trainer, _ = make_trainer(Recipe(epochs=1, batch_size=16, precision=precision))
    seen = set()
    for block in trainer.model.blocks:
        block.attn.register_forward_hook(lambda module, args, out: seen.add((module.training, out.dtype)))
    assert math.isfinite(train(trainer, epochs=[0])[0][1])
    assert seen == {(True, dtype), (False, dtype)}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_every_precision_is_tested():
    assert [*PRECISIONS] == ['float32', 'conv-tf32', 'bfloat16']


def test_original_schedule():
    rates = Recipe(epochs=30, lr=5e-4, schedule='original').learning_rates(2)
    assert len(rates) == 60 and rates[::2] == rates[1::2]
    assert rates[:10:2] == [5e-4 / (5 - epoch) for epoch in range(5)]
    assert rates[10] == 5e-4 and rates[34] == pytest.approx(0.5 * 5e-4 * (1 + math.cos(math.pi * 12 / 25)))
    assert Recipe(epochs=3, schedule='original', lr=1.).learning_rates(1) == [1 / 5, 1 / 4, 1 / 3]


def test_cosine_schedule():
    rates = Recipe(epochs=4, lr=1e-3).learning_rates(100)
    assert len(rates) == 400 and max(rates) == pytest.approx(1e-3, rel=0.02) and rates[0] == pytest.approx(1e-5)
    assert rates.index(max(rates)) == 25 and rates[-1] < 1e-7


def test_batch_sizes():
    assert batch_sizes(10, 4) == [4, 4, 2] and batch_sizes(8, 4) == [4, 4] and batch_sizes(3, 4) == [3]


# On a GPU

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@NEEDS_CUDA
@pytest.mark.parametrize('name, tol', [('cct_2', None), ('cct_2_sot_qk', None), ('cct_2_sot_qk', 0.1)])
def test_cuda_graphs(name, tol):
    device = torch.device('cuda')
    with capturable():  # as in a study
        graphed, initial = make_trainer(name=name, sot_tol=tol, device=device)
        assert graphed.captured
        first = train(graphed)
        graphed.reset(initial)
        for again, before in zip(train(graphed), first, strict=True):
            assert again == pytest.approx(before, rel=1e-3)
    eager, _ = make_trainer(name=name, sot_tol=tol, device=device, graphs=False)
    assert train(eager)[0][1] == pytest.approx(first[0][1], rel=0.05)  # other dropout


@NEEDS_CUDA
def test_cuda_graphs_do_not_disturb_each_other():
    device = torch.device('cuda')
    with capturable():
        first, second = (
            make_trainer(name=name, sot_tol=0.1, device=device) for name in ('cct_2_sot_qk', 'cct_2_sot_q'))
        alone = train(first[0])
        first[0].reset(first[1])
        together = [train_epoch([first[0], second[0]], 0, epoch) for epoch in range(2)]
    for (mine, _), before in zip(together, alone, strict=True):
        assert mine[:2] == pytest.approx(before, rel=1e-3)


@NEEDS_CUDA
def test_what_no_cuda_graph_holds_is_trained_eagerly():
    with capturable(), pytest.warns(RuntimeWarning, match='no CUDA graphs, training eagerly'):
        trainer, _ = make_trainer(name='cct_2_sot_qk', sot_tol=0.1, device=torch.device('cuda'), sot_reg=0.01)
    with capturable():
        assert not trainer.captured and math.isfinite(train(trainer, epochs=[0])[0][1])

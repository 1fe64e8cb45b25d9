""" Training of one model of a study """
import timm
import torch

import timm_sot  # noqa: F401
from timm_sot.study.data import Images, StudyData, normalizer
from timm_sot.study.engine import Recipe, evaluate, train

DEVICE = torch.device('cpu')


def make_data(num_train=32, num_test=16):
    """Dark images against bright ones."""
    def images(n):
        labels = torch.arange(n) % 2
        noise = torch.randint(0, 100, (n, 3, 32, 32), generator=torch.Generator().manual_seed(n))
        return Images((noise + 150 * labels[:, None, None, None]).to(torch.uint8), labels)
    return StudyData('brightness', images(num_train), images(num_test), 2, True)


def make_model(seed=0):
    torch.manual_seed(seed)
    return timm.create_model('cct_2', num_classes=2)


def test_learns():
    steps = []
    recipe = Recipe(epochs=2, batch_size=12)
    epochs = list(train(make_model(), make_data(), recipe, 0, DEVICE, on_step=lambda: steps.append(0)))
    assert len(epochs) == 2 and len(steps) == 2 * recipe.steps(make_data()) == 6
    assert epochs[-1][0] == 100. and epochs[-1][1] < epochs[0][1]


def test_repeatable():
    first, again, other = (
        list(train(make_model(), make_data(), Recipe(epochs=1), seed, DEVICE)) for seed in (0, 0, 1))
    assert first == again != other


def test_evaluate():
    data = make_data(num_test=10)
    model = make_model().train()
    normalize = normalizer((0.5,) * 3, (0.25,) * 3, DEVICE)
    top1, loss = evaluate(model, data.test, normalize, batch_size=4)
    with torch.no_grad():
        logits = model(normalize(data.test.images))
    assert not model.training
    assert abs(top1 - 100 * (logits.argmax(1) == data.test.labels).float().mean().item()) < 1e-4
    assert abs(loss - torch.nn.functional.cross_entropy(logits, data.test.labels).item()) < 1e-5

""" Model cards """
import pytest
from exported import run, train_py
from huggingface_hub import ModelCard


def test_card_of_a_model_of_timm_alone(tmp_path):
    _, checkpoint = train_py(tmp_path / 'run', 'test_resnet')
    assert run(checkpoint, '--out', tmp_path / 'test_resnet.digits') == 0
    text = (tmp_path / 'test_resnet.digits' / 'README.md').read_text()
    assert "`ResNet`, trained on digits by timm's train.py." in text and 'pip install' not in text
    assert 'timm-sot' not in ModelCard.load(tmp_path / 'test_resnet.digits' / 'README.md').data.tags
    assert run(train_py(tmp_path / 'run', 'cct_2')[1], '--out', tmp_path / 'cct_2.digits') == 0
    text = (tmp_path / 'cct_2.digits' / 'README.md').read_text()
    assert "by timm's train.py. timm-sot adds Self" in text and 'pip install .  # in a clone of timm-sot' in text


@pytest.mark.parametrize('name, data', [
    ('test_resnet.e200_pets_cats', 'pets_cats'), ('test_resnet.cifar10', 'cifar10'), ('test_resnet.e5', 'e5'),
    ('test_resnet', 'digits')])
def test_tag_names_the_data(name, data, tmp_path):
    _, checkpoint = train_py(tmp_path / 'run', 'test_resnet')
    assert run(checkpoint, '--out', tmp_path / name) == 0
    card = ModelCard.load(tmp_path / name / 'README.md')
    assert card.data.datasets == [data] and f'trained on {data} by' in card.text and f'for {name}\n' in card.text

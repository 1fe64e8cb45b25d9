""" ONNX: exported models compute the same elsewhere """
import pytest
import timm
import torch
from timm.layers import set_exportable

from reference import error

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamo', [True, False])  # the exporters that timm's onnx_export.py has
@pytest.mark.parametrize('name, how', [
    ('cct_2_sot_qk', 'default'),
    *(pytest.param('cct_2_sot_qk', how, marks=pytest.mark.slow) for how in ('exportable', 'fused_attn')),
    pytest.param('cct_2_sot_shares', 'default', marks=pytest.mark.slow)])
def test_models(tmp_path, name, how, dynamo):
    torch.manual_seed(0)
    if how == 'exportable':
        with set_exportable(True):
            model = timm.create_model(name)
    else:
        model = timm.create_model(name)
        for block in model.blocks:
            block.attn.fused_attn = how == 'default'
    model.eval()
    assert all(block.attn.fused_attn == (how == 'default') for block in model.blocks)
    images = torch.randn(2, 3, 32, 32)
    file = tmp_path / 'model.onnx'
    torch.onnx.export(model, (images,), file, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    logits, = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert error(torch.from_numpy(logits), model(images)) < 1e-4
    # of other runtimes some refuse one that trains, also with probability 0
    assert 'Dropout' not in {node.op_type for node in onnx.load(file).graph.node}

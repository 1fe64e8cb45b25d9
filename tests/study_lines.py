"""Lines of made-up studies"""
import json

from timm_sot.study.presets import ORIGINAL
from timm_sot.study.store import KINDS

CIFAR = 'cifar10 50000+10000 sha256:0123456789abcdef'
HELD_OUT_DATA = 'cifar10 (validation) 45000+5000 sha256:fedcba9876543210'
RECIPE = {**{key: value for key, value in ORIGINAL.items() if key != 'epochs'}, 'first': ('cct_2', {})}
SOT = dict(sot_reg=0.1, sot_tol=0.1)
NOISE = [0.3, -0.4, 0.1, 0.5, -0.2]


def make_line(model, kwargs, seed, final, **changes):
    line = {
        'model': model, 'kwargs': kwargs, 'seed': seed, 'epochs': 30,
        'top1': [30.] * 28 + [final + 0.5, final], 'loss': [1.] * 30, 'seconds': 20. + seed, 'device': 'GPU, float32',
        'versions': {'torch': '2.11'}, 'commit': 'abc', 'data': CIFAR, **changes}
    line.update(best=max(line['top1']), final=line['top1'][-1])
    assert changes.keys() <= {*KINDS, 'entropy', 'common', 'looked_at', 'processor'}
    return line


def make_row(model, kwargs, finals, **changes):
    return [make_line(model, kwargs, seed, round(final, 4), **changes) for seed, final in enumerate(finals)]


BASELINE = make_row('cct_2', {}, [76 + noise for noise in NOISE])
BETTER = make_row('better', SOT, [77.1, 76.7, 77.0, 77.6, 76.9])
HIGHER = make_row('higher', SOT, [80., 74., 79., 75., 78.5])  # by 1 in the mean, with an interval that contains zero
WORSE = make_row('worse', SOT, [74., 73.5, 73.9, 74.4, 73.7])
SWEEP = [line for k, reg in enumerate((0.1, 0.2, 0.5, 1)) for line in make_row(
    'cct_2_sot_qk', {**SOT, 'sot_reg': reg}, [75 + 0.1 * k + noise for noise in NOISE[:1 + k]])]


def write(folder, lines, settings=RECIPE):
    folder.mkdir(exist_ok=True)
    (folder / 'results.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if settings is not None:
        (folder / 'study.json').write_text(json.dumps(settings))
    return str(folder)

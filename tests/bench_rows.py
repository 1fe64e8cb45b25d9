"""Reports of a bench that never ran"""
from timm_sot.bench.timing import summary


def fake_report(*rows, device_type='cpu'):
    about = {
        'device': f'a {device_type}', 'device_type': device_type, 'threads': 1, 'cores': 2, 'load': 0.5,
        'dtype': 'float32', 'quick': False, 'versions': {'torch': '2.5'}, 'commit': 'abc',
        'date': '2026-11-23T00:00:00+00:00', 'seconds': 1.}
    return {'about': about, 'rows': list(rows), 'bars': []}


def fake_row(section, case, phase, contender, baseline='', **result):
    for kind in ('call', 'graph'):
        if kind in result:
            samples = result[kind] if isinstance(result[kind], list) else [result[kind]]
            result[kind] = {'calls': 1, **summary(samples)}
    return dict(section=section, case=case, phase=phase, baseline=baseline, contender=contender, **result)

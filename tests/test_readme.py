"""Code in README, and in the pages that it refers to, runs, and their commands name what exists."""
import contextlib
import io
import re
import shlex
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm_scripts import TRAIN_OPTIONS, VALIDATE_OPTIONS

import timm_sot
from timm_sot.attention import VARIANTS
from timm_sot.bench.report import BARS
from timm_sot.cct import CCT
from timm_sot.cli import main
from timm_sot.study.presets import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
STUDY = (ROOT / 'hub' / 'study' / 'README.md').read_text()
FIGURES = (ROOT / 'hub' / 'figures' / 'README.md').read_text()
PAGES = README + STUDY + FIGURES
PYTHON = re.findall(r'```python\n(.*?)```', README, re.S)
BASH = [block.strip() for block in re.findall(r'```bash\n(.*?)```', PAGES, re.S)]
SCRIPTS = {'train.py': TRAIN_OPTIONS, 'validate.py': VALIDATE_OPTIONS}


@pytest.mark.parametrize('code', PYTHON)
def test_code_runs(code):
    names = {}
    exec(compile(code, 'README.md', 'exec'), names)
    values = [value for value in names.values() if isinstance(value, (torch.Tensor, torch.nn.Module))]
    assert values, 'it leaves nothing'
    for value in values:
        tensors = [value] if isinstance(value, torch.Tensor) else value.state_dict().values()
        assert all(tensor.isfinite().all() for tensor in tensors)


def commands_of_scripts():
    for block in BASH:
        for line in block.splitlines():
            if (words := shlex.split(line)) and words[0] == 'python':
                yield words[1:]


@pytest.mark.parametrize('words', [*commands_of_scripts()], ids=' '.join)
def test_commands_for_timms_scripts(words):
    script, *words = words
    options = {word for word in words if word.startswith('--')}
    assert options <= SCRIPTS[script]
    value = dict(zip(words, words[1:]))
    assert timm.is_model(value['--model'])
    assert (ROOT / value.get('--config', 'README.md')).exists()
    takes = (CCT if value['--model'].startswith('cct') else timm.models.VisionTransformer).__init__.__annotations__
    for word in words:
        if re.match(r'\w+=', word):
            assert word.split('=')[0] in takes


@pytest.mark.parametrize('command', [block for block in BASH if block.startswith('timm-sot attention')])
def test_commands_of_figures(command, tmp_path, monkeypatch):
    """They draw what the page shows, given the images that they name."""
    words = shlex.split(command)[1:]
    value = dict(zip(words, words[1:]))
    out = ROOT / value['--out']
    assert out.exists() and out.parent == ROOT / 'hub' / 'figures' and f']({out.name})' in FIGURES

    monkeypatch.chdir(tmp_path)
    image = Path(value['--image'])
    if image.suffix:
        image.parent.mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(image)
    else:
        image.mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(image / '0.png')
    Path(value['--out']).parent.mkdir(parents=True)
    assert main(words) == 0
    assert Path(value['--out']).stat().st_size > 0


def test_other_commands_are_run_by_ci():
    ci = (ROOT / '.ci' / 'run').read_text()
    others = [block for block in BASH if not re.match('python |for |timm-sot attention', block)]
    assert others
    for block in others:
        assert f'\nstep bash -c "{block}"\n' in ci, block


@pytest.fixture(scope='module')
def own_options():
    found = {}
    figures = [f'attention {figure}' for figure in ('compare', 'heads', 'patches', 'entropy', 'reg')]
    for command in ('study', 'study report', *figures, 'export', 'bench'):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main([*command.split(), '--help']) == 0
        found[command] = set(re.findall(r'--[a-z][a-z-]+', out.getvalue()))
    return found


def test_studies_that_ci_does_not_run(own_options):
    lines = [shlex.split(line, comments=True) for block in re.findall(r'```text\n(.*?)```', PAGES, re.S)
             for line in block.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        assert line[:2] == ['timm-sot', 'study']
        command = 'study report' if line[2] == 'report' else 'study'
        assert {word for word in line if word.startswith('--')} <= own_options[command]
        assert command == 'study report' or line[line.index('--preset') + 1] in PRESETS


def test_results_are_those_of_the_report():
    section = README.split('## The study')[1].split('\n## ')[0]
    report = ''.join(path.read_text() for path in (ROOT / 'hub' / 'study').rglob('report.md'))
    for page in (section, STUDY):
        rows = [line for line in page.splitlines() if line.startswith('| `cct_2')]
        assert len(rows) >= 9
        for row in rows:
            assert row in report, row


def test_what_was_tried_is_in_the_reports():
    table = README.split('| form | epochs | n |')[1].split('\n\n')[0]
    rows = re.findall(r'^\| `(\w+)` \| (\d+) \| (\d) \| (.*?) \| (.*?) \| (?:(\S+) \(`(\w+)`\) )?\|$', table, re.M)
    assert len(rows) == table.count('\n') - 1 >= 20
    reports = {10: 'candidates', 5: 'screening'}
    reports = {n: (ROOT / 'hub' / 'study' / name / 'report.md').read_text() for n, name in reports.items()}
    for name, epochs, n, top1, minus_softmax, minus_control, control in rows:
        last = reports[int(epochs)].split('Best epoch')[0]
        candidate, top1 = rf'\| `cct_2 candidate={name}` \|', re.escape(top1)
        row = rf'{candidate} {n} \| {top1} \| [^|]+ \| {re.escape(minus_softmax)} \|'
        assert re.search(row, last), row
        control_row = rf'{candidate} {top1} \| `cct_2 candidate=(\w+)` \| [^|]+ \| (\S+) \|'
        assert re.findall(control_row, reports[int(epochs)]) == ([(control, minus_control)] if control else []), name
    for epochs, text in reports.items():
        measured = set(re.findall(r'^\| `cct_2 candidate=(\w+)` \| \d', text, re.M))
        assert measured == {row[0] for row in rows if row[1] == str(epochs)}, 'nothing is left out'


def test_links_lead_somewhere():
    for page, folder in ((README, ROOT), (STUDY, ROOT / 'hub' / 'study'), (FIGURES, ROOT / 'hub' / 'figures')):
        for link in re.findall(r'\]\(([^)]+)\)', page):
            file, _, heading = link.partition('#')
            if not file:
                assert re.search(f'^## {heading.replace("-", " ")}$', page, re.M | re.I), link
            elif '://' not in file:
                assert (folder / file).exists(), link


def test_inline_names_exist(own_options):
    options = set(re.findall(r'`(--[\w-]+)', PAGES))
    assert options <= TRAIN_OPTIONS | VALIDATE_OPTIONS | set().union(*own_options.values())
    for name in re.findall(r'`(cct_\w+)`', PAGES):
        assert timm.is_model(name), name
    for name in re.findall(r'`([\w-]+\.yaml)`', README):
        assert (ROOT / 'train_configs' / name).exists(), name
    argument = r'`(sot_(?:reg|iters|tol)|pos_embed|kernel_size|n_conv_layers|dynamic_img_size|attn)`'
    for name in re.findall(argument, README):
        assert name in CCT.__init__.__annotations__, name


def test_extras_and_script_exist():
    extras = set(re.findall(r"pip install (?:-e )?'\.\[(\w+)\]'", README))
    assert extras == {'all', 'bench', 'cpu', 'ray', 'study', 'test', 'viz'}
    assert extras <= {extra for line in requires('timm-sot') for extra in re.findall(r'extra == ["\'](\w+)', line)}
    assert 'timm-sot' in {script.name for script in entry_points(group='console_scripts')}


def test_bars_are_those_of_the_bench():
    table = README[README.index('| what | on | bar | aim |'):].partition('\n\n')[0]
    rows = [[cell.strip() for cell in line.split('|')[3:5]] for line in table.splitlines()[2:]]
    assert sorted(rows) == sorted([bar.bar, bar.aim] for bar in BARS)


def test_registry_table_is_complete():
    for name in timm.list_models(module='cct'):
        assert f'`{name}`' in README, name
    rows = re.findall(r'^\| `(cct_\d+)` .* \| ([\d.]+) M \|$', README, re.M)
    assert len(rows) == 5
    for name, millions in rows:
        model = timm.create_model(name, device='meta')
        assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}' == millions


def test_variant_table_is_complete():
    assert re.findall(r'^\| `(softmax|sot_\w+)` \| \S*[sS]', README, re.M) == list(VARIANTS)
    assert set(timm_sot.__all__) <= set(re.findall(r'\w+', README))

""" The command line """
import subprocess
import sys

import pytest

import timm_sot
from timm_sot.cli import main


def test_help(capsys):
    assert main(['--help']) == 0
    printed = capsys.readouterr().out
    assert 'study' in printed and 'bench' in printed
    assert main(['study', '--help']) == 0
    assert '--model-kwargs' in capsys.readouterr().out


def test_no_command(capsys):
    assert main([]) == 2
    printed = capsys.readouterr()
    assert 'COMMAND' in printed.err and printed.err.count('\n') == 1 and not printed.out


def test_help_does_not_wait_for_torch():
    code = "import sys; from timm_sot.cli import main; main(['study', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], stdout=subprocess.DEVNULL).returncode == 0


def test_interrupt(monkeypatch, folder, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_sot.study.runner.train_epoch', interrupted)
    assert main(['study', '--data-dir', folder, '--device', 'cpu']) == 130
    assert 'Traceback' not in capsys.readouterr().err


@pytest.mark.slow
def test_module():
    done = subprocess.run([sys.executable, '-m', 'timm_sot', '--version'], capture_output=True, text=True)
    assert done.stdout == f'timm-sot {timm_sot.__version__}\n' and done.returncode == 0


def test_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'timm-sot {timm_sot.__version__}\n'

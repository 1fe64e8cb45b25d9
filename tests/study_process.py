"""A study in a process of its own"""
import os
import signal
import subprocess
import sys
import time

import timm_sot


def start(arguments, **options):
    """Run `timm-sot study`."""
    command = [sys.executable, '-m', 'timm_sot', 'study', *arguments]
    root = os.path.dirname(os.path.dirname(timm_sot.__file__))
    return subprocess.Popen(command, env={**os.environ, 'PYTHONPATH': root}, **options)


def kill_after_an_epoch(arguments, checkpoint):
    """Run `timm-sot study` and end it by SIGKILL once it has kept an epoch, before it has finished a run."""
    process = start(arguments, stderr=subprocess.DEVNULL)
    for _ in range(15000):  # five minutes: where other processes have the cores, one to start takes a while
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (checkpoint.parents[1] / 'results.jsonl').exists()

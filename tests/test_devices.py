"""What a process does with the memory of its tensors, counted by the system."""

import platform
import subprocess
import sys

import pytest

from pcnn_lightning.cli import main, parser

COUNTING = """
import resource
import torch
from pcnn_lightning.devices import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(20_000_000)  # 80 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_the_memory_of_a_freed_tensor_is_kept_for_the_next():
    output = subprocess.run([sys.executable, "-c", COUNTING], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert before > 500, "huge pages or small ones, the system hands out new ones each time"
    assert after < before / 10


def test_the_command_line_keeps_memory_on_a_cpu(monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(parser, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(sys, "argv", ["pcnn_lightning"])
    main(["summary", "--config", "digits.yaml"])
    assert kept == [True]

"""`lavender env`: the facts of this process, and a report where a package is missing or broken."""

from __future__ import annotations

import getpass
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from command_line import lavender
from lavender.cli import env


def test_the_facts_are_those_of_this_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    facts = json.loads(lavender("env", "--json").out)
    assert facts["packages"]["torch"] == version("torch")
    assert facts["packages"]["lavender-vlm"] == version("lavender-vlm")
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert facts["torch"]["CUDA"] == torch.cuda.is_available()
    assert facts["variables"]["OMP_NUM_THREADS"] == "1"
    lines = lavender("env").out.splitlines()
    assert f"  torch: {version('torch')}" in lines
    assert "  OMP_NUM_THREADS: 1" in lines


def test_nothing_personal_is_printed():
    printed = lavender("env", "--json").out
    assert str(Path.home()) not in printed
    assert str(Path.cwd()) not in printed
    assert f'"{getpass.getuser()}"' not in printed


def test_a_missing_and_a_broken_package_are_facts(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package",))
    monkeypatch.setitem(sys.modules, "torch", None)  # as if its import failed
    ran = lavender("env")
    assert ran.code == 0
    assert "  no-such-package: not installed" in ran.out
    assert "  cannot be imported: ModuleNotFoundError" in ran.out


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("/home/xavier/my env/lib/libtorch.so: cannot open shared object file", "…/libtorch.so: cannot open"),
        ("cannot import name 'x' from 'torch' (/home/xavier/torch/__init__.py)", "(…/__init__.py)"),
        ('Error loading "C:\\Users\\xavier\\torch\\lib\\c10.dll" or one of its dependencies.', '"…/c10.dll"'),
        ("see file:///home/xavier/x.txt\nand https://pytorch.org/get-started/", "https://pytorch.org/get-started/"),
    ],
)
def test_a_fault_names_no_folder(message, printed):
    fault = env._fault(OSError(message))
    assert printed in fault
    assert "xavier" not in fault
    assert "\n" not in fault


@pytest.mark.parametrize("by_nvml", ["0", "1"])
def test_a_gpu_that_cannot_be_asked_is_a_fact(by_nvml, monkeypatch):
    """By NVML, as accelerate has torch ask, the first question fails already."""

    def refuse() -> int:
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", by_nvml)
    monkeypatch.setattr(torch.cuda, "device_count", refuse)
    ran = lavender("env")
    assert ran.code == 0
    assert "  GPUs cannot be asked: RuntimeError: CUDA driver initialization failed" in ran.out.splitlines()

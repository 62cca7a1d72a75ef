"""`lavender env`: the facts of this process, and a report where a package is missing or broken."""

from __future__ import annotations

import getpass
import json
import sys
from importlib.metadata import version
from pathlib import Path

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

"""What others may rely on: the public names, the verbs, and that looking at them loads no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lavender
from lavender.cli.main import VERBS as OURS
from lavender.cli.main import main

NAMES = [
    "AlignmentArguments",
    "AlignmentConfig",
    "AlignmentMixin",
    "ExtractionConfig",
    "LavenderConfig",
    "LavenderTrainer",
    "MapStore",
    "AnsweredPicture",
    "Teacher",
    "WordMaps",
    "__version__",
    "export",
    "extract",
    "read_samples",
    "student_maps",
    "to_dataset",
]
VERBS = ["check", "demo", "eval", "export", "extract", "inspect", "report", "study", "train"]
HEAVY = ["torch", "transformers", "diffusers", "datasets", "trl", "numpy", "PIL"]


def test_public_names_are_these():
    assert lavender.__all__ == NAMES


def test_every_public_name_can_be_had():
    for name in NAMES:
        assert getattr(lavender, name).__doc__
    namespace: dict = {}
    exec("from lavender import *", namespace)
    assert set(NAMES) <= namespace.keys() | {"__version__"}


def test_another_name_is_an_error():
    with pytest.raises(AttributeError, match="module 'lavender' has no attribute 'Lavender'"):
        _ = lavender.Lavender


def test_verbs_are_these(capsys):
    assert sorted(OURS) == VERBS
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    listed = [line.split()[0] for line in shown.splitlines() if line.startswith("    ") and line[4] != " "]
    assert sorted(listed) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lavender {verb}")


@pytest.mark.parametrize("arguments", [[], ["dance"], ["extract"], ["extract", "--data", "x"], ["demo", "--no"]])
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: lavender" in capsys.readouterr().err


def test_a_wrong_setting_exits_with_two_and_a_missing_file_with_one(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("trust_remote_code: 'no'\nmodel: m\ndata: d\nmaps: s\nout: o\n")
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert capsys.readouterr().err.startswith("lavender train: Got trust_remote_code='no'. Expected true or false.")
    assert main(["train", str(tmp_path / "no.yaml")]) == 1
    assert capsys.readouterr().err.startswith(f"lavender train: Got no file at {tmp_path / 'no.yaml'}. Expected a YAML")


def test_data_that_are_missing_exit_with_one(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["extract", "--data", str(tmp_path / "no"), "--teacher", "world", "--out", out]) == 1
    assert f"lavender extract: Got {tmp_path / 'no'}, which does not exist" in capsys.readouterr().err


def test_inspecting_what_does_not_exist_exits_with_one(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err.startswith("lavender inspect: Got ")


@pytest.mark.parametrize(
    "code",
    [
        "import lavender",
        "import lavender.cli; from lavender.cli.main import build_parser; build_parser()",
        "import lavender.cli\ntry: lavender.cli.main(['--help'])\nexcept SystemExit: pass",
        "import lavender; lavender.AlignmentConfig; lavender.ExtractionConfig()",
    ],
)
def test_looking_loads_nothing_heavy(code):
    code += f"\nimport sys; assert not (loaded := set(sys.modules) & set({HEAVY})), loaded"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_lavender_help_as_a_user_types_it():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lavender.cli", "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    assert result.stdout.startswith("usage: lavender")
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "lavender.errors" in imported
    assert not imported & set(HEAVY)

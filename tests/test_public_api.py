"""What others may rely on: the public names, the verbs, and that looking at them loads no torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys

import pytest

import lavender
import lavender.training
from lavender.cli.main import VERBS as OURS
from lavender.cli.main import main

NAMES = [
    "AnsweredPicture",
    "ExtractionConfig",
    "LavenderConfig",
    "LavenderTrainer",
    "MapStore",
    "Teacher",
    "WordMaps",
    "export",
    "extract",
    "read_samples",
    "student_maps",
    "to_dataset",
]
TRAINING_NAMES = ["AlignmentArguments", "AlignmentMixin", "LavenderConfig", "LavenderTrainer", "export"]
OLD_NAMES = {
    "AlignmentArguments": "lavender.training.arguments.AlignmentArguments",
    "AlignmentConfig": "lavender.config.AlignmentConfig",
    "AlignmentMixin": "lavender.training.mixin.AlignmentMixin",
    "Reading": "lavender.students.word_maps.AnsweredPicture",
}
VERBS = [
    *("check", "data", "demo", "env", "eval", "export", "extract", "inspect", "look", "report", "store", "study"),
    "train",
]
HEAVY = ["torch", "transformers", "diffusers", "datasets", "trl", "numpy", "PIL"]


def test_public_names_are_these():
    assert lavender.__all__ == NAMES
    assert len(NAMES) == 12
    assert lavender.training.__all__ == TRAINING_NAMES


@pytest.mark.parametrize(("package", "names"), [("lavender", NAMES), ("lavender.training", TRAINING_NAMES)])
def test_every_public_name_can_be_had(package, names):
    module = importlib.import_module(package)
    for submodule in pkgutil.iter_modules(module.__path__):  # one of a public name would take its place
        assert submodule.name not in names
    for name in names:
        assert getattr(module, name).__doc__
        assert callable(getattr(module, name))
    namespace: dict = {}
    exec(f"from {package} import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(names)
    assert set(names) <= set(dir(module))


def test_the_version_is_an_attribute():
    assert lavender.__version__ == importlib.metadata.version("lavender-vlm")


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_names_still_work_with_a_warning(name):
    module, _, new_name = OLD_NAMES[name].rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"^lavender\.{name} is deprecated: use `from lavender[a-z.]* import"):
        exec(f"from lavender import {name}", namespace := {})
    assert namespace[name] is getattr(importlib.import_module(module), new_name)
    with pytest.warns(DeprecationWarning, match="is deprecated") as caught:
        getattr(lavender, name)
    assert caught[0].filename == __file__
    advice = re.findall("`(.*)`", str(caught[0].message))
    exec(advice[0], namespace)  # what the warning says works, and warns no more
    assert namespace[new_name] is namespace[name]


def test_another_name_is_an_error():
    with pytest.raises(AttributeError, match=r"^module 'lavender' has no attribute 'Lavender'$"):
        _ = lavender.Lavender
    with pytest.raises(AttributeError, match=r"^module 'lavender\.training' has no attribute 'Trainer'$"):
        _ = lavender.training.Trainer


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
        "import lavender; lavender.ExtractionConfig(); from lavender.config import AlignmentConfig; AlignmentConfig()",
        "import lavender.training; dir(lavender), dir(lavender.training)",
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

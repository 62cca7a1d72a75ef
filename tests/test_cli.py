"""The command line as a user meets it: help, exit codes, messages; runs that cannot begin; inspect.

Verbs run in this process, through `main`. No score is looked at: any weights will do.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from command_line import complaint, lavender, write_run, write_scenes
from families.published_configs import UNSUPPORTED
from lavender.cli.eval import _table
from lavender.cli.main import DONE, FAILED, VERBS, WRONG_USAGE, build_parser
from lavender.cli.options import Several
from lavender.cli.terminal import show
from lavender.data.store import MapStore

# help and wrong usage


def test_help_names_every_verb_and_loads_no_framework():
    script = (
        "import sys; from lavender.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *page, loaded = ran.stdout.splitlines()
    assert loaded == "[]"
    assert all(any(line.split()[:1] == [verb] for line in page) for verb in VERBS)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help(verb):
    ran = lavender(verb, "--help")
    assert ran.code == DONE
    assert ran.out.startswith(f"usage: lavender {verb} ")
    assert not ran.err


@pytest.mark.parametrize("arguments", [(), *((verb,) for verb in VERBS)])
def test_help_fits_a_terminal_of_80_columns(arguments, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, lavender(*arguments, "--help").out.splitlines())) <= 80


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_wrapped_on_a_terminal_and_whole_in_a_pipe(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    path = "/a/folder/whose-name/" + "is-long" * 12
    line = f"note: {'left out 1 sample ' * 4}{path}"
    pipe, terminal = io.StringIO(), Terminal()
    show(line, pipe)
    show(line, terminal)
    assert pipe.getvalue() == f"{line}\n"
    first, *others = terminal.getvalue().splitlines()
    assert first.startswith("note: left out")
    assert all(len(part) <= 60 or part == f"  {path}" for part in (first, *others))
    assert " ".join(terminal.getvalue().split()) == line


def test_the_table_of_eval_has_straight_columns():
    scores = {"answer_nll": 1.25, "content_f1": 0.5, "entropy": 3.0, "map_agreement": None}
    head, *rows = _table({"base": scores, "a run with a long name": scores})
    assert head.split() == ["model", *scores]
    assert rows[0].split() == ["base", "1.2500", "0.5000", "3.0000", "–"]
    for name, cell in (("answer_nll", "1.2500"), ("entropy", "3.0000"), ("map_agreement", "–")):
        end = head.index(name) + len(name)
        assert all(row[:end].endswith(cell) for row in rows)
    *_, last = _table({"base": scores}, {"entropy": 2.5})
    assert last.split() == ["teacher's", "maps", "–", "–", "2.5000", "–"]


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert lavender("--version").out == f"lavender-vlm {version('lavender-vlm')}\n"


@pytest.mark.parametrize(
    "arguments", [(), ("extrakt",), ("extract", "--data", "photos"), ("eval", "run", "--limit", "x")]
)
def test_usage_that_argparse_refuses(arguments):
    ran = lavender(*arguments)
    assert ran.code == WRONG_USAGE
    assert ran.err.startswith("usage: lavender")
    assert ran.err.endswith(" --help`.\n")


@pytest.mark.parametrize(
    ("arguments", "option", "before"),
    [
        (("report", "--maps", "maps", "runs/aligned"), "--maps", "run"),
        (("report", "--maps", "one", "--maps", "two", "runs/aligned"), "--maps", "run"),
        (("check", "--data", "photos", "--maps", "maps", "model"), "--maps", "model"),
        (("data", "inspect", "--maps", "one", "two", "photos"), "--maps", "DATA"),
        (("look", "--words", "noun", "model", "photo.jpg", "a cat"), "--words", "TARGET photo text"),
        (("study", "--seeds", "1", "2", "main"), "--seeds", "name"),
    ],
)
def test_an_argument_behind_an_option_of_several_values_is_not_lost(arguments, option, before):
    ran = lavender(*arguments)
    assert ran.code == WRONG_USAGE
    assert ran.err.endswith(f"Do this: {option} takes every word up to the next option: put {before} before it.\n")


def test_a_run_behind_the_maps_is_not_lost():
    line = complaint(lavender("eval", "--maps", "maps", "runs/aligned"), WRONG_USAGE)
    assert "put it before --maps, which takes every word up to the next option" in line


def test_options_of_several_values_may_be_repeated():
    parse = build_parser().parse_args
    together, repeated = (
        parse(["report", "run", "--maps", "a", "b"]),
        parse(["report", "run", "--maps", "a", "--maps", "b"]),
    )
    assert together.maps == repeated.maps == [Path("a"), Path("b")]


def test_every_option_of_several_values_beside_arguments_without_dashes_says_so():
    checked = 0
    todo = [build_parser()]
    while todo:
        actions = todo.pop()._actions
        todo += [
            parser for one in actions if isinstance(one, argparse._SubParsersAction) for parser in one.choices.values()
        ]
        plain = [one for one in actions if not one.option_strings and not isinstance(one, argparse._SubParsersAction)]
        for action in actions if plain else ():
            if action.option_strings and action.nargs in ("+", "*"):
                assert isinstance(action, Several), action.option_strings
                checked += 1
    assert checked == 6  # --maps of check, eval, report and data inspect; --words of look; --seeds of study


# runs


@pytest.fixture(scope="module")
def scenes_folder(some_scenes, captions, tmp_path_factory) -> Path:
    """Six scenes as PNG files with their captions."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), some_scenes, captions)


def test_a_missing_run_file(tmp_path):
    assert str(tmp_path / "run.yaml") in complaint(lavender("train", tmp_path / "run.yaml"), FAILED)


@pytest.mark.parametrize("text", ["model: [a", "- model\n- data\n", "a: b: c"])
def test_a_run_file_that_is_not_keys_and_values(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert str(path) in complaint(lavender("train", path), WRONG_USAGE)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("algin_weight", "align_weight"), ("learning_rat", "learning_rate"), ("modell", "model"), ("Pooling", "pooling")],
)
def test_a_misspelt_key_names_the_nearest_right_one(wrong, right, tmp_path):
    line = complaint(lavender("train", write_run(tmp_path, **{wrong: 1})), WRONG_USAGE)
    assert repr(wrong) in line
    assert line.endswith(f"Do this: write {right!r} instead.")


def test_a_misspelt_key_of_lora(tmp_path):
    line = complaint(lavender("train", write_run(tmp_path, lora={"r": 8, "alhpa": 32})), WRONG_USAGE)
    assert "run.yaml: lora" in line
    assert line.endswith("Do this: write 'alpha' instead.")


def test_a_misspelt_set_names_the_nearest_right_one(tmp_path):
    line = complaint(lavender("train", write_run(tmp_path), "--set", "algin_weight=5"), WRONG_USAGE)
    assert line.endswith("Do this: write 'align_weight' instead.")


@pytest.mark.parametrize("override", ["align_weight", "align_weight=[1", "=5"])
def test_a_set_that_is_no_key_and_value(override, tmp_path):
    assert override in complaint(lavender("train", write_run(tmp_path), "--set", override), WRONG_USAGE)


@pytest.mark.parametrize("key", ["model", "data", "maps", "out"])
def test_a_missing_key_is_named(key, tmp_path):
    path = write_run(tmp_path)
    path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != key}))
    assert f"no key {key!r}" in complaint(lavender("train", path), WRONG_USAGE)


@pytest.mark.parametrize("lora", [8, "often", [1]])
def test_lora_that_is_no_mapping(lora, tmp_path):
    assert repr(lora) in complaint(lavender("train", write_run(tmp_path, lora=lora)), WRONG_USAGE)


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    """YAML 1.1 reads 5e-4 as a text."""
    from lavender.training.run import read_run

    path = write_run(tmp_path)
    path.write_text(path.read_text() + "learning_rate: 5e-4\nweight_decay: 1E3\n")
    run = read_run(path, ["adam_epsilon=1e-5", "run_name=e5"])
    assert run.training["learning_rate"] == 5e-4
    assert run.training["weight_decay"] == 1000
    assert run.training["adam_epsilon"] == 1e-5
    assert run.training["run_name"] == "e5"


def test_missing_training_data(tmp_path):
    assert "which does not exist" in complaint(lavender("train", write_run(tmp_path)), FAILED)


def test_a_setting_out_of_range(scenes_folder, tmp_path):
    path = write_run(tmp_path, data=str(scenes_folder), align_weight=-1)
    assert "align_weight=-1" in complaint(lavender("train", path), WRONG_USAGE)


@pytest.mark.parametrize("settings", [{"pooling": "learn"}, {"aligner": "deep"}, {"align_weight": "estimated"}])
def test_a_setting_of_the_published_loss_alone(settings, scenes_folder, tmp_path):
    """The user has not named the loss that it contradicts: the message says which it is, and how to choose another."""
    line = complaint(lavender("train", write_run(tmp_path, data=str(scenes_folder), **settings)), WRONG_USAGE)
    ((name, value),) = settings.items()
    assert f"Got {name}={value!r} with attention_loss='mass', the default. Expected " in line
    assert "set attention_loss" in line


def test_a_setting_of_the_wrong_kind(scenes_folder, tmp_path):
    path = write_run(tmp_path, data=str(scenes_folder), eval_strategy="sometimes")
    assert "sometimes" in complaint(lavender("train", path), WRONG_USAGE)


def test_a_model_that_is_not_there(scenes_folder, tmp_path):
    path = write_run(tmp_path, data=str(scenes_folder), model=str(tmp_path / "nowhere"))
    expected = f"the model {tmp_path / 'nowhere'}, which cannot be loaded: there is no such folder. Expected"
    assert expected in complaint(lavender("train", path), FAILED)
    line = complaint(lavender("inspect", "nobody/nothing"), FAILED)
    assert "the model nobody/nothing, which cannot be loaded: " in line
    assert "no such folder" not in line


def test_training_without_a_map_store(scenes_folder, tmp_path):
    path = write_run(tmp_path, data=str(scenes_folder))
    assert str(tmp_path / "maps") in complaint(lavender("train", path), FAILED)


@pytest.mark.parametrize("verb", ["eval", "report"])
def test_a_folder_that_is_no_run(verb, tmp_path):
    line = complaint(lavender(verb, tmp_path), FAILED)
    assert f"no config.yaml in {tmp_path}" in line


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_no_sample_to_look_at(limit, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    assert "limit" in complaint(lavender("eval", tmp_path, "--limit", limit), WRONG_USAGE)


# inspect


@pytest.fixture(scope="module")
def mllama_config(make_student, tmp_path_factory) -> Path:
    """A folder with a Mllama's config and nothing else."""
    path = tmp_path_factory.mktemp("mllama")
    make_student().config.save_pretrained(path)
    return path


def test_inspect_needs_a_models_config_alone(mllama_config, make_student):
    assert [file.name for file in mllama_config.iterdir()] == ["config.json"]
    ran = lavender("inspect", mllama_config)
    facts, student = json.loads(ran.out), make_student()
    assert ran.code == DONE
    assert facts["kind"] == "model"
    assert facts["family"] == "mllama"
    assert facts["class"] == "MllamaForConditionalGeneration"
    assert facts["usable_layers"] == student.config.text_config.cross_attention_layers
    assert facts["parameters"] == sum(parameter.numel() for parameter in student.parameters())


@pytest.mark.parametrize("model_type", [UNSUPPORTED, "bert"])
def test_inspect_names_a_family_that_is_not_supported(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    line = complaint(lavender("inspect", tmp_path), FAILED)
    assert repr(model_type) in line
    assert "mllama" in line


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "no such thing"}', "{"])
def test_inspect_of_what_is_no_model(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert str(tmp_path) in complaint(lavender("inspect", tmp_path), FAILED)


def test_inspect_of_a_path_that_is_not_there(tmp_path):
    assert str(tmp_path / "nowhere") in complaint(lavender("inspect", tmp_path / "nowhere"), FAILED)


def test_inspect_a_map_store(store_path):
    ran, store = lavender("inspect", store_path), MapStore.open(store_path)
    facts = json.loads(ran.out)
    assert ran.code == DONE
    assert facts["kind"] == "map store"
    assert facts["records"] == len(store)
    assert facts["words"] == store.num_words
    assert facts["grid"] == [11, 13]
    first = next(iter(store))
    assert facts["examples"][0]["text"] == first.text
    assert facts["examples"][0]["words"] == [word.text for word in first.words]


def test_inspect_a_damaged_map_store(store_path, tmp_path):
    copy = shutil.copytree(store_path, tmp_path / "maps")
    maps = next(copy.glob("*.safetensors"))
    content = bytearray(maps.read_bytes())
    content[-1] ^= 1
    maps.write_bytes(content)
    assert "shard-00000" in complaint(lavender("inspect", copy), FAILED)


def test_inspect_draws_a_picture_only_of_a_model(store_path, tmp_path):
    assert "--picture" in complaint(lavender("inspect", store_path, "--picture", tmp_path / "x.png"), WRONG_USAGE)
    assert not (tmp_path / "x.png").exists()
    refused = lavender("inspect", store_path, "--dtype", "bfloat16")
    assert "--dtype without --picture" in complaint(refused, WRONG_USAGE)

"""The settings of a run: each is of its type and range, or is refused by name before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import yaml

from lavender.config import DEFAULTS
from lavender.errors import ConfigError, DataError
from lavender.training.run_config import LoraSettings, RunConfig, check_out, read_run
from lavender.training.settings import (
    STRATEGIES,
    checked_training,
    refused_settings,
    training_keys,
    try_optimizer,
)
from lavender.training.trainer import LavenderConfig
from lavender.training.yaml_files import yaml_text
from lavender.type_checks import hints_of
from wrong_values import WRONG_VALUES

NEEDED: dict[str, Any] = {"model": "m", "data": "d", "maps": "s", "out": "o"}


def failure(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig(**(NEEDED | settings))
    assert len(str(caught.value)) < 4000
    return str(caught.value)


def written(tmp_path: Path, text: str = "", **settings: Any) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(NEEDED | settings) + text)
    return path


@pytest.mark.parametrize("value", [None, "false", "no", "true", "", 0, 1, [0], [True], {"a": 1}])
def test_code_runs_only_after_a_plain_true(value):
    assert "Got trust_remote_code=" in failure(trust_remote_code=value)
    assert RunConfig(**NEEDED, trust_remote_code=True).trust_remote_code is True
    assert RunConfig(**NEEDED).trust_remote_code is False


@pytest.mark.parametrize("value", WRONG_VALUES, ids=lambda value: repr(value)[:20])
def test_every_setting_has_its_type_or_is_refused_by_name(value):
    for name in hints_of(RunConfig):
        said = refusal(lambda settings: RunConfig(**settings), NEEDED | {name: value})
        assert not said or said.startswith((f"Got {name}", f"Got a key of {name}", "Got the key", "Got peft_type"))
    for name in hints_of(LoraSettings):
        said = refusal(lambda settings: LoraSettings(**settings), {name: value})
        assert not said or name in said
    for name in training_keys():
        said = refusal(checked_training, {name: value})
        assert not said or name in said.partition("=")[0]


def refusal(build, settings: dict[str, Any]) -> str:
    """What is said, or nothing where the settings are taken."""
    try:
        build(settings)
    except ConfigError as error:
        return str(error)
    return ""


def test_all_defaults_of_training_are_allowed():
    """A run's config.yaml has them all."""
    defaults = {one.name: one.default for one in fields(LavenderConfig) if isinstance(one.default, str | float | None)}
    kept = {name: value for name, value in defaults.items() if name in training_keys()}
    assert len(kept) > 90
    assert checked_training(kept) == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"learning_rate": "1e-5"},
            "Got learning_rate='1e-5'. Expected a number. Do this: write 1e-05 without quotes.",
        ),
        ({"max_steps": "300"}, "Got max_steps='300'. Expected a whole number. Do this: write 300 without quotes."),
        (
            {"max_steps": None},
            "Got max_steps=None. Expected a whole number. Do this: leave max_steps out for its default, -1",
        ),
        ({"max_steps": 1.5}, "Got max_steps=1.5. Expected a whole number."),
        ({"learning_rate": -1}, "Got learning_rate=-1. Expected a number from 0 to"),
        ({"seed": 10**30}, "Got seed=1000000000000000000000000000000. Expected a number from 0 to 4294967295."),
        ({"bf16": "false"}, "Got bf16='false'. Expected true or false or null."),
        ({"optim": 5}, "Got optim=5. Expected one of ('adamw_torch',"),
        ({"heads": "x"}, "Got heads='x'."),
        ({"output_dir": "x"}, "Got the key 'output_dir' in training."),
        ({"log_level": "loud"}, "Got log_level='loud'. Expected one of ('detail', 'debug',"),
        ({"loss_type": "x"}, "Got loss_type='x'. Expected one of ('nll',"),
        (
            {"include_num_input_tokens_seen": "x"},
            "Got include_num_input_tokens_seen='x'. Expected true or false",
        ),
        ({"parallelism_config": {"a": 1}}, "Got parallelism_config={'a': 1}. Expected null."),
        (
            {"label_names": "x"},
            "Got label_names='x'. Expected a list of texts or null. Do this: write label_names: [x].",
        ),
    ],
)
def test_what_is_said_of_a_setting_of_training(settings, message):
    assert message in failure(training=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "Got model=''. Expected a path."),
        ({"out": "a\0b"}, "Got out='a\\x00b'. Expected a path."),
        ({"data": "a" * 300}, "Got data='aaa"),
        ({"data": ["a"]}, "Got data=['a']. Expected a text."),
        ({"maps": []}, "Got maps=[]. Expected a map store, or several."),
        ({"maps": [3]}, "Got maps=3. Expected a text."),
        ({"freeze": "vision_tower"}, "Got freeze='vision_tower'. Expected a list of one of ('vision_tower',"),
        ({"freeze": [[]]}, "Got freeze=[]. Expected one of ('vision_tower', 'connector', 'language_model')."),
        ({"dtype": "x"}, "Got dtype='x'. Expected one of ('auto', 'float32',"),
        ({"dtype": None}, "Got dtype=None."),
        ({"image_processor": [1]}, "Got image_processor=[1]. Expected a mapping."),
        ({"image_processor": None}, "leave image_processor out"),
        ({"quantization": True}, "Got quantization=True."),
        ({"quantization": {}}, "Got quantization: {}."),
        ({"quantization": {"load_in_4bit": "no"}}, "Got quantization.load_in_4bit='no'. Expected true or false."),
        ({"quantization": {"load_in_4bit": True, "x": 1}}, "Got the key 'x' in quantization."),
        ({"lora": {"r": 8}}, "Got lora={'r': 8}."),
        ({"peft": [1]}, "Got peft=[1]. Expected a mapping"),
        ({"peft": {"r": 8}}, "Got peft_type: None. Expected one of"),
        ({"peft": {"peft_type": [1]}}, "Got peft_type: [1]."),
        (
            {"peft": {"peft_type": "LORA", "r": "8"}},
            "Got peft.r='8'. Expected a whole number. Do this: write 8 without",
        ),
        ({"peft": {"peft_type": "LORA", "target_modules": [1]}}, "Got peft.target_modules=1."),
        ({"lora": LoraSettings(), "peft": {"peft_type": "LORA"}}, "Got lora and peft."),
    ],
)
def test_what_is_said_of_a_setting_of_a_run(settings, message):
    assert message in failure(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"r": True},
        {"alpha": "32"},
        {"dropout": 1},
        {"dropout": -0.1},
        {"target_modules": []},
        {"target_modules": [1]},
        {"target_modules": None},
    ],
)
def test_lora(settings):
    with pytest.raises(ConfigError, match=f"Got (lora\\.)?{next(iter(settings))}"):
        LoraSettings(**settings)
    assert LoraSettings(target_modules=("q",)).target_modules == ("q",)


def test_no_means_no_for_a_strategy(tmp_path):
    """YAML reads it as false."""
    run = read_run(written(tmp_path, "".join(f"{name}: no\n" for name in STRATEGIES)))
    assert run.training == dict.fromkeys(STRATEGIES, "no")
    LavenderConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **run.training)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", [], ("mass", *DEFAULTS["mass"])),
        ("attention_loss: kl", [], ("kl", *DEFAULTS["kl"])),
        ("attention_loss: published", [], ("published", 2.0, 1.0)),
        ("attention_loss: published\nalign_weight: 7", ["attention_loss=kl"], ("kl", 7, DEFAULTS["kl"][1])),
        ("align_weight: 7\nsharpen: 3", ["align_weight=null", "sharpen=null"], ("mass", *DEFAULTS["mass"])),
        ("align_weight: null", ["align_weight=0"], ("mass", 0, DEFAULTS["mass"][1])),
    ],
)
def test_the_loss_decides_what_a_run_leaves_out(tmp_path, text, overrides, expected):
    """null means the default, in a run file and with --set."""
    run = read_run(written(tmp_path, text), overrides)
    args = LavenderConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **run.training)
    assert (args.attention_loss, args.align_weight, args.sharpen) == expected


def test_home_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths: dict[str, Any] = {
        "data": "~/d",
        "maps": ["~/s", "~/t"],
        "out": "~/o",
        "model": "~/m",
        "eval_data": "~/e",
        "eval_maps": "~/f",
        "replay_data": "~/r",
    }
    run = read_run(written(tmp_path, **paths), ["chat_template_path=~/c.jinja"])
    assert (run.data, run.out, run.model) == ("/home/someone/d", "/home/someone/o", "/home/someone/m")
    assert run.replay_data == "/home/someone/r"
    assert run.stores() == ["/home/someone/s", "/home/someone/t", "/home/someone/f"]
    assert run.training["chat_template_path"] == "/home/someone/c.jinja"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay_data": "r", "replay_share": 1.0}, "Got replay_share=1.0. Expected a number between 0 and 1."),
        ({"replay_share": 0.3}, "Got replay_share=0.3 without replay_data."),
    ],
)
def test_replay(settings, message):
    with pytest.raises(ConfigError) as error:
        RunConfig("m", "d", "s", "o", **settings)
    assert message in str(error.value)


def test_paths_of_python(tmp_path):
    run = RunConfig(tmp_path / "m", tmp_path, tmp_path / "s", tmp_path)
    assert (run.model, run.maps) == (str(tmp_path / "m"), str(tmp_path / "s"))


def test_a_runs_own_config_is_a_run_file(tmp_path):
    """Settings of training stand under `training` there, and what it was made with under `record`."""
    settings = NEEDED | {"lora": {"r": 4}, "training": {"seed": 3, "max_steps": 7}, "record": {"versions": {"x": "1"}}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml_text(settings))
    run = read_run(path, ["max_steps=9", "data=other"])
    assert run == RunConfig("m", "other", "s", "o", lora=LoraSettings(r=4), training={"seed": 3, "max_steps": 9})
    for broken, message in (
        ({"training": [1]}, "Got training=[1]"),
        ({"record": "x"}, "Got record='x'"),
        ({"seed": 1}, "Got 'seed' in"),
    ):
        path.write_text(yaml_text(settings | broken))
        with pytest.raises(ConfigError) as caught:
            read_run(path)
        assert message in str(caught.value)


def test_files_and_overrides(tmp_path):
    with pytest.raises(DataError, match="Got no file at"):
        read_run(tmp_path / "no.yaml")
    for override in ("seed", "=1", "seed=[", "seed=!!python/name:os.system", "5=1"):
        with pytest.raises(ConfigError):
            read_run(written(tmp_path), [override])
    with pytest.raises(ConfigError, match="Got no key 'data'"):
        (tmp_path / "x.yaml").write_text("model: m")
        read_run(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="the key 'learning_rate' twice"):
        read_run(written(tmp_path, "learning_rate: 1e-5\nlearning_rate: 0.5\n"))


def test_where_a_run_is_to_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "x" / "y"):
        with pytest.raises(ConfigError, match=r"file(, which is| stands, which is) a file"):
            check_out(path)
    assert check_out(tmp_path / "new" / "x") == tmp_path / "new" / "x"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "settings",
    [
        {"optim_args": "x"},
        {"lr_scheduler_kwargs": {"a": 1}},
        {"adam_beta1": 1.0},
        {"optim": "galore_adamw"},
        {"lr_scheduler_type": "cosine_with_min_lr"},
    ],
)
def test_the_optimiser_is_tried(tmp_path, settings):
    args = LavenderConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)
    with pytest.raises(ConfigError, match="Got settings of training that the optimiser"):
        try_optimizer(args)
    good = LavenderConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    try_optimizer(good)


def test_whatever_a_library_raises_is_one_sentence():
    for error in (KeyError("x"), ImportError("no wandb"), OSError(2, "No such file"), RuntimeError("a\nb")):
        with pytest.raises(ConfigError, match="Got settings of training that TRL refuses"), refused_settings("TRL"):
            raise error
    for other in (DataError("a", "b", "c"), MemoryError(), OSError(28, "No space left on device")):
        with pytest.raises(type(other)), refused_settings("TRL"):
            raise other


def test_only_an_error_of_a_library_is_a_refused_setting():
    """An error of other code of Lavender's is a bug: its traceback must not be hidden."""

    def passed_on(function, *values):  # Lavender's function that calls a library
        return function(*values)

    def elsewhere(function, *values):  # other code of Lavender's
        return function(*values)

    def broken():
        raise AttributeError("a bug")

    namespace = {"__name__": "lavender.training.example"}
    inside: Any = FunctionType(passed_on.__code__, namespace)
    further: Any = FunctionType(elsewhere.__code__, namespace)
    own: Any = FunctionType(broken.__code__, namespace | {"AttributeError": AttributeError})
    library: Any = yaml.safe_load  # raises AttributeError for a number
    said = pytest.raises(ConfigError, match="Got settings of training that TRL refuses: 'int' object")
    with said, refused_settings("TRL", called_by=inside):
        inside(library, 5)
    for function, *values in ((inside, further, library, 5), (inside, own), (further, library, 5), (library, 5)):
        with pytest.raises(AttributeError), refused_settings("TRL", called_by=inside):
            function(*values)

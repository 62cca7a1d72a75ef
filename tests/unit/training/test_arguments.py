"""Every setting of alignment from the command line, and from the YAML file, of a script that uses TRL's parser."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl import ModelConfig, ScriptArguments, TrlParser

from lavender.config import DEFAULTS, AlignmentConfig, Pooling
from lavender.errors import ConfigError
from lavender.training.arguments import AlignmentArguments
from lavender.training.trainer import LavenderConfig

OPTIONS: tuple[tuple[str, str, Any], ...] = (
    ("maps", "a", "a"),
    ("align_weight", "3", 3.0),
    ("align_weight", "1e-3", 1e-3),
    ("align_weight", "estimated", "estimated"),
    *(("pooling", pooling, pooling) for pooling in get_args(Pooling)),
    ("match", "root", "root"),
    ("parts_of_speech", "noun", ["noun"]),
    ("parts_of_speech", "noun verb", ["noun", "verb"]),
    ("subjects_and_objects", "", True),
    ("subjects_and_objects", "True", True),
    ("weight_by_confidence", "true", True),
    ("attention_loss", "kl", "kl"),
    ("texts", "questions", "questions"),
    ("rows", "both", "both"),
    ("attributes", "noun", "noun"),
    ("tokens", "first", "first"),
    ("sharpen", "2", 2.0),
    ("subtract_background", "true", True),
    ("word_share", "0.5", 0.5),
    ("attention_forcing", "1", 1.0),
    ("forcing_share", "0.5", 0.5),
    ("layers", "1 3", [1, 3]),
    ("layers", "2", [2]),
    ("layers", "middle", "middle"),
    ("layer_share", "0.5", 0.5),
    ("heads", "0 2", [0, 2]),
    ("parallel_init", "random", "random"),
    ("aligner", "deep", "deep"),
    ("aligner_kind", "mlp", "mlp"),
    ("aligner_norm", "none", "none"),
    ("aligner_activation", "leaky-relu", "leaky-relu"),
    ("aligner_width", "7", 7),
    ("align_warmup", "0.1", 0.1),
    ("align_decay", "0.2", 0.2),
    ("align_switches", "3", 3),
    ("aligner_pretraining", "0.25", 0.25),
    ("min_coverage", "0", 0.0),
    ("probe_size", "0", 0),
    ("probe_steps", "5", 5),
    ("augment_flip", "0.5", 0.5),
    ("augment_crop", "0.8", 0.8),
    ("augment_resize", "0.4", 0.4),
)
SETTINGS = [setting.name for setting in fields(AlignmentArguments)]


@dataclass
class OtherArguments(AlignmentArguments, TrainingArguments):
    """Those of another trainer than TRL's."""


@pytest.fixture(scope="module")
def basics(tmp_path_factory) -> list[str]:
    return ["--output_dir", str(tmp_path_factory.mktemp("out")), "--use_cpu", "--bf16", "False"]


PUBLISHED = {"attention_loss": "published"}
NEEDS: dict[str, dict[str, Any]] = {
    "forcing_share": {"attention_forcing": 1},
    "layer_share": {"layers": "middle"},
    **{name: PUBLISHED for name in AlignmentConfig.__dataclass_fields__ if name.startswith("aligner")},
    **dict.fromkeys(("pooling", "align_weight"), PUBLISHED),
    "parallel_init": PUBLISHED | {"pooling": "learn"},
}
"""Settings that are refused alone, and what they need."""


def from_trl(options: list[str]) -> Any:
    return TrlParser((LavenderConfig,)).parse_args_and_config(options)[0]  # ty: ignore[invalid-argument-type]


def from_transformers(options: list[str]) -> Any:
    return HfArgumentParser((OtherArguments,)).parse_args_into_dataclasses(options)[0]  # ty: ignore


def test_every_setting_is_tried():
    assert {name for name, _, _ in OPTIONS} == set(SETTINGS)


@pytest.mark.parametrize(("name", "text", "value"), OPTIONS, ids=lambda part: str(part))
def test_from_the_command_line(name, text, value, basics):
    needed = [part for key, number in NEEDS.get(name, {}).items() for part in (f"--{key}", str(number))]
    options = [*basics, *needed, f"--{name}", *text.split()]
    for parse in (from_trl, from_transformers):
        arrived = getattr(parse(options), name)
        assert arrived == value
        assert type(arrived) is type(value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, _, value in OPTIONS], ids=lambda part: str(part))
def test_from_a_config_file(name, value, basics, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({name: value} | NEEDS.get(name, {})))
    assert getattr(from_trl([*basics, "--config", str(path)]), name) == value


def test_the_command_line_wins_over_the_config_file(basics, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("layers: [1, 3]\nattention_loss: published\nalign_weight: 5\nheads: [0]\nmaps: b\n")
    args = from_trl([*basics, "--config", str(path), "--layers", "last", "--align_weight", "estimated"])
    assert (args.layers, args.align_weight, args.heads, args.maps) == ("last", "estimated", [0], "b")


def test_defaults_are_those_of_the_config(basics):
    assert from_trl(basics).alignment() == from_transformers(basics).alignment() == AlignmentConfig()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("mass", *DEFAULTS["mass"])),
        ({"attention_loss": "mass"}, ("mass", *DEFAULTS["mass"])),
        ({"attention_loss": "kl"}, ("kl", *DEFAULTS["kl"])),
        ({"attention_loss": "published"}, ("published", 2.0, 1.0)),
        ({"attention_loss": "published-js"}, ("published-js", 2.0, 1.0)),
        ({"align_weight": 0.7}, ("mass", 0.7, DEFAULTS["mass"][1])),
        ({"align_weight": 0}, ("mass", 0, DEFAULTS["mass"][1])),
        ({"attention_loss": "kl", "align_weight": 2, "sharpen": 1}, ("kl", 2, 1)),
        ({"attention_loss": "published", "sharpen": 3}, ("published", 2.0, 3)),
    ],
    ids=str,
)
def test_the_loss_decides_what_is_left_out(given, expected, basics, tmp_path):
    """On the command line, in a script's file and in Python; null in a file is the default too."""
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    parsed = [from_trl([*basics, *options]), from_transformers([*basics, *options])]
    path = tmp_path / "config.yaml"
    for settings in (given, {"align_weight": None, "sharpen": None} | given):
        path.write_text(yaml.safe_dump(settings))
        parsed.append(from_trl([*basics, "--config", str(path)]))
        parsed.append(LavenderConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings))
    for args in parsed:
        assert (args.attention_loss, args.align_weight, args.sharpen) == expected
        assert args.alignment() == AlignmentConfig(**given)


def test_the_help_states_the_default_weights():
    help_text = AlignmentArguments.__dataclass_fields__["align_weight"].metadata["help"]
    for loss, (weight, _) in DEFAULTS.items():
        assert f"{weight:g} with the loss {loss}" in help_text


def test_beside_the_other_arguments_of_a_script(basics):
    parser = TrlParser((ScriptArguments, LavenderConfig, ModelConfig))  # ty: ignore[invalid-argument-type]
    parsed: Any = parser.parse_args_and_config(
        [*basics, "--dataset_name", "d", "--model_name_or_path", "m", "--layers", "0", "1", "--maps", "a"]
    )
    script, args, model = parsed
    assert (script.dataset_name, model.model_name_or_path, args.layers, args.maps) == ("d", "m", [0, 1], "a")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--align_weight some", "Got align_weight='some'. Expected a number or 'estimated'."),
        ("--align_weight nan", "Got align_weight=nan."),
        ("--layers some", "Got layers='some'. Expected a list of whole numbers or one of ('all',"),
        ("--layers 1 x", "Got layers='x'. Expected a whole number."),
        ("--parts_of_speech adverb", "Got parts_of_speech='adverb'. Expected one of ('noun',"),
    ],
)
def test_a_wrong_value_is_named(option, message, basics):
    with pytest.raises(ConfigError) as caught:
        from_trl([*basics, *option.split()])
    assert message in str(caught.value)


def test_a_wrong_choice_lists_the_right_ones(basics, capsys):
    with pytest.raises(SystemExit):
        from_trl([*basics, "--pooling", "flow"])
    assert "invalid choice: 'flow' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_help(name):
    parser = TrlParser((LavenderConfig,))  # ty: ignore[invalid-argument-type]
    action = next(action for action in parser._actions if action.dest == name)
    assert action.help is not None
    assert action.help.endswith(".")
    assert len(action.help) > 20
    parser.format_help()  # a percent sign, for instance, would fail here

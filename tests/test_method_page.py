"""docs/method.md names every setting of alignment, every value it takes, and its default."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from lavender import config
from lavender.config import AlignmentConfig
from lavender.training.run import read_run

PAGE = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
OPTIONS = (
    config.Pooling,
    config.Texts,
    config.Match,
    config.Rows,
    config.WordTokens,
    config.Attributes,
    config.LayerChoice,
    config.ParallelInit,
    config.AlignerForm,
    config.AlignerNorm,
    config.AlignerKind,
    config.AlignerActivation,
    config.AttentionLoss,
)


@pytest.mark.parametrize("name", [one.name for one in fields(AlignmentConfig)])
def test_every_setting_has_its_place(name):
    assert f"`{name}`" in PAGE or f"`{name}:" in PAGE


@pytest.mark.parametrize("value", [value for option in OPTIONS for value in get_args(option)])
def test_every_value_is_named(value):
    assert f"`{value}`" in PAGE


def row_of(setting: str) -> str:
    return next(line for line in PAGE.splitlines() if line.startswith(f"| `{setting}` |"))


def test_the_defaults_of_the_losses_are_stated():
    for loss, (weight, _) in config.DEFAULTS.items():
        assert f"{weight:g} for `{loss}`" in row_of("align_weight")
    assert "2 for the published losses" in row_of("align_weight")
    ((power, losses),) = {power: tuple(config.DEFAULTS) for _, power in config.DEFAULTS.values()}.items()
    assert f"| {power:g} for `{losses[0]}` and `{losses[1]}`, else 1 |" in row_of("sharpen")
    assert f"| `{AlignmentConfig().attention_loss}` (default) |" in PAGE
    assert PAGE.count("(default) |") == 1


def test_the_commands_are_read():
    lines = [line for line in PAGE.splitlines() if line.startswith("lavender train")]
    assert len(lines) == 2
    for line in lines:
        overrides = [part.strip("'") for part in line.split(" --set ")[1:]]
        run = read_run(Path(__file__).parents[1] / "examples" / "world.yaml", overrides)
        assert run.out.startswith("runs/")
        AlignmentConfig(
            **{
                key: run.training[key]
                for key in ("attention_loss", "pooling", "heads", "layers")
                if key in run.training
            }
        )

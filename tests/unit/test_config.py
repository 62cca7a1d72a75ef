"""Settings: what is refused, and with which words."""

from __future__ import annotations

import pytest

from lavender.config import AlignmentConfig, ExtractionConfig, check_keys, from_mapping
from lavender.errors import ConfigError, LavenderError


def failure(build, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**settings)
    assert isinstance(caught.value, LavenderError)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_defaults_are_the_papers():
    assert ExtractionConfig().grid == (32, 32)
    assert ExtractionConfig().parts_of_speech == ("noun", "adjective", "verb")
    assert AlignmentConfig().pooling == "layer-mean"
    assert AlignmentConfig().attention_loss == "min-max"
    assert AlignmentConfig().aligner == "sim"
    assert AlignmentConfig().aligner_kind == "convolution"
    assert AlignmentConfig().aligner_norm == "instance"
    assert AlignmentConfig().aligner_activation == "relu6"
    assert AlignmentConfig().aligner_width == 32
    assert AlignmentConfig().layers is None


@pytest.mark.parametrize(
    ("key", "near"), [("tmestep", "timestep"), ("num_step", "num_steps"), ("parts_of_speach", "parts_of_speech")]
)
def test_a_misspelt_key_names_the_nearest_right_one(key, near):
    message = failure(lambda: from_mapping(ExtractionConfig, {key: 7}, "run.yaml"))
    assert f"Got the key {key!r} in run.yaml." in message
    assert f"Do this: write {near!r} instead." in message


def test_a_key_like_no_other_lists_all():
    message = failure(lambda: check_keys({"zzz": 1}, ["batch", "audio"], "run.yaml"))
    assert message == (
        "Got the key 'zzz' in run.yaml. Expected a known key, such as audio, batch. "
        "Do this: remove it, or look it up in the documentation."
    )


def test_right_keys_build_the_config():
    assert from_mapping(ExtractionConfig, {"seed": 3, "grid": [5, 7]}, "run.yaml") == ExtractionConfig(
        seed=3, grid=(5, 7)
    )
    assert AlignmentConfig(layers=[3, 8]).layers == (3, 8)  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "nose"}, "Got mode='nose'. Expected one of ('noise', 'ddim')."),
        ({"timestep": 1000}, "Got timestep=1000. Expected a whole number from 0 to 999."),
        ({"timestep": -1}, "Got timestep=-1."),
        ({"timestep": True}, "Got timestep=True."),
        ({"timestep": "100"}, "Got timestep='100'."),
        ({"timestep": float("nan")}, "Got timestep=nan."),
        ({"num_steps": 0}, "Got num_steps=0. Expected a whole number from 1 to 1000."),
        ({"batch_size": 0}, "Got batch_size=0."),
        ({"grid": (1, 32)}, "Got grid=(1, 32). Expected (rows, cols), each from 2 to 256."),
        ({"grid": (32, 257)}, "Got grid=(32, 257)."),
        ({"grid": (32,)}, "Got grid=(32,)."),
        ({"parts_of_speech": ("noun", "adverb")}, "Got parts_of_speech='adverb'. Expected one of ('noun',"),
    ],
)
def test_extraction_ranges(settings, message):
    assert message in failure(ExtractionConfig, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pooling": "flow"},
            "Got pooling='flow'. Expected one of ('layer-mean', 'layer-max', 'mean-mean', 'max-mean',",
        ),
        (
            {"attention_loss": "l2"},
            "Got attention_loss='l2'. Expected one of ('min-max', 'min-max-sum', 'mse', 'kl', 'js').",
        ),
        ({"aligner": "wide"}, "Got aligner='wide'. Expected one of ('light', 'sim', 'deep')."),
        ({"aligner_kind": "conv"}, "Got aligner_kind='conv'. Expected one of ('convolution', 'mlp')."),
        (
            {"aligner_norm": "layer"},
            "Got aligner_norm='layer'. Expected one of ('instance', 'batch', 'group', 'none').",
        ),
        ({"aligner_norm": None}, "Got aligner_norm=None."),
        ({"aligner_activation": "relu"}, "Got aligner_activation='relu'. Expected one of ('relu6', 'leaky-relu')."),
        ({"align_weight": -0.1}, "Got align_weight=-0.1. Expected a number from 0 to 1000000000.0."),
        ({"align_weight": "10"}, "Got align_weight='10'."),
        ({"aligner_width": 0}, "Got aligner_width=0."),
        ({"min_coverage": 1.1}, "Got min_coverage=1.1. Expected a number from 0 to 1."),
    ],
)
def test_alignment_ranges(settings, message):
    assert message in failure(AlignmentConfig, **settings)


@pytest.mark.parametrize("settings", [{"timestep": 100.5}, {"num_steps": 2.5}, {"batch_size": 1.5}])
def test_a_count_is_a_whole_number(settings):
    assert f"Got {next(iter(settings))}=" in failure(ExtractionConfig, **settings)


def test_the_edges_are_allowed():
    ExtractionConfig(timestep=0, num_steps=1, batch_size=1, grid=(2, 256))
    ExtractionConfig(timestep=999, num_steps=1000)
    AlignmentConfig(align_weight=0, min_coverage=0)
    AlignmentConfig(align_weight=1e9, min_coverage=1)


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign to field 'seed'"):
        ExtractionConfig().seed = 3  # ty: ignore[invalid-assignment]


def test_identity_leaves_out_what_changes_no_map():
    assert ExtractionConfig(batch_size=2).identity() == ExtractionConfig(batch_size=7).identity()
    for settings in ({"seed": 1}, {"timestep": 7}, {"mode": "ddim"}, {"grid": (5, 7)}, {"parts_of_speech": ("noun",)}):
        assert from_mapping(ExtractionConfig, settings, "here").identity() != ExtractionConfig().identity()

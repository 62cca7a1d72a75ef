"""Settings: what is refused, and with which words."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args

import pytest

from lavender.alignment.pooling import POOLINGS
from lavender.config import DEFAULTS, AlignmentConfig, AttentionLoss, ExtractionConfig, Pooling
from lavender.errors import ConfigError, LavenderError
from lavender.type_checks import check_keys, fits, from_mapping, hints_of
from wrong_values import WRONG_VALUES


def failure(build, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**settings)
    assert isinstance(caught.value, LavenderError)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_defaults():
    assert ExtractionConfig().grid == (32, 32)
    assert ExtractionConfig().parts_of_speech == ("noun", "adjective", "verb")
    assert AlignmentConfig().pooling == "layer-mean"
    assert AlignmentConfig().attention_loss == "mass"
    assert AlignmentConfig().aligner == "sim"
    assert AlignmentConfig().aligner_kind == "convolution"
    assert AlignmentConfig().aligner_norm == "instance"
    assert AlignmentConfig().aligner_activation == "relu6"
    assert AlignmentConfig().aligner_width == 32
    assert AlignmentConfig().layers is None


def test_the_defaults_of_the_losses():
    """λ and the power of the maps. The other tests read them from the table."""
    assert DEFAULTS == {"mass": (0.5, 2.0), "kl": (1.0, 2.0)}
    config = AlignmentConfig(attention_loss="published")
    assert (config.align_weight, config.sharpen) == (2.0, 1.0)


def test_another_loss_with_its_own_defaults():
    """A config has numbers, so `replace` keeps them, unless they are left out again."""
    published = AlignmentConfig(attention_loss="published")
    kept = replace(published, attention_loss="mass")
    assert (kept.align_weight, kept.sharpen) == (2.0, 1.0)
    assert replace(published, attention_loss="mass", align_weight=None, sharpen=None) == AlignmentConfig()


@pytest.mark.parametrize("loss", get_args(AttentionLoss))
def test_what_is_left_out_depends_on_the_loss(loss):
    """None is left out too; what is given counts, also if it is another loss's default, or 0."""
    weight, sharpen = DEFAULTS.get(loss, (2.0, 1.0))
    config = AlignmentConfig(attention_loss=loss)
    assert (config.align_weight, config.sharpen) == (weight, sharpen)
    given: dict[str, Any] = {"align_weight": None, "sharpen": None}
    assert AlignmentConfig(attention_loss=loss, **given) == config
    assert AlignmentConfig(attention_loss=loss, align_weight=0).align_weight == 0
    for others_weight, others_sharpen in (*DEFAULTS.values(), (2.0, 1.0)):
        config = AlignmentConfig(attention_loss=loss, align_weight=others_weight, sharpen=others_sharpen)
        assert (config.align_weight, config.sharpen) == (others_weight, others_sharpen)
    assert AlignmentConfig(attention_loss=loss, align_weight=0.7).sharpen == sharpen
    assert AlignmentConfig(attention_loss=loss, sharpen=3.0).align_weight == weight


@pytest.mark.parametrize(
    ("key", "near"), [("tmesteps", "timesteps"), ("num_step", "num_steps"), ("parts_of_speach", "parts_of_speech")]
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
        ({"mode": "nose"}, "Got mode='nose'. Expected one of ('noise', 'ddim', 'null-text')."),
        ({"timesteps": (1000,)}, "Got timesteps=1000. Expected a whole number from 0 to 999."),
        ({"timesteps": (50, -1)}, "Got timesteps=-1."),
        ({"timesteps": (True,)}, "Got timesteps=True."),
        ({"timesteps": ("100",)}, "Got timesteps='100'."),
        ({"timesteps": (float("nan"),)}, "Got timesteps=nan."),
        ({"timesteps": 50}, "Got timesteps=50. Expected a list of whole numbers. Do this: write timesteps: [50]."),
        ({"timesteps": ()}, "Got timesteps=(). Expected a list of one or more."),
        ({"num_noises": 0}, "Got num_noises=0. Expected a whole number from 1 to 1000."),
        ({"num_steps": 0}, "Got num_steps=0. Expected a whole number from 1 to 999."),
        ({"num_steps": 1000}, "Got num_steps=1000."),
        ({"inversion_steps": 0}, "Got inversion_steps=0. Expected a whole number from 1 to 10."),
        ({"inversion_steps": 11}, "Got inversion_steps=11."),
        (
            {"inversion_steps": 3},
            "Got inversion_steps=3 with num_steps=10. Expected a divisor of num_steps. "
            "Do this: change one of them, such as 5 and 10.",
        ),
        ({"null_text_iterations": -1}, "Got null_text_iterations=-1. Expected a whole number from 0 to 1000."),
        ({"guidance": -0.5}, "Got guidance=-0.5. Expected a number from 0 to 100."),
        ({"guidance": float("inf")}, "Got guidance=inf."),
        ({"seed": -1}, "Got seed=-1. Expected a whole number from 0 to 4294967295."),
        ({"geometry": "stretch"}, "Got geometry='stretch'. Expected one of ('squash', 'crop', 'letterbox', 'aspect')."),
        ({"largest_layer": 0}, "Got largest_layer=0. Expected a whole number from 1 to 1024."),
        ({"layer_weights": 3}, "Got layer_weights=3. Expected a mapping of a number or a list of numbers or null."),
        ({"layer_weights": {"up": -1}}, "Got layer_weights={'up': -1}."),
        ({"layer_weights": {"up": []}}, "Got layer_weights={'up': []}."),
        ({"layer_weights": {"up": [1, True]}}, "Got layer_weights.up=True. Expected a number."),
        ({"layer_weights": {"up": float("nan")}}, "Got layer_weights.up=nan. Expected a number or a list of numbers."),
        ({"competition": "softmax"}, "Got competition='softmax'. Expected one of ('none', 'share', 'contrast')."),
        ({"carrier": "next"}, "Got carrier='next'. Expected one of ('own', 'own+next')."),
        ({"refine": 3}, "Got refine=3. Expected a whole number from 0 to 2."),
        ({"flip": 1}, "Got flip=1. Expected true or false. Do this: change flip."),
        ({"head_share": 0}, "Got head_share=0. Expected a number from 1e-09 to 1."),
        ({"word_share": 1.5}, "Got word_share=1.5. Expected a number from 1e-09 to 1."),
        ({"batch_size": 0}, "Got batch_size=0."),
        ({"grid": (1, 32)}, "Got grid=(1, 32). Expected (rows, cols), each from 2 to 256."),
        ({"grid": (32, 257)}, "Got grid=(32, 257)."),
        ({"grid": (32,)}, "Got grid=(32,). Expected a list of 2 whole numbers."),
        ({"grid": (2.5, 3)}, "Got grid=2.5. Expected a whole number."),
        ({"grid": {}}, "Got grid={}. Expected a list of 2 whole numbers."),
        ({"timesteps": [[50]]}, "Got timesteps=[50]. Expected a whole number."),
        ({"parts_of_speech": "noun"}, "Got parts_of_speech='noun'. Expected a list of one of ('noun', 'adjective',"),
        ({"parts_of_speech": [{}]}, "Got parts_of_speech={}. Expected one of ('noun', 'adjective', 'verb', 'other')."),
        ({"parts_of_speech": ()}, "Got parts_of_speech=(). Expected a list of one or more."),
        ({"seed": 10**5000}, "Got seed=int of very many digits."),
        ({"seed": True}, "Got seed=True. Expected a whole number."),
        ({"seed": None}, "Got seed=None. Expected a whole number. Do this: leave seed out for its default, 0."),
        ({"seed": "7"}, "Got seed='7'. Expected a whole number. Do this: write 7 without quotes."),
        ({"tiny_vae": 3}, "Got tiny_vae=3. Expected a text or null."),
        ({"tiny_vae": ""}, "Got tiny_vae=''. Expected a path."),
        ({"layer_weights": {1: 2.0}}, "Got a key of layer_weights=1. Expected a text."),
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
            "Got attention_loss='l2'. Expected one of ('mass', 'kl', 'published', 'published-sum', 'published-mse', ",
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
        (
            {"align_weight": "10"},
            "Got align_weight='10'. Expected a number or 'estimated'. Do this: write 10 without quotes.",
        ),
        ({"align_weight": float("nan")}, "Got align_weight=nan."),
        ({"align_weight": 10**400}, "Got align_weight=1000"),
        ({"align_weight": [2]}, "Got align_weight=[2]."),
        ({"heads": "x"}, "Got heads='x'. Expected a list of whole numbers or null. Do this: change heads."),
        ({"heads": 2}, "Got heads=2. Expected a list of whole numbers or null. Do this: write heads: [2]."),
        ({"heads": [0, 0]}, "Got heads=[0, 0]. Expected one or more, none twice."),
        ({"heads": [[0]]}, "Got heads=[0]. Expected a whole number."),
        ({"heads": [True]}, "Got heads=True. Expected a whole number."),
        ({"heads": []}, "Got heads=[]. Expected one or more, none twice."),
        ({"layers": "some"}, "Got layers='some'. Expected a list of whole numbers or one of ('all', 'first',"),
        ({"layers": [1.0]}, "Got layers=1.0. Expected a whole number."),
        ({"layers": 3}, "Got layers=3. Expected a list of whole numbers or one of"),
        ({"layers": {"a": 1}}, "Got layers={'a': 1}."),
        ({"parts_of_speech": "noun"}, "Got parts_of_speech='noun'."),
        ({"pooling": ["learn"]}, "Got pooling=['learn']."),
        ({"subjects_and_objects": "no"}, "Got subjects_and_objects='no'. Expected true or false."),
        ({"aligner_width": 0}, "Got aligner_width=0."),
        ({"min_coverage": 1.1}, "Got min_coverage=1.1. Expected a number from 0 to 1."),
        ({"rows": "reads"}, "Got rows='reads'. Expected one of ('predict', 'read', 'both')."),
        (
            {"rows": "both", "match": "exact"},
            "Got rows='both' with match='exact'. Expected rows: predict, since predictions decide which words match.",
        ),
        (
            {"attributes": "noun", "subjects_and_objects": True},
            "Got attributes='noun' with subjects_and_objects=True, which leaves out adjectives.",
        ),
        ({"attributes": "noun", "parts_of_speech": ("noun",)}, "Got attributes='noun' with parts_of_speech=('noun',)"),
        ({"texts": "all", "match": "root"}, "Got texts='all' with match='root'. Expected texts: answers, since"),
        ({"sharpen": 0}, "Got sharpen=0. Expected a number from 0.1 to 16."),
        ({"word_share": 0}, "Got word_share=0."),
        ({"attention_forcing": 2}, "Got attention_forcing=2. Expected a number from 0 to 1."),
        (
            {"attention_forcing": 0.5, "match": "exact"},
            "Got match='exact' with attention_forcing=0.5. Expected match: label",
        ),
        (
            {"forcing_share": 0.5},
            "Got forcing_share=0.5 without attention_forcing. Expected a setting that does something. "
            "Do this: set attention_forcing, or leave forcing_share out.",
        ),
        (
            {"tokens": "first", "match": "exact"},
            "Got tokens='first' with match='exact'. Expected tokens: all, since predictions decide which words match. "
            "Do this: set match: label, or leave tokens out.",
        ),
        ({"tokens": "first", "match": "root"}, "Got tokens='first' with match='root'. Expected tokens: all, since"),
        ({"attention_forcing": 0.5, "rows": "read"}, "Expected rows: predict or both, since only rows that predict"),
        ({"attention_forcing": 0.5, "texts": "questions"}, "Expected texts: answers or all, since only words of"),
        (
            {"attention_loss": "published", "attention_forcing": 0.5, "pooling": "learn"},
            "Got pooling='learn' with attention_forcing=0.5.",
        ),
        (
            {"attention_loss": "mass", "pooling": "flow-sum"},
            "Got pooling='flow-sum' with attention_loss='mass', the default. Expected layer-mean or mean-mean",
        ),
        (
            {"pooling": "learn"},
            "Got pooling='learn' with attention_loss='mass', the default. Expected layer-mean or mean-mean: this loss "
            "has no Aligner and no projections of its own. Do this: leave pooling out, or set attention_loss: "
            "published.",
        ),
        (
            {"aligner": "deep"},
            "Got aligner='deep' with attention_loss='mass', the default. Expected no setting of the Aligner or of "
            "learned projections: this loss has neither. Do this: leave aligner out, or set attention_loss: published.",
        ),
        (
            {"align_weight": "estimated"},
            "Got align_weight='estimated' with attention_loss='mass', the default. Expected squared residuals of maps. "
            "Do this: set attention_loss to published or published-sum, or align_weight to a number.",
        ),
        (
            {"attention_loss": "kl", "aligner_width": 8},
            "Got aligner_width=8 with attention_loss='kl'. Expected no setting of the Aligner",
        ),
        ({"attention_loss": "kl", "parallel_init": "random"}, "Got parallel_init='random' with"),
        ({"attention_loss": "mass", "aligner_pretraining": 0.1}, "Got aligner_pretraining=0.1 with"),
        ({"attention_loss": "mass", "align_weight": "estimated"}, "Got align_weight='estimated' with"),
    ],
)
def test_alignment_ranges(settings, message):
    assert message in failure(AlignmentConfig, **settings)


@pytest.mark.parametrize("settings", [{"num_noises": 100.5}, {"num_steps": 2.5}, {"batch_size": 1.5}])
def test_a_count_is_a_whole_number(settings):
    assert f"Got {next(iter(settings))}=" in failure(ExtractionConfig, **settings)


@pytest.mark.parametrize("value", WRONG_VALUES, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("kind", [ExtractionConfig, AlignmentConfig])
def test_a_setting_has_its_type_or_is_refused_by_name(kind, value):
    refused = 0
    for name, hint in hints_of(kind).items():
        said = refusal(kind, name, value)
        if said is None:
            is_default = kind is AlignmentConfig and value is None and name in ("align_weight", "sharpen")
            assert fits(value, hint) or is_default
        else:
            assert said.startswith((f"Got {name}", f"Got a key of {name}"))
            assert len(said) < 1000
            refused += 1
    assert refused > len(hints_of(kind)) / 3


def refusal(kind, name: str, value: object) -> str | None:
    try:
        kind(**{name: value})
    except ConfigError as error:
        return str(error)
    return None


def test_the_edges_are_allowed():
    ExtractionConfig(timesteps=(0,), batch_size=1, grid=(2, 256))
    ExtractionConfig(timesteps=(999, 0), refine=2, head_share=1e-9, word_share=1, largest_layer=1)
    ExtractionConfig(mode="null-text", num_steps=1, inversion_steps=1, guidance=0, null_text_iterations=0)
    ExtractionConfig(mode="null-text", num_steps=999, inversion_steps=333, guidance=100)
    ExtractionConfig(layer_weights={"up": [0, 1.5], "down": 0}, largest_layer=None)
    AlignmentConfig(align_weight=0, min_coverage=0)
    AlignmentConfig(align_weight=1e9, min_coverage=1)
    AlignmentConfig(attention_forcing=0.5, forcing_share=0.5)
    AlignmentConfig(tokens="first")


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign to field 'seed'"):
        ExtractionConfig().seed = 3  # ty: ignore[invalid-assignment]


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "ddim"},
        {"timesteps": [7]},
        {"timesteps": [50, 7]},
        {"num_noises": 2},
        {"num_steps": 7, "mode": "ddim"},
        {"inversion_steps": 5, "mode": "null-text"},
        {"null_text_iterations": 1, "mode": "null-text"},
        {"guidance": 2.0, "mode": "null-text"},
        {"seed": 1},
        {"geometry": "crop"},
        {"largest_layer": 16},
        {"layer_weights": {"up": 2.0}},
        {"competition": "share"},
        {"carrier": "own+next"},
        {"refine": 1},
        {"flip": True},
        {"head_share": 0.5},
        {"word_share": 0.5},
        {"tiny_vae": "tiny"},
        {"grid": (5, 7)},
        {"parts_of_speech": ("noun",)},
    ],
    ids=lambda one: next(iter(one)),
)
def test_every_setting_that_changes_a_map_is_in_the_identity(settings):
    plain = ExtractionConfig(mode=settings.get("mode", "noise") if len(settings) > 1 else "noise")
    assert from_mapping(ExtractionConfig, settings, "here").identity() != plain.identity()


def test_identity_leaves_out_what_changes_no_map():
    assert ExtractionConfig(batch_size=2).identity() == ExtractionConfig(batch_size=7).identity()
    assert len(ExtractionConfig().identity()) == len(fields(ExtractionConfig)) - 1


def test_the_table_of_poolings_has_each():
    assert tuple(POOLINGS) == get_args(Pooling)
    assert len(set(POOLINGS.values())) == len(POOLINGS)


@pytest.mark.parametrize(
    ("earlier", "name"),
    [
        ("min-max", "published"),
        ("min-max-sum", "published-sum"),
        ("mse", "published-mse"),
        ("js", "published-js"),
    ],
)
def test_a_loss_by_its_earlier_name(earlier, name):
    with pytest.warns(DeprecationWarning, match=f"{earlier!r} is called {name!r} now"):
        config = AlignmentConfig(attention_loss=earlier)
    assert config == AlignmentConfig(attention_loss=name)

"""Which layers and heads are aligned: by name, by number, and what the learned attention takes by default."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaConfig, MllamaConfig

from lavender.alignment.objective import attach, detach
from lavender.config import AlignmentConfig
from lavender.errors import ConfigError
from lavender.students.capture import PARALLEL_NAME
from lavender.students.registry import adapter_for
from lavender.world.student_models import STUDENTS

LLAMA_32_VISION = (3, 8, 13, 18, 23, 28, 33, 38)


@pytest.mark.parametrize(
    ("choice", "share", "expected"),
    [
        (None, 1 / 3, LLAMA_32_VISION),
        ("all", 1 / 3, LLAMA_32_VISION),
        ("first", 1 / 3, (3, 8, 13)),
        ("middle", 1 / 3, (13, 18, 23)),
        ("last", 1 / 3, (28, 33, 38)),
        ("first", 0.5, (3, 8, 13, 18)),
        ("middle", 0.5, (13, 18, 23, 28)),
        ("last", 0.01, (38,)),
        ("middle", 1, LLAMA_32_VISION),
        ((33, 3), 1 / 3, (33, 3)),
    ],
)
def test_layers_by_name(choice, share, expected):
    assert adapter_for(MllamaConfig()).layers(choice, share) == expected


def test_a_self_attending_model_has_every_layer():
    """Vicuna's 32: a fifth is 6."""
    adapter = adapter_for(LlavaConfig())
    assert adapter.layers(None) == tuple(range(32))
    assert adapter.layers("middle", 0.2) == tuple(range(13, 19))


def test_a_layer_without_a_picture_is_refused():
    with pytest.raises(ConfigError, match=r"Got layers=\(3, 4\), of which \[4\] do not see the picture\."):
        adapter_for(MllamaConfig()).layers((3, 4))


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    [("mllama", None, 2), ("llava", None, 1), ("llava", "all", 4), ("llava", "last", 1)],
)
def test_learn_takes_the_middle_of_a_self_attending_model(family, layers, expected, captions):
    """Every cross-attention layer, but of four self-attention layers a fifth, unless more are asked for."""
    processor = STUDENTS[family].build_processor(captions, vocabulary=300)
    model = STUDENTS[family].build_model(processor)
    head = attach(model, AlignmentConfig(attention_loss="published", pooling="learn", layers=layers))
    assert len(head.layers) == expected
    assert len([name for name, _ in model.named_modules() if name.endswith(PARALLEL_NAME)]) == expected


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_the_start_of_the_learned_attention(init, make_student):
    model = make_student()
    head = attach(model, AlignmentConfig(attention_loss="published", pooling="learn", parallel_init=init))
    attention = adapter_for(model.config).attention_module(model, head.layers[0])
    new = attention.get_submodule(PARALLEL_NAME)
    same = [
        torch.equal(new.query.weight, attention.q_proj.weight),
        torch.equal(new.key.weight, attention.k_proj.weight),
    ]
    assert same == [init == "pretrained"] * 2
    assert new.query.weight.std() > 0
    detach(model)


def test_heads_that_are_not_there_are_refused(make_student):
    model = make_student()
    heads = adapter_for(model.config).num_heads()
    with pytest.raises(ConfigError, match=rf"Got heads=\(0, {heads}\)\. Expected numbers from 0 to {heads - 1}\."):
        attach(model, AlignmentConfig(heads=(0, heads)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "second"}, r"Got layers='second'\. Expected a list of whole numbers or one of \('all', 'first',"),
        ({"layers": 3}, r"Got layers=3\. Expected a list of whole numbers or .* Do this: write layers: \[3\]\."),
        ({"heads": 3}, r"Got heads=3\. Expected a list of whole numbers or null\."),
        ({"heads": []}, r"Got heads=\[\]\. Expected one or more, none twice\."),
        ({"layers": [3, 3]}, r"Got layers=\[3, 3\]\. Expected one or more, none twice\."),
        ({"layer_share": 0}, r"Got layer_share=0\."),
        ({"parts_of_speech": "noun"}, r"Got parts_of_speech='noun'\. Expected a list of one of"),
        ({"parallel_init": "zero"}, r"Got parallel_init='zero'\."),
        ({"align_weight": "guessed"}, r"Got align_weight='guessed'\. Expected a number or 'estimated'\."),
        (
            {"align_weight": "estimated", "attention_loss": "kl"},
            r"Got align_weight='estimated' with attention_loss='kl'\. Expected squared residuals of maps\.",
        ),
        ({"weight_by_confidence": 1}, r"Got weight_by_confidence=1\. Expected true or false\."),
        ({"subjects_and_objects": "yes"}, r"Got subjects_and_objects='yes'\. Expected true or false\."),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AlignmentConfig(**settings)

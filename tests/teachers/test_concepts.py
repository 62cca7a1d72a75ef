"""Concept vectors in output space, against the blocks' own calls with words in place of the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lavender.config import ExtractionConfig
from lavender.errors import CaptureError, ConfigError
from lavender.teachers.diffusion.base import TeacherFamily
from lavender.teachers.diffusion.concepts import ConceptCapture, capture_concepts
from lavender.teachers.diffusion.registry import family_of
from lavender.teachers.diffusion.teacher import Teacher
from lavender.words import words_of
from teachers import pipelines, transformer_pipelines
from teachers.basis import CONTRAST_ROUNDING, ROUNDING, Bypass, any_indicators, given_of, plain, same, traces
from teachers.pipelines import TEXTS, fresh, job, jobs, picture, shared

SIZE = (12, 20)


@pytest.fixture(params=[pipelines.stable_diffusion_3, pipelines.stable_diffusion_35, transformer_pipelines.flux])
def build(request, monkeypatch) -> Callable[[], Any]:
    monkeypatch.setattr("lavender.teachers.diffusion.flux.Flux.side", 64)
    return request.param


@pytest.fixture
def family(build) -> TeacherFamily:
    pipeline = shared(build)
    return family_of(type(pipeline))(pipeline)


def columns(family: TeacherFamily) -> Tensor:
    """E (row, token, word): the first row has three words, the second two and an empty column."""
    values = torch.zeros(2, family.word_keys, 3)
    values[0, 1, 0] = values[0, 2, 1] = 1
    values[0, 3:5, 2] = 0.5
    values[1, 2, 0] = values[1, 4, 1] = 1
    return values


@torch.no_grad()
def captured(family: TeacherFamily, stop: bool = False, last: int | None = None) -> tuple[dict[str, Tensor], Any]:
    given, maps, output = given_of(family, SIZE), {}, None
    layers = family.concept_layers(SIZE)[:last]
    num_text_keys = given[2]["states"].shape[1]
    capture = ConceptCapture(
        layers,
        [layer.name for layer in layers],
        columns(family),
        num_text_keys,
        lambda layer, one: maps.__setitem__(layer.name, one),
    )
    with capture_concepts(capture, stop):
        output = family.denoise(*given)
    return maps, output


@torch.no_grad()
def by_hand(family: TeacherFamily, monkeypatch, row: int, num_words: int) -> list[Tensor]:
    """One row: each block as the backbone calls it, then again with the words as its whole text."""
    layers, outputs, calls = family.concept_layers(SIZE), [], []
    attend = F.scaled_dot_product_attention

    def kept(*args, **kwargs):
        outputs.append(attend(*args, **kwargs))
        return outputs[-1]

    def keep(module, args, options):
        calls.append((len(outputs), options))

    handles = [layer.module.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", kept)
        latents, timesteps, condition, size = given_of(family, SIZE)
        one = slice(row, row + 1)
        family.predict(latents[one], timesteps[one], {name: part[one] for name, part in condition.items()}, size)
        for handle in handles:
            handle.remove()
        num_text = condition["states"].shape[1]
        values = columns(family)[row, :, :num_words]
        words = values.T[None] @ calls[0][1]["encoder_hidden_states"][:, : len(values)]
        maps = []
        for layer, (index, options) in zip(layers, calls, strict=True):
            image = outputs[index][:, :, num_text:] if layer.text_first else outputs[index][:, :, :-num_text]
            changed = options | {"encoder_hidden_states": words}
            if options.get("image_rotary_emb") is not None:
                changed["image_rotary_emb"] = tuple(
                    torch.cat([part[:num_words], part[num_text:]]) for part in options["image_rotary_emb"]
                )
            before = len(outputs)
            words, _ = layer.module(**changed)
            output = outputs[before]
            concepts = output[:, :, :num_words] if layer.text_first else output[:, :, -num_words:]
            maps.append(image.transpose(1, 2).flatten(2)[0] @ concepts.transpose(1, 2).flatten(2)[0].T)
    return maps


def test_maps_are_the_dot_products_of_attention_outputs(family, monkeypatch):
    maps, _ = captured(family)
    for row, num_words in ((0, 3), (1, 2)):
        expected = by_hand(family, monkeypatch, row, num_words)
        assert list(maps) == [layer.name for layer in family.concept_layers(SIZE)]
        for found, wanted in zip(maps.values(), expected, strict=True):
            assert found.shape == (2, 1, 6 * 10, 4)
            # another order of sums, over several blocks
            torch.testing.assert_close(found[row, 0, :, :num_words], wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[row, 0, :, -1], wanted.mean(dim=1), rtol=1e-4, atol=1e-5)
            assert wanted.std(dim=0).min() > 0
            assert wanted.std(dim=1).max() > 0


def test_outputs_are_the_same_bits_and_nothing_is_left(family):
    before = traces(family)
    with torch.no_grad():
        bare = family.denoise(*given_of(family, SIZE))
    maps, output = captured(family)
    assert torch.equal(output, bare)
    assert traces(family) == before
    early, stopped = captured(family, stop=True, last=1)
    assert stopped is None
    assert list(early) == list(maps)[:1]
    assert all(torch.equal(one, maps[name]) for name, one in early.items())
    assert traces(family) == before


@pytest.mark.parametrize("levers", [{}, {"competition": "share", "geometry": "crop"}, {"competition": "contrast"}])
def test_maps_do_not_depend_on_the_batch(build, levers):
    config = plain(space="output", layer_weights=None, **levers)
    together = Teacher(shared(build), config)(jobs())
    for one, whole in zip(jobs(), together, strict=True):
        (alone,) = Teacher(shared(build), config)([one])
        same(alone, whole, CONTRAST_ROUNDING if config.competition == "contrast" else ROUNDING)
        assert whole.words == words_of(one.text)
        assert whole.maps.min() >= 0
        torch.testing.assert_close(whole.maps.amax(dim=(1, 2)), torch.ones(len(whole.words)))


def test_output_space_gives_other_maps_and_another_identity(build):
    config = plain(space="output", layer_weights=None)
    image = picture(64, 64)
    (output,), (weights,) = (Teacher(shared(build), one)([job(image, TEXTS[0])]) for one in (config, plain()))
    assert (output.maps - weights.maps).abs().max() > 0.1
    assert config.identity() != plain(layer_weights=None).identity()


def test_the_second_half_of_the_blocks_is_the_default(build):
    teacher = Teacher(shared(build), plain(space="output", layer_weights=None))
    every = teacher.family.concept_layers((16, 16))
    assert [layer.name for layer in teacher.layers((64, 64))] == [layer.name for layer in every[len(every) // 2 :]]


@pytest.mark.parametrize("space", ["attention", "output"])
def test_one_expert_layer_is_read_alone(build, space):
    pipeline = shared(build)
    expert = Teacher(pipeline, plain(space=space, layer_weights=None, expert_layer=1))
    (layer,) = expert.layers((64, 64))
    assert layer.name == "transformer_blocks.1.attn"
    weights = {"transformer_blocks": 0.0, "transformer_blocks.1.": 1.0}
    if pipeline.transformer.config.get("num_single_layers") and space == "attention":
        weights["single_transformer_blocks"] = 0.0
    given = Teacher(pipeline, plain(space=space, layer_weights=weights))
    for one, other in zip(expert(jobs()[:1]), given(jobs()[:1]), strict=True):
        same(one, other, atol=1e-6)
    count = len(expert.candidates((64, 64)))
    with pytest.raises(ConfigError, match=f"Got expert_layer={count}. Expected a layer from 0 to {count - 1}"):
        Teacher(pipeline, plain(space=space, layer_weights=None, expert_layer=count))


def test_custom_processors_are_refused(build):
    pipeline = fresh(build)
    pipeline.transformer.set_attn_processor(Bypass())
    teacher = Teacher(pipeline, plain(space="output", layer_weights=None))
    with torch.no_grad():  # transformers installs hooks of its own in a text encoder at its first call
        teacher.family.encode_texts([""])
    before = traces(teacher.family)
    with pytest.raises(CaptureError, match="Got no attention in layer 'transformer_blocks.0.attn'"):
        teacher(jobs()[:1])
    assert traces(teacher.family) == before


def test_two_passes_are_refused(family):
    given = given_of(family, SIZE)
    layers = family.concept_layers(SIZE)
    words = any_indicators(family)
    capture = ConceptCapture(layers, [], words, given[2]["states"].shape[1], lambda layer, one: None)
    with pytest.raises(CaptureError, match="Got two passes through layer"), torch.no_grad(), capture_concepts(capture):
        family.denoise(*given)
        family.denoise(*given)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"refine": 1}, "refine"),
        ({"head_share": 0.5}, "head_share"),
        ({"layer_weights": {"transformer_blocks": [1, 0]}}, "layer_weights per head"),
    ],
)
def test_settings_of_heads_are_refused_in_output_space(settings, wrong):
    with pytest.raises(ConfigError, match=f"Got {wrong} with space='output'"):
        ExtractionConfig(space="output", **settings)


def test_an_expert_layer_beside_weights_is_refused():
    with pytest.raises(ConfigError, match="Got expert_layer=1 with layer_weights"):
        ExtractionConfig(expert_layer=1, layer_weights={})


def test_other_families_refuse_output_space():
    for build in (pipelines.stable_diffusion, transformer_pipelines.pixart_sigma, transformer_pipelines.flux_2_klein):
        with pytest.raises(ConfigError, match="Got space='output' with a .*Do this: use space='attention'"):
            Teacher(shared(build), plain(space="output", layer_weights=None))

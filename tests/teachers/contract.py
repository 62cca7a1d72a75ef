"""What must hold for every family of teachers. A family's test file subclasses `Contract` and gives its fixtures.

1 maps are the softmax · 2 no bit of the backbone changes, and it is left as it was · 3 a job's maps depend on the
job alone · 4 a stopped forward gives the same maps · 5 a planted patch comes back at its place · 6 what is refused,
overflows, or is rounded (5 and 6 in `teachers.limits`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lavender.errors import CaptureError
from lavender.teachers.diffusion.capture import WordCapture, capture_words
from lavender.teachers.diffusion.registry import family_of
from lavender.teachers.diffusion.teacher import Teacher
from lavender.words import words_of
from teachers.basis import (
    CONTRAST_ROUNDING,
    GRID,
    LEVERS,
    ROUNDING,
    SIZES,
    Largest,
    any_indicators,
    captured,
    given_of,
    indicators,
    same,
    traces,
)
from teachers.explicit import first_text_key, heat_of, indicator_of, projections, softmax_of
from teachers.limits import Limits
from teachers.pipelines import TEXTS, job, jobs, picture


class Contract(Limits):
    """Collected as a subclass only."""

    # 1

    @SIZES
    @pytest.mark.parametrize("num_words", [None, 31])  # more words than a head is wide need several calls
    def test_maps_are_the_softmax_averaged_over_a_words_tokens(self, family, readings, rotate, size, num_words):
        layers, words_BTW = family.layers(size), indicators(readings, num_words)
        mask_BK = self.text_mask(given_of(family, size)[2])
        with projections(layers) as seen:
            maps, _ = captured(family, size, words_BTW=words_BTW)
        assert list(maps) == [layer.name for layer in layers]
        for layer in layers:
            softmax_BHCK, first = softmax_of(layer, seen, rotate, mask_BK), first_text_key(layer)
            expected = softmax_BHCK[..., first : first + words_BTW.shape[1]] @ words_BTW[:, None].double()
            assert maps[layer.name].dtype == torch.float32
            # shares of about 1/256; a logit of some tens, rounded to float32, moves one by 1e-6 on some CPUs
            torch.testing.assert_close(maps[layer.name].double(), expected, rtol=0, atol=1e-5)
            assert expected.std(dim=2).max() > 0.1 * expected.mean()  # flat maps would be equal too easily

    @pytest.mark.parametrize("index", [0, 1])
    @pytest.mark.parametrize("shape", ["square", "wide", "tall"])
    def test_a_teachers_maps_are_the_mean_over_layers_and_heads(
        self, pipeline, readings, rotate, latent_sizes, shape, index
    ):
        sides, latent_size = latent_sizes[shape]
        text = TEXTS[index]
        teacher = Teacher(pipeline, self.plain(geometry="aspect"))
        layers, words = teacher.family.layers(latent_size), words_of(text)
        with projections(layers) as seen:
            (found,) = teacher([job(picture(*sides), text)])
        indicator_TW = indicator_of(text, words, readings)
        for word, count in self.counts[index].items():
            assert (indicator_TW[:, [one.text for one in words].index(word)] > 0).sum() == count
        mask_BK = self.text_mask(teacher.family.encode_texts([text]))
        expected = heat_of(layers, seen, indicator_TW, GRID, rotate, mask_BK)
        assert found.words == words
        torch.testing.assert_close(found.maps.double(), expected, rtol=0, atol=1e-5)

    def test_the_softmax_is_never_written_out(self, family, monkeypatch):
        size, given = (16, 16), given_of(family, (16, 16))
        layers, keys = family.layers(size), given[2]["states"].shape[1]
        forbidden, largest = set(), Largest()
        on_attention = WordCapture.on_attention

        def watched(self, layer, query, key, options):
            forbidden.add((query.shape[2], key.shape[2]))
            forbidden.add((layer.grid[0] * layer.grid[1], key.shape[2]))
            with largest:
                on_attention(self, layer, query, key, options)

        monkeypatch.setattr(WordCapture, "on_attention", watched)
        captured(family, size)
        assert layers
        assert all(shape[-2:] not in forbidden for shape in largest.shapes)
        cells = max(layer.grid[0] * layer.grid[1] for layer in layers)
        assert max(np.prod(shape) for shape in largest.shapes) < 2 * 4 * cells * max(keys, 48)

    # 2

    @SIZES
    def test_outputs_are_the_same_bits_with_capture(self, family, size):
        with torch.no_grad():
            plain = family.denoise(*given_of(family, size))
        assert torch.equal(captured(family, size)[1], plain)
        with torch.no_grad():
            assert torch.equal(family.denoise(*given_of(family, size)), plain)

    def test_gradients_of_the_backbone_are_not_asked_for(self, family):
        maps, output = captured(family, (16, 16))
        assert not output.requires_grad
        assert not any(one.requires_grad for one in maps.values())

    def test_the_pipeline_is_left_as_it_was(self, own):
        for parameter in list(own.backbone.parameters())[::3]:
            parameter.requires_grad_(False)
        parts = [one for one in own.pipeline.components.values() if isinstance(one, torch.nn.Module)]
        before, weights = traces(own), [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
        Teacher(own.pipeline, self.plain(refine=self.refine, flip=True))(jobs())
        assert traces(own) == before
        for part, old in zip(parts, weights, strict=True):
            assert all(torch.equal(one, old[name]) for name, one in part.state_dict().items())

    @pytest.mark.parametrize("stop", [False, True])
    def test_the_backbone_is_restored_after_an_exception(self, family, stop):
        before, given = traces(family), given_of(family, (16, 16))
        layers = family.layers((16, 16))
        capture = WordCapture(layers[:2], any_indicators(family), given[2]["states"].shape[1], lambda layer, one: None)
        with pytest.raises(KeyError, match="mine"), torch.no_grad(), capture_words(capture, stop):
            raise KeyError("mine")
        assert traces(family) == before

    def test_an_exception_inside_a_layer_leaves_no_mark(self, family, monkeypatch):
        before, layer = traces(family), family.layers((16, 16))[1]
        with monkeypatch.context() as patch:
            patch.setattr(layer.module.to_k, "forward", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                captured(family, (16, 16))
        assert traces(family) == before
        assert len(captured(family, (16, 16))[0]) == len(family.layers((16, 16)))

    def test_two_passes_in_one_capture_are_refused(self, family):
        before, given = traces(family), given_of(family, (16, 16))
        capture = WordCapture(
            family.layers((16, 16)), any_indicators(family), given[2]["states"].shape[1], lambda layer, one: None
        )
        twice = pytest.raises(CaptureError, match="Got two passes through layer")
        with twice, torch.no_grad(), capture_words(capture):
            family.denoise(*given)
            family.denoise(*given)
        assert traces(family) == before

    # 3

    @pytest.mark.parametrize("levers", LEVERS, ids=lambda one: "-".join(one) or "plain")
    def test_maps_do_not_depend_on_the_batch(self, pipeline, levers):
        config = self.plain(**levers | {"refine": levers.get("refine", 0) * self.refine})
        rounding = CONTRAST_ROUNDING if config.competition == "contrast" else ROUNDING
        together = Teacher(pipeline, config)(jobs())
        alone = [Teacher(pipeline, config)([one])[0] for one in jobs()]
        backwards = Teacher(pipeline, config)(jobs()[::-1])[::-1]
        for one, *others in zip(jobs(), together, alone, backwards, strict=True):
            for maps in others:
                assert (maps.image_id, maps.text, maps.words) == (one.image_id, one.text, one.words)
                assert maps.maps.shape == (len(one.words), *GRID)
                same(maps, others[0], rounding)
        assert (together[0].maps - together[3].maps).abs().max() > 10 * rounding  # another picture, another map

    def test_a_picture_is_encoded_once_and_so_is_a_text(self, pipeline, monkeypatch):
        encoded, read = [], []
        encode = pipeline.vae.encode
        monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
        teacher = Teacher(pipeline, self.plain())
        handle = teacher.family.text_encoder.register_forward_hook(
            lambda module, args, options, output: read.append(len(args[0] if args else options["input_ids"])),
            with_kwargs=True,
        )
        first, again = teacher(jobs()), teacher(jobs()[1:])
        handle.remove()
        assert sum(encoded) == 3  # of four jobs
        assert sum(read) == 3
        for one, other in zip(first[1:], again, strict=True):
            same(one, other)

    def test_a_teacher_from_a_folder_gives_the_same_maps(self, pipeline, tmp_path: Path):
        pipeline.save_pretrained(tmp_path / "teacher", safe_serialization=True)
        loaded = Teacher.from_pretrained(tmp_path / "teacher", self.plain())
        assert loaded.name == str(tmp_path / "teacher")
        assert type(loaded.pipeline) is type(pipeline)
        for one, other in zip(loaded(jobs()), Teacher(pipeline, self.plain())(jobs()), strict=True):
            same(one, other)
        renamed = Teacher.from_pretrained(tmp_path / "teacher", self.plain(), name="mine")
        assert renamed.name == "mine"

    # 4

    def test_a_stopped_forward_gives_the_same_bits_and_runs_no_later_layer(self, family):
        every = family.layers((16, 16))
        ran = []
        handles = [
            layer.module.register_forward_hook(lambda *args, name=layer.name: ran.append(name)) for layer in every
        ]
        full, _ = captured(family, (16, 16))
        assert ran == [layer.name for layer in every]
        for kept in (every[:1], every[:2], [every[1], every[0]]):
            ran.clear()
            maps, output = captured(family, (16, 16), kept, stop=True)
            assert output is None
            assert ran == [layer.name for layer in every[: len(kept)]]
            assert all(torch.equal(one, full[name]) for name, one in maps.items())
        for handle in handles:
            handle.remove()

    def test_a_teacher_stops_after_the_last_layer_that_it_reads(self, pipeline):
        family = family_of(type(pipeline))(pipeline)
        second, ran = family.layers((16, 16))[1], []
        handles = [one.module.register_forward_hook(lambda *args: ran.append(1)) for one in family.layers((16, 16))]
        weights = {name.split(".")[0]: 0.0 for name in (layer.name for layer in family.layers((16, 16)))}
        Teacher(pipeline, self.plain(layer_weights={**weights, second.name: 1.0}))(jobs()[:1])
        assert len(ran) == 2
        for handle in handles:
            handle.remove()

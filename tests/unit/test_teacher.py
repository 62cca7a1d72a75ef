"""The teacher: its capture is exact and leaves no trace; its maps depend on picture and text alone.

Axis suffixes: B batch row, C cell, T text token, W word.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from lavender.config import ExtractionConfig
from lavender.diffusion.capture import capture_words, layer_grid
from lavender.diffusion.teacher import Job, Teacher
from lavender.errors import CaptureError, UnsupportedModelError
from lavender.images import image_id
from lavender.words import words_of

CONFIG = ExtractionConfig(grid=(11, 13), timestep=300)
SIZES = [(16, 16), (16, 24), (12, 20)]  # of latents, (height, width)


def unet_input(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A noisy latent, a timestep and text states, two rows."""
    return torch.randn(2, 4, *size), torch.tensor(100), torch.randn(2, 48, 128)


def indicator(num_words: int = 3) -> torch.Tensor:
    """E (row 2, token 48, word): word 0 has two tokens, the others one, another in each row."""
    words_BTW = torch.zeros(2, 48, num_words)
    words_BTW[:, 5:7, 0] = 0.5
    for word in range(1, num_words):
        words_BTW[0, 7 + word, word] = words_BTW[1, 11 + word, word] = 1
    return words_BTW


def job(scene, text: str, words=None) -> Job:
    return Job(scene.image, image_id(scene.image), text, words_of(text) if words is None else words)


def traces(unet) -> list:
    """All that a capture could leave behind in a UNet."""
    hooks = [(name, len(one._forward_hooks), len(one._forward_pre_hooks)) for name, one in unet.named_modules()]
    return [hooks, {name: id(one) for name, one in unet.attn_processors.items()}, unet.training]


class Reference(AttnProcessor):
    """Attention with its probabilities written out, kept as their mean over heads, (B, C, T)."""

    def __init__(self):
        super().__init__()
        self.probabilities = torch.empty(0)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        if encoder_hidden_states is not None:
            query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
            scores = attn.get_attention_scores(attn.head_to_batch_dim(query), attn.head_to_batch_dim(key), None)
            self.probabilities = scores.unflatten(0, (hidden_states.shape[0], -1)).mean(dim=1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


@pytest.fixture
def own_processors(pipeline):
    """The UNet, whose attention processors a test may replace."""
    processors = pipeline.unet.attn_processors
    yield pipeline.unet
    pipeline.unet.set_attn_processor(processors)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_capture_changes_no_bit_of_the_output(pipeline, size):
    given = unet_input(size)
    plain = pipeline.unet(*given).sample
    with capture_words(pipeline.unet, indicator()) as layers:
        captured = pipeline.unet(*given).sample
    assert torch.equal(plain, captured)
    assert torch.equal(plain, pipeline.unet(*given).sample)
    names = [name for name in layers if name.endswith("attn2")]
    assert names == list(layers)
    assert len(names) == 2 * 1 + 1 + 2 * 2  # blocks down with one layer each, the middle, blocks up with two


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_words", [3, 31])  # a head is 16 or 24 wide: 31 words need two calls
@torch.no_grad()
def test_maps_are_the_softmax_summed_over_tokens(own_processors, size, num_words):
    unet, given, words_BTW = own_processors, unet_input(size), indicator(num_words)
    with capture_words(unet, words_BTW) as layers:
        unet(*given)
    references = {name: Reference() for name in unet.attn_processors}
    unet.set_attn_processor(dict(references))
    unet(*given)
    for name, maps_BCW in layers.items():
        probabilities_BCT = references[f"{name}.processor"].probabilities
        torch.testing.assert_close(maps_BCW, probabilities_BCT @ words_BTW, rtol=0, atol=1e-6)
    assert {layer_grid(maps.shape[1], *size) for maps in layers.values()} == {size, (size[0] // 2, size[1] // 2)}


@torch.no_grad()
def test_the_unet_is_restored_after_an_exception(pipeline):
    before, given = traces(pipeline.unet), unet_input((16, 16))
    with pytest.raises(KeyError, match="mine"), capture_words(pipeline.unet, indicator()) as layers:
        pipeline.unet(*given)
        raise KeyError("mine")
    assert traces(pipeline.unet) == before
    seen = {name: maps.clone() for name, maps in layers.items()}
    pipeline.unet(*given)  # outside: nothing is captured, and a second pass is no error
    assert all(torch.equal(layers[name], maps) for name, maps in seen.items())


@torch.no_grad()
def test_an_exception_inside_a_layer_leaves_no_mark(pipeline, monkeypatch):
    before, given = traces(pipeline.unet), unet_input((16, 16))
    layer = next(one for name, one in pipeline.unet.named_modules() if name.endswith("attn2"))
    with monkeypatch.context() as patch:
        patch.setattr(layer.to_k, "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError), capture_words(pipeline.unet, indicator()):
            pipeline.unet(*given)
    assert traces(pipeline.unet) == before
    with capture_words(pipeline.unet, indicator()) as layers:
        pipeline.unet(*given)
    assert len(layers) == 7


@torch.no_grad()
def test_custom_attention_processors_are_refused(own_processors):
    unet = own_processors
    unet.set_attn_processor(AttnProcessor())
    with pytest.raises(CaptureError) as caught, capture_words(unet, indicator()):
        unet(*unet_input((16, 16)))
    assert "Got 7 of 7 cross-attention layers not seen, the first 'down_blocks.0" in str(caught.value)
    assert "unet.set_default_attn_processor()" in str(caught.value)


@torch.no_grad()
def test_two_passes_in_one_capture_are_refused(pipeline):
    before, given = traces(pipeline.unet), unet_input((16, 16))
    with pytest.raises(CaptureError, match="two attention calls in layer"), capture_words(pipeline.unet, indicator()):
        pipeline.unet(*given)
        pipeline.unet(*given)
    assert traces(pipeline.unet) == before


def test_layer_grid_halves_rounding_up():
    assert layer_grid(16 * 24, 16, 24) == (16, 24)
    assert layer_grid(96, 16, 24) == (8, 12)
    assert layer_grid(7 * 9, 13, 17) == (7, 9)
    assert layer_grid(4 * 5, 13, 17) == (4, 5)
    assert layer_grid(1, 13, 17) == (1, 1)
    with pytest.raises(CaptureError, match="Got a layer with 100 cells on a 16×24 latent"):
        layer_grid(100, 16, 24)


@pytest.fixture(scope="module")
def jobs(some_scenes, captions) -> list[Job]:
    """The scenes with their captions, one picture with two texts, one text without a word to map."""
    return [
        *(job(scene, caption) for scene, caption in zip(some_scenes, captions, strict=True)),
        job(some_scenes[0], "another text of the first picture"),
        job(some_scenes[1], "a dog", words=()),
    ]


@pytest.mark.parametrize("mode", ["noise", "ddim"])
def test_maps_do_not_depend_on_the_batch(pipeline, jobs, mode):
    teacher = Teacher(pipeline, ExtractionConfig(mode=mode, grid=(11, 13), num_steps=3))
    together = teacher(jobs)
    alone = [teacher([one])[0] for one in jobs]
    backwards = teacher(jobs[::-1])[::-1]
    for one, *others in zip(jobs, together, alone, backwards, strict=True):
        for maps in others:
            assert (maps.image_id, maps.text, maps.words) == (one.image_id, one.text, one.words)
            assert maps.maps.shape == (len(one.words), 11, 13)
            torch.testing.assert_close(maps.maps, others[0].maps, rtol=0, atol=1e-5)
            if len(one.words):
                assert maps.maps.amax(dim=(1, 2)).tolist() == [1] * len(one.words)
    assert not torch.allclose(together[0].maps[0], together[1].maps[0], atol=1e-3)


def test_the_unet_is_the_same_after_the_teacher(pipeline, jobs):
    before, weights = traces(pipeline.unet), {name: one.clone() for name, one in pipeline.unet.state_dict().items()}
    Teacher(pipeline, CONFIG)(jobs[:2])
    assert traces(pipeline.unet) == before
    assert all(torch.equal(one, weights[name]) for name, one in pipeline.unet.state_dict().items())


def test_ddim_runs_and_differs(pipeline, jobs):
    noise = Teacher(pipeline, CONFIG)(jobs[:1])[0].maps
    ddim = Teacher(pipeline, ExtractionConfig(mode="ddim", grid=(11, 13), num_steps=2))(jobs[:1])[0].maps
    assert ddim.shape == noise.shape
    assert (ddim - noise).abs().max() > 1e-3


def test_the_same_noise_for_the_same_picture(pipeline):
    teacher, shape = Teacher(pipeline, CONFIG), torch.Size((4, 5, 7))
    assert torch.equal(teacher._noise("ab", shape), Teacher(pipeline, CONFIG)._noise("ab", shape))
    assert not torch.equal(teacher._noise("ab", shape), teacher._noise("ac", shape))
    other = Teacher(pipeline, ExtractionConfig(seed=1))
    assert not torch.equal(teacher._noise("ab", shape), other._noise("ab", shape))
    assert teacher._noise("ab", torch.Size((4, 16, 16))).std().item() == pytest.approx(1, abs=0.1)


def test_the_seed_changes_the_maps(pipeline, jobs):
    one = Teacher(pipeline, CONFIG)(jobs[:1])[0].maps
    other = Teacher(pipeline, ExtractionConfig(grid=(11, 13), timestep=300, seed=1))(jobs[:1])[0].maps
    assert (one - other).abs().max() > 1e-3


def test_the_whole_picture_is_the_frame(pipeline):
    """A picture squashed to the teacher's square is the teacher's square."""
    wide = Image.new("RGB", (130, 70), (9, 80, 200))
    wide.paste((250, 40, 3), (0, 0, 65, 35))
    teacher, words = Teacher(pipeline, CONFIG), words_of("a dog")
    square = wide.resize((64, 64), Image.Resampling.BILINEAR)
    given = teacher([Job(wide, "same", "a dog", words)])[0].maps
    torch.testing.assert_close(given, teacher([Job(square, "same", "a dog", words)])[0].maps, rtol=0, atol=1e-5)


LONG = " ".join(["A dog sits near a cat. the red apple is here;", "is it? yes!\n\n"] * 40)


@pytest.mark.parametrize(
    "text",
    [
        "a dog", "A dog. ", "  a dog\n", "...", "", "wow!!! a dog?! no", LONG, LONG.replace(".", "").replace(";", ""),
        "one sentence " * 80, "犬。" * 60, "no-end" * 30 + " and then a dog",
    ],
)  # fmt: skip
def test_windows_join_to_the_text(pipeline, text):
    teacher = Teacher(pipeline, CONFIG)
    windows = teacher.windows(text)
    assert "".join(text[start:end] for start, end in windows) == text
    assert all(start < end for start, end in windows)


@pytest.mark.parametrize("text", [LONG, LONG.replace(".", ""), "one sentence " * 80])
def test_windows_fit_the_text_encoder(pipeline, text):
    teacher, tokenizer = Teacher(pipeline, CONFIG), pipeline.tokenizer
    windows = teacher.windows(text)
    assert max(len(tokenizer(text[start:end])["input_ids"]) for start, end in windows) <= 48
    total = len(tokenizer(text, verbose=False)["input_ids"])
    assert len(windows) <= 3 * total / 46  # they are filled, at least by a third
    assert all(text[end - 1] in " \n" or end == len(text) for _, end in windows)  # no word is cut


def test_sentences_stay_whole_where_they_fit(pipeline):
    text = "a dog is here. " * 20
    for start, end in Teacher(pipeline, CONFIG).windows(text):
        assert start % 15 == 0
        assert end % 15 == 0


def test_a_caption_of_two_thousand_words_maps_every_word(pipeline, some_scenes):
    text = " ".join(["the dog and red cats."] * 400)
    words = words_of(text)
    assert len(words) == 2000
    maps = Teacher(pipeline, ExtractionConfig(grid=(2, 3)))([job(some_scenes[0], text, words)])[0]
    assert maps.words == words
    assert maps.dropped == ()
    assert maps.maps.amax(dim=(1, 2)).min() == 1


def test_memory_grows_with_the_text_not_with_its_square(pipeline, some_scenes, monkeypatch):
    """A window of 48 tokens has no place for more than 46 words; columns for the words of others are waste."""
    text = " ".join(["the dog and red cats."] * 40)
    teacher, run, shapes = Teacher(pipeline, ExtractionConfig(grid=(2, 3))), Teacher._run, []
    monkeypatch.setattr(
        Teacher, "_run", lambda self, latents, states, words_BTW, noise: shapes.append(words_BTW.shape)
        or run(self, latents, states, words_BTW, noise),
    )  # fmt: skip
    teacher([job(some_scenes[0], text)])
    assert max(shape[-1] for shape in shapes) <= 46


def test_a_repeated_word_has_a_map_for_each_occurrence(pipeline, some_scenes):
    maps = Teacher(pipeline, CONFIG)([job(some_scenes[0], "a dog near a dog")])[0]
    assert [word.start for word in maps.words] == [0, 2, 6, 11, 13]
    assert (maps.maps[1] - maps.maps[4]).abs().max() > 1e-3


def test_a_word_beyond_the_text_encoder_is_dropped_and_named(pipeline, some_scenes):
    text = "xq" * 90 + "-dog and cat"  # one word of more tokens than the encoder has: its beginning stands for it
    maps = Teacher(pipeline, CONFIG)([job(some_scenes[0], text)])[0]
    assert [word.text for word in maps.words] + [one.what for one in maps.dropped] == ["xq" * 90 + "-dog", "and", "cat"]


def test_other_pipelines_are_refused(pipeline):
    class Other(StableDiffusionPipeline):
        pass

    with pytest.raises(UnsupportedModelError) as caught:
        Teacher(Other(**pipeline.components, requires_safety_checker=False), CONFIG)
    assert str(caught.value).startswith("Got a Other. Expected a StableDiffusionPipeline (Stable Diffusion 1.x or 2.x)")


def test_a_teacher_from_a_folder_gives_the_same_maps(pipeline, jobs, tmp_path):
    pipeline.save_pretrained(tmp_path / "teacher", safe_serialization=True)
    loaded = Teacher.from_pretrained(tmp_path / "teacher", CONFIG)
    assert loaded.name == str(tmp_path / "teacher")
    expected = Teacher(pipeline, CONFIG)(jobs[:2])
    for one, other in zip(loaded(jobs[:2]), expected, strict=True):
        torch.testing.assert_close(one.maps, other.maps, rtol=0, atol=1e-6)

"""The teacher on the world's tiny pipeline: its words, its confidences, its memory, what it refuses.

What holds for every family is in `teachers.contract`.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import AutoencoderTiny, DDPMPipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CTRLTokenizer

from lavender.config import ExtractionConfig
from lavender.data.images import image_id
from lavender.errors import DataError, UnsupportedModelError
from lavender.teachers.diffusion import teacher as module
from lavender.teachers.diffusion.registry import FAMILIES
from lavender.teachers.diffusion.teacher import Job, Teacher
from lavender.words import content_words, words_of
from lavender.world import TEACHER_PATH

CONFIG = ExtractionConfig(grid=(11, 13), timesteps=(300,), geometry="squash")


def job(scene, text: str, words=None) -> Job:
    return Job(scene.image, image_id(scene.image), text, words_of(text) if words is None else words)


@pytest.fixture(scope="module")
def jobs(some_scenes, captions) -> list[Job]:
    """The scenes with their captions, one picture with two texts, one text without a word to map."""
    return [
        *(job(scene, caption) for scene, caption in zip(some_scenes, captions, strict=True)),
        job(some_scenes[0], "another text of the first picture"),
        job(some_scenes[1], "a dog", words=()),
    ]


def test_maps_are_heat_with_a_confidence_for_each_word(pipeline, jobs):
    for one, given in zip(Teacher(pipeline, CONFIG)(jobs), jobs, strict=True):
        assert (one.image_id, one.text, one.words, one.dropped) == (given.image_id, given.text, given.words, ())
        assert one.maps.shape == (len(given.words), 11, 13)
        assert one.maps.dtype == one.confidence.dtype == torch.float32
        assert one.maps.flatten(1).amax(dim=1, keepdim=True).tolist() == [[1]] * len(given.words)
        assert one.confidence.shape == (len(given.words),)
        assert ((one.confidence >= 0) & (one.confidence <= 1)).all()


def test_maps_of_one_picture_and_one_text(pipeline, some_scenes, tmp_path):
    """Content words are found, a word without a map is named, and the picture may be a file or its content."""
    image, text = some_scenes[0].image, f"a red dog and two {'x' * 65} run"
    path = tmp_path / "scene.png"
    image.save(path)
    teacher = Teacher(pipeline, CONFIG)
    expected = teacher([job(some_scenes[0], text, content_words(text, CONFIG.parts_of_speech))])[0]
    assert [word.text for word in expected.words] == ["red", "dog", "run"]
    for source in (image, path, str(path), path.read_bytes()):
        maps = teacher.maps(source, text)
        assert (maps.image_id, maps.text, maps.words) == (expected.image_id, text, expected.words)
        assert maps.dropped == expected.dropped
        assert [drop.reason for drop in maps.dropped] == ["a word of more than 64 characters"]
        torch.testing.assert_close(maps.maps, expected.maps, rtol=0, atol=1e-5)
        torch.testing.assert_close(maps.confidence, expected.confidence, rtol=0, atol=1e-5)
        assert maps.image is not None
        assert maps.image.tobytes() == image.tobytes()


def test_a_text_without_content_words_has_no_maps(pipeline, some_scenes):
    maps = Teacher(pipeline, CONFIG).maps(some_scenes[0].image, "of 12, the")
    assert (maps.words, maps.dropped, maps.maps.shape) == ((), (), (0, 11, 13))


def test_a_picture_that_is_missing_is_refused(pipeline, tmp_path):
    with pytest.raises(DataError, match=r"Got the image .*/no\.png, which does not exist"):
        Teacher(pipeline, CONFIG).maps(tmp_path / "no.png", "a dog")


def test_no_config_is_the_default_config(pipeline):
    assert Teacher(pipeline).config == ExtractionConfig()
    teacher = Teacher.from_pretrained(TEACHER_PATH)
    assert teacher.config == ExtractionConfig()
    assert teacher.name == str(TEACHER_PATH)


def test_no_job_is_no_work(pipeline):
    assert Teacher(pipeline, CONFIG)([]) == []


def test_the_seed_changes_the_maps(pipeline, jobs):
    one = Teacher(pipeline, CONFIG)(jobs[:1])[0].maps
    other = Teacher(pipeline, dataclasses.replace(CONFIG, seed=1))(jobs[:1])[0].maps
    assert (one - other).abs().max() > 1e-3


def test_maps_cover_the_whole_picture(pipeline):
    """A picture squashed to the teacher's square is the teacher's square."""
    wide = Image.new("RGB", (130, 70), (9, 80, 200))
    wide.paste((250, 40, 3), (0, 0, 65, 35))
    words = words_of("a dog")
    square = wide.resize((64, 64), Image.Resampling.BILINEAR)
    given = Teacher(pipeline, CONFIG)([Job(wide, "same", "a dog", words)])[0]
    expected = Teacher(pipeline, CONFIG)([Job(square, "same", "a dog", words)])[0]
    torch.testing.assert_close(given.maps, expected.maps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("geometry", ["squash", "aspect", "crop"])
def test_a_view_is_as_good_as_the_picture(pipeline, jobs, geometry):
    config = ExtractionConfig(grid=(11, 13), geometry=geometry, flip=True)
    teacher = Teacher(pipeline, config)
    with_views = [Job(teacher.view(one.image), one.image_id, one.text, one.words) for one in jobs[:2]]
    for one, other in zip(teacher(with_views), Teacher(pipeline, config)(jobs[:2]), strict=True):
        assert torch.equal(one.maps, other.maps)


def test_mirrored_pictures_are_encoded_once(pipeline, some_scenes, monkeypatch):
    """Also where a call has more pictures than are kept."""
    monkeypatch.setattr("lavender.teachers.diffusion.teacher.CACHED", 2)
    teacher, encoded = Teacher(pipeline, ExtractionConfig(grid=(8, 8), flip=True, batch_size=1)), []
    encode = teacher.family.encode_pixels
    monkeypatch.setattr(teacher.family, "encode_pixels", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    given = [Job(scene.image, str(index), "a dog", words_of("a dog")[1:]) for index, scene in enumerate(some_scenes)]
    teacher(given)
    assert sum(encoded) == 2 * len(given) > 4


def test_flip_is_the_mean_with_the_mirrored_picture(pipeline, some_scenes, monkeypatch):
    """Of a picture that is its own mirror image, the map is too."""
    half = some_scenes[0].image.crop((0, 0, 40, 60))
    image = Image.new("RGB", (80, 60))
    image.paste(half, (0, 0))
    image.paste(half.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (40, 0))
    given = Job(image, image_id(image), "a dog", words_of("a dog"))
    plain, flipped = (
        Teacher(pipeline, ExtractionConfig(grid=(11, 13), flip=flip))([given])[0].maps for flip in (False, True)
    )
    torch.testing.assert_close(flipped, flipped.flip(-1), rtol=0, atol=1e-5)
    assert (plain - plain.flip(-1)).abs().max() > 1e-3
    monkeypatch.setattr(module, "to_heat", lambda maps: maps / 1)  # before the maximum is made 1, it is the mean
    raw = [Teacher(pipeline, ExtractionConfig(grid=(11, 13), flip=flip)) for flip in (False, True)]
    monkeypatch.setattr(module.WordMaps, "__post_init__", lambda self: None)
    one, both = (teacher([given])[0].maps for teacher in raw)
    torch.testing.assert_close(both, (one + one.flip(-1)) / 2, rtol=0, atol=1e-5)


# words


def test_a_caption_of_two_thousand_words_maps_every_word(pipeline, some_scenes):
    text = " ".join(["the dog and red cats."] * 400)
    words = words_of(text)
    assert len(words) == 2000
    maps = Teacher(pipeline, ExtractionConfig(grid=(2, 3)))([job(some_scenes[0], text, words)])[0]
    assert maps.words == words
    assert maps.dropped == ()
    assert maps.maps.amax(dim=(1, 2)).min() == 1


def test_a_repeated_word_has_a_map_for_each_occurrence(pipeline, some_scenes):
    maps = Teacher(pipeline, CONFIG)([job(some_scenes[0], "a dog near a dog")])[0]
    assert [word.start for word in maps.words] == [0, 2, 6, 11, 13]
    assert (maps.maps[1] - maps.maps[4]).abs().max() > 1e-3


def test_a_word_beyond_the_text_encoder_is_dropped_and_named(pipeline, some_scenes):
    """Without a space there is no place to cut: the beginning stands for a word that is too long, the next is lost."""
    text = "xq" * 30 + "/dog and cat"
    maps = Teacher(pipeline, CONFIG)([job(some_scenes[0], text)])[0]
    assert [word.text for word in maps.words] == ["xq" * 30, "and", "cat"]
    assert [(one.what, one.reason) for one in maps.dropped] == [
        ("dog", "the teacher's text encoder has no token for it")
    ]


def test_a_word_longer_than_any_is_dropped_and_named(pipeline, some_scenes):
    maps = Teacher(pipeline, CONFIG)([job(some_scenes[0], f"a dog {'x' * 6000} cat")])[0]
    assert [word.text for word in maps.words] == ["a", "dog", "cat"]
    assert [(one.what, one.reason) for one in maps.dropped] == [("x" * 20 + "…", "a word of more than 64 characters")]


def test_the_least_confident_words_are_dropped_by_name(pipeline, some_scenes):
    text = "a red dog near two small houses and the sun"
    whole = Teacher(pipeline, CONFIG)([job(some_scenes[0], text)])[0]
    config = dataclasses.replace(CONFIG, word_share=0.4)
    some = Teacher(pipeline, config)([job(some_scenes[0], text)])[0]
    assert len(whole.words) == 10
    assert len(some.words) == 4
    assert list(some.words) == sorted(some.words, key=lambda word: word.start)
    kept = [whole.words.index(word) for word in some.words]
    left = [index for index in range(10) if index not in kept]
    assert whole.confidence[kept].min() >= whole.confidence[left].max()
    assert whole.confidence[kept].max() > whole.confidence[left].min()  # or any four would do
    assert torch.equal(some.maps, whole.maps[kept])
    assert torch.equal(some.confidence, whole.confidence[kept])
    assert sorted(one.what for one in some.dropped) == sorted(whole.words[index].text for index in left)
    assert {one.reason for one in some.dropped} == {"among the least confident of its text"}


def test_a_text_keeps_one_word_at_least(pipeline, some_scenes):
    config = ExtractionConfig(grid=(11, 13), word_share=0.01)
    assert len(Teacher(pipeline, config)([job(some_scenes[0], "a red dog")])[0].words) == 1


# what is kept


def test_what_is_remembered_is_bounded(pipeline, some_scenes, monkeypatch):
    monkeypatch.setattr(module, "CACHED", 3)
    teacher = Teacher(pipeline, CONFIG)
    given = [job(scene, f"dog {'a ' * index}") for index, scene in enumerate(some_scenes)]
    together = teacher(given)
    assert len(teacher._pictures) == len(teacher._texts) == 3
    for one, other in zip(together, teacher(given), strict=True):
        torch.testing.assert_close(one.maps, other.maps, rtol=0, atol=1e-5)


def test_a_tiny_encoder_takes_the_place_of_the_pipelines(pipeline, jobs, tmp_path):
    """As TAESD: factor 4 like the pipeline's own, and latents that are already scaled."""
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
        latent_channels=4,
    ).eval()
    tiny.save_pretrained(tmp_path / "tiny", safe_serialization=True)
    pipeline.save_pretrained(tmp_path / "teacher", safe_serialization=True)
    config = ExtractionConfig(grid=(11, 13), tiny_vae=str(tmp_path / "tiny"))
    teacher = Teacher.from_pretrained(tmp_path / "teacher", config)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(teacher.family.encode_pixels(pixels), tiny.encode(pixels).latents)
    assert teacher(jobs[:1])[0].maps.amax(dim=(1, 2)).min() == 1


def test_the_encoder_is_read_at_its_mode_and_scaled(pipeline):
    teacher, pixels = Teacher(pipeline, CONFIG), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        assert torch.equal(teacher.family.encode_pixels(pixels), expected)


# what is refused


def test_other_pipelines_are_refused(pipeline):
    known = [family.pipeline_class.__name__ for family in FAMILIES]
    other = DDPMPipeline(pipeline.unet, pipeline.scheduler)
    with pytest.raises(UnsupportedModelError) as caught:
        Teacher(other, CONFIG)
    assert str(caught.value) == (
        f"Got a DDPMPipeline. Expected one of {', '.join(known)}. Do this: use one of these, or add a "
        "family: see TeacherFamily in lavender/teachers/diffusion/base.py."
    )


def test_a_folder_of_another_pipeline_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MochiPipeline", "_diffusers_version": "1"}))
    with pytest.raises(UnsupportedModelError, match=r"Got .*, a MochiPipeline\. Expected one of StableDiffusionPipe"):
        Teacher.from_pretrained(tmp_path, CONFIG)


def test_a_slow_tokenizer_is_refused(pipeline, tmp_path):
    """It does not know where in the text a token stands."""
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    slow = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    components = {**pipeline.components, "tokenizer": slow}
    with pytest.raises(UnsupportedModelError) as caught:
        Teacher(StableDiffusionPipeline(**components, requires_safety_checker=False), CONFIG)
    assert str(caught.value).startswith("Got the slow tokenizer CTRLTokenizer. Expected a fast tokenizer, ")

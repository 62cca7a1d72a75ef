"""Pictures are flipped, cropped and resized together with their maps, in training alone; views depend on the epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from families.test_qwen_vl import family_of
from lavender.alignment.augment import DRAW, MIN_SIDE, Augment, View
from lavender.alignment.collator import AlignmentCollator
from lavender.alignment.coverage import CROPPED, OUTSIDE, Coverage
from lavender.alignment.examples import CUT
from lavender.data.images import image_id
from lavender.data.samples import Sample, to_dataset
from lavender.data.store import MapStore
from lavender.errors import ConfigError
from lavender.maps import WordMaps
from lavender.students.registry import adapter_for
from lavender.training.trainer import LavenderConfig, LavenderTrainer
from lavender.words import content_words
from lavender.world.student_models import STUDENTS, conversation

GRID = (11, 13)
CELL = 16  # pixels per cell: pictures of 208 × 176
ANSWER = "a dog and a cat"
MESSAGES = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": ANSWER}]
PLACES = {"dog": (slice(2, 4), slice(1, 4)), "cat": (slice(8, 10), slice(9, 11))}
CHANNELS = {"dog": 0, "cat": 1}
EPOCHS = 24

# one map


def test_a_view_of_a_map_is_a_mean_over_areas():
    """The right half of two cells by four, worked out by hand; mirrored, the last column comes first."""
    heat = torch.tensor([[0.0, 1.0, 0.5, 0.25], [0.0, 0.0, 0.0, 1.0]])
    right = View(whole=(20, 40), box=(0, 20, 20, 40), size=(20, 20), mirrored=False)
    assert right.map(heat).tolist() == [[0.5, 0.5, 0.25, 0.25], [0, 0, 1, 1]]
    mirrored = View(whole=(20, 40), box=(0, 20, 20, 40), size=(20, 20), mirrored=True)
    assert mirrored.map(heat).tolist() == [[0.25, 0.25, 0.5, 0.5], [1, 1, 0, 0]]
    between = View(whole=(20, 40), box=(0, 15, 20, 35), size=(20, 20), mirrored=False)  # cells of half a cell
    expected = torch.tensor([[1, 0.5, 0.5, 0.25], [0, 0, 0, 1]])
    torch.testing.assert_close(between.map(heat), expected, rtol=0, atol=1e-6)


def test_a_word_is_left_out_if_most_of_its_place_is_cut_off():
    heat = torch.tensor([[1.0, 1.0, 0.4, 0.0]])  # its place is the first two cells
    for left, shown in ((0, True), (10, True), (11, False), (20, False)):
        view = View(whole=(8, 40), box=(0, left, 8, 40), size=(8, 40 - left), mirrored=False)
        assert view.shows(heat) == shown


def test_nothing_changes_without_a_change():
    heat, image = torch.rand(3, 5), Image.new("RGB", (40, 20))
    view = View(whole=(20, 40), box=(0, 0, 20, 40), size=(20, 40), mirrored=False)
    assert view.map(heat) is heat
    assert view.picture(image) is image
    assert view.shows(heat)


def test_large_maps_take_no_large_matrix():
    """Each row and column alone: a matrix for all pairs of cells would have 4 G numbers here."""
    heat = torch.zeros(256, 256)
    heat[100:140, 30:60] = 1
    view = View(whole=(512, 512), box=(128, 0, 384, 256), size=(256, 256), mirrored=False)
    expected = torch.zeros(256, 256)
    expected[2 * (100 - 64) : 2 * (140 - 64), 60:120] = 1
    assert view.shows(heat)
    torch.testing.assert_close(view.map(heat), expected, rtol=0, atol=1e-6)


# through the real collator


@pytest.fixture(scope="module", params=["mllama", "llava"])
def family(request, captions) -> tuple[Any, Any]:
    """(adapter, processor)."""
    made = STUDENTS[request.param]
    processor = made.build_processor([*captions, ANSWER], vocabulary=300)
    return adapter_for(made.build_model(processor).config), processor


@pytest.fixture
def planted(family, tmp_path):
    """A picture with a red patch for the dog and a green one for the cat, exact maps of both, and a collator.

    The collator's base also puts the pictures that it gets in a list.
    """
    adapter, processor = family
    pixels = np.zeros((GRID[0] * CELL, GRID[1] * CELL, 3), np.uint8)
    words = content_words(ANSWER, ("noun",))
    maps = torch.zeros(len(words), *GRID)
    for index, word in enumerate(words):
        rows, cols = PLACES[word.text]
        maps[index, rows, cols] = 1
        pixels[rows.start * CELL : rows.stop * CELL, cols.start * CELL : cols.stop * CELL, CHANNELS[word.text]] = 255
    image = Image.fromarray(pixels)
    store = tmp_path / "maps"
    with MapStore.writer(store, {"made by": "tests"}, {}, GRID) as writer:
        writer.add(WordMaps(image_id(image), ANSWER, words, maps))
    base, seen = DataCollatorForVisionLanguageModeling(processor), []

    def watched(examples: list[dict[str, Any]]) -> dict[str, Any]:
        seen[:] = examples[0]["images"]
        return base(examples)

    return image, AlignmentCollator(watched, processor, adapter, MapStore.open(store)), seen


def on_grid(picture: Image.Image, channel: int) -> np.ndarray:
    """The mean brightness of a channel in each cell, from 0 to 1: each pixel becomes rows × cols equal ones first."""
    pixels, (rows, cols) = np.asarray(picture)[:, :, channel] / 255, GRID
    fine = pixels.repeat(rows, axis=0).repeat(cols, axis=1)
    return fine.reshape(rows, picture.height, cols, picture.width).mean(axis=(1, 3))


@pytest.mark.parametrize(("flip", "crop", "resize"), [(0.5, 1, 1), (0, 0.5, 1), (0, 1, 0.4), (0.5, 0.5, 0.4)], ids=str)
def test_planted_patches_stay_under_their_maps(planted, flip, crop, resize):
    """What the student sees at a word's map is the word's patch, whatever was drawn; each change occurs."""
    image, collator, seen = planted
    collator.augment = Augment(flip, crop, resize, seed=1)
    sizes, first_columns, cut = set(), set(), 0
    for epoch in range(EPOCHS):
        collator.augment.epoch.fill_(epoch)
        alignment = collator([{"images": [image], "messages": MESSAGES}])["alignment"]
        (picture,) = seen
        sizes.add(picture.size)
        counted = Coverage.of(alignment["counts"])
        assert counted.words + counted.dropped[CROPPED] == 2
        assert counted.words == len(alignment["words"][0])
        cut += counted.dropped[CROPPED]
        for word, target in zip(alignment["words"][0], alignment["targets"][0], strict=False):
            patch = on_grid(picture, CHANNELS[word])
            first_columns.add(word == "dog" and patch.sum(axis=0).argmax() > GRID[1] / 2)
            limit = 0.01 if resize == 1 else 0.2  # of soft edges: a cell has about six pixels across
            assert np.abs(patch / patch.max() - target.numpy()).max() <= limit, (epoch, word)
        assert min(picture.size) >= MIN_SIDE
    assert (len(sizes) > 5) == (crop < 1 or resize < 1)
    assert (True in first_columns) == (flip > 0)
    assert (cut > 0) == (crop < 1)


def test_the_batch_is_that_of_a_picture_and_maps_that_were_cut_before(planted, tmp_path):
    image, collator, seen = planted
    collator.augment = Augment(0.5, 0.5, 0.5, seed=1)
    example = {"images": [image], "messages": MESSAGES}
    for epoch in range(4):
        collator.augment.epoch.fill_(epoch)
        batch = collator([example])
        (view,) = collator.augment.views([image], [image_id(image)], MESSAGES, None)
        assert view.picture(image).tobytes() == seen[0].tobytes()
        cut = view.picture(image)
        whole = collator._targets.store.get(image_id(image), ANSWER)
        kept = [index for index, heat in enumerate(whole.maps) if view.shows(heat)]
        maps = torch.stack([view.map(whole.maps[index]) for index in kept]) if kept else torch.zeros(0, *GRID)
        with MapStore.writer(tmp_path / f"cut-{epoch}", {"made by": "tests"}, {}, GRID) as writer:
            words = tuple(whole.words[index] for index in kept)
            writer.add(WordMaps(image_id(cut), ANSWER, words, maps))
        store = MapStore.open(tmp_path / f"cut-{epoch}")
        plain = AlignmentCollator(collator._base, collator._processor, collator._adapter, store)
        expected = plain([{"images": [cut], "messages": MESSAGES}])
        alignment, wanted = batch.pop("alignment"), expected.pop("alignment")
        for key in wanted.keys() - {"counts", "sample_counts", "names", "faults", "words", "targets"}:
            assert torch.equal(alignment[key], wanted[key]), key
        assert alignment["words"] == wanted["words"]
        torch.testing.assert_close(alignment["targets"], wanted["targets"], rtol=0, atol=0.6 / 255)
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_word_counts_if_its_map_in_the_view_is_seen(planted, monkeypatch):
    """The processor cuts the longer side. Where the words are in the whole picture does not matter."""
    image, collator, _ = planted
    images = collator._processor.image_processor
    monkeypatch.setattr(images, "do_center_crop", True)
    monkeypatch.setattr(images, "size", {"shortest_edge": images.crop_size["height"]})
    boxes = [
        (32, 0, 64, 100),  # of its columns 34 to 66 are seen. The dog is at 16 to 64, in the whole in unseen cells
        (100, 26, 160, 176),  # 45 to 105 are seen, and the cat is at 118 to 150, in the whole in a seen cell
    ]
    found = []
    for box in boxes:
        view = View(image.size[::-1], box, (box[2] - box[0], box[3] - box[1]), mirrored=False)
        collator.augment = fixed({None: view})
        found.append(collator([{"images": [image], "messages": MESSAGES}])["alignment"])
    assert [alignment["words"] for alignment in found] == [[["dog"]], [[]]]
    dropped = [Coverage.of(alignment["counts"]).dropped for alignment in found]
    assert [counts[OUTSIDE] for counts in dropped] == [0, 1]
    assert [counts[CROPPED] for counts in dropped] == [1, 1]
    assert "176 × 208 pixels" in found[0]["names"][0]  # of the file, not of the view


def fixed(views: dict[int | None, View]) -> Any:
    """An `Augment` whose views are chosen by a sample's number."""
    return SimpleNamespace(views=lambda images, identities, messages, draw: [views[draw]])


def test_a_part_with_more_tokens_than_max_length_is_left_out(captions, tmp_path):
    """Qwen-VL rounds: 300 × 310 pixels have 11 × 12 tokens in this model, and 93 × 96 have 12 × 12."""
    made = family_of("qwen2_5_vl", [*captions, ANSWER, "what is it?"])
    adapter, image = adapter_for(made.make().config), Image.new("RGB", (310, 300))
    with MapStore.writer(tmp_path / "maps", {"made by": "tests"}, {}, GRID) as writer:
        writer.add(WordMaps(image_id(image), ANSWER, content_words(ANSWER, ("noun",)), torch.rand(2, *GRID)))
    examples = [{"images": [image], "messages": MESSAGES, DRAW: draw} for draw in (0, 1)]
    batch = DataCollatorForVisionLanguageModeling(made.processor)([{"images": [image], "messages": MESSAGES}])
    picture = (batch["input_ids"][0] == adapter.image_token_id()).nonzero().flatten()
    assert len(picture) == 11 * 12
    length = int(picture[-1]) + 6
    base = DataCollatorForVisionLanguageModeling(made.processor, max_length=length)
    collator = AlignmentCollator(base, made.processor, adapter, MapStore.open(tmp_path / "maps"))
    whole, part = ((0, 0, 300, 310), (300, 310)), ((0, 0, 93, 96), (93, 96))
    collator.augment = fixed({draw: View((300, 310), *view, mirrored=False) for draw, view in enumerate((whole, part))})
    batch = collator(examples)
    assert batch["input_ids"].shape == (1, length)
    counted = Coverage.of(batch["alignment"]["counts"])
    assert counted.samples == 2
    assert counted.dropped[CUT] == len(batch["alignment"]["faults"]) == 1


def test_off_is_the_same_to_the_bit(planted):
    image, collator, _ = planted
    example = {"images": [image], "messages": MESSAGES}
    expected = collator([example])
    collator.augment = Augment(0, 1, 1, seed=1)
    batch = collator([example])
    for one, other in ((batch, expected), (batch.pop("alignment"), expected.pop("alignment"))):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert torch.equal(one[key], value) if isinstance(value, torch.Tensor) else one[key] == value, key


def test_a_text_with_sides_is_not_mirrored():
    augment, image = Augment(1, 1, 1, seed=1), Image.new("RGB", (100, 80))

    def mirrored(question: str) -> bool:
        messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        return augment.views([image], ["x"], messages, None)[0].mirrored

    assert mirrored("what is bright?")
    assert not mirrored("What is on the Left?")
    assert not mirrored("the rightmost dog")
    assert not mirrored("top_left and UPPER-RIGHT")


def test_a_small_picture_is_not_made_smaller():
    for side in (16, 64, 70):
        augment = Augment(0, 0.1, 0.1, seed=1)
        (view,) = augment.views([Image.new("RGB", (side, 2 * side))], ["x"], [], None)
        assert min(view.size) == min(side, MIN_SIDE)


# in a trainer


@pytest.fixture(scope="module")
def large(some_scenes, captions) -> Dataset:
    """The scenes at three times their size, with which there is something to crop. They have no maps."""
    return to_dataset(
        Sample(f"scene {scene.seed}", (scene.image.resize((192, 192)),), conversation("what is it?", caption))
        for scene, caption in zip(some_scenes, captions, strict=True)
    )


@pytest.fixture
def trainer_of(make_student, processor, large, store_path, tmp_path):
    def trainer_of(**settings: Any) -> LavenderTrainer:
        common: dict[str, Any] = {
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "max_length": None,
            "disable_tqdm": True,
        }
        common |= {
            "per_device_train_batch_size": 2,
            "maps": str(store_path),
            "seed": 3,
            "probe_size": 0,
            "min_coverage": 0.0,
        }
        args = LavenderConfig(output_dir=str(tmp_path / "out"), **common | settings)
        return LavenderTrainer(
            make_student(), args, processing_class=processor, train_dataset=large, eval_dataset=large
        )

    return trainer_of


def pixels(trainer: LavenderTrainer, epoch: int) -> list[torch.Tensor]:
    assert trainer._augment is not None
    trainer._augment.epoch.fill_(epoch)
    return [batch["pixel_values"] for batch in loader_of(trainer)]


def loader_of(trainer: Any) -> Any:
    trainer.loader = vars(trainer).get("loader") or trainer.get_train_dataloader()
    trainer.loader.set_epoch(0)  # the same order
    return trainer.loader


def test_views_depend_on_the_epoch_and_not_on_workers(trainer_of):
    settings = {"augment_crop": 0.5, "augment_flip": 0.5}
    here = trainer_of(**settings)
    first, second = pixels(here, 0), pixels(here, 1)
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    # nor on the weight of the loss
    workers = trainer_of(**settings, align_weight=0, dataloader_num_workers=1, dataloader_persistent_workers=True)
    for epoch, expected in enumerate((first, second)):
        assert all(torch.equal(one, other) for one, other in zip(pixels(workers, epoch), expected, strict=True))
    del workers.loader  # ends its worker
    shares = [pixels_of_process(here, process, 2) for process in range(2)]
    together = [batch for both in zip(*shares, strict=True) for batch in both]
    in_order = [pixel for batch in pixels_of_process(here, 0, 1) for pixel in batch]
    assert torch.equal(torch.cat(together)[: len(in_order)], torch.stack(in_order))


def pixels_of_process(trainer: LavenderTrainer, process: int, number: int) -> list[torch.Tensor]:
    """What one of several processes would get of the data set in its order."""
    whole = loader_of(trainer)
    loader = DataLoader(whole.dataset, batch_size=1, collate_fn=whole.collate_fn)
    shard = prepare_data_loader(loader, num_processes=number, process_index=process, put_on_device=False)
    return [batch["pixel_values"] for batch in shard]


def test_a_run_resumed_within_an_epoch_sees_the_same_pictures(trainer_of, monkeypatch, tmp_path):
    seen: list[torch.Tensor] = []
    step = LavenderTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(inputs["pixel_values"].clone())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LavenderTrainer, "training_step", watched)
    settings = {"augment_crop": 0.5, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    trainer_of(**settings).train()
    whole, seen = seen, []
    trainer_of(**settings).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert (len(whole), len(seen)) == (6, 2)
    assert all(torch.equal(one, other) for one, other in zip(seen, whole[4:], strict=True))


def test_only_training_is_augmented_and_the_epoch_is_told(trainer_of):
    trainer = trainer_of(augment_flip=1.0, augment_crop=0.5, num_train_epochs=2)
    before = next(iter(trainer.get_eval_dataloader()))["pixel_values"]
    trainer.train()
    assert trainer._augment is not None
    assert int(trainer._augment.epoch) == 1
    assert torch.equal(next(iter(trainer.get_eval_dataloader()))["pixel_values"], before)
    assert trainer.data_collator.augment is None
    assert trainer.train_dataset.column_names == ["images", "messages"]
    assert trainer.coverage.samples == 12


def test_repeated_rows_have_views_of_their_own(trainer_of, large):
    """Also if the sampler reads a column, and without a copy of the data set."""
    trainer = trainer_of(augment_crop=0.5, train_sampling_strategy="group_by_length")
    trainer.train_dataset = large.add_column("length", [5] * len(large)).select([0] * 4)
    one, other = pixels(trainer, 0)
    assert len({row.numpy().tobytes() for batch in (one, other) for row in batch}) == 4
    assert loader_of(trainer).dataset.rows is trainer.train_dataset


@pytest.mark.parametrize(
    ("setting", "value"), [("augment_flip", 1.5), ("augment_crop", 0), ("augment_resize", "half"), ("augment_crop", 2)]
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ConfigError, match=setting):
        LavenderConfig(output_dir="unused", use_cpu=True, bf16=False, **{setting: value})

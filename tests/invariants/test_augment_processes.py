"""Two processes draw other views of their samples, and each sample has the view that one process draws for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from invariants.test_augment import ANSWER, CELL, CHANNELS, GRID, PLACES, on_grid
from lavender.data.images import image_id
from lavender.data.samples import Sample, to_dataset
from lavender.data.store import MapStore
from lavender.maps import WordMaps
from lavender.words import content_words
from lavender.world.student_models import STUDENTS, conversation
from scale.launching import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ROWS, EPOCHS = 8, 2
WORKER = """
import sys
import numpy as np
import torch
from datasets import load_from_disk
from transformers import AutoProcessor, MllamaForConditionalGeneration
from lavender import LavenderConfig, LavenderTrainer
from lavender.alignment.collator import AlignmentCollator

torch.set_num_threads(1)
folder, out = sys.argv[1:]
args = LavenderConfig(
    output_dir=out, maps=folder + "/maps", num_train_epochs=2, per_device_train_batch_size=1, seed=3, bf16=False,
    use_cpu=True, max_length=None, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
    report_to="none", probe_size=0, train_sampling_strategy="sequential", augment_crop=0.5, augment_flip=0.5,
)
processor = AutoProcessor.from_pretrained(folder)
model = MllamaForConditionalGeneration.from_pretrained(folder)
trainer = LavenderTrainer(model, args, processing_class=processor, train_dataset=load_from_disk(folder + "/data"))
base, call, pictures, found, numbers = trainer.data_collator._base, AlignmentCollator.__call__, [], {}, {}

def watched(examples):
    pictures[:] = [np.asarray(example["images"][0]) for example in examples]
    return base(examples)

def kept(self, examples):
    batch = call(self, examples)
    if self.augment is not None:
        epoch = int(self.augment.epoch)
        number = numbers[epoch] = numbers.get(epoch, -1) + 1
        row = args.world_size * number + args.process_index  # the samples are in the order of the data
        found[f"{row} {epoch} picture"] = pictures[0]
        alignment = batch["alignment"]
        for word, target in zip(alignment["words"][0], alignment["targets"][0]):
            found[f"{row} {epoch} {word}"] = target.numpy()
    return batch

trainer.data_collator._base, AlignmentCollator.__call__ = watched, kept
trainer.train()
np.savez(f"{out}/{args.process_index}.npz", **found)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


class Seen(NamedTuple):
    """What a process got for a row in an epoch: the picture, and the maps of its words."""

    process: int
    picture: np.ndarray
    maps: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(captions, tmp_path_factory) -> Path:
    """A student, its processor, exact maps of two patches in a picture, and data whose rows are all the same sample."""
    path = tmp_path_factory.mktemp("augmented")
    processor = STUDENTS["mllama"].build_processor([*captions, ANSWER], vocabulary=300)
    STUDENTS["mllama"].build_model(processor).save_pretrained(path)
    processor.save_pretrained(path)
    pixels = np.zeros((GRID[0] * CELL, GRID[1] * CELL, 3), np.uint8)
    words = content_words(ANSWER, ("noun",))
    maps = torch.zeros(len(words), *GRID)
    for index, word in enumerate(words):
        rows, cols = PLACES[word.text]
        maps[index, rows, cols] = 1
        pixels[rows.start * CELL : rows.stop * CELL, cols.start * CELL : cols.stop * CELL, CHANNELS[word.text]] = 255
    image = Image.fromarray(pixels)
    with MapStore.writer(path / "maps", {"made by": "tests"}, {}, GRID) as writer:
        writer.add(WordMaps(image_id(image), ANSWER, words, maps))
    dataset: Dataset = to_dataset([Sample("planted", (image,), conversation("what is it?", ANSWER))] * ROWS)
    dataset.save_to_disk(path / "data")
    (path / "worker.py").write_text(WORKER)
    return path


def seen_by(folder: Path, kind: str, processes: int, **options: Any) -> dict[tuple[int, int], Seen]:
    """(row, epoch) → what one of the processes got."""
    out = folder / f"out {processes}"
    launch(kind, folder / "worker.py", folder, out, processes=processes, **options)
    found: dict[tuple[int, int], Seen] = {}
    for process in range(processes):
        with np.load(out / f"{process}.npz") as kept:
            for name in kept.files:
                row, epoch, what = name.split()
                one = found.setdefault((int(row), int(epoch)), Seen(process, kept[f"{row} {epoch} picture"], {}))
                assert one.process == process  # no row has two processes
                if what != "picture":
                    one.maps[what] = kept[name]
    return found


def test_each_sample_has_a_view_of_its_own_whichever_process_has_it(folder):
    one = seen_by(folder, "one_gpu", 1, options=["--cpu"])
    two = seen_by(folder, "ddp", 2)
    assert one.keys() == two.keys() == {(row, epoch) for row in range(ROWS) for epoch in range(EPOCHS)}
    assert sorted(seen.process for seen in two.values()) == [0] * ROWS + [1] * ROWS
    # the rows are equal, and yet no two of them have the same view, in one process or in two
    assert len({(seen.picture.shape, seen.picture.tobytes()) for seen in two.values()}) == ROWS * EPOCHS
    for key, seen in two.items():
        assert np.array_equal(seen.picture, one[key].picture)  # a part of the picture, perhaps mirrored: exact copies
        assert seen.maps.keys() == one[key].maps.keys()
        for word, heat in seen.maps.items():
            assert np.allclose(heat, one[key].maps[word], rtol=0, atol=1e-6)
            patch = on_grid(Image.fromarray(seen.picture), CHANNELS[word])
            assert np.abs(patch / patch.max() - heat).max() <= 0.01, (key, word)  # the map had the same view
    assert sum(len(seen.maps) for seen in two.values()) >= ROWS * EPOCHS  # of two words each; some are cut off

"""A detector of transformers as a teacher: from its boxes, by the example's way, to a map store."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil, Owlv2Processor

from lavender.data.samples import read_samples
from lavender.data.store import MapStore
from lavender.errors import DataError
from lavender.teachers.annotations.coco import CocoPanoptic
from lavender.teachers.annotations.extract import extract_annotations
from lavender.teachers.annotations.panoptic_writer import Segment, write_panoptic
from lavender.world import TEACHER_PATH

EXAMPLE = Path(__file__).parents[3] / "examples" / "detector_maps.py"
GRID = (5, 7)
WIDTH, HEIGHT = 70, 50


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    texts = ("two dogs near a red apple", "a quiet table")
    rows = []
    for number, (pixels, text) in enumerate(zip(noise, texts, strict=True)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def detector(tmp_path) -> Path:
    """A tiny OWLv2 of random weights, as a folder."""
    model = json.loads((TEACHER_PATH / "tokenizer" / "tokenizer.json").read_text())["model"]
    # OWLv2 takes a text whose first token is 0 for padding, and that is the world's start token
    vocabulary = {piece: (number - 1) % len(model["vocab"]) for piece, number in model["vocab"].items()}
    merges: Any = [tuple(pair) for pair in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Owlv2Config(
        text_config={**sizes, **special, "vocab_size": len(tokenizer)},
        vision_config={**sizes, "image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    Owlv2ForObjectDetection(config).save_pretrained(tmp_path / "detector")
    processor = Owlv2ImageProcessorPil(size={"height": 64, "width": 64})
    Owlv2Processor(processor, tokenizer).save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


def test_a_detectors_boxes_become_a_map_store(pictures, detector, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("detector_maps", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    out = tmp_path / "boxes"
    monkeypatch.chdir(pictures.parent)  # a relative folder, as in the example's own command
    monkeypatch.setattr(sys, "argv", ["x", str(detector), pictures.name, "--out", str(out), "--threshold", "0.001"])
    example.main()
    path = Path(capsys.readouterr().out.strip())
    annotations = CocoPanoptic(path, pictures=pictures)
    summary = extract_annotations(annotations.samples(), annotations, tmp_path / "maps", grid=GRID)
    store = MapStore.open(tmp_path / "maps", verify=True)
    maps = {one.text: one for one in store}
    assert set(maps) == {"two dogs near a red apple", "a quiet table"}
    content = json.loads(path.read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    assert set(names.values()) <= {"dog", "apple", "table"}
    mapped = 0
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        (sample,) = [one for one in read_samples(pictures) if Path(str(one.sources[0])).name == image["file_name"]]
        colours = np.asarray(Image.open(out / "panoptic_found" / annotation["file_name"])).astype(int)
        ids = colours[..., 0] + 256 * colours[..., 1]
        for word, heat in zip(maps[sample.answers[0]].words, maps[sample.answers[0]].maps, strict=True):
            wanted = [one["id"] for one in annotation["segments_info"] if names[one["category_id"]] == word.lemma]
            shares = np.isin(ids, wanted).reshape(GRID[0], 10, GRID[1], 10).mean(axis=(1, 3))
            expected = torch.tensor(shares / shares.max(), dtype=torch.float32)
            torch.testing.assert_close(heat, expected, rtol=0, atol=0.5 / 255 + 1e-6)  # the store's 8 bits
            mapped += 1
    assert mapped >= 1
    assert summary.words == mapped


def test_overlaps_belong_to_the_highest_score_and_masks_count_as_boxes_do(pictures, tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[:, :35] = True
    segments = [Segment("apple", 0.9, (0, 0, 25, 70)), Segment("dog", 0.5, mask), Segment("dog", 0.4, (0, 0, 25, 70))]
    path = write_panoptic(tmp_path / "out", pictures, {"0.png": segments, "1.png": []}, {"0.png": ["a dog"]})
    annotations = CocoPanoptic(path, pictures=pictures)
    found = annotations.read("0")
    assert [drop.reason for drop in found.faults] == ["segment 3 ('dog') has no pixel in 0.png"]
    regions = {word.text: region for word, region in found.find("dogs and an apple").words}
    assert regions["apple"].covered.sum() == 25 * 70
    assert regions["dogs"].covered[25:, :35].all()
    assert regions["dogs"].covered.sum() == 25 * 35
    assert annotations.read("1").find("a dog").words == []


def test_what_cannot_be_written_is_refused(pictures, tmp_path):
    wrong = [Segment("dog", 1, np.ones((3, 4), dtype=bool))]
    with pytest.raises(DataError, match=r"Got a mask of \(3, 4\) on 0.png. Expected \(height, width\) \(50, 70\)"):
        write_panoptic(tmp_path / "a", pictures, {"0.png": wrong}, {})
    with pytest.raises(DataError, match="which is not empty"):
        write_panoptic(pictures, pictures, {}, {})
    with pytest.raises(DataError, match="Got the label or file name ''"):
        write_panoptic(tmp_path / "b", pictures, {"0.png": [Segment("", 1, (0, 0, 1, 1))]}, {})
    with pytest.raises(DataError, match="differ only in the ending"):
        write_panoptic(tmp_path / "c", pictures, {"0.png": [], "0.jpg": []}, {})

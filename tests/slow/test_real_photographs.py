"""Real photographs in each published layout, through every verb that a user's own pictures meet."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
import yaml

from lavender.data.store import MapStore
from lavender.maps import WordMaps
from slow.conftest import ANSWER, CAPTIONS, LAYOUTS, PROMPT, QUESTION
from slow.pages import SCHEMES, WIDTHS, assert_whole, browser  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ALL_CAPTIONS = {text for texts in CAPTIONS.values() for text in texts}


def records(store: MapStore) -> dict[tuple[str, str], WordMaps]:
    return {(maps.image_id, maps.text): maps for maps in store}


@pytest.fixture(scope="module")
def stores(photograph_run) -> dict[str, dict[tuple[str, str], WordMaps]]:
    return {layout: records(MapStore.open(photograph_run.maps[layout], verify=True)) for layout in LAYOUTS}


def test_every_caption_of_every_layout_has_maps(stores):
    for layout in ("imagefolder", "flickr30k"):
        assert {text for _, text in stores[layout]} == ALL_CAPTIONS
    assert {text for _, text in stores["jsonl"]} == ALL_CAPTIONS | {ANSWER}
    for store in stores.values():
        assert len({identity for identity, _ in store}) == len(CAPTIONS)
        assert all(len(maps.words) >= 2 for maps in store.values())


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_the_same_content_gives_the_same_maps_in_every_layout(layout, stores):
    """The layouts differ in file names, order and batches; a map is stored in 255 steps of its maximum."""
    for key, maps in stores["imagefolder"].items():
        other = stores[layout][key]
        assert other.words == maps.words
        torch.testing.assert_close(other.maps, maps.maps, atol=1.01 / 255, rtol=0)


def test_maps_of_different_content_differ(stores):
    """So that the test above compares something."""
    chosen = [maps.maps[0] for maps in stores["imagefolder"].values()]
    assert all((one - other).abs().max() > 0.05 for one, other in itertools.pairwise(chosen))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extract_says_what_it_did(layout, photograph_run):
    said = photograph_run.said[f"extract {layout}"]
    assert f"{len(ALL_CAPTIONS) + (layout == 'jsonl')} texts with " in said
    assert "; 0 were already there; 0 dropped" in said


@pytest.mark.parametrize("kind", ["full", "lora", "llava"])
def test_a_run_folder_is_complete(kind, photograph_run):
    run = photograph_run.runs[kind]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["prompt"] == PROMPT
    assert (config["lora"] is not None) == (kind == "lora")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in ("vlm_loss", "attention_loss"):
        values = [line[key] for line in lines if key in line]
        assert len(values) == 3
        assert all(math.isfinite(value) and value > 0 for value in values)
    coverage = json.loads((run / "coverage.json").read_text())
    assert coverage["samples"] == coverage["mapped_samples"] == 12  # three steps of four
    assert not coverage["unreadable"]
    assert json.loads((run / "environment.json").read_text())["transformers"]


def test_eval_sets_base_baseline_and_run_side_by_side(photograph_run):
    result = json.loads((photograph_run.runs["lora"] / "eval.json").read_text())
    assert list(result["arms"]) == ["base", "full", "lora"]
    for scores in result["arms"].values():
        assert 0 < scores["answer_nll"] < 50
        assert 0 <= scores["content_f1"] <= 1
        assert 0 < scores["entropy"] <= math.log(16 * 16)
        assert -1 <= scores["map_agreement"] <= 1
    nll = {arm: scores["answer_nll"] for arm, scores in result["arms"].items()}
    assert len(set(nll.values())) == 3  # three models, not one three times
    assert nll["full"] < nll["base"]  # it was trained on these texts
    for word in ("base", "full", "lora", "answer_nll", "note: these samples were trained on"):
        assert word in photograph_run.said["eval"]


def test_the_report_says_that_the_teacher_never_saw_photographs(photograph_run):
    page = (photograph_run.runs["lora"] / "report.html").read_text()
    assert "built-in teacher, which was trained on drawings over textures only" in page
    assert "On photographs they show that the pipeline works, not where things are." in page
    assert "these samples were trained on" in page
    for name in ("base", "full", "lora", "astronaut", "teacher"):
        assert name in page


def test_a_question_is_learnt_with_its_own_words(photograph_run, stores):
    from lavender.data.samples import read_samples

    asked = [one for one in read_samples(photograph_run.data["jsonl"]) if one.answers == (ANSWER,)]
    assert len(asked) == 1
    assert asked[0].messages[0]["content"][-1]["text"] == QUESTION
    (maps,) = [maps for (_, text), maps in stores["jsonl"].items() if text == ANSWER]
    assert [word.text for word in maps.words if word.part_of_speech == "noun"] == ["cat", "eyes"]


PLAIN_USE = """
import sys, json, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from peft import PeftModel
path, base, picture, prompt = sys.argv[1:]
if base:
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype="float32"), path)
else:
    model, report = AutoModelForImageTextToText.from_pretrained(path, dtype="float32", output_loading_info=True)
    assert not any(report.values()), report
processor = AutoProcessor.from_pretrained(path)
turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
text = processor.apply_chat_template([turn], add_generation_prompt=True)
inputs = processor(images=[[Image.open(picture)]], text=[text], add_special_tokens=False, return_tensors="pt")
with torch.inference_mode():
    ids = model.eval().generate(**inputs, max_new_tokens=20, do_sample=False)
assert not [name for name in sys.modules if name.split(".")[0] == "lavender"]
print(json.dumps(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)))
"""


# PEFT asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["full", "lora", "llava"])
def test_the_checkpoint_runs_without_lavender_and_says_the_same(kind, photograph_run, tmp_path):
    from PIL import Image

    from lavender.evaluation.answers import generate_answers
    from lavender.training.run import load_run

    checkpoint, picture = photograph_run.runs[kind] / "checkpoint", photograph_run.data["imagefolder"] / "coffee.png"
    base = yaml.safe_load((photograph_run.runs[kind] / "config.yaml").read_text())["model"] if kind == "lora" else ""
    command = [sys.executable, "-c", PLAIN_USE, str(checkpoint), base, str(picture), PROMPT]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    model, processor = load_run(photograph_run.runs[kind])
    with Image.open(picture) as image:
        ours = generate_answers(model, processor, [image], [PROMPT], max_new_tokens=20)
    assert json.loads(ran.stdout.splitlines()[-1]).strip() == ours[0].strip()
    assert ours[0].strip()


# PEFT asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_export_writes_one_ordinary_checkpoint(kind, photograph_run, lavender_process, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from lavender.cli import main
    from lavender.training.run import load_run

    run, out = photograph_run.runs[kind], tmp_path / "exported"
    assert str(out) in lavender_process("export", run, "--out", out)
    assert AutoProcessor.from_pretrained(out).tokenizer.is_fast
    expected = load_run(run)[0].state_dict()
    found = AutoModelForImageTextToText.from_pretrained(out, dtype="float32").state_dict()
    assert found.keys() == expected.keys()
    for name, one in expected.items():  # merged in the base's half precision
        torch.testing.assert_close(found[name], one, rtol=2**-10 if kind == "lora" else 0, atol=1e-4)
    assert not (run / "alignment_head.safetensors").exists(), "the default loss adds no weights"
    assert main(["export", str(run), "--out", str(out)]) == 2  # not empty any more
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "other")]) == 1  # no run


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_of_the_report_is_whole_and_asks_for_nothing(photograph_run, browser, width, scheme):  # noqa: F811
    assert_whole(browser, photograph_run.runs["lora"] / "report.html", width, scheme)

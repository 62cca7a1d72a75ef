"""`lavender train --dry-run` says what training would do, loads no weights and writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from command_line import Ran, complaint, lavender
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.config import AlignmentConfig
from lavender.evaluation.dry_run import UNCHECKED
from lavender.evaluation.memory import DIRECT, footprint_of_run
from lavender.training.run import LoraSettings, RunConfig, train
from lavender.training.yaml_files import yaml_text

STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "probe_size": 0,
}
CASES: dict[str, dict[str, Any]] = {
    "full, one part frozen": {"freeze": ["vision_tower"]},
    "lora": {"lora": {"r": 4}},
    "published loss with projections": {"training": {"attention_loss": "published", "pooling": "learn"}},
    "published loss, lora": {"lora": {"r": 4}, "training": {"attention_loss": "published"}},
    "plain": {"training": {"align_weight": 0.0}},
}


@pytest.fixture
def weightless(places, tmp_path) -> dict[str, str]:
    """The places, with a model folder that has everything but weights."""
    model = tmp_path / "weightless"
    shutil.copytree(places["model"], model, ignore=shutil.ignore_patterns("*.safetensors*"))
    return places | {"model": str(model)}


def dry(tmp_path: Path, settings: dict[str, Any], *options: str) -> Ran:
    return lavender("train", run_file(tmp_path, settings), "--dry-run", *options)


def run_file(tmp_path: Path, settings: dict[str, Any]) -> Path:
    training = settings.get("training", {})
    flat = {name: value for name, value in settings.items() if name != "training"} | STEP | training
    (tmp_path / "run.yaml").write_text(yaml_text(flat))
    return tmp_path / "run.yaml"


def lines_with(text: str, begin: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(begin)]


@pytest.mark.parametrize("case", CASES)
def test_it_says_what_training_then_says(case, places, weightless, tmp_path):
    """The lines about the loss, maps and trained parameters are those of the run itself; nothing was written."""
    settings = {"out": str(tmp_path / "out"), **CASES[case]}
    ran = dry(tmp_path, weightless | settings)
    assert ran.code == DONE, ran.err
    assert not (tmp_path / "out").exists()
    real = lavender("train", run_file(tmp_path, places | settings))
    assert real.code == DONE, real.err
    for begin in ("alignment: attention_loss", "plain fine-tuning", "maps for", "trained parameters", "left out"):
        said = lines_with(ran.out, begin)
        assert said == lines_with(real.out, begin)[: len(said)], begin
    assert lines_with(ran.out, "trained parameters")
    coverage = json.loads((tmp_path / "out" / "coverage.json").read_text())
    assert coverage["samples"] == 2  # of a step; the dry run read all six
    assert "of 6 samples that were read, 5 have words with maps" in ran.out


def test_the_first_samples_have_their_words_and_places(weightless, some_scenes, captions, tmp_path):
    ran = dry(tmp_path, weightless | {"out": str(tmp_path / "out")})
    assert ran.code == DONE, ran.err
    shown = ran.out[ran.out.index("first samples:") : ran.out.index("trained parameters")].splitlines()
    assert [line.split(":")[0] for line in shown if line.startswith("  ") and line[2] != " "] == ["  0", "  1", "  2"]
    for scene, caption in zip(some_scenes[:3], captions, strict=False):
        assert f"    assistant: {caption}" in shown
        height, width = scene.image.height, scene.image.width
        assert any(f"of {height} × {width} pixels" in line for line in shown)
    from lavender.data.images import image_id
    from lavender.data.store import MapStore

    record = MapStore.open(weightless["maps"]).get(image_id(some_scenes[0].image), captions[0])
    assert record is not None
    for word, heat in zip(record.words, record.maps, strict=True):
        row, col = divmod(int(heat.argmax()), 13)
        place = f"row {row + 1} of 11, column {col + 1} of 13"
        assert f"    {word.text}: its map is highest in {place}" in shown


def test_settings_are_resolved_and_memory_adds_up(weightless, tmp_path):
    ran = dry(tmp_path, weightless | {"out": str(tmp_path / "out"), "lora": True}, "--set", "learning_rate=3e-4")
    assert ran.code == DONE, ran.err
    assert "  learning_rate: 0.0003\n" in ran.out
    assert "  align_weight: 0.5\n" in ran.out  # a default that depends on the loss
    assert "'r': 8, 'alpha': 32" in ran.out
    (total,) = lines_with(ran.out, "memory per device")
    after = ran.out[ran.out.index(total) :].splitlines()
    parts = [float(line.split()[-2]) for line in after if line.endswith(" GB") and line != total]
    assert len(parts) == 5
    assert after[-1] == UNCHECKED
    assert float(total.split()[-2]) == pytest.approx(sum(parts), abs=0.005 * 6)


def test_frozen_weights_of_lora_count_in_their_type():
    weights = {}
    setups = {"lora": {"weights": 2010, DIRECT: 0}, "full": {"weights": 4000}}
    for dtype in ("float32", "bfloat16"):
        run = RunConfig(model="m", data="d", maps="s", out="o", lora=LoraSettings(), dtype=dtype)
        weights[dtype] = footprint_of_run(run, AlignmentConfig(align_weight=0.0), setups, 5, 1)["weights"]
    assert weights == {"float32": 4010, "bfloat16": 2010}


def test_what_would_end_the_run_ends_the_dry_run(weightless, tmp_path):
    settings = weightless | {"out": str(tmp_path / "out")}
    few = dry(tmp_path, settings | {"training": {"min_coverage": 0.9}})
    assert "maps for 5 of 6 samples" in complaint(few, FAILED)
    assert "target_modules" in complaint(dry(tmp_path, settings | {"lora": {"target_modules": ["x"]}}), WRONG_USAGE)
    assert "which has no manifest.json" in complaint(dry(tmp_path, settings | {"maps": str(tmp_path)}), FAILED)
    compiled = dry(tmp_path, settings | {"training": {"torch_compile": True}})
    assert "torch_compile with alignment" in complaint(compiled, WRONG_USAGE)
    chosen = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "attention_loss"}
    evaluated = settings | {"eval_data": settings["data"], "eval_maps": settings["maps"]}
    few = dry(tmp_path, evaluated | {"training": chosen | {"min_coverage": 0.9}})
    assert "maps for 5 of 6 samples" in complaint(few, FAILED)
    assert not (tmp_path / "out").exists()


def test_a_chat_template_of_a_file_is_the_one_that_counts(weightless, tmp_path):
    """Marks of answers too: with them the loss covers the answers alone, as in training."""
    processor = AutoProcessor.from_pretrained(weightless["model"])
    marked = processor.chat_template
    bare = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    bare = bare.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    assert bare != marked
    processor.chat_template = bare
    processor.save_pretrained(weightless["model"])
    (tmp_path / "marked.jinja").write_text(marked)
    settings = weightless | {"out": str(tmp_path / "out")}
    whole = dry(tmp_path, settings)
    assert "the loss covers whole conversations" in whole.out
    ran = dry(tmp_path, settings | {"training": {"chat_template_path": str(tmp_path / "marked.jinja")}})
    assert ran.code == DONE, ran.err
    assert "the loss covers whole conversations" not in ran.out
    lost = dry(tmp_path, settings | {"training": {"chat_template_path": "gone.jinja"}})
    assert "chat_template_path: gone.jinja" in complaint(lost, WRONG_USAGE)
    asked = dry(tmp_path, settings | {"training": {"assistant_only_loss": True}})
    assert asked.code == WRONG_USAGE


def test_a_folder_with_a_run_is_compared(places, tmp_path):
    settings = places | {"out": str(tmp_path / "out")}
    train(RunConfig(**settings, training=STEP))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "training would do nothing, because it is finished" in dry(tmp_path, settings).out
    longer = dry(tmp_path, settings | {"training": {"max_steps": 2}})
    assert "training would go on with it" in longer.out
    assert "its model, data and maps still have the same content is not checked" in longer.out
    other = dry(tmp_path, settings | {"training": {"align_weight": 0.25}})
    assert "align_weight: 0.5 → 0.25" in complaint(other, WRONG_USAGE)
    assert dry(tmp_path, settings | {"training": {"align_weight": 0.25}}, "--restart").code == DONE
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before

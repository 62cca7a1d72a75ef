"""The README's code is run: the stock TRL script, the same with two lines changed, and the maps of one image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from lavender.data.images import image_id
from lavender.data.samples import read_samples, to_dataset
from lavender.data.store import MapStore
from lavender.maps import WordMaps
from lavender.students.registry import FAMILIES
from lavender.world import TEACHER_PATH
from lavender.world.language import caption_scene
from lavender.world.scenes import scenes
from lavender.world.student_models import build_mllama, build_mllama_processor

DOCS = Path(__file__).parents[1] / "docs"
README = (DOCS.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
STOCK, *CHANGED, MAPS = BLOCKS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with `model`, `train.parquet` and `maps`, which the scripts expect."""
    drawn = list(scenes("development", 8))
    captions = [caption_scene(scene).text for scene in drawn]
    processor = build_mllama_processor(captions * 5)
    torch.manual_seed(0)
    build_mllama(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    lines = []
    for scene, caption in zip(drawn, captions, strict=True):
        scene.image.save(tmp_path / "data" / f"{scene.seed}.png")
        lines.append(f'{{"file_name": "{scene.seed}.png", "text": "{caption}"}}\n')
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(lines))
    samples = read_samples(tmp_path / "data")
    to_dataset(samples).to_parquet(tmp_path / "train.parquet")
    with MapStore.writer(tmp_path / "maps", {"teacher": "random"}, {}, (5, 7)) as writer:
        for sample in samples:
            words = _words(sample.answers[0])
            maps = torch.rand(len(words), 5, 7)
            writer.add(WordMaps(image_id(sample.load()[0]), sample.answers[0], words, maps))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_page_is_in_the_table_of_the_documentation():
    section = README.partition("\n## Documentation\n")[2]
    linked = re.findall(r"\]\(docs/([\w-]+\.md)", section)
    assert set(linked) == {path.name for path in DOCS.glob("*.md")}


def _words(text: str):
    from lavender.words import content_words

    return content_words(text, ("noun",))


def _run(script: str, **namespace: Any) -> dict:
    """Run it as it stands, but on the CPU: TRL's default precision wants a GPU unless it is told."""
    script = script.replace("max_length=None", "max_length=None, use_cpu=True, report_to='none', logging_steps=1")
    exec(compile(script, "README.md", "exec"), namespace)
    return namespace


def test_maps_of_one_image(folder):
    """With the built-in teacher as `teacher`."""
    (folder / "teacher").symlink_to(TEACHER_PATH)
    Image.open(next((folder / "data").glob("*.png"))).convert("RGB").save(folder / "cat.jpg")
    assert [word.text for word in _run(MAPS)["word_maps"].words] == ["cat", "red", "sofa"]
    assert (folder / "cat-maps.png").is_file()


def test_the_run_file_is_that_of_the_first_page():
    readme, start = (
        yaml.safe_load(re.findall(r"^```yaml run\.yaml\n(.*?)^```", page, re.M | re.S)[0])
        for page in (README, (DOCS / "index.md").read_text())
    )
    assert readme == start


def test_the_number_of_families_is_that_of_the_registry():
    assert f"| students | {len(FAMILIES)} families" in README


def test_the_stock_script_runs(folder):
    assert "lavender" not in STOCK
    assert _run(STOCK)["trainer"].state.global_step > 0


@pytest.fixture(params=["datasets", "structs", "bytes"])
def parquet(request, folder):
    """train.parquet as `datasets` writes it, or plainly, without its features: the images as structs or as bytes."""
    if request.param != "datasets":
        columns: dict[str, list] = {"messages": []}
        for sample in read_samples(folder / "data"):
            columns["messages"].append(
                [{"role": message["role"], "content": message["content"][-1]["text"]} for message in sample.messages]
            )
            encoded = Path(sample.sources[0]).read_bytes()  # ty: ignore[invalid-argument-type]
            if request.param == "bytes":
                columns.setdefault("image", []).append(encoded)
            else:
                columns.setdefault("images", []).append([{"bytes": encoded, "path": None}])
        table = pa.table(columns)
        assert not table.schema.metadata
        pq.write_table(table, folder / "train.parquet")
    return folder


def test_two_changed_lines_make_it_a_lavender_script(parquet):
    imports, arguments = CHANGED
    script = STOCK.replace("from trl import SFTConfig, SFTTrainer\n", imports)
    script = script.replace('args = SFTConfig(output_dir="tuned", max_length=None)\n', arguments)
    different = [pair for pair in zip(STOCK.splitlines(), script.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(different) == 2
    trainer = _run(script)["trainer"]
    assert trainer.coverage.mapped_samples == trainer.coverage.samples > 0
    assert len(read_samples("train.parquet")) == len(trainer.train_dataset)  # what `lavender extract` reads
    assert any(line.get("attention_loss", 0) > 0 for line in trainer.state.log_history)

"""The commands of docs/stores.md, run as they stand in a folder with what they name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
from datasets import load_dataset
from PIL import Image

from command_line import lavender
from lavender.cli.main import DONE
from lavender.data.store import MapStore
from test_documented_commands import commands, shells

PAGE = (Path(__file__).parents[1] / "docs" / "stores.md").read_text()


def test_the_commands_of_the_page_run(store_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("maps", "maps-1", "maps-2"):
        shutil.copytree(store_path, name)
    (shown,) = re.findall(r"^(jpeg-maps/\S+)$", PAGE, re.M)
    Path(shown).parent.mkdir(parents=True)
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(shown)
    Path("flickr30k").mkdir()
    Image.new("RGB", (20, 10)).save("flickr30k/36979.jpg")
    row = {"file_name": "36979.jpg", "text": "A group of friends plays cards."}
    Path("flickr30k/metadata.jsonl").write_text(json.dumps(row))
    ran = [one for block in shells(PAGE) for one in commands(block)]
    assert [one[1] for one in ran] == ["verify", "stats", "stats", "merge", "export", "import", "push", "import"]
    for command in ran:
        result = lavender(*command)
        assert result.code == DONE, (shlex.join(command), result.err)
    whole = MapStore.open("maps")
    assert len(MapStore.open("maps-all")) == len(MapStore.open("maps-again")) == len(whole) == 5
    assert MapStore.open("maps-again").num_words == whole.num_words
    (record,) = MapStore.open("maps-authors")
    assert [word.text for word in record.words] == ["group"]
    assert sorted(path.name for path in Path("to-upload").iterdir()) == ["README.md", "data", "lavender_maps.json"]
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert "load_dataset" in code
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    exec(code, {"load_dataset": load_dataset})
    text, _, shape = capsys.readouterr().out.strip().partition("[")
    assert text.strip() == next(iter(whole)).text
    assert shape.endswith(f"({len(next(iter(whole)).words)}, 11, 13)")

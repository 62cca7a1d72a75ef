"""The example of docs/teachers.md that takes masks which people drew, as it stands, and the command after it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

from command_line import lavender
from lavender.cli.main import DONE
from lavender.data.store import MapStore
from test_documented_commands import commands

PAGE = (Path(__file__).parents[1] / "docs" / "teachers.md").read_text()


def test_masks_that_people_drew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_photos").mkdir()
    Image.new("RGB", (64, 48), "grey").save("my_photos/engine.jpg")
    mask = np.zeros((48, 64), np.uint8)
    mask[:24, 32:] = 255
    Image.fromarray(mask).save("gasket.png")
    section = PAGE[PAGE.index("**From masks that you drew.**") :]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    exec(compile(code, "teachers.md", "exec"), {})
    (command,) = commands(re.findall(r"`(lavender extract [^`]+)`", section)[0])
    ran = lavender(*command)
    assert ran.code == DONE, ran.err
    (record,) = MapStore.open("maps")
    assert [word.text for word in record.words] == ["gasket"]
    rows, cols = record.maps.shape[1:]
    expected = np.zeros((rows, cols), bool)
    expected[: rows // 2, cols // 2 :] = True
    assert ((record.maps[0].numpy() > 0.5) == expected).all()

"""What several tests of runs begin with."""

from __future__ import annotations

import pytest

from command_line import write_scenes


@pytest.fixture(scope="module")
def places(make_student, processor, some_scenes, captions, store_path, tmp_path_factory) -> dict[str, str]:
    """A model and data on disk."""
    folder = tmp_path_factory.mktemp("run")
    for part in (make_student(), processor):
        part.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    write_scenes(folder / "data", some_scenes, captions)
    return {"model": str(folder / "model"), "data": str(folder / "data"), "maps": str(store_path)}

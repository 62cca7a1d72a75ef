"""Run files, trained: several map stores, home in paths, settings of the image processor, and code without consent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import complaint, lavender
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.data.store import MapStore
from lavender.errors import ConfigError
from lavender.evaluation.inspect import inspect_target
from lavender.evaluation.runs import evaluate_runs
from lavender.training.run import RunConfig, load_run, plan_of, read_run, train
from lavender.training.run_folder import resolved_settings
from lavender.training.yaml_files import read_settings, yaml_text

STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "probe_size": 0,
}


@pytest.fixture
def halves(places, tmp_path) -> list[str]:
    """The maps of `places` in two stores, each with half of the records."""
    whole = list(MapStore.open(places["maps"]))
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    for folder, records in zip(folders, (whole[::2], whole[1::2]), strict=True):
        with MapStore.writer(folder, {"teacher": "test"}, {}, whole[0].grid) as writer:
            for one in records:
                writer.add(one)
    return folders


def test_several_map_stores(places, halves, tmp_path):
    one = train(RunConfig(**places, out=str(tmp_path / "one"), training=STEP))
    several = train(RunConfig(**places | {"maps": halves}, out=str(tmp_path / "several"), training=STEP))
    covered = [json.loads((out / "coverage.json").read_text())["words"] for out in (one, several)]
    assert covered[0] == covered[1] > 0
    assert read_settings(several / "config.yaml")["maps"] == halves
    assert evaluate_runs(several, [], limit=2)["maps"] == halves
    assert train(read_run(several / "config.yaml")) == several  # finished: the same run


def test_settings_that_a_run_does_not_read_are_refused(places, tmp_path, monkeypatch):
    given = {**places, **STEP, "out": str(tmp_path / "x")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml_text(given | {"model_init_kwargs": {"revision": "v9"}}))
    assert "model_init_kwargs" in complaint(lavender("train", file), WRONG_USAGE)
    file.write_text(yaml_text(given))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as the launcher sets it
    line = complaint(lavender("train", file), WRONG_USAGE)
    assert "mixed_precision: bf16, and a run with neither bf16 nor fp16" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("launcher", ["no", "fp16", "bf16"])
def test_a_run_in_16_bits_does_not_depend_on_the_launcher(launcher, places, tmp_path, monkeypatch):
    """Without a file of its own, accelerate launches with "no"."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    args = plan_of(RunConfig(**places, out=str(tmp_path / "x"), training=STEP | {"bf16": True})).args
    assert args.mixed_precision == "bf16"


def test_the_repository_of_a_run_is_not_that_of_its_copy(places, tmp_path):
    """Unless the user named it, it has the name of the folder, also where the run file is another run's."""
    run = RunConfig(**places, out=str(tmp_path / "one"), training=STEP | {"push_to_hub": True})
    plan = plan_of(run)
    assert plan.args.hub_model_id == "one"
    settings = resolved_settings(plan.run, plan.args, {})
    (tmp_path / "config.yaml").write_text(yaml_text(settings))
    assert plan_of(read_run(tmp_path / "config.yaml", [f"out={tmp_path / 'two'}"])).args.hub_model_id == "two"
    given = [f"out={tmp_path / 'two'}", "hub_model_id=me/mine"]
    plan = plan_of(read_run(tmp_path / "config.yaml", given))
    assert resolved_settings(plan.run, plan.args, {})["training"]["hub_model_id"] == "me/mine"


def test_an_export_goes_to_the_folder_that_a_link_names(places, tmp_path, monkeypatch):
    run = train(RunConfig(**places, out=str(tmp_path / "run"), training=STEP))
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert lavender("export", run, "--out", tmp_path / "link").code == DONE
    assert (tmp_path / "disk" / "config.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "which cannot be replaced" in complaint(lavender("export", run, "--out", "."), WRONG_USAGE)
    adapter = lavender("export", run, "--out", tmp_path / "adapter", "--adapter")
    assert "whose weights were tuned themselves" in complaint(adapter, WRONG_USAGE)


def test_json_has_no_nan(places, tmp_path):
    """Of an evaluation of which no word has a map."""
    evaluated = {"eval_data": places["data"], "eval_strategy": "steps", "eval_steps": 1}
    with MapStore.writer(tmp_path / "none", {"teacher": "test"}, {}, MapStore.open(places["maps"]).grid):
        pass
    file = tmp_path / "run.yaml"
    settings = {**places, **STEP, **evaluated, "eval_maps": str(tmp_path / "none"), "out": str(tmp_path / "x")}
    file.write_text(yaml_text(settings))
    ran = lavender("train", file, "--json")
    assert ran.code == DONE, ran.err

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads(ran.out, parse_constant=refuse)


def test_home_in_paths(places, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml_text({**places, **STEP, "out": "~/runs/x"}))
    assert lavender("train", "~/run.yaml").code == DONE
    assert (tmp_path / "runs" / "x" / "checkpoint").is_dir()
    assert lavender("export", "~/runs/x", "--out=~/exported").code == DONE
    assert load_run("~/exported")[0] is not None
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"size": "large"},
        {"image_mean": ["a", "b", "c"]},
        {"do_resize": "no"},
        {"size": {"height": -3, "width": 8}},
        {"image_processor_type": 5},
    ],
    ids=str,
)
def test_settings_of_the_image_processor_are_tried(places, tmp_path, settings):
    run = RunConfig(**places, out=str(tmp_path / "out"), image_processor=settings, training=STEP)
    with pytest.raises(ConfigError, match=r"Got (settings .* the image processor refuses|image_processor\.)"):
        train(run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["false", "no", "true", 1, None, [0]])
def test_code_needs_a_plain_true_in_python_too(places, value):
    for call in (load_run, inspect_target):
        with pytest.raises(ConfigError, match="Got trust_remote_code="):
            call(places["model"], trust_remote_code=value)


def test_exit_codes(places, tmp_path):
    """2 for a wrong setting, 1 for a file that is not there."""
    assert "Got no file at" in complaint(lavender("train", tmp_path / "no.yaml"), FAILED)
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        path = tmp_path / "run.yaml"
        path.write_text(yaml_text({**places, **STEP, "out": str(tmp_path / Path(out))}))
        assert "which is a file" in complaint(lavender("train", path), WRONG_USAGE)

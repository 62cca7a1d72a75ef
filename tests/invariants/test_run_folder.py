"""A run's folder: what it says of the run is complete, and nothing goes on in it that is another run."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from command_line import complaint, lavender, write_run
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.config import DEFAULTS, AlignmentConfig
from lavender.students.loading import load_run
from lavender.training.run import RunConfig, read_run, train
from lavender.training.run_config import training_keys
from lavender.training.run_folder import FREE, FREE_WITHOUT_BEST, differences, write_config
from lavender.training.trainer import LavenderConfig, LavenderTrainer

STEPS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "seed": 3,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "disable_tqdm": True,
    "probe_size": 0,
}


@pytest.fixture(scope="module")
def finished(places, tmp_path_factory) -> tuple[Path, Path]:
    """(run file, its folder) of a run that was trained to its end; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_run(folder, **places, prompt="describe the picture.", **STEPS)
    ran = lavender("train", file)
    assert ran.code == DONE, ran.err
    assert "maps for 5 of 6 samples with a picture; 1 without maps" in ran.out
    assert f"alignment: attention_loss mass, align_weight {DEFAULTS['mass'][0]}, sharpen 2.0\n" in ran.out
    assert "samples of the training" in ran.out
    return file, folder / "out"


@pytest.fixture
def run(finished, tmp_path) -> tuple[Path, Path]:
    """(run file, its folder): a copy of the finished one."""
    settings = yaml.safe_load(finished[0].read_text()) | {"out": str(tmp_path / "out")}
    shutil.copytree(finished[1], tmp_path / "out")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml", tmp_path / "out"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(out: Path) -> dict[str, torch.Tensor]:
    files = [*out.glob("alignment_head.safetensors"), *(out / "checkpoint").glob("*.safetensors")]
    return {f"{file.name}: {name}": one for file in files for name, one in load_file(file).items()}


def assert_same_weights(found: Path, expected: Path) -> None:
    """To the bit: the same numbers, computed in the same process by one thread."""
    own, theirs = weights(found), weights(expected)
    assert own.keys() == theirs.keys()
    assert [name for name, one in theirs.items() if not torch.equal(own[name], one)] == []


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def unfinish(out: Path) -> None:
    """As a kill before the export leaves it."""
    shutil.rmtree(out / "checkpoint")
    for name in ("coverage.json", "alignment_head.safetensors"):
        (out / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("learning_rate=0.02", "learning_rate: 0.01 → 0.02"),
        ("seed=4", "seed: 3 → 4"),
        ("max_steps=3", "max_steps: 4 → 3"),
        ("max_steps=-1", "max_steps: 4 → -1"),
        ("align_weight=0", f"align_weight: {DEFAULTS['mass'][0]} → 0"),
        ("attention_loss=kl", 'attention_loss: "mass" → "kl"'),
        ("pooling=mean-mean", 'pooling: "layer-mean" → "mean-mean"'),
        ("lora={r: 2}", "lora.r: not recorded → 2"),
        ("dtype=bfloat16", 'dtype: "float32" → "bfloat16"'),
        ("prompt=What is this?", 'prompt: "describe the picture." → "What is this?"'),
        ("freeze=[connector]", 'freeze: null → ["connector"]'),
    ],
)
def test_other_settings_are_refused_by_name(run, setting, said):
    file, out = run
    before = content(out)
    for state in ("finished", "unfinished"):
        line = complaint(lavender("train", file, "--set", setting), WRONG_USAGE)
        assert said in line
        assert "--restart" in line
        assert content(out) == before
        if state == "finished":
            unfinish(out)
            before = content(out)


def test_a_run_may_be_made_longer_and_says_so(run):
    """It goes on from its last checkpoint; its record keeps that its schedules once followed the shorter length."""
    file, out = run
    ran = lavender("train", file, "--set", "max_steps=6")
    assert ran.code == DONE, ran.err
    assert "made longer, max_steps: 4 → 6" in ran.out
    assert f"going on from {out / 'trainer' / 'checkpoint-4'}" in ran.out
    found = yaml.safe_load((out / "config.yaml").read_text())
    assert found["training"]["max_steps"] == 6
    assert found["record"]["made_longer"] == [{"max_steps": [4, 6]}]
    steps = [one["step"] for one in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in one]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert "finished" in lavender("train", file, "--set", "max_steps=6").out


def test_a_longer_run_without_a_checkpoint_says_that_it_begins_anew(run):
    """As after `save_strategy: "no"`: it is no run that was made longer."""
    file, out = run
    scores = [out / name for name in ("eval.json", "eval.jsonl", "eval-tasks.json", "report.html")]
    for path in scores:
        path.write_text("{}")
    shutil.rmtree(out / "trainer")
    ran = lavender("train", file, "--set", "max_steps=5")
    assert ran.code == DONE, ran.err
    assert "there is no whole checkpoint: the run begins at its first step" in ran.out
    assert "made_longer" not in yaml.safe_load((out / "config.yaml").read_text())["record"]
    assert not any(path.exists() for path in scores)  # of the shorter run


def test_a_run_that_is_being_made_longer_is_not_finished(run, tmp_path):
    """Its checkpoint is the shorter run's."""
    unfinish(run[1])
    (run[1] / "checkpoint").mkdir(exist_ok=True)
    for words in (("export", run[1], "--out", tmp_path / "exported"), ("inspect", run[1])):
        line = complaint(lavender(*words), FAILED)
        assert "it is not finished" in line
        assert f"let it go on: lavender train {run[1] / 'config.yaml'}" in line


def test_a_model_that_training_would_replace_is_named_and_loads_by_its_own_path(run, tmp_path):
    """A copy without the trainer's checkpoints: `lavender train` would begin at the first step."""
    file, out = run
    shutil.rmtree(out / "trainer")
    (out / "coverage.json").write_text("{")
    line = complaint(lavender("train", file), FAILED)
    assert f"put back a copy of coverage.json; the model is in {out / 'checkpoint'}" in line
    line = complaint(lavender("export", out, "--out", tmp_path / "exported"), FAILED)
    assert f"after coverage.json name the model folder itself, {out / 'checkpoint'}" in line
    (out / "coverage.json").unlink()
    for words in (("export", out, "--out", tmp_path / "exported"), ("inspect", out)):
        line = complaint(lavender(*words), FAILED)
        assert f"name the model folder itself, {out / 'checkpoint'}; lavender train would begin the run anew" in line
    ran = lavender("inspect", out / "checkpoint")  # the advice holds
    assert ran.code == DONE, ran.err
    load_run(out / "checkpoint")
    AutoModelForImageTextToText.from_pretrained(out / "checkpoint")


def test_several_differences_are_all_named(run):
    line = complaint(lavender("train", run[0], "--set", "seed=4", "--set", "match=exact"), WRONG_USAGE)
    assert 'match: "label" → "exact"' in line
    assert "seed: 3 → 4" in line


@pytest.mark.parametrize("settings", [[], ["probe_size=2", "logging_steps=3", "save_steps=1", "report_to=none"]])
def test_a_finished_run_stays_as_it_is(run, settings):
    """Also under settings that do not change what it is. With a constant learning rate it once trained a step more."""
    before = content(run[1])
    ran = lavender("train", run[0], *(part for one in settings for part in ("--set", one)))
    assert ran.code == DONE, ran.err
    assert f"finished: {run[1]} holds this run" in ran.out
    assert content(run[1]) == before
    assert lavender("train", run[1] / "config.yaml", "--set", f"out={run[1]}").code == DONE
    assert content(run[1]) == before


def test_a_finished_run_whose_coverage_is_damaged_says_what_to_delete(run, finished):
    """The advice holds: without the file the run is made complete again, and its weights are the same."""
    file, out = run
    coverage = (out / "coverage.json").read_text()
    (out / "coverage.json").write_text(coverage[:35])
    line = complaint(lavender("train", file), FAILED)
    assert f"{out / 'coverage.json'}, which is damaged" in line
    assert "delete coverage.json, and give the command again" in line
    (out / "coverage.json").unlink()
    ran = lavender("train", file)
    assert ran.code == DONE, ran.err
    assert json.loads((out / "coverage.json").read_text()) == json.loads(coverage)
    assert_same_weights(out, finished[1])


def test_a_run_stopped_before_its_export_trains_no_further_step(run, finished):
    unfinish(run[1])
    ran = lavender("train", run[0])
    assert ran.code == DONE, ran.err
    assert f"going on from {run[1] / 'trainer' / 'checkpoint-4'}" in ran.out
    assert_same_weights(run[1], finished[1])
    assert (run[1] / "coverage.json").read_bytes() == (finished[1] / "coverage.json").read_bytes()
    assert [one["step"] for one in metrics(run[1]) if "loss" in one] == [1, 2, 3, 4]


@pytest.mark.parametrize("what", ["model", "data", "maps"])
def test_content_that_changed_since_is_refused_and_a_copy_is_not(run, what, tmp_path):
    """The settings name the same path, or another one with the same content."""
    file, out = run
    settings = yaml.safe_load(file.read_text())
    own = tmp_path / what
    shutil.copytree(settings[what], own)
    said = lavender("train", file, "--set", f"{what}={own}")
    assert "finished: " in said.out, said.err
    if what == "model":
        tensors = load_file(own / "model.safetensors")
        tensors[next(iter(tensors))] += 1
        save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    elif what == "data":
        page = own / "metadata.jsonl"
        page.write_text(page.read_text().replace('."', '!"'))
        assert page.read_bytes() != (Path(settings["data"]) / "metadata.jsonl").read_bytes()
    else:
        last = sorted(own.glob("shard-*"))[-1]
        last.with_name("shard-00099" + last.suffix).write_bytes(last.read_bytes())
        if not last.name.endswith(".safetensors"):
            maps = last.with_suffix(".safetensors")
            maps.with_name("shard-00099.safetensors").write_bytes(maps.read_bytes())
    before = content(out)
    assert f"{what}: {settings[what]} → {own}" in complaint(
        lavender("train", file, "--set", f"{what}={own}"), WRONG_USAGE
    )
    assert content(out) == before


def test_restart_begins_anew_and_leaves_what_is_not_the_run_s(run):
    file, out = run
    (out / "notes.txt").write_text("mine")
    (out / "eval.json").write_text("{}")
    ran = lavender("train", file, "--restart", "--set", "max_steps=1", "--set", "align_weight=0")
    assert ran.code == DONE, ran.err
    assert "plain fine-tuning: align_weight 0\n" in ran.out
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "eval.json").exists()
    assert [path.name for path in (out / "trainer").glob("checkpoint-*")] == ["checkpoint-1"]
    assert [one["step"] for one in metrics(out) if "loss" in one] == [1]
    assert yaml.safe_load((out / "config.yaml").read_text())["training"]["align_weight"] == 0
    # settings that cannot be leave the run where it is
    before = content(out)
    assert lavender("train", file, "--restart", "--set", "pooling=none").code == WRONG_USAGE
    assert content(out) == before


def test_folders_that_hold_something_else(run, tmp_path):
    file, out = run
    foreign, lost, old, other = (tmp_path / name for name in ("foreign", "lost", "old", "other"))
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("all of it")
    shutil.copytree(out, lost)
    (lost / "config.yaml").unlink()
    shutil.copytree(out, old)
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["record"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    other.mkdir()
    (other / "config.yaml").write_text("name: another program's\n")
    (other / "data.csv").write_text("1")
    (tmp_path / "a file").write_text("x")
    own = tmp_path / "own"  # the user's run file, in the folder that it names
    own.mkdir()
    shutil.copy(file, own / "config.yaml")
    for place, said in (
        (foreign, "which holds 'thesis.tex' and no config.yaml"),
        (tmp_path / "a file", "which is a file"),
        (lost, "which holds what a run wrote, but no config.yaml"),
        (old, "a run of an earlier version, which did not record all of its settings"),
        (other, "which does not say 'model'"),
        (own, "which holds a config.yaml that no run wrote"),
    ):
        before, code = content(tmp_path), FAILED if place == other else WRONG_USAGE
        assert said in complaint(lavender("train", file, "--set", f"out={place}"), code)
        assert content(tmp_path) == before
    for place, code in ((foreign, WRONG_USAGE), (other, FAILED), (own, WRONG_USAGE)):
        assert lavender("train", file, "--restart", "--set", f"out={place}").code == code
        assert content(tmp_path) == before


def test_config_yaml_says_all_and_repeats_the_run(finished, tmp_path):
    config = yaml.safe_load((finished[1] / "config.yaml").read_text())
    assert {one.name for one in fields(AlignmentConfig)} <= config["training"].keys()
    missing = training_keys() - config["training"].keys()
    assert missing == {"gradient_checkpointing", "gradient_checkpointing_kwargs", "hub_token", "local_rank"}
    chosen = {name: config["training"][name] for name in ("attention_loss", "align_weight", "sharpen")}
    weight, sharpen = DEFAULTS["mass"]
    assert chosen == {"attention_loss": "mass", "align_weight": weight, "sharpen": sharpen}
    assert config["dtype"] == "float32"
    assert config["record"]["content"].keys() == {"model", "data", "maps"}
    assert {"python", "platform", "torch", "lavender-vlm"} <= config["record"]["versions"].keys()
    ran = lavender("train", finished[1] / "config.yaml", "--set", f"out={tmp_path / 'again'}")
    assert ran.code == DONE, ran.err
    assert_same_weights(tmp_path / "again", finished[1])
    assert differences(config, yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())) == []


def test_texts_that_look_like_numbers_stay_texts(tmp_path, places):
    training = {"seed": 3, "adam_epsilon": 1e-8}
    write_config(tmp_path, {**places, "out": "1e5", "prompt": "1e-3", "freeze": [], "training": training})
    found = read_run(tmp_path / "config.yaml")
    assert (found.out, found.prompt, found.training) == ("1e5", "1e-3", training)


def test_which_settings_are_free():
    """Each is one, and is no setting of the loss; when to save is free unless the best checkpoint is chosen."""
    assert training_keys() | {"out", "trust_remote_code"} >= FREE | FREE_WITHOUT_BEST
    assert not FREE & {one.name for one in fields(AlignmentConfig)}
    best = {"training": {"load_best_model_at_end": True, "save_steps": 1}}
    assert differences(best, {"training": {"load_best_model_at_end": True, "save_steps": 2}}) == ["save_steps: 1 → 2"]
    assert differences({"training": {"save_steps": 1}}, {"training": {"save_steps": 2}}) == []


def test_plain_runs_of_another_default_loss_are_the_same():
    """A plain run that began while another loss was the default continues."""
    old = {"training": {"align_weight": 0.0, "attention_loss": "published", "sharpen": 1.0}}
    new = {"training": {"align_weight": 0.0, "attention_loss": "mass", "sharpen": 2.0}}
    assert differences(old, new) == []
    aligned = {"training": new["training"] | {"align_weight": 0.5}}
    assert differences(old, aligned) == [
        "align_weight: 0.0 → 0.5",
        'attention_loss: "published" → "mass"',
        "sharpen: 1.0 → 2.0",
    ]


def test_a_run_of_before_a_setting_was_known_goes_on(run):
    """Its record lacks settings that are off by default. They count as off; another value is another run."""
    file, out = run
    config = yaml.safe_load((out / "config.yaml").read_text())
    for name in ("augment_flip", "augment_crop", "augment_resize", "subtract_background", "neftune_noise_alpha"):
        del config["training"][name]
    for name in ("columns", "replay_share", "quantization", "freeze", "image_processor"):
        del config[name]
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    ran = lavender("train", file)
    assert ran.code == DONE, ran.err
    assert f"finished: {out} holds this run" in ran.out
    for setting, said in (
        ("augment_flip=0.5", "augment_flip: not recorded → 0.5"),
        ("augment_crop=0.5", "augment_crop: not recorded → 0.5"),
        ("subtract_background=true", "subtract_background: not recorded → true"),
    ):
        assert f"({said})" in complaint(lavender("train", file, "--set", setting), WRONG_USAGE)
    del config["training"]["attention_loss"]  # whose default is not off, and was another once
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    assert 'attention_loss: not recorded → "mass"' in complaint(lavender("train", file), WRONG_USAGE)


def interrupt_at_the_fourth_step(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LavenderTrainer.training_step

    def until_the_fourth(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LavenderTrainer, "training_step", until_the_fourth)
        train(run)


def test_an_interrupted_run_has_its_lines_and_goes_on_without_one_twice(finished, places, tmp_path, monkeypatch):
    run = read_run(finished[0], [f"out={tmp_path / 'out'}", "probe_size=1", "probe_steps=1"])
    interrupt_at_the_fourth_step(run, monkeypatch)
    out = tmp_path / "out"
    assert [one["step"] for one in metrics(out) if "loss" in one] == [1, 2, 3]
    train(run)
    assert [one["step"] for one in metrics(out) if "loss" in one] == [1, 2, 3, 4]
    assert [one["step"] for one in metrics(out) if "probe_peak_hits" in one] == [0, 1, 2, 3, 4]
    state = json.loads((out / "trainer" / "checkpoint-4" / "trainer_state.json").read_text())
    assert metrics(out)[:-1] == state["log_history"]  # and the line of the end
    assert "train_runtime" in metrics(out)[-1]
    assert_same_weights(out, finished[1])


@pytest.mark.parametrize("loss", ["mass", "kl", "published"])
def test_every_loss_goes_on_after_a_break(finished, places, tmp_path, monkeypatch, loss):
    """The draws of attention forcing go on with it: at the third step, which is done again, some words are forced."""
    whole, broken = (
        read_run(finished[0], [f"out={tmp_path / name}", f"attention_loss={loss}", "attention_forcing=0.9"])
        for name in ("whole", "broken")
    )
    train(whole)
    interrupt_at_the_fourth_step(broken, monkeypatch)
    train(broken)
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")
    assert (tmp_path / "whole" / "alignment_head.safetensors").is_file() == (loss == "published")
    lines = [[one for one in metrics(tmp_path / name) if "loss" in one] for name in ("whole", "broken")]
    for name in ("loss", "attention_loss", "attention_mass", "matched_words"):
        assert [one[name] for one in lines[0]] == [one[name] for one in lines[1]]


def test_a_run_of_an_earlier_default_keeps_its_loss(finished, tmp_path, monkeypatch):
    """Its folder states the published loss. A run file that states none means the present default: another run."""
    published = read_run(finished[0], [f"out={tmp_path / 'out'}", "attention_loss=published"])
    interrupt_at_the_fourth_step(published, monkeypatch)
    before = content(tmp_path / "out")
    line = complaint(lavender("train", finished[0], "--set", f"out={tmp_path / 'out'}"), WRONG_USAGE)
    weight, sharpen = DEFAULTS["mass"]
    for said in (
        'attention_loss: "published" → "mass"',
        f"align_weight: 2.0 → {weight}",
        f"sharpen: 1.0 → {sharpen}",
    ):
        assert said in line
    assert content(tmp_path / "out") == before
    ran = lavender("train", tmp_path / "out" / "config.yaml")
    assert ran.code == DONE, ran.err
    assert f"going on from {tmp_path / 'out' / 'trainer' / 'checkpoint-2'}" in ran.out
    assert len(load_file(tmp_path / "out" / "alignment_head.safetensors")) == 5  # the Aligner
    recorded = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["training"]
    assert (recorded["attention_loss"], recorded["align_weight"], recorded["sharpen"]) == ("published", 2.0, 1.0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    found = bytearray(path.read_bytes())
    found[len(found) // 2] ^= 16
    path.write_bytes(found)


DAMAGE = {
    "model.safetensors": (cut, lambda path: path.write_bytes(b"no weights"), Path.unlink),
    "optimizer.pt": (cut, flip, lambda path: torch.save([1, 2], path), Path.unlink),
    "scheduler.pt": (cut, lambda path: path.write_bytes(b""), Path.unlink),
    "rng_state.pth": (cut, flip, lambda path: torch.save({"python": 1}, path), Path.unlink),
    "trainer_state.json": (
        cut,
        lambda path: path.write_text("[1, 2]"),
        lambda path: path.write_text('{"global_step": 4}'),
        lambda path: path.write_text('{"global_step": 4, "log_history": 3, "unknown": 1}'),
        lambda path: path.write_bytes(b"\xff\xfe"),
    ),
    "config.json": (cut, lambda path: path.write_text("[1]")),
    "coverage_counts.json": (cut, lambda path: path.write_text("[1]"), lambda path: path.write_text('{"a": 1}')),
}


@pytest.mark.parametrize(
    ("name", "which"), [(name, which) for name, ways in DAMAGE.items() for which in range(len(ways))]
)
def test_a_damaged_checkpoint_is_passed_over(name, which, run):
    """Found without training: the last whole one is that of step 2."""
    from lavender.training.resuming import last_whole_checkpoint

    folder = run[1] / "trainer"
    assert last_whole_checkpoint(folder) == (folder / "checkpoint-4", {})
    DAMAGE[name][which](folder / "checkpoint-4" / name)
    found, passed = last_whole_checkpoint(folder)
    assert found == folder / "checkpoint-2"
    (reason,) = passed.values()
    assert name in reason or "was not written to its end" in reason or "no weights" in reason


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run, finished):
    """The trainer keeps the newest one of `save_total_limit`; a damaged one must not be taken for it."""
    unfinish(run[1])
    flip(run[1] / "trainer" / "checkpoint-4" / "optimizer.pt")
    ran = lavender("train", run[0], "--set", "save_total_limit=1")
    assert ran.code == DONE, ran.err
    assert f"passed over {run[1] / 'trainer' / 'checkpoint-4'}, whose optimizer.pt is damaged" in ran.out
    assert f"going on from {run[1] / 'trainer' / 'checkpoint-2'}" in ran.out
    assert_same_weights(run[1], finished[1])
    names = {path.name for path in (run[1] / "trainer").iterdir() if path.is_dir()}
    assert names == {"checkpoint-4", "unusable-checkpoint-4"}


def test_without_a_whole_checkpoint_the_run_begins_at_its_first_step(run, finished):
    unfinish(run[1])
    for step in (2, 4):
        cut(run[1] / "trainer" / f"checkpoint-{step}" / "model.safetensors")
    ran = lavender("train", run[0])
    assert ran.code == DONE, ran.err
    assert ran.out.count("passed over ") == 2
    assert "there is no whole checkpoint: the run begins at its first step" in ran.out
    assert_same_weights(run[1], finished[1])


def test_settings_resolve_to_themselves(finished, tmp_path):
    """Read back, config.yaml gives the same config: so a repeated run is the same one."""
    recorded = yaml.safe_load((finished[1] / "config.yaml").read_text())["training"]
    args = LavenderConfig(output_dir=str(tmp_path), **recorded)
    again = {name: getattr(args, name) for name in recorded}
    changed = {
        name
        for name, value in recorded.items()
        if again[name] != value and name != "accelerator_config" and getattr(again[name], "value", None) != value
    }
    assert changed == set()

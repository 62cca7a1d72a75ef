"""The folder of a run: its config.yaml, the comparison of its settings with those of a new call, and its removal.

`config.yaml` has every resolved setting, so later defaults never change a run. Under `record` it has what the run was
made from: versions, digests of model, data and maps, the number of processes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavender.config import DEFAULTS as BY_LOSS
from lavender.config import RENAMED_LOSSES
from lavender.errors import ConfigError, DataError, FileError
from lavender.files import TEMPORARY, data_path, write_whole
from lavender.training.arguments import AlignmentArguments
from lavender.training.run_config import RunConfig
from lavender.training.settings import training_keys
from lavender.training.yaml_files import read_settings, yaml_text

if TYPE_CHECKING:
    from lavender.training.trainer import LavenderConfig

CONFIG, METRICS, COVERAGE, CHECKPOINT, HEAD = (
    "config.yaml",
    "metrics.jsonl",
    "coverage.json",
    "checkpoint",
    "alignment_head.safetensors",
)
TRAINER = "trainer"
"""Folder of the trainer's checkpoints, from which a run continues."""
SCORES = ("eval.json", "eval.jsonl", "eval-tasks.json", "report.html")
"""Scores of a run's model. The answers in eval-tasks/ say of which weights they are."""
OWN = (
    CONFIG,
    METRICS,
    COVERAGE,
    CHECKPOINT,
    HEAD,
    TRAINER,
    "environment.json",
    *SCORES,
    "eval-tasks",
)
"""Everything that `train`, `eval` and `report` write into a run folder."""
PACKAGES = (
    "lavender-vlm",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
)
FREE = frozenset(
    {
        "out",
        "trust_remote_code",
        # monitoring: the probe restores the state of random numbers, and its forwards change no weight
        "probe_size",
        "probe_steps",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "skip_memory_metrics",
        # how data are loaded, and what is stored where
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataset_num_proc",
        "ddp_timeout",
        "save_total_limit",
        "save_on_each_node",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
    }
)
"""Settings that do not change the result of a run: it may continue with other values."""
FREE_WITHOUT_BEST = frozenset({"save_strategy", "save_steps"})
"""The same, unless the run keeps the best of its saved checkpoints."""
FREE_WHEN_PLAIN = frozenset({"attention_loss", "sharpen"})
"""The same, if both runs are plain fine-tuning (`align_weight` 0). Their defaults have changed."""
OFF = {"augment_crop": 1.0, "augment_resize": 1.0, "replay_share": 0.5}
"""Settings that later versions added, and the value that changes nothing, where it is not empty, false or 0."""
CONTENT = frozenset({"model", "data", "replay_data", "maps", "eval_data", "eval_maps"})
NOT_RECORDED = "not recorded"
# recorded as given: the launcher resolves the rest, or the folder. Left out: old names of two settings, a secret
_AS_GIVEN = ("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "hub_model_id")
_LEFT_OUT = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "hub_token", "local_rank")


def resolved_settings(run: RunConfig, args: LavenderConfig, content: Mapping[str, str]) -> dict[str, Any]:
    """The content of config.yaml: all settings, and under `record` what the run was made from."""
    defaults = {setting.name: setting.default for setting in fields(args)}
    training = {}
    for name in sorted(training_keys() - set(_LEFT_OUT)):
        value = run.training.get(name, defaults[name]) if name in _AS_GIVEN else getattr(args, name)
        training[name] = _plain(value)
    record = {
        "versions": versions(),
        "content": dict(content),
        "processes": args.world_size,
        "divided_by": _divided_by(args),
        "device": args.device.type,
        "local": [
            name for name in ("data", "replay_data") if (path := getattr(run, name)) and data_path(path).exists()
        ],
    }
    return json.loads(json.dumps(asdict(run) | {"training": training, "record": record}))


def _divided_by(args: LavenderConfig) -> str:
    """How training is divided over processes. Checkpoints of one way cannot be read by another."""
    if args.deepspeed_plugin is not None:
        return f"ZeRO-{args.deepspeed_plugin.zero_stage}"
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "FSDP"
    return "DDP" if args.world_size > 1 else "nothing"


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages in `PACKAGES`."""
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return system | {name: version(name) for name in PACKAGES}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else value


def check_place(out: Path, restart: bool = False) -> bool:
    """Whether the folder holds a run. Nothing is written.

    Args:
        restart: whether the run may be removed.

    Raises:
        ConfigError: the path is a file; the folder holds other content, or checkpoints without config.yaml.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise ConfigError(f"out: {out}, which is a file", "a folder", "choose another out")
    names = {path.name for path in out.iterdir() if not path.name.startswith(TEMPORARY)}
    foreign = sorted(names - set(OWN))
    if CONFIG in names:
        if (names == {CONFIG} or (foreign and restart)) and "record" not in read_config(out):
            raise ConfigError(
                f"out: {out}, which holds a {CONFIG} that no run wrote",
                "a new or empty folder, or that of a run",
                "choose another out; a run file may lie beside the run's folder",
            )
        return True
    if foreign:
        got = f"out: {out}, which holds {foreign[0]!r} and no {CONFIG}"
        raise ConfigError(got, "a new or empty folder, or that of a run", "choose another out")
    if not restart and (names - {TRAINER} or any((out / TRAINER).glob("checkpoint-*"))):
        raise ConfigError(
            f"out: {out}, which holds what a run wrote, but no {CONFIG}",
            "the settings it was trained with",
            "choose another out, put the file back, or add --restart to begin anew",
        )
    return False


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml, without any default: a missing setting was not recorded.

    Raises:
        FileError: there is no such file.
        DataError: no run wrote the file.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileError(f"no {CONFIG} in {folder}", "a run folder that `lavender train` wrote", "name such a folder")
    try:
        found = read_settings(path)
    except ConfigError as error:  # the file is a run's, not the user's
        raise DataError(error.got, error.expected, f"put back what the run wrote to {path}") from error
    lacks = [key for key in ("model", "data", "maps") if key not in found]
    if lacks:
        raise DataError(
            f"{path}, which does not say {lacks[0]!r}", f"the {CONFIG} of a run", "name the folder of a run"
        )
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting: nested ones as `lora.r`, training settings without a prefix."""
    for key, value in settings.items():
        if prefix == "" and key == "training" and isinstance(value, Mapping):
            yield from flat(value)
        elif isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", None if value == {} or value == [] else value


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How a folder's run differs from the wanted one, one text per setting. Digests of content replace paths.

    A setting that one of the two does not have, as of another version, counts as its default if that is off.
    """
    old, new, off = dict(flat(found)), dict(flat(wanted)), _off()
    free = set(FREE)
    if not (old.get("load_best_model_at_end") or new.get("load_best_model_at_end")):
        free |= FREE_WITHOUT_BEST
    if old.get("align_weight") == new.get("align_weight") == 0:
        free |= FREE_WHEN_PLAIN
    lines = []
    for key in [*new, *(key for key in old if key not in new)]:
        name = key.removeprefix("record.content.")
        if key in free or key in CONTENT or key.startswith("record.versions.") or key in _UNCOMPARED:
            continue
        before, after = (settings.get(key, off.get(key, NOT_RECORDED)) for settings in (old, new))
        if before == after:
            continue
        before, after = old.get(key, NOT_RECORDED), new.get(key, NOT_RECORDED)
        if name != key:  # show the path, not the digest
            before, after = old.get(name, NOT_RECORDED), new.get(name, NOT_RECORDED)
            same = before == after
            lines.append(f"{name}: the content of {after} has changed" if same else f"{name}: {before} → {after}")
        else:
            lines.append(f"{key.removeprefix('record.')}: {_shown(before)} → {_shown(after)}")
    return lines


def defaults_before(found: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of this library that a run did not record because it is from before them, with their default.

    A run records every setting that there is, so one that it lacks came later, and the default does what was done
    before. Runs of the first versions did not record all of their settings: nothing is said of these.

    Args:
        found: the content of the run's config.yaml.

    Returns:
        Name → default, as `flat` gives it. `align_weight` and `sharpen` have the default of the run's loss.
    """
    if "record" not in found or not isinstance(found.get("training"), dict):
        return {}
    recorded, settings = dict(flat(found)), [*fields(RunConfig), *fields(AlignmentArguments)]
    made = {
        setting.name: setting.default if setting.default_factory is MISSING else setting.default_factory()
        for setting in settings
    }
    loss = str(recorded.get("attention_loss", made["attention_loss"]))
    made |= zip(("align_weight", "sharpen"), BY_LOSS.get(RENAMED_LOSSES.get(loss, loss), (2.0, 1.0)), strict=True)
    present = {name.partition(".")[0] for name in recorded} | {"dtype"}  # recorded as resolved, not as "auto"
    return {
        name: value
        for name, value in flat(json.loads(json.dumps(made, default=str)))
        if name.partition(".")[0] not in present
    }


def _off() -> dict[str, Any]:
    """The settings whose default is off, with that default as `flat` gives it."""
    from lavender.training.trainer import LavenderConfig

    settings = [setting for kind in (RunConfig, LavenderConfig) for setting in fields(kind)]
    empty = {
        setting.name: None for setting in settings if setting.default == () or setting.default_factory in (dict, list)
    }
    off = {setting.name: setting.default for setting in settings if not setting.default or setting.default == "no"}
    return off | empty | OFF


LENGTH = ("max_steps", "num_train_epochs")
"""Settings that may grow: the run is then made longer, and its record says so."""
_UNCOMPARED = ("record.device", "record.local", "record.later_versions", "record.made_longer", *LENGTH)


def _shown(value: Any) -> str:
    return value if value == NOT_RECORDED else json.dumps(value, ensure_ascii=False)


def check_same(out: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the folder's config.yaml, if it is the wanted run.

    Raises:
        ConfigError: the run has other settings, which the message lists, or did not record all of them.
    """
    found = read_config(out)
    do = "choose another out, set what the folder has, or add --restart to begin anew"
    if "record" not in found or not isinstance(found.get("training"), dict):
        raise ConfigError(
            f"out: {out}, a run of an earlier version, which did not record all of its settings",
            "a run that can be compared with the wanted one",
            "choose another out, or add --restart to begin anew",
        )
    lengths = _lengths(found, wanted).items()
    lines = [f"{name}: {before} → {after}" for name, (before, after) in lengths if not 0 < before < after]
    lines += differences(found, wanted)
    if lines:
        raise ConfigError(f"out: {out}, which holds a run of other settings ({'; '.join(lines)})", "the same run", do)
    return found


def _lengths(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Settings of the run's length that differ: (before, after). If steps and epochs are given, steps decide."""
    names = (
        ("max_steps",) if max(settings["training"].get("max_steps", 0) for settings in (found, wanted)) > 0 else LENGTH
    )
    pairs = {name: (found["training"].get(name, 0), wanted["training"].get(name, 0)) for name in names}
    return {name: (before, after) for name, (before, after) in pairs.items() if before != after}


def is_finished(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the folder's run is trained to its end and exported: coverage.json is written last."""
    return not _lengths(found, wanted) and (out / COVERAGE).is_file() and (out / CHECKPOINT).is_dir()


def remove_run(out: Path) -> None:
    """Remove what a run wrote, and nothing else; config.yaml, which marks the folder as a run's, is removed last."""
    for name in sorted(OWN, key=lambda name: name == CONFIG):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_config(out: Path, settings: Mapping[str, Any]) -> None:
    """Write `resolved_settings` to config.yaml."""
    write_whole(out / CONFIG, yaml_text(settings))


def write_environment(out: Path, settings: Mapping[str, Any]) -> None:
    """Write versions, device and seed to environment.json, for programs that read JSON."""
    record = settings["record"]
    found = record["versions"] | {"device": record["device"], "seed": str(settings["training"]["seed"])}
    write_whole(out / "environment.json", json.dumps(found | {"processes": str(record["processes"])}, indent=1))


def gone_on(found: Mapping[str, Any], wanted: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """config.yaml of a run that continues, with its first record; and notes where versions or length differ.

    A run that is made longer differs from a run of that length: its learning rate and λ have followed the shorter
    schedule so far. So the record keeps the change.
    """
    record = dict(found["record"])
    before, now = record.get("versions", {}), wanted["record"]["versions"]
    notes = []
    if changed := [name for name in now if before.get(name) != now[name]]:
        listed = ", ".join(f"{name} {before.get(name, NOT_RECORDED)} → {now[name]}" for name in changed)
        notes.append(f"going on under other versions than it began with: {listed}")
        record["later_versions"] = [*record.get("later_versions", []), {name: now[name] for name in changed}]
    for name, (before, after) in _lengths(found, wanted).items():
        notes.append(f"made longer, {name}: {before} → {after}; schedules follow the new length from here")
        record["made_longer"] = [*record.get("made_longer", []), {name: [before, after]}]
    return wanted | {"record": record}, notes

"""The folder of a run: its config.yaml, whether wanted settings are those of the run in it, and how it begins anew.

`config.yaml` has every setting as it was resolved, so that no later default is ever filled in, and under `record` what
the run was made from: versions, digests of model, data and maps, the number of processes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavender.errors import ConfigError, DataError, FileError
from lavender.files import TEMPORARY, write_whole
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
"""Where the trainer writes its own checkpoints, from which a run goes on."""
OWN = (CONFIG, METRICS, COVERAGE, CHECKPOINT, HEAD, TRAINER, "environment.json", "eval.json", "report.html")
"""All that `train`, `eval` and `report` write into a run's folder."""
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
        # how a run is watched: the probe keeps the state of random numbers, and its forwards change no weight
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
        # how data reach the process, and what is kept where
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
"""Settings that do not change what a run is: it may go on, or be finished, under others."""
FREE_WITHOUT_BEST = frozenset({"save_strategy", "save_steps"})
"""Likewise, unless the best of the saved checkpoints is chosen."""
CONTENT = {"model": "model", "data": "data", "maps": "maps", "eval_data": "eval_data", "eval_maps": "eval_maps"}
NOT_RECORDED = "not recorded"
# as given, not as resolved: the launcher decides the rest; the old names of two settings; a secret
_AS_GIVEN = ("fsdp", "fsdp_config", "deepspeed", "parallelism_config")
_LEFT_OUT = ("gradient_checkpointing", "gradient_checkpointing_kwargs", "hub_token", "local_rank")


def resolved_settings(run: RunConfig, args: LavenderConfig, content: Mapping[str, str]) -> dict[str, Any]:
    """What config.yaml says of a run: all settings, and under `record` what it was made from."""
    defaults = {one.name: one.default for one in fields(args)}
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
    }
    return json.loads(json.dumps(asdict(run) | {"training": training, "record": record}))


def _divided_by(args: LavenderConfig) -> str:
    """What divides the training among processes, whose checkpoints another cannot read."""
    if args.deepspeed_plugin is not None:
        return f"ZeRO-{args.deepspeed_plugin.zero_stage}"
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "FSDP"
    return "DDP" if args.world_size > 1 else "nothing"


def versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "platform": platform.platform()}
    return own | {name: version(name) for name in PACKAGES}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.to_dict() if hasattr(value, "to_dict") else value


def check_place(out: Path, restart: bool = False) -> bool:
    """Whether a run is in the folder, which may be removed for `restart`. Nothing is written.

    Raises:
        ConfigError: a file; content that is no run's; checkpoints whose settings are not known.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise ConfigError(f"out: {out}, which is a file", "a folder", "choose another out")
    names = {path.name for path in out.iterdir() if not path.name.startswith(TEMPORARY)}
    foreign = sorted(names - set(OWN))
    if CONFIG in names:
        if foreign and restart:
            read_config(out)  # is it a run's at all?
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
    """What a run's config.yaml says, and nothing else: what is not there was not recorded.

    Raises:
        FileError: no such file.
        DataError: one that no run wrote.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileError(f"no {CONFIG} in {folder}", "a run folder that `lavender train` wrote", "name such a folder")
    try:
        found = read_settings(path)
    except ConfigError as error:  # what a run wrote is no setting of the user's
        raise DataError(error.got, error.expected, f"put back what the run wrote to {path}") from error
    lacks = [key for key in ("model", "data", "maps") if key not in found]
    if lacks:
        raise DataError(
            f"{path}, which does not say {lacks[0]!r}", f"the {CONFIG} of a run", "name the folder of a run"
        )
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting, nested ones as `lora.r`; settings of training need no prefix."""
    for key, value in settings.items():
        if prefix == "" and key == "training" and isinstance(value, Mapping):
            yield from flat(value)
        elif isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", None if value == {} or value == [] else value


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How the run in a folder differs from the wanted one, a text a setting. Where content is known, paths are free."""
    own, other = dict(flat(found)), dict(flat(wanted))
    free = set(FREE)
    if not (own.get("load_best_model_at_end") or other.get("load_best_model_at_end")):
        free |= FREE_WITHOUT_BEST
    lines = []
    for key in [*other, *(key for key in own if key not in other)]:
        name = key.removeprefix("record.content.")
        if key in free or key in CONTENT or key.startswith("record.versions.") or key in _UNCOMPARED:
            continue
        before, after = own.get(key, NOT_RECORDED), other.get(key, NOT_RECORDED)
        if before == after:
            continue
        if name != key:  # a digest tells nobody anything
            before, after = own.get(name, NOT_RECORDED), other.get(name, NOT_RECORDED)
            same = before == after
            lines.append(f"{name}: the content of {after} has changed" if same else f"{name}: {before} → {after}")
        else:
            lines.append(f"{key.removeprefix('record.')}: {_shown(before)} → {_shown(after)}")
    return lines


LENGTH = ("max_steps", "num_train_epochs")
"""Settings that may grow: the run is made longer then, and its record says so."""
_UNCOMPARED = ("record.device", "record.later_versions", "record.made_longer", *LENGTH)


def _shown(value: Any) -> str:
    return value if value == NOT_RECORDED else json.dumps(value, ensure_ascii=False)


def check_same(out: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What config.yaml says, if the run in the folder is the wanted one.

    Raises:
        ConfigError: it has other settings, each named, or does not say all of them.
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
    """Each setting of the length that differs, before and after. Steps count before epochs where both are given."""
    names = ("max_steps",) if max(one["training"].get("max_steps", 0) for one in (found, wanted)) > 0 else LENGTH
    pairs = {name: (found["training"].get(name, 0), wanted["training"].get(name, 0)) for name in names}
    return {name: (before, after) for name, (before, after) in pairs.items() if before != after}


def is_finished(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether the run in the folder was trained to its end and exported: coverage.json is written last."""
    return not _lengths(found, wanted) and (out / COVERAGE).is_file() and (out / CHECKPOINT).is_dir()


def remove_run(out: Path) -> None:
    """Remove what a run wrote, and nothing else. config.yaml goes last: until then the folder is a run's."""
    for name in sorted(OWN, key=lambda name: name == CONFIG):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_config(out: Path, settings: Mapping[str, Any]) -> None:
    write_whole(out / CONFIG, yaml_text(settings))


def write_environment(out: Path, settings: Mapping[str, Any]) -> None:
    """Versions, device and seed apart, for programs that read JSON."""
    record = settings["record"]
    found = record["versions"] | {"device": record["device"], "seed": str(settings["training"]["seed"])}
    write_whole(out / "environment.json", json.dumps(found | {"processes": str(record["processes"])}, indent=1))


def gone_on(found: Mapping[str, Any], wanted: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """config.yaml of a run that goes on, with the record of its beginning; notes where versions or length differ.

    A run that is made longer is not the run that would have had this length from the beginning: what the learning rate
    and the weight of alignment did until now followed the shorter one. So the record keeps it.
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

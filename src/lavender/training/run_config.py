"""The settings of a run, read from a YAML file and `key=value` overrides."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lavender.data.columns import checked_columns
from lavender.errors import ConfigError
from lavender.files import expanded, shown
from lavender.training.settings import checked_training, training_keys
from lavender.training.yaml_files import parse_yaml, read_settings
from lavender.type_checks import check_fields, check_keys, check_path, from_mapping, write_paths_as_texts

Part = Literal["vision_tower", "connector", "language_model"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64", "float", "half", "double"]
PATHS = ("model", "data", "replay_data", "out", "eval_data", "eval_maps")
RECORD = "record"
"""Key of a run folder's config.yaml that records what the run was made from. It is not a setting."""


@dataclass(frozen=True)
class LoraSettings:
    """Settings of LoRA. The defaults are the paper's: its adapter file has the size of r=8 on q and v.

    Attributes:
        r: rank of the update.
        alpha: scale of the update; it is multiplied by alpha / r.
        dropout: dropout probability, from 0 to less than 1.
        target_modules: names of the modules to tune, or a regular expression.
    """

    r: int = 8
    alpha: int = 32
    dropout: float = 0.05
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        check_fields(self)
        for name, high in (("r", 65536), ("alpha", 10**6)):
            if not 1 <= getattr(self, name) <= high:
                raise ConfigError(
                    f"lora.{name}={getattr(self, name)}", f"a whole number from 1 to {high}", f"change {name}"
                )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout}", "a number from 0 to less than 1", "change dropout")
        if not self.target_modules:
            raise ConfigError("lora.target_modules, empty", "the modules to tune", "leave it out for q_proj and v_proj")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run.

    Attributes:
        model: folder or Hub id of the base model.
        data: data set that `lavender.data.samples.read_samples` reads.
        maps: folder of the map store of that data, or a list of several.
        eval_data: held-out data of the same kind, for `eval_strategy`; None for no evaluation.
        eval_maps: folder of the map store of `eval_data`; None if `maps` contains its maps.
        replay_data: data of the kind that the model learned before, mixed into `data` so that the model forgets less;
            None for none. Its samples are aligned too if `maps` has maps of them. `min_coverage` does not count them.
        replay_share: the share of `replay_data` among the samples. The part that is too small for its share is
            repeated; of both, every sample is in an epoch.
        out: the run folder.
        prompt: question for captions that come without one.
        columns: names of columns of `data`, `eval_data` and `replay_data`, as in `read_samples`; None for the usual
            names.
        lora: settings of LoRA; None for full tuning.
        peft: settings of any PEFT config, with its `peft_type`; `lora` is the short form for LoRA.
        freeze: parts that do not train: vision_tower, connector, language_model.
        image_processor: settings of the image processor to change, such as its `size`.
        dtype: type of the loaded weights, a torch name; "auto" is float32 where the weights themselves train.
        quantization: settings of transformers' BitsAndBytesConfig, for QLoRA: base weights in 4 or 8 bits.
        trust_remote_code: run the Python code that comes with the model.
        training: any setting of LavenderConfig, that is, of TRL's SFTConfig and of alignment.

    Raises:
        ConfigError: a setting is of another type, out of its range, or contradicts another.
    """

    model: str
    data: str
    maps: str | list[str]
    out: str
    replay_data: str | None = None
    replay_share: float = 0.5
    eval_data: str | None = None
    eval_maps: str | None = None
    prompt: str = "Describe the image."
    columns: Mapping[str, str] | None = None
    lora: LoraSettings | None = None
    peft: Mapping[str, Any] | None = None
    freeze: Sequence[Part] = ()
    image_processor: Mapping[str, Any] = field(default_factory=dict)
    dtype: Dtype = "auto"
    quantization: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        write_paths_as_texts(self, ["maps", *PATHS])
        check_fields(self)
        for name in PATHS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_path(name, getattr(self, name)))
        stores = [check_path("maps", path) for path in self.training_stores()]
        if not stores:
            raise ConfigError("maps=[]", "a map store, or several", "write maps: FOLDER")
        object.__setattr__(self, "maps", stores[0] if len(stores) == 1 else stores)
        if self.lora is not None and self.peft is not None:
            raise ConfigError("lora and peft", "one of them", "leave out lora; peft: {peft_type: LORA} is the same")
        if not 0 < self.replay_share < 1:
            raise ConfigError(f"replay_share={self.replay_share}", "a number between 0 and 1", "change replay_share")
        if self.replay_data is None and self.replay_share != RunConfig.replay_share:
            raise ConfigError(f"replay_share={self.replay_share} without replay_data", "data to replay", "add it")
        checked_columns(self.columns)
        _check_methods(self.peft, self.quantization)
        object.__setattr__(self, "training", checked_training(self.training))

    def training_stores(self) -> list[str]:
        """The folders of `maps`."""
        return [self.maps] if isinstance(self.maps, str) else list(self.maps)

    def stores(self) -> list[str]:
        """The folders of all map stores, of training and of evaluation, each once."""
        return list(dict.fromkeys([*self.training_stores(), *([self.eval_maps] if self.eval_maps else [])]))

    def peft_settings(self) -> Mapping[str, Any] | None:
        """The settings of the PEFT config, from `peft` or `lora`; None for full tuning."""
        if self.lora is None:
            return self.peft
        targets = self.lora.target_modules
        return {
            "peft_type": "LORA",
            "r": self.lora.r,
            "lora_alpha": self.lora.alpha,
            "lora_dropout": self.lora.dropout,
            "target_modules": targets if isinstance(targets, str) else list(targets),
        }


def read_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's settings from a YAML file and `key=value` overrides. Training settings need no prefix.

    The config.yaml of a run folder is such a file too.

    Raises:
        DataError: there is no such file, or it cannot be read.
        ConfigError: a missing key, an unknown key (with the most similar known one), a value of another type.
    """
    path = expanded(path)
    settings = _flat(read_settings(path), str(path))
    return _run_config(_flat(overridden(settings, overrides), "--set"), str(path))


def overridden(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The settings with those of `KEY=VALUE` texts, whose values are YAML, in their place.

    `lora.r=8` sets one setting of a mapping, which is made if there is none. `training.` before a key changes nothing.

    Raises:
        ConfigError: a text of another form; a part of a setting that is no mapping.
    """
    settings = copy.deepcopy(dict(settings))
    for override in overrides:
        key, sign, text = override.partition("=")
        *above, last = key.removeprefix("training.").split(".")
        if not sign or not all((*above, last)):
            raise ConfigError(f"--set {shown(override)}", "KEY=VALUE", "write for example --set align_weight=0.5")
        value = parse_yaml(text, f"--set {shown(override)}")
        if key == "training" and isinstance(value, dict):
            settings |= value
            continue
        inside = settings
        for name in above:
            if inside.get(name) is None or isinstance(inside[name], bool):
                inside[name] = {}
            if not isinstance(inside[name], dict):
                got = f"--set {shown(override)}, but {name} is {shown(inside[name])}"
                raise ConfigError(got, "a mapping to set a part of", f"set {name} itself")
            inside = inside[name]
        inside[last] = value
    return settings


def check_out(path: str | Path) -> Path:
    """The path of a run's folder, with `~` expanded. Nothing is created.

    Raises:
        ConfigError: there is a file at the path or above it.
    """
    out = expanded(path)
    there = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        above = "" if there == out else f"above which {there} stands, "
        raise ConfigError(f"out={path}, {above}which is a file", "a folder", "choose another out")
    return out


def _flat(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a file with those under `training:` at the top level, and without `record:`."""
    settings_of_run = {key: value for key, value in settings.items() if key not in ("training", RECORD)}
    for key in ("training", RECORD):
        if not isinstance(settings.get(key, {}), dict):
            raise ConfigError(f"{key}={shown(settings[key])} in {where}", "a mapping", f"remove {key}")
    training = settings.get("training", {})
    if twice := sorted(settings_of_run.keys() & training.keys()):
        raise ConfigError(f"{twice[0]!r} in {where} and in its training", "each setting once", "remove one of the two")
    return settings_of_run | training


def _run_config(settings: dict[str, Any], where: str) -> RunConfig:
    names = [field.name for field in fields(RunConfig) if field.name != "training"]
    check_keys(settings, names + sorted(training_keys()), where)
    for key in ("model", "data", "maps", "out"):
        if key not in settings:
            raise ConfigError(f"no key {key!r} in {where}", f"{key}: …", "add it")
    run = {key: value for key, value in settings.items() if key in names}
    lora = run.pop("lora", None)
    if lora is not None and lora is not False:
        if lora is not True and not isinstance(lora, dict):
            raise ConfigError(
                f"lora={shown(lora)} in {where}", "true, false or settings", "write for example lora: {r: 8}"
            )
        run["lora"] = from_mapping(LoraSettings, {} if lora is True else lora, f"{where}: lora")
    return RunConfig(**run, training={key: value for key, value in settings.items() if key not in names})


def _check_methods(peft: Mapping[str, Any] | None, quantization: Mapping[str, Any] | None) -> None:
    from lavender.training.trainable import check_quantization, plain_peft_config

    if peft is not None:
        plain_peft_config(peft)
    if quantization is not None:
        check_quantization(quantization)

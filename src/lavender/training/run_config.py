"""The settings of a run, from YAML and `key=value` overrides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lavender.config import check_keys, from_mapping
from lavender.errors import ConfigError
from lavender.files import expanded, shown
from lavender.training.settings import checked_training, training_keys
from lavender.training.yaml_files import parse_yaml, read_settings
from lavender.type_checks import check_fields, check_path, write_paths_as_texts

Part = Literal["vision_tower", "connector", "language_model"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64", "float", "half", "double"]
PATHS = ("model", "data", "out", "eval_data", "eval_maps")
RECORD = "record"
"""A key of a run folder's config.yaml: what that run was made with. It is no setting."""


@dataclass(frozen=True)
class LoraSettings:
    """LoRA as the paper used it (its adapter file's size fits r=8 on q and v)."""

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
    """Everything a run needs.

    Attributes:
        model: path or hub id of the base model.
        data: what `lavender.data.read_samples` reads.
        maps: the map store of that data, or a list of several.
        eval_data: held-out data of the same kind, for `eval_strategy`; or None.
        eval_maps: the map store of that data, if `maps` does not hold its maps too.
        out: the run folder.
        prompt: the question put before captions that come without one.
        lora: LoRA settings, or None for full tuning.
        peft: settings of any PEFT config, `peft_type` first, in the place of `lora`, its short form.
        freeze: parts of which nothing is trained: vision_tower, connector, language_model.
        image_processor: settings that replace the image processor's own, such as its `size`.
        dtype: of the loaded weights, a torch name, or "auto".
        quantization: settings of transformers' BitsAndBytesConfig, for QLoRA: the base's weights in 4 or 8 bits.
        trust_remote_code: run code that comes with the model.
        training: any setting of LavenderConfig, which is TRL's SFTConfig and alignment's.
    """

    model: str
    data: str
    maps: str | list[str]
    out: str
    eval_data: str | None = None
    eval_maps: str | None = None
    prompt: str = "Describe the image."
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
        stores = [check_path("maps", path) for path in (self.maps if isinstance(self.maps, list) else [self.maps])]
        if not stores:
            raise ConfigError("maps=[]", "a map store, or several", "write maps: FOLDER")
        object.__setattr__(self, "maps", stores[0] if len(stores) == 1 else stores)
        if self.lora is not None and self.peft is not None:
            raise ConfigError("lora and peft", "one of them", "leave out lora; peft: {peft_type: LORA} is the same")
        _check_methods(self.peft, self.quantization)
        object.__setattr__(self, "training", checked_training(self.training))

    def training_stores(self) -> list[str]:
        """The folders of `maps`."""
        return [self.maps] if isinstance(self.maps, str) else list(self.maps)

    def stores(self) -> list[str]:
        """The folders of all map stores, of training and of evaluation, each once."""
        return list(dict.fromkeys([*self.training_stores(), *([self.eval_maps] if self.eval_maps else [])]))

    def peft_settings(self) -> Mapping[str, Any] | None:
        """Those of `peft`, or of `lora`, its short form; None for full tuning."""
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
    """A run's settings from YAML and `key=value` overrides; settings of training need no prefix.

    The config.yaml of a run folder is such a file too.

    Raises:
        DataError: there is no such file, or it cannot be read.
        ConfigError: a missing key, a misspelt key (named with the nearest right one), a value of another type.
    """
    path = expanded(path)
    settings = _flat(read_settings(path), str(path)) | _flat(read_overrides(overrides), "--set")
    return _run_config(settings, str(path))


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` settings, values as YAML."""
    settings = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {shown(override)}", "KEY=VALUE", "write for example --set align_weight=5")
        settings[key] = parse_yaml(value, f"--set {shown(override)}")
    return settings


def check_out(path: str | Path) -> Path:
    """Where a run's folder is to be; nothing is made yet.

    Raises:
        ConfigError: there is a file at the path or above it.
    """
    out = expanded(path)
    there = next(one for one in (out, *out.absolute().parents) if os.path.lexists(one))
    if not there.is_dir():
        above = "" if there == out else f"above which {there} stands, "
        raise ConfigError(f"out={path}, {above}which is a file", "a folder", "choose another out")
    return out


def _flat(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Settings of training without the `training:` that config.yaml puts them under, and without its `record:`."""
    own = {key: value for key, value in settings.items() if key not in ("training", RECORD)}
    for key in ("training", RECORD):
        if not isinstance(settings.get(key, {}), dict):
            raise ConfigError(f"{key}={shown(settings[key])} in {where}", "a mapping", f"remove {key}")
    training = settings.get("training", {})
    if twice := sorted(own.keys() & training.keys()):
        raise ConfigError(f"{twice[0]!r} in {where} and in its training", "each setting once", "remove one of the two")
    return own | training


def _run_config(settings: dict[str, Any], where: str) -> RunConfig:
    own = [one.name for one in fields(RunConfig) if one.name != "training"]
    check_keys(settings, own + sorted(training_keys()), where)
    for key in ("model", "data", "maps", "out"):
        if key not in settings:
            raise ConfigError(f"no key {key!r} in {where}", f"{key}: …", "add it")
    run = {key: value for key, value in settings.items() if key in own}
    lora = run.pop("lora", None)
    if lora is not None and lora is not False:
        if lora is not True and not isinstance(lora, dict):
            raise ConfigError(
                f"lora={shown(lora)} in {where}", "true, false or settings", "write for example lora: {r: 8}"
            )
        run["lora"] = from_mapping(LoraSettings, {} if lora is True else lora, f"{where}: lora")
    return RunConfig(**run, training={key: value for key, value in settings.items() if key not in own})


def _check_methods(peft: Mapping[str, Any] | None, quantization: Mapping[str, Any] | None) -> None:
    from lavender.training.trainable import check_quantization, plain_peft_config

    if peft is not None:
        plain_peft_config(peft)
    if quantization is not None:
        check_quantization(quantization)

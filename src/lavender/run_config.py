"""The settings of a run, from YAML and `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from lavender.config import check_keys, from_mapping
from lavender.errors import ConfigError


@dataclass(frozen=True)
class LoraSettings:
    """LoRA as the paper used it (its adapter file's size fits r=8 on q and v)."""

    r: int = 8
    alpha: int = 32
    dropout: float = 0.05
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs.

    Attributes:
        model: path or hub id of the base model.
        data: what `lavender.data.read_samples` reads.
        maps: the map store of that data.
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
    maps: str
    out: str
    eval_data: str | None = None
    eval_maps: str | None = None
    prompt: str = "Describe the image."
    lora: LoraSettings | None = None
    peft: Mapping[str, Any] | None = None
    freeze: Sequence[str] = ()
    image_processor: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    quantization: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    def peft_settings(self) -> Mapping[str, Any] | None:
        """Those of `peft`, or of `lora`, its short form; None for full tuning."""
        if self.lora is None:
            return self.peft
        targets = self.lora.target_modules
        return {
            "peft_type": "LORA", "r": self.lora.r, "lora_alpha": self.lora.alpha, "lora_dropout": self.lora.dropout,
            "target_modules": targets if isinstance(targets, str) else list(targets),
        }  # fmt: skip


def read_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run's settings from YAML and `key=value` overrides; settings of training need no prefix.

    Raises:
        ConfigError: a missing file or key, a misspelt key (named with the nearest right one).
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no file at {path}", "a YAML file", "see examples/world.yaml")
    settings = _parsed(path.read_text(), str(path)) or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"a {type(settings).__name__} in {path}", "keys and values", "see examples/world.yaml")
    return _run_config(settings | read_overrides(overrides), str(path))


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` settings, values as YAML."""
    settings = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {override!r}", "KEY=VALUE", "write for example --set align_weight=5")
        settings[key] = _parsed(value, f"--set {override!r}")
    return settings


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which 5e-4 is a text, with the numbers of YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}, which is not YAML: {reason}", "valid YAML", "see examples/world.yaml") from error


def _run_config(settings: dict[str, Any], where: str) -> RunConfig:
    settings.pop("record", None)  # of a run's config.yaml: what the run was made from
    nested = settings.pop("training", {})  # likewise: there the settings of training stand apart
    settings = (nested if isinstance(nested, dict) else {"training": nested}) | settings
    own = [one.name for one in fields(RunConfig) if one.name != "training"]
    check_keys(settings, own + sorted(training_keys()), where)
    for key in ("model", "data", "maps", "out"):
        if key not in settings:
            raise ConfigError(f"no key {key!r} in {where}", f"{key}: …", "add it")
    run = {key: value for key, value in settings.items() if key in own}
    lora = run.pop("lora", None)
    if lora is not None and lora is not False:
        if lora is not True and not isinstance(lora, dict):
            raise ConfigError(f"lora: {lora!r} in {where}", "true, false or settings", "write for example lora: {r: 8}")
        run["lora"] = from_mapping(LoraSettings, {} if lora is True else lora, f"{where}: lora")
    peft = run.get("peft")
    if peft is not None and (not isinstance(peft, dict) or "lora" in run):
        got = "lora and peft" if "lora" in run else f"peft: {peft!r}"
        raise ConfigError(f"{got} in {where}", "one of them, with its settings", "write peft: {peft_type: LORA, r: 8}")
    return RunConfig(**run, training={key: value for key, value in settings.items() if key not in own})


def training_keys() -> set[str]:
    from lavender.trainer import LavenderConfig

    return {one.name for one in fields(LavenderConfig) if one.init} - {"output_dir", "maps"}

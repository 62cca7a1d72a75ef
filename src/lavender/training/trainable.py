"""Which weights of a model train: frozen parts, PEFT methods, the quantised base of QLoRA; and their numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from lavender.alignment.objective import TRAINED_PARTS, is_alignment_part
from lavender.config import AlignmentConfig
from lavender.errors import ConfigError
from lavender.files import shown
from lavender.students.base import PARTS
from lavender.students.registry import adapter_for
from lavender.type_checks import check_keys, check_type, hints_of

ALIGNMENT = "alignment"
ALL_LINEAR = "all-linear"
PAST_HOOKS = frozenset(("ADALORA", "XLORA"))
"""PEFT methods whose wrapper calls the model's forward itself, past the hooks in which alignment reads attention."""
QUANTIZATION: dict[str, Any] = {
    "load_in_8bit": bool,
    "load_in_4bit": bool,
    "llm_int8_threshold": float,
    "llm_int8_skip_modules": list[str] | None,
    "llm_int8_enable_fp32_cpu_offload": bool,
    "llm_int8_has_fp16_weight": bool,
    "bnb_4bit_compute_dtype": Literal["float32", "bfloat16", "float16"] | None,
    "bnb_4bit_quant_type": Literal["fp4", "nf4"],
    "bnb_4bit_use_double_quant": bool,
    "bnb_4bit_quant_storage": Literal["float16", "float32", "int8", "uint8", "float64", "bfloat16"] | None,
}
"""Settings of BitsAndBytesConfig and their types, which the class itself does not declare."""


def weights_dtype(asked: str, config: PreTrainedConfig, with_peft: bool) -> str:
    """The type in which a run loads its weights, as a torch name.

    Args:
        asked: a torch name, or "auto": float32 if the weights themselves train, because AdamW's small steps are lost
            in 16 bits, and its squared gradients in float16; with PEFT the type that the model's config names.
        with_peft: whether a PEFT method trains, not the weights themselves.

    Raises:
        ConfigError: no type of torch; float16 for weights that train.
    """
    if asked == "auto":
        named = (
            getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) if with_peft else None
        )
        return str(named or "float32").removeprefix("torch.")
    dtype = getattr(torch, str(asked).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype: {asked!r}", "auto, float32, bfloat16 or float16", "write for example dtype: float32")
    if dtype == torch.float16 and not with_peft:
        raise _float16("dtype: float16 for full tuning")
    return str(dtype).removeprefix("torch.")


def _float16(got: str) -> ConfigError:
    return ConfigError(
        f"{got}, in which AdamW's squared gradients become 0 and training diverges",
        "trained weights of float32",
        "set dtype: float32, in a script from_pretrained(…, dtype=torch.float32), and bf16: true to compute in "
        "bfloat16 where the device can; or load the weights in bfloat16",
    )


def refuse_float16(model: nn.Module) -> None:
    """Refuse weights that would train in float16.

    Raises:
        ConfigError: a trained weight is float16.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise _float16(f"trained weights of float16, such as {name}")


def freeze(model: PreTrainedModel, parts: Sequence[str]) -> None:
    """Freeze parts of a model, some of "vision_tower", "connector" and "language_model".

    With PEFT pass the same parts to `peft_config_of`: a PEFT method freezes the whole model, then adds its own weights.

    Raises:
        ConfigError: an unknown part, or all three.
    """
    _check(parts)
    adapter = adapter_for(model.config)
    for name, parameter in model.named_parameters():
        if adapter.part_of(name) in parts:
            parameter.requires_grad_(False)


def peft_config_of(settings: Mapping[str, Any], model: PreTrainedModel, frozen: Sequence[str] = ()) -> PeftConfig:
    """The PEFT config of these settings, restricted to modules outside the frozen parts.

    Args:
        settings: `peft_type`, and settings of that type's config.

    Raises:
        ConfigError: an unknown type or setting; a type that adds tokens to the text, or that cannot exclude modules;
            no target module of that name outside the frozen parts.
    """
    _check(frozen)
    config = plain_peft_config(settings)
    _exclude_frozen(config, model, frozen)
    return config


def plain_peft_config(settings: Mapping[str, Any]) -> PeftConfig:
    """The PEFT config of these settings, independent of the model.

    Raises:
        ConfigError: an unknown type or setting, a setting of another type, a type that tunes no chosen modules.
    """
    known: dict[str, Any] = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    given = dict(settings)
    kind = given.pop("peft_type", None)
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(
            f"peft_type: {shown(kind)}",
            f"one of {sorted(known.keys() - PAST_HOOKS)}",
            "write for example peft: {peft_type: LORA}",
        )
    allowed = [setting.name for setting in dataclasses.fields(known[kind]) if setting.init]
    if not {"target_modules", "modules_to_save"} <= set(allowed):
        raise _tunes_no_modules(kind)
    _refuse_past_hooks(kind)
    check_keys(given, allowed, "peft")
    for name, value in given.items():
        hint = bool | str if name == "init_lora_weights" else hints_of(known[kind])[name]  # such as pissa_niter_16
        check_type(f"peft.{name}", value, hint)
    try:
        return known[kind](**({"task_type": "CAUSAL_LM"} | given))
    except Exception as error:  # PEFT's checks raise many types
        got = f"settings of {kind} that PEFT refuses: {error}"
        raise ConfigError(got, "values that it accepts", "change the setting") from error


def _refuse_past_hooks(kind: str) -> None:
    if kind in PAST_HOOKS:
        raise ConfigError(
            f"peft_type: {kind}, whose wrapper bypasses the hooks through which alignment reads attention",
            "another method, such as LORA",
            "choose one",
        )


def _tunes_no_modules(kind: str) -> ConfigError:
    return ConfigError(
        f"peft_type: {kind}, which does not tune chosen modules",
        "a method that does, such as LORA or IA3",
        "choose another; added tokens would shift the text's positions",
    )


def check_quantization(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for an unknown setting, one of another type, or neither 4 nor 8 bits."""
    check_keys(settings, list(QUANTIZATION), "quantization")
    for name, value in settings.items():
        check_type(f"quantization.{name}", value, QUANTIZATION[name])
    if not (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        raise ConfigError(
            f"quantization: {settings!r}", "settings of BitsAndBytesConfig", "write quantization: {load_in_4bit: true}"
        )


def quantization_config(settings: Mapping[str, Any], with_peft: bool) -> BitsAndBytesConfig:
    """The BitsAndBytesConfig of these settings, for QLoRA.

    Raises:
        ConfigError: as in `check_quantization`; no PEFT method, so nothing could train; bitsandbytes is missing.
    """
    check_quantization(settings)
    if not with_peft:
        raise ConfigError("quantization without lora or peft", "something that can be trained", "add lora: true")
    if importlib.util.find_spec("bitsandbytes") is None:
        do = "pip install 'lavender-vlm[quantization]'"
        raise ConfigError("quantization, and no bitsandbytes", "that package", do)
    try:
        return BitsAndBytesConfig(**settings)
    except (AttributeError, TypeError, ValueError) as error:
        got = f"quantization: {settings}, which transformers refuses: {error}"
        raise ConfigError(got, "values that it accepts", "change the setting") from error


def _exclude_frozen(config: Any, model: PreTrainedModel, frozen: Sequence[str]) -> None:
    """Exclude frozen parts from a PEFT config, and check that it matches a module elsewhere."""
    if not config.target_modules and not vars(config).get("target_parameters"):
        raise ConfigError("peft without target_modules", "the modules to tune", "add target_modules: [q_proj, v_proj]")
    adapter = adapter_for(model.config)
    names = [name for name, _ in model.named_modules()]
    if any(name and adapter.part_of(name) in frozen for name in names):
        if "exclude_modules" not in vars(config):
            raise ConfigError(
                f"freeze with peft_type: {config.peft_type.value}, which cannot leave out modules",
                "a method that can, such as LORA",
                "choose another, or leave freeze out and write target_modules as a regular expression",
            )
        if config.exclude_modules:
            raise ConfigError(f"freeze and exclude_modules={config.exclude_modules!r}", "one of them", "leave out one")
        config.exclude_modules = _matching(adapter, frozen)
    special = isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    if config.target_modules and not special and not any(check_target_module_exists(config, name) for name in names):
        raise ConfigError(
            f"target_modules={config.target_modules!r}" + (f" with freeze: {list(frozen)}" if frozen else ""),
            "names of modules in parts that train",
            "see the model's modules, or freeze less",
        )


def name_all_linear(config: PeftConfig, model: PreTrainedModel) -> None:
    """Replace PEFT's "all-linear" by the names of the linear layers, before alignment adds further ones.

    The output layer is left out, as in PEFT, and so are the linear layers inside it, which PEFT includes for IDEFICS.

    Raises:
        ConfigError: a method that adds tokens to the text, or one whose wrapper bypasses the model's hooks.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise _tunes_no_modules(kind)
    _refuse_past_hooks(kind)
    tuned: Any = config  # PeftConfig itself lacks target_modules
    chosen = vars(tuned).get("target_modules")
    if not isinstance(chosen, str) or chosen.lower() != ALL_LINEAR:
        return
    head = model.get_output_embeddings()
    inner = set() if head is None else set(head.modules())
    tuned.target_modules = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module not in inner
    }


def train_alignment(model: PreTrainedModel, config: AlignmentConfig, peft_config: PeftConfig | None) -> None:
    """Choose whether the weights that alignment added to a model train, beside PEFT's if there are any."""
    if config.align_weight == 0:
        for name, parameter in model.named_parameters():
            if is_alignment_part(name):  # they get no gradient, which DDP would wait for
                parameter.requires_grad_(False)
    elif peft_config is not None:
        tuned: Any = peft_config  # PeftConfig itself lacks the attribute
        parts = () if config.is_direct else TRAINED_PARTS  # a direct loss has no parameters
        tuned.modules_to_save = sorted({*(tuned.modules_to_save or ()), *parts}) or None


def set_alignment_type(model: PreTrainedModel) -> None:
    """Make the weights that alignment adds float32: TRL casts all trained weights of QLoRA to bfloat16.

    With ZeRO-3 they get the model's type, because DeepSpeed needs one type for all weights; it keeps float32 copies.
    """
    dtype = model.dtype if is_deepspeed_zero3_enabled() else torch.float32
    for name, parameter in model.named_parameters():
        if is_alignment_part(name) and parameter.dtype in (torch.float32, torch.bfloat16):
            parameter.data = parameter.data.to(dtype)


def _matching(adapter: Any, frozen: Sequence[str]) -> str:
    """A regular expression for all modules of frozen parts, by the rule of `part_of`: the longest prefix decides."""
    patterns = []
    for part in frozen:
        for prefix in adapter.parts[part]:
            trained = [
                longer
                for name, prefixes in adapter.parts.items()
                if name not in frozen
                for longer in prefixes
                if longer.startswith(f"{prefix}.")
            ]
            excluded = "".join(f"(?!{re.escape(longer)}(\\.|$))" for longer in trained)
            patterns.append(f"{excluded}{re.escape(prefix)}(\\..*)?")
    return "|".join(patterns)


def trained_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Number of parameters, (trained, all), of each part of a model and of the weights that alignment adds.

    PEFT's weights count in the part they are added to. A shard of ZeRO-3 counts as the whole weight, and a packed
    weight as the numbers that it stands for.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapter = adapter_for(base.config)
    trained, whole = Counter(), Counter()
    for name, parameter in base.named_parameters():
        part = ALIGNMENT if is_alignment_part(name) else adapter.part_of(name)
        size = _size(parameter)
        whole[part] += size
        trained[part] += size if parameter.requires_grad else 0
    return {part: (trained[part], whole[part]) for part in (*PARTS, ALIGNMENT) if whole[part]}


def _size(parameter: nn.Parameter) -> int:
    """Number of values that a parameter stands for."""
    packed = vars(parameter).get("quant_state")  # bitsandbytes packs two 4-bit values per byte
    return vars(parameter).get("ds_numel", parameter.numel()) if packed is None else packed.shape.numel()


class Trained(NamedTuple):
    """What a model trains.

    Attributes:
        parameters: number of parameters of each part, (trained, all), see `trained_parameters`.
        has_bfloat16: whether some trained weights are bfloat16, so that small steps are rounded away.
        is_quantized: whether the base model is quantised.
    """

    parameters: dict[str, tuple[int, int]]
    has_bfloat16: bool
    is_quantized: bool


def check_trained(model: nn.Module, frozen: Sequence[str]) -> Trained:
    """What a model trains, after checking it against the frozen parts.

    Raises:
        ConfigError: a weight in a frozen part trains; nothing of the model trains; a trained weight is float16.
    """
    refuse_float16(model)
    counts = trained_parameters(model)
    moved = [part for part in frozen if counts.get(part, (0, 0))[0]]
    if moved:
        raise ConfigError(
            f"freeze: {list(frozen)}, and trained weights in {moved}", "none", "look at peft's bias and modules_to_save"
        )
    if not any(number for part, (number, _) in counts.items() if part != ALIGNMENT):
        raise ConfigError(f"freeze: {list(frozen)}, which leaves nothing to train", "a part that trains", "freeze less")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    has_bfloat16 = any(one.dtype == torch.bfloat16 for one in model.parameters() if one.requires_grad)
    return Trained(counts, has_bfloat16, is_quantized=bool(vars(base).get("is_quantized")))


def _check(parts: Sequence[str]) -> None:
    wrong = [part for part in parts if part not in PARTS]
    if wrong or isinstance(parts, str):
        raise ConfigError(f"freeze: {parts!r}", f"a list of some of {list(PARTS)}", "write for example [vision_tower]")
    if set(parts) == set(PARTS):
        raise ConfigError(f"freeze: {list(parts)}", "a part that trains", "leave one out")

"""The training settings of a run (TRL's, transformers' and alignment's): checked, then merged into LavenderConfig."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from functools import cache
from pathlib import Path
from traceback import walk_tb
from types import FunctionType, NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args

from lavender.errors import ConfigError, LavenderError, nearest
from lavender.files import expanded, shown
from lavender.type_checks import check_keys, check_path, check_type, hints_of

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from lavender.training.trainer import LavenderConfig

DEFAULTS: dict[str, Any] = {"report_to": "none", "max_length": None}
"""A run's defaults where they differ from TRL's."""
OF_THE_RUN = {"output_dir", "maps", "resume_from_checkpoint", "trust_remote_code"}
"""Settings of the trainer that a run sets from its own keys, such as `out` and `maps`."""
STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")
PATHS = ("chat_template_path", "deepspeed", "fsdp_config")
"""Settings that may name a file of the user's."""
_OTHER_TYPES: dict[str, Any] = {
    "fsdp": bool | str | list[str] | None,  # the type hint leaves out types that the documentation allows
    "debug": str | list[str],
    "parallelism_config": NoneType,  # an object, which a file cannot hold
    "include_num_input_tokens_seen": bool | Literal["all", "non_padding", "no"],
}
_OF_SETTINGS = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""Numbers of an OSError about the file that a setting names; transformers raises some without a number."""
_MANY = 10**12
_RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, 10**6),
    "per_device_eval_batch_size": (1, 10**6),
    "max_steps": (-1, _MANY),
    "gradient_accumulation_steps": (1, 10**6),
    "num_train_epochs": (1e-9, 1e6),
    "learning_rate": (0, 1e6),
    "warmup_steps": (0, _MANY),
    "weight_decay": (0, 1e6),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, 1),
    "max_grad_norm": (0, 1e30),
    "label_smoothing_factor": (0, 1),
    "logging_steps": (1e-9, _MANY),
    "eval_delay": (0, _MANY),
    "eval_steps": (1e-9, _MANY),
    "save_steps": (1e-9, _MANY),
    "save_total_limit": (0, _MANY),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, 256),
    "dataloader_prefetch_factor": (1, 1024),
    "ddp_timeout": (1, 10**8),
    "ddp_bucket_cap_mb": (1, 10**6),
    "torch_empty_cache_steps": (1, _MANY),
    "eval_accumulation_steps": (1, _MANY),
    "max_length": (1, 10**8),
    "dataset_num_proc": (1, 256),
    "pad_to_multiple_of": (1, 10**6),
    "neftune_noise_alpha": (0, 1e6),
    "router_aux_loss_coef": (0, 1e6),
    "local_rank": (-1, 10**6),
    "probe_size": (0, 10**6),
    "probe_steps": (1, _MANY),
    "augment_flip": (0, 1),
    "augment_crop": (0.1, 1),
    "augment_resize": (0.1, 1),
}


@cache
def training_keys() -> set[str]:
    """The names of the training settings that a run may have."""
    from lavender.training.trainer import LavenderConfig

    return {setting.name for setting in fields(LavenderConfig) if setting.init} - OF_THE_RUN


def checked_training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the training settings of a run. No model, data or package is loaded for it.

    Returns:
        The settings, with `~` expanded in paths, and false as "no" for a strategy: YAML reads `no` as false.

    Raises:
        ConfigError: an unknown name, or a value of another type or out of its range.
    """
    from lavender.training.trainer import LavenderConfig

    check_keys(settings, sorted(training_keys()), "training")
    known, checked = {setting.name: setting for setting in fields(LavenderConfig)}, {}
    for name, value in settings.items():
        value = "no" if name in STRATEGIES and value is False else value
        hint = hints_of(LavenderConfig)[name]
        check_type(name, value, _OTHER_TYPES.get(name, hint), known[name].default)
        choices = known[name].metadata.get("choices") or _names_of(hint)
        if choices and value is not None and value not in choices:
            near = nearest(str(value), map(str, choices))
            do = f"write {near!r} instead" if near else f"set {name} to one of them"
            raise ConfigError(f"{name}={shown(value)}", f"one of {tuple(choices)}", do)
        low, high = _RANGES.get(name, (None, None))
        if low is not None and isinstance(value, int | float) and not low <= value <= high:
            raise ConfigError(f"{name}={shown(value)}", f"a number from {low} to {high}", f"change {name}")
        checked[name] = check_path(name, value) if name in PATHS and isinstance(value, str) else value
    return checked


def _names_of(hint: Any) -> list[str]:
    """What a setting that is a member of an enumeration may be, also where its type is any text besides."""
    enums = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    return [member.value for kind in enums for member in kind]


def trainer_arguments(settings: Mapping[str, Any], processor: ProcessorMixin, output_dir: Path) -> LavenderConfig:
    """The arguments of a run's trainer: its settings over the run's defaults over TRL's.

    Args:
        settings: checked training settings of the run.
        processor: its chat template decides whether the loss can be of the answers alone.
        output_dir: folder for the trainer's checkpoints.

    Raises:
        ConfigError: the settings contradict each other, or need a package or device that is missing.
    """
    from lavender.training.trainer import LavenderConfig

    if settings.get("model_init_kwargs"):
        raise ConfigError(
            f"model_init_kwargs: {shown(settings['model_init_kwargs'])}, which a run does not read",
            "the run's own settings: dtype, quantization, trust_remote_code",
            "leave it out; for others download the model and name its folder",
        )
    defaults: dict[str, Any] = DEFAULTS | {"assistant_only_loss": marks_answers(processor)}
    with refused_settings("LavenderConfig"):
        args = LavenderConfig(output_dir=str(output_dir), **(defaults | dict(settings)))
    if not (args.bf16 or args.fp16) and args.mixed_precision != "no":  # else transformers takes the run's
        got = f"a launcher with mixed_precision: {args.mixed_precision}, and a run with neither bf16 nor fp16"
        raise ConfigError(got, "one precision", "launch with --mixed_precision no, or set bf16 or fp16")
    try_optimizer(args)
    return args


def marks_answers(processor: Any) -> bool:
    """Whether the chat template marks the assistant's turns, or TRL has a variant of the template that does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not processor.chat_template:
        return False
    try:
        return has_generation_markers(processor.chat_template) or get_training_chat_template(processor) is not None
    except ValueError:  # TRL raises it for a template that it does not know
        return False


def set_chat_template(processor: Any, path: str | None) -> None:
    """Give a processor the chat template of a file, as TRL will. A path that names a tokenizer is left to TRL.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path is None or not path.endswith((".jinja", ".j2")):
        return
    try:
        processor.chat_template = expanded(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        got = f"chat_template_path: {path}, which cannot be read: {reason}"
        raise ConfigError(got, "a Jinja template", "check the path") from error


def set_image_processor(processor: Any, settings: Mapping[str, Any]) -> None:
    """Replace settings of the image processor. The run's checkpoint has them too.

    Raises:
        ConfigError: an unknown setting, one of another type, or one with which no picture can be processed.
    """
    from huggingface_hub.dataclasses import validate_typed_dict
    from PIL import Image

    if not settings:
        return
    images = processor.image_processor
    for name, value in getattr(processor, "images_kwargs", {}).items():  # they override the image processor's own
        if settings.get(name, value) != value:
            raise ConfigError(
                f"image_processor.{name}: {settings[name]!r}, where {type(processor).__name__} itself sets {value!r}",
                "a setting that it takes from its image processor",
                "leave it out" + ("; max_patches: 1 turns tiles off" if name == "crop_to_patches" else ""),
            )
    before, typed = images.to_dict(), getattr(images, "valid_kwargs", None)
    check_keys(settings, list(before), "image_processor")
    named = {name: value for name, value in settings.items() if typed and name in typed.__annotations__}
    for name in settings.keys() - named.keys():
        if before[name] is not None:
            check_type(f"image_processor.{name}", settings[name], type(before[name]))
    with refused_settings("the image processor"):
        if typed:
            validate_typed_dict(typed, named)
        changed = type(images).from_dict(before | dict(settings))
        changed(images=[Image.new("RGB", (64, 48))], return_tensors="pt")
    processor.image_processor = changed


@contextmanager
def refused_settings(where: str, called_by: FunctionType | None = None) -> Iterator[None]:
    """Turn an error of transformers, TRL or PEFT into a ConfigError of one sentence.

    They raise nearly every exception of Python for a setting, so its type says little. Errors of memory and disk are
    raised unchanged.

    Args:
        where: what refuses the setting, for the message.
        called_by: the function of Lavender that passes the settings on, if the code inside does more than that. Then
            only errors of the libraries that it calls are of settings; errors of other code are raised unchanged.
    """
    import torch

    try:
        yield
    except (LavenderError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        is_of_system = isinstance(error, OSError) and error.errno not in _OF_SETTINGS
        if is_of_system or (called_by is not None and not _raised_in_library(error, called_by)):
            raise
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        got = f"settings of training that {where} refuses: {reason}"
        raise ConfigError(got, "settings that it accepts", "change or leave out the setting") from error


def _raised_in_library(error: Exception, function: FunctionType) -> bool:
    """Whether a library raised the error, called by this function and by no other code of Lavender's."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    codes = [frame.f_code for frame in frames if frame.f_globals.get("__name__", "").startswith("lavender.")]
    return bool(codes) and codes[-1] is function.__code__ and frames[-1].f_code is not function.__code__


def try_optimizer(args: LavenderConfig) -> None:
    """Build the optimiser and the schedule once, for a dummy weight, so that a wrong setting fails early.

    Raises:
        ConfigError: they cannot be built: a package is missing, or a setting is wrong.
    """
    import torch
    from transformers import Trainer, get_scheduler

    from lavender.training.arguments import as_dict

    if args.deepspeed or args.optim_target_modules:  # DeepSpeed builds it; or it needs the model's modules
        return
    with refused_settings(f"the optimiser {args.optim} or the schedule {args.lr_scheduler_type}"):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **settings)
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, as_dict(args.lr_scheduler_kwargs))

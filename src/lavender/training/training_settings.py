"""The settings of training in a run file: TRL's, transformers' and alignment's, checked before anything is loaded."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

from lavender.config import check_keys
from lavender.errors import ConfigError, LavenderError
from lavender.files import shown
from lavender.type_checks import check_path, check_type, hints_of

if TYPE_CHECKING:
    from lavender.training.trainer import LavenderConfig

OF_THE_RUN = {"output_dir", "maps", "resume_from_checkpoint", "trust_remote_code"}
"""What a run says in its own keys `out` and `maps`, and finds out or has of its own."""
STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")
PATHS = ("chat_template_path", "deepspeed", "fsdp_config")
_OTHER_TYPES: dict[str, Any] = {
    "fsdp": bool | str | list[str] | None,  # the hint leaves out what the documentation has
    "debug": str | list[str],
    "parallelism_config": NoneType,  # an object, which a file cannot hold
    "include_num_input_tokens_seen": bool | Literal["all", "non_padding", "no"],
}
_OF_SETTINGS = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""What an OSError is about where a setting names a file; transformers raises some of its own, without a number."""
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
}


@cache
def training_keys() -> set[str]:
    """The names of the settings of training that a run may have."""
    from lavender.training.trainer import LavenderConfig

    return {one.name for one in fields(LavenderConfig) if one.init} - OF_THE_RUN


def checked_training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with `no`, which YAML reads as false, as "no" for a strategy, and `~` put in.

    Raises:
        ConfigError: an unknown name, or a value of another type or out of its range.
    """
    from lavender.training.trainer import LavenderConfig

    check_keys(settings, sorted(training_keys()), "training")
    known, checked = {one.name: one for one in fields(LavenderConfig)}, {}
    for name, value in settings.items():
        value = "no" if name in STRATEGIES and value is False else value
        check_type(name, value, _OTHER_TYPES.get(name, hints_of(LavenderConfig)[name]), known[name].default)
        choices = known[name].metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise ConfigError(f"{name}={shown(value)}", f"one of {tuple(choices)}", f"set {name} to one of them")
        low, high = _RANGES.get(name, (None, None))
        if low is not None and isinstance(value, int | float) and not low <= value <= high:
            raise ConfigError(f"{name}={shown(value)}", f"a number from {low} to {high}", f"change {name}")
        checked[name] = check_path(name, value) if name in PATHS and isinstance(value, str) else value
    return checked


@contextmanager
def refused_settings(where: str) -> Iterator[None]:
    """Say in one sentence that transformers, TRL or PEFT refuses a setting, in whichever way it does.

    What memory and disk refuse stays what it is.
    """
    import torch

    try:
        yield
    except (LavenderError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # they raise nearly all of Python's own
        if isinstance(error, OSError) and error.errno not in _OF_SETTINGS:
            raise
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        got = f"settings of training that {where} refuses: {reason}"
        raise ConfigError(got, "settings that it accepts", "change or leave out the setting") from error


def try_optimizer(args: LavenderConfig) -> None:
    """Make the optimiser and the schedule once, of a weight that belongs to nothing.

    Raises:
        ConfigError: they cannot be made: a package is missing, or a setting is wrong.
    """
    import torch
    from transformers import Trainer, get_scheduler

    from lavender.training.arguments import as_dict

    if args.deepspeed or args.optim_target_modules:  # made by DeepSpeed; or made for modules of the model
        return
    with refused_settings(f"the optimiser {args.optim} or the schedule {args.lr_scheduler_type}"):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **settings)
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, as_dict(args.lr_scheduler_kwargs))

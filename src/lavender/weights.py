"""Loading weights, and what is seen to of them: none missing, none without a place, all finite.

For models of transformers and diffusers alike: both tell what they found if asked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from lavender.errors import ModelError
from lavender.model_files import check_weight_files

logger = logging.getLogger(__name__)
_NUMBERED = re.compile(r"\.\d+\.")
_BUFFERS = re.compile(r"(position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|num_batches_tracked)$")
MOST_AS_HELD = 4  # a model may have this many times the numbers of its files: they may be packed
SHOWN = 3


def load_weights(cls: Any, path: str | Path, empty: Callable[[], nn.Module] | None = None, **settings: Any) -> Any:
    """`cls.from_pretrained(path, **settings)`, refused if what it reports or holds is not a whole model.

    Args:
        cls: a class of transformers or diffusers, or an Auto class.
        path: folder or hub id.
        empty: builds the same model from its config. It is called with the meta device, to see that the model is not
            far larger than its files before any memory is taken.

    Raises:
        ModelError: a file is missing or damaged; the config tells of another model; a weight is missing, of another
            shape, or not finite.
    """
    held = check_weight_files(path)
    if held and empty is not None and not is_deepspeed_zero3_enabled():  # which divides weights as they are built
        with torch.device("meta"):
            told = sum(one.numel() for one in empty().parameters())
        if told > MOST_AS_HELD * held:
            raise ModelError(
                f"a config of {told:,} parameters in {path}, whose weights are {held:,}", "a config of these weights",
                "repair its config.json, or get the folder once more",
            )  # fmt: skip
    # other shapes are told in what was found, by name; else they are an error that names none
    model, found = cls.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **settings)
    _check_found(found, path)
    check_finite(model, path)
    spare_packing(model)
    return model


def _check_found(found: Mapping[str, Any], path: str | Path) -> None:
    """See that what `from_pretrained` reports is a whole model; tied weights and those to ignore are not in it."""
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        renamed = f", and has {_some(unexpected)}, which the model has not" if unexpected else ""
        raise ModelError(
            f"the model {path}, whose weights lack {_some(missing)}{renamed}", "all weights of the model",
            "get the folder once more, or repair its config.json: missing weights would be drawn at random",
        )  # fmt: skip
    if found["mismatched_keys"] or found["error_msgs"]:
        names = [str(one[0]) for one in found["mismatched_keys"]] or list(map(str, found["error_msgs"]))
        raise ModelError(
            f"the model {path}, whose weights are of other shapes than its config says: {_some(sorted(names))}",
            "weights of this config", "get the folder once more, or repair its config.json",
        )  # fmt: skip
    left = [name for name in unexpected if not _BUFFERS.search(name)]
    if any(_NUMBERED.search(name) for name in left):
        raise ModelError(
            f"the model {path}, whose config has no place for {_some(left)}", "as many layers as the weights have",
            "repair its config.json, or get the folder once more",
        )  # fmt: skip
    if left:
        logger.warning("of %s these weights are not used, since the model has none of the name: %s", path, _some(left))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_finite(model: nn.Module, path: str | Path) -> None:
    """See that no weight is NaN or infinite, nor a stored buffer NaN; of packed weights, what scales them.

    Raises:
        ModelError: names the first that is.
    """
    for name, parameter in model.named_parameters():
        for numbers in _numbers(parameter):
            refuse_not_finite(name, numbers, path)
    stored = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and buffer.isnan().any():
            refuse_not_finite(name, buffer, path)


def refuse_not_finite(name: str, numbers: Tensor, path: str | Path) -> None:
    """Raise ModelError if one of a weight's numbers is NaN or infinite. One on the meta device comes later (FSDP)."""
    if not numbers.is_floating_point() or not numbers.numel() or numbers.is_meta:
        return
    wide = numbers.float() if numbers.element_size() == 1 else numbers  # of 8 bits, which have no order
    if not torch.stack(torch.aminmax(wide.detach())).isfinite().all():
        raise ModelError(f"NaN or infinity in {name} of {path}", "finite weights", "get the model once more")


def _numbers(parameter: nn.Parameter) -> list[Tensor]:
    """What of a parameter is numbers here: itself, DeepSpeed's shard, or the scales of bitsandbytes' packed weights."""
    own = vars(parameter)
    packed, whole = own.get("quant_state"), own.get("ds_tensor", parameter)
    if packed is not None:
        return [packed.state2.absmax, packed.offset] if packed.nested else [packed.absmax]
    return [whole, own["SCB"]] if isinstance(own.get("SCB"), Tensor) else [whole]


def spare_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for CPUs with AVX512-BF16.

    It does so for good at the first forward in evaluation. The kernel for such weights has no gradient, its scales
    are rounded to bfloat16, and layers whose width is no multiple of the block fail.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False

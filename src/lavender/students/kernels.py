"""The attention kernels that capture works with: what each is given, and which keys it lets a row see.

The rows are computed beside the kernel, so what hides a key from the kernel must hide it from the rows. That is a mask
of all tokens (`eager`, `sdpa`), a function of two positions (`flex_attention`), or a mask of padding, lengths or
positions that restart, and a window (the flash kernels).

Axis suffixes: B sample, H head, R row, T token, K key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lavender.errors import CaptureError, UnsupportedModelError
from lavender.students.rows import Scoring, select_rows

FLASH_KERNELS = (
    "flash_attention_2",
    "flash_attention_3",
    # what transformers loads in their place where the package flash-attn is not installed
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn3",
    "kernels-community/vllm-flash-attn3",
    "kernels-community/aiter-flash-attn",  # on ROCm
)
BASE_KERNELS = ("eager", "sdpa", "flex_attention", *FLASH_KERNELS)
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keyword arguments by which a flash kernel is told that a row holds several samples."""


class KernelName(str):
    """Name of the capturing version of a base kernel, as registered with transformers. It equals the base's name too.

    Models decide by the name what they give to the kernel: some compare it with "sdpa" or "flex_attention", others ask
    whether it contains "flash". Only what looks it up by its hash (a dictionary, a set) tells the two apart.
    """

    __slots__ = ()
    PREFIX = "lavender_"

    def __eq__(self, other: object) -> bool:
        return str(self) == other or self.removeprefix(self.PREFIX) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(str(self))


def kernel_name(base: str) -> str:
    """See `KernelName`."""
    return KernelName(KernelName.PREFIX + base)


def register(capturing: Callable[[str], Callable]) -> None:
    """Register a capturing version of every base kernel with transformers.

    Both interfaces must know the name: the form of the mask follows it, and an unknown name gets no mask.

    Args:
        capturing: makes the capturing version, from the name of the base kernel.
    """
    for base in BASE_KERNELS:
        AttentionInterface.register(str(kernel_name(base)), capturing(base))
        form = "flash_attention_2" if base in FLASH_KERNELS else base
        AttentionMaskInterface.register(str(kernel_name(base)), ALL_MASK_ATTENTION_FUNCTIONS[form])


def install(model: PreTrainedModel) -> str:
    """Switch the decoder to the capturing kernel. Part of `CaptureSession`.

    Returns:
        The name of the kernel before. Pass it to `set_kernel` to undo the switch.

    Raises:
        UnsupportedModelError: the model uses another kernel than `BASE_KERNELS`.
        CaptureError: the registration with transformers is missing.
    """
    base = model.config.get_text_config()._attn_implementation or ""
    if base in {kernel_name(kernel) for kernel in BASE_KERNELS}:
        return base
    if base not in BASE_KERNELS:
        raise UnsupportedModelError(
            f"attn_implementation={base!r}",
            f"one of {BASE_KERNELS}",
            "load the model with one of these, such as attn_implementation='sdpa'",
        )
    if kernel_name(base) not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise CaptureError(
            f"no form of mask for the kernel {kernel_name(base)!r}, which would then get none",
            "the one lavender registers",
            "let nothing remove it from transformers' AttentionMaskInterface",
        )
    set_kernel(model, kernel_name(base))
    return base


def set_kernel(model: PreTrainedModel, name: str) -> None:
    """Set the attention kernel of the decoder alone, not of the vision tower.

    In its config, not by `set_attn_implementation`, which would look for a package of the name of a flash kernel.
    """
    model.config.get_text_config()._attn_implementation = {"": name}


def run(base: str, module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """What a base kernel returns for a layer whose config names the capturing version."""
    if base == "eager":
        return _eager_of(module)(module, *tensors, **kwargs)
    if base in FLASH_KERNELS:  # they look up their package by the name in the config
        config = _Changed(module.config, _attn_implementation=base)
        return ALL_ATTENTION_FUNCTIONS[base](_Changed(module, config=config), *tensors, **kwargs)
    return ALL_ATTENTION_FUNCTIONS[base](module, *tensors, **kwargs)


class _Changed:
    """An object with other values of some attributes; the object itself stays as it is."""

    def __init__(self, whole: Any, **attributes: Any):
        self._whole = whole
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def _eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The eager kernel of a layer: every model of transformers has its own, beside its attention class."""
    for kind in type(module).__mro__:
        kernel = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if kernel is not None:
            return kernel
    raise UnsupportedModelError(
        f"{type(module).__name__} without an eager_attention_forward in its module",
        "a model class of transformers",
        "load the model with attn_implementation='sdpa'",
    )


Known = dict[tuple, tuple[Any, Tensor | None]]
"""What the rows of a request see, by all that it depends on, so that layers share it. The first entry of a value is
kept only so that no other object gets the same id."""


def scoring_of(
    base: str,
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGKD: Tensor,
    mask: Tensor | BlockMask | None,
    rows_BR: Tensor,
    arguments: Mapping[str, Any],
    known: Known,
) -> Scoring:
    """How a kernel scores the keys of a layer for the rows.

    Args:
        base: name of the base kernel.
        module: attention module of the layer.
        query_BHTD, key_BGKD, mask: as the kernel gets them.
        rows_BR: long, positions of the rows.
        arguments: the kernel's other keyword arguments.
        known: what the rows saw in earlier layers. It is updated.

    Raises:
        CaptureError: the rows would not be those of the kernel.
    """
    for name, what in (("position_bias", "a position bias"), ("s_aux", "attention sinks")):
        if arguments.get(name) is not None:
            raise _not_exact(module, what)
    causal = arguments.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal  # as the kernels decide it
    hiding = mask, arguments.get("position_ids"), *(arguments.get(name) for name in LENGTHS)
    window, lengths = arguments.get("sliding_window"), (query_BHTD.shape[2], key_BGKD.shape[2])
    depends_on = base, causal, window, lengths, key_BGKD.device, *map(id, hiding)
    if depends_on not in known:
        known[depends_on] = hiding, _seen(base, module, mask, rows_BR.to(key_BGKD.device), lengths, causal, arguments)
    return Scoring(arguments["scaling"], known[depends_on][1], arguments.get("softcap"))


def _seen(
    base: str,
    module: nn.Module,
    mask: Any,
    rows_BR: Tensor,
    lengths: tuple[int, int],
    causal: bool,
    arguments: Mapping[str, Any],
) -> Tensor | None:
    """The mask of a layer at the rows, as in `Scoring`. `lengths` are the numbers of queries and keys."""
    if base in FLASH_KERNELS:
        if not causal:
            raise _not_exact(module, "attention to later tokens by a flash kernel")
        if lengths[0] != lengths[1]:
            raise _not_exact(module, f"{lengths[0]} queries and {lengths[1]} keys by a flash kernel")
        return _seen_by_flash(module, mask, rows_BR, lengths[1], arguments)
    if isinstance(mask, BlockMask):
        return _seen_by_blocks(mask, rows_BR, lengths[1])
    if mask is None:
        if base != "sdpa" or not causal:  # without a mask the others hide nothing
            raise _not_exact(module, "attention to later tokens, without a mask")
        return None
    if base == "flex_attention" and (mask.dtype == torch.bool or mask.shape[1] > 1):
        raise _not_exact(module, f"a mask of {mask.dtype} for {mask.shape[1]} heads that flex_attention adds to scores")
    return select_rows(mask.expand(len(rows_BR), -1, -1, -1), rows_BR)[..., : lengths[1]]


def _not_exact(module: nn.Module, got: str) -> CaptureError:
    return CaptureError(
        f"{got}, in layer {module.layer_idx}",
        "attention by scores and a causal mask alone",
        "load the model with attn_implementation='sdpa'; if that is refused too, report this model class",
    )


def _seen_by_blocks(blocks: BlockMask, rows_BR: Tensor, num_keys: int) -> Tensor:
    """Which keys each row sees by the function of a BlockMask: bool (sample, head or 1, row, key)."""
    sees, (samples, rows) = blocks.mask_mod, rows_BR.shape

    def row_sees(sample: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return sees(sample, head, rows_BR[sample, row], key)

    return create_mask(row_sees, samples, blocks.shape[1], rows, num_keys, rows_BR.device)


def _seen_by_flash(
    module: nn.Module, mask: Any, rows_BR: Tensor, num_keys: int, arguments: Mapping[str, Any]
) -> Tensor | None:
    """Which keys each row sees by a causal flash kernel: bool (sample, 1, row, key); None: those up to its own.

    The kernel takes the first that it finds of a mask of padding, lengths, and positions that restart.
    """
    tokens = torch.arange(num_keys, device=rows_BR.device)
    window = arguments.get("sliding_window")
    window = window if window is not None and num_keys > window else None
    segments_BK, places_BK = None, tokens.expand(len(rows_BR), -1)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != places_BK.shape:
            raise _not_exact(module, f"a mask of the shape {tuple(mask.shape)} for a flash kernel")
        segments_BK = mask.to(tokens.device).bool().long()
        places_BK = segments_BK.cumsum(dim=1)  # the kernel gets the tokens without padding: its window counts those
    elif (starts := _starts(module, places_BK, arguments)) is not None:
        segments_BK = torch.bucketize(tokens, starts.to(tokens), right=True)[None]
    if segments_BK is None and window is None:
        return None
    seen_BRK = tokens <= rows_BR[..., None]
    if segments_BK is not None:
        own_BR = segments_BK.gather(1, rows_BR)
        seen_BRK &= (segments_BK[:, None] == own_BR[..., None]) & (own_BR > 0)[..., None]
    if window is not None:
        seen_BRK &= places_BK[:, None] > places_BK.gather(1, rows_BR)[..., None] - window
    return seen_BRK[:, None]


def _starts(module: nn.Module, places_BK: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Where samples start in a row that holds several, by lengths or by positions that restart; None for one sample."""
    positions, lengths = arguments.get("position_ids"), tuple(cast(Any, arguments.get(name)) for name in LENGTHS)
    if all(one is not None for one in lengths):
        if len(places_BK) > 1 or not torch.equal(lengths[0], lengths[1]):
            raise _not_exact(module, f"lengths for {len(places_BK)} rows, or others for keys than for queries")
        return lengths[0]
    if positions is None or len(places_BK) > 1 or positions.shape[-1] == 1:
        return None
    if positions.shape != places_BK.shape:
        raise _not_exact(module, f"positions of the shape {tuple(positions.shape)} for a flash kernel")
    least = positions.min()
    if torch.equal((positions - least).to(places_BK), places_BK):
        return None
    return (positions[0] == least).nonzero()[:, 0]

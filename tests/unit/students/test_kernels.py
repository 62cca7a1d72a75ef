"""Capture with every attention kernel: logits to the bit, rows and gradients of eager attention, whatever hides keys.

Decoders of random weights: one with grouped keys; one with a window; one with windows in every other layer and a
softcap. Batches: without padding, with padding at either side or amid the tokens, and samples behind one another in one
row, told apart by positions that restart or by lengths. The flash kernels are those of `reference_kernels`.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

from lavender.errors import CaptureError, UnsupportedModelError
from lavender.students.capture import AttentionRequest
from lavender.students.forcing import Forcing
from lavender.students.image_keys import grid_boxes, key_layout
from lavender.students.kernels import BASE_KERNELS, FLASH_KERNELS, install, kernel_name, scoring_of, set_kernel
from reference_kernels import use_flash, use_flex_uncompiled, use_flex_with_gradient

KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
VOCABULARY, TOKENS = 61, 23
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "initializer_range": 0.5,  # scores that differ, so that a wrong key shows
}
LENGTHS = (9, 5, 9)  # of the samples in one row

MODELS = {
    "grouped": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    ),
}
BATCHES = ("whole", "left", "right", "amid", "positions", "lengths")


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch) -> str:
    use_flash(monkeypatch)
    use_flex_uncompiled(monkeypatch)
    return request.param


@pytest.fixture(params=list(MODELS))
def model(request):
    torch.manual_seed(3)
    return MODELS[request.param]().eval()


@pytest.fixture
def grouped():
    torch.manual_seed(3)
    return MODELS["grouped"]().eval()


def batch_of(kind: str) -> dict[str, Any]:
    if kind in ("positions", "lengths"):
        cuts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        batch = {
            "input_ids": torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(5)),
            "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        }
        told = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 9, "max_length_k": 9}
        return batch | (told if kind == "lengths" else {})
    ids = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if kind == "amid":
        mask[1, [0, 7, 8, 15]] = 0
    elif kind != "whole":
        mask[1, slice(4) if kind == "left" else slice(-4, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def request_of(batch: dict[str, Any]) -> AttentionRequest:
    """Rows of tokens that are no padding, early and late; keys of every sample, and of padding."""
    if "attention_mask" in batch:
        return AttentionRequest(
            torch.tensor([[21, 3, 12], [17, 6, 10]]), (0, 1), torch.tensor([[0, 2, 3, 11, 18], [4, 5, 6, 9, -1]])
        )
    return AttentionRequest(torch.tensor([[22, 3, 12, 8, 14]]), (0, 1), torch.tensor([[1, 2, 9, 10, 11, 14, 15, 20]]))


def keys_of(request: AttentionRequest) -> Tensor:
    assert request.keys_BK is not None
    return request.keys_BK


def name_kernel(model, kernel: str) -> None:
    """As `attn_implementation` does, which on this machine finds no flash-attn."""
    model.config._attn_implementation = kernel
    if isinstance(model, Gemma2ForCausalLM) and kernel == "sdpa":
        pytest.skip("transformers refuses a softcap with sdpa")


def eager_rows(model, batch: dict[str, Any], request: AttentionRequest) -> Tensor:
    """By transformers' eager kernel, with gradient: (layer, sample, head, row, key)."""
    name_kernel(model, "eager")
    every = torch.stack(model(**batch, use_cache=False, output_attentions=True).attentions)
    rows = torch.stack([every[:, index, :, own] for index, own in enumerate(request.rows_BR)], dim=1)
    kept = [rows[:, index, ..., own.clamp_min(0)] * (own >= 0) for index, own in enumerate(keys_of(request))]
    return torch.stack(kept, dim=1)


@pytest.mark.parametrize("kind", BATCHES)
@torch.no_grad()
def test_logits_are_the_same_bits_and_rows_those_of_eager_attention(model, kernel, kind):
    if kind == "lengths" and kernel not in FLASH_KERNELS:
        pytest.skip("lengths are for flash kernels; the others read the positions, which are here too")
    batch, request = batch_of(kind), request_of(batch_of(kind))
    if kind == "amid" and kernel in FLASH_KERNELS and not isinstance(model, LlamaForCausalLM):
        pytest.skip("transformers' own kernels differ: a flash kernel's window counts no padding")
    name_kernel(model, kernel)
    plain = model(**batch, use_cache=False).logits
    assert install(model) == kernel
    assert torch.equal(model(**batch, use_cache=False).logits, plain)
    output = model(**batch, use_cache=False, attention_request=request)
    assert torch.equal(output.logits, plain)
    set_kernel(model, kernel)
    assert torch.equal(model(**batch, use_cache=False).logits, plain)
    expected = eager_rows(model, batch, request)
    # two kernels: layer 1 gets the output of layer 0 in another order of sums
    torch.testing.assert_close(request.stacked(), expected, rtol=1e-5, atol=1e-6)
    assert (expected > 0.01).any()
    assert (expected == 0).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@torch.no_grad()
def test_compiled_flex_attention(grouped):
    """As transformers runs it: the code generator compiles kernel and mask for this machine."""
    batch, request = batch_of("left"), request_of(batch_of("left"))
    name_kernel(grouped, "flex_attention")
    plain = grouped(**batch, use_cache=False).logits
    install(grouped)
    assert torch.equal(grouped(**batch, use_cache=False, attention_request=request).logits, plain)
    torch.testing.assert_close(request.stacked(), eager_rows(grouped, batch, request), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_flash_window_counts_no_padding(monkeypatch):
    """The kernel gets the tokens without padding: those amid the tokens take no place in it."""
    use_flash(monkeypatch)
    torch.manual_seed(3)
    model = MODELS["window"]().eval()
    batch = batch_of("amid")
    kept = batch["attention_mask"][1].bool()
    alone = {"input_ids": batch["input_ids"][1:, kept]}
    position = int(kept[:17].sum())
    every = AttentionRequest(torch.tensor([[position]]), (0,), torch.arange(19)[None])
    name_kernel(model, "flash_attention_2")
    install(model)
    positions = (kept.cumsum(0) - 1).clamp_min(0).expand(2, -1)
    request = AttentionRequest(torch.tensor([[17], [17]]), (0,), torch.arange(TOKENS).expand(2, -1))
    model(**batch, position_ids=positions, use_cache=False, attention_request=request)
    model(**alone, use_cache=False, attention_request=every)
    torch.testing.assert_close(request.rows[0][1:, ..., kept], every.rows[0], rtol=1e-5, atol=1e-6)
    assert request.rows[0][1, ..., ~kept].abs().sum() == 0
    assert (every.rows[0][0, 0, 0] > 0).sum() == 6


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["left", "positions"])
def test_gradients_are_those_of_eager_attention(model, kernel, kind, checkpointed, monkeypatch):
    if kernel == "flex_attention":
        use_flex_with_gradient(monkeypatch)
    batch, request = batch_of(kind), request_of(batch_of(kind))
    eager = copy.deepcopy(model)
    expected = eager_rows(eager, batch, request)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (expected * weights).sum().backward()
    name_kernel(model, kernel)
    install(model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    model(**batch, use_cache=False, attention_request=request)
    (request.stacked() * weights).sum().backward()
    for one, other in zip(model.model.layers, eager.model.layers, strict=True):
        for name in ("q_proj", "k_proj"):
            found, wanted = (layer.self_attn.get_parameter(f"{name}.weight").grad for layer in (one, other))
            # two kernels add up in different orders; gradients here are of the order of 1
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            assert wanted.abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["right", "positions"])
@torch.no_grad()
def test_forced_rows_are_the_same_with_every_kernel(model, kernel, kind):
    """Forcing acts on the layer's output, which every kernel returns alike; here against the eager kernel."""
    batch, logits = batch_of(kind), []
    for name in ("eager", kernel):
        request = request_of(batch)
        samples, words = request.rows_BR.shape
        layout = key_layout([[grid_boxes(1, int((own >= 0).sum()))] for own in keys_of(request)])
        heat = torch.rand(samples, words, 2, 5, generator=torch.Generator().manual_seed(6))
        shares = torch.eye(words).expand(samples, -1, -1)
        forced = torch.ones(samples, words, dtype=torch.bool)
        request.forcing = Forcing(heat, shares, forced, layout, torch.zeros(samples, words).long())
        name_kernel(model, name)
        plain = model(**batch, use_cache=False).logits
        install(model)
        logits.append(model(**batch, use_cache=False, attention_request=request).logits)
        assert (logits[-1] - plain).abs().max() > 1e-2
        set_kernel(model, name)
    real = batch.get("attention_mask", torch.ones(1, TOKENS)).bool()
    torch.testing.assert_close(logits[1][real], logits[0][real], rtol=1e-4, atol=1e-4)


def test_attention_sinks_are_refused():
    torch.manual_seed(3)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)).eval()
    name_kernel(model, "eager")
    install(model)
    with pytest.raises(CaptureError, match="Got attention sinks, in layer 0"):
        model(**batch_of("whole"), attention_request=request_of(batch_of("whole")))


def test_another_kernel_is_refused(grouped):
    name_kernel(grouped, "paged|eager")
    with pytest.raises(UnsupportedModelError, match=r"paged\|eager.*Expected one of .*'eager', 'sdpa'"):
        install(grouped)
    assert grouped.config._attn_implementation == "paged|eager"


def test_what_transformers_loads_in_place_of_flash_attention_is_known():
    assert {FLASH_ATTN_KERNEL_FALLBACK[f"flash_attention_{version}"] for version in (2, 3)} <= set(FLASH_KERNELS)
    assert "kernels-community/aiter-flash-attn" in FLASH_KERNELS  # the same table on ROCm


def test_models_ask_the_name_which_kernel_it_is():
    """Whether it is a flash kernel; or by comparison, as Gemma 4 does, and models with sparse attention."""
    for base in BASE_KERNELS:
        name = kernel_name(base)
        assert ("flash" in name) == (base in FLASH_KERNELS)
        for one in (name, copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
            assert one == base
            assert base == one
            assert one == f"lavender_{base}"
            assert one in (base, "another")
            assert not one != base  # noqa: SIM202
            assert not base != one  # noqa: SIM202
            assert [other for other in BASE_KERNELS if one == other] == [base]
            assert {base: 1, f"lavender_{base}": 2}[one] == 2


@pytest.mark.parametrize(
    ("base", "arguments", "got"),
    [
        ("flash_attention_2", {"is_causal": False}, "attention to later tokens by a flash kernel"),
        ("flash_attention_2", {"attention_mask": torch.zeros(1, 1, 4, 4)}, r"a mask of the shape \(1, 1, 4, 4\)"),
        ("flash_attention_2", {"position_ids": torch.zeros(3, 1, 4)}, r"positions of the shape \(3, 1, 4\)"),
        ("flash_attention_2", {"key": torch.zeros(1, 2, 6, 8)}, "4 queries and 6 keys by a flash kernel"),
        ("eager", {"attention_mask": None}, "attention to later tokens, without a mask"),
        ("flex_attention", {"attention_mask": None}, "attention to later tokens, without a mask"),
        ("sdpa", {"is_causal": False}, "attention to later tokens, without a mask"),
        ("sdpa", {"position_bias": torch.zeros(1, 4, 4, 4)}, "a position bias"),
        ("flex_attention", {"attention_mask": torch.ones(1, 1, 4, 4) > 0}, "a mask of torch.bool for 1 heads"),
    ],
)
def test_what_cannot_be_exact_is_refused(grouped, base, arguments, got):
    given = {"attention_mask": None, "key": torch.zeros(1, 2, 4, 8), "scaling": 1.0} | arguments
    key, mask = given.pop("key"), given.pop("attention_mask")
    with pytest.raises(CaptureError, match=f"Got {got}.*in layer 0"):
        scoring_of(
            base, grouped.model.layers[0].self_attn, torch.zeros(1, 4, 4, 8), key, mask, torch.tensor([[1]]), given, {}
        )

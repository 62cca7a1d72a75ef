"""What must hold for every family of students. A family's test file subclasses `Contract` and gives its fixtures.

1 logits unchanged · 2 rows exact · 3 gradients reach q and k · 4 the model is restored · 5 the place of every
image key (`families.geometry`, also for a family's other processors) · 6 padding side and batch order change
nothing · 7 checkpointing · 8 samples with several pictures and with none, LoRA, bfloat16 (`families.batches`) ·
9 what would be silently wrong raises (`families.guards`) · 10 parts that can be frozen (`families.parts`) ·
11 `lavender look` (`families.look`) · 12 answers as benchmarks ask for them (`families.answers`). A family's further
text models or towers need `families.core` alone, the decisive part of 1, 2, 3, 5, 6 and 7.
"""

from __future__ import annotations

import copy
import io
from typing import get_args

import pytest
import torch
from PIL import Image
from torch import Tensor

from families.answers import Answers
from families.asking import captured, cast, request_of, traces
from families.batches import Batches
from families.by_hand import ByHand
from families.core import KINDS, LEARN, PUBLISHED, Core
from families.direct import DirectLosses
from families.geometry import GRID, batch_of
from families.guards import Guards
from families.look import Look
from families.parts import Parts
from families.words import Words
from lavender.alignment.objective import HEAD_NAME, attach, detach
from lavender.config import DIRECT_LOSSES, AlignmentConfig, Pooling
from lavender.errors import CaptureError, ConfigError, UnsupportedModelError
from lavender.students.capture import AttentionRequest, CaptureSession
from lavender.students.kernels import install, set_kernel
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture, capturing, student_maps
from lavender.words import words_of
from reference_kernels import use_flex_uncompiled

EVERY_POOLING = pytest.mark.parametrize(
    ("alignment", "dtype"),
    [(PUBLISHED | {"pooling": pooling}, torch.float32) for pooling in get_args(Pooling)]
    + [(PUBLISHED | {"pooling": own}, torch.bfloat16) for own in ("layer-mean", "max-mean", "flow-multi", "learn")]
    + [({"attention_loss": kind}, torch.bfloat16) for kind in DIRECT_LOSSES],
    ids=lambda part: "-".join(part.values()) if isinstance(part, dict) else str(part).removeprefix("torch."),
)
"""The direct losses are in float64 in `families.direct`."""
WAYS = pytest.mark.parametrize(
    "way", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "static", "lookup"]
)
"""Ways to generate: they differ in how many tokens a step has, and in whether it gets a mask."""


class Contract(Answers, Batches, ByHand, DirectLosses, Guards, Look, Parts, Words, Core):
    """Collected as a subclass only."""

    guesses = True
    """Whether transformers can generate by guessing several tokens and checking them in one step."""

    # 1

    @WAYS
    @torch.no_grad()
    def test_generation_is_the_same_with_capture(self, family, model, readings, way):
        if "prompt_lookup_num_tokens" in way and not self.guesses:
            pytest.skip("transformers itself cannot")
        one = batch_of(family, readings[:1])

        def tokens_and_logits() -> tuple[Tensor, Tensor]:
            output = model.generate(
                **one, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, **way
            )
            return output.sequences, torch.stack(output.logits)

        plain = tokens_and_logits()
        with capturing(model):
            for found, expected in zip(tokens_and_logits(), plain, strict=True):
                assert torch.equal(found, expected)

    @torch.no_grad()
    def test_the_last_logits_are_the_same_bits_with_capture(self, family, model, readings):
        """As a model asked for them alone computes them: of one sample, which has no mask."""
        one = batch_of(family, readings[:1])
        for kept in (1, 3):
            plain = model(**one, logits_to_keep=kept).logits
            with capturing(model):
                assert torch.equal(model(**one, logits_to_keep=kept).logits, plain)

    @torch.no_grad()
    def test_logits_are_the_same_bits_with_flex_attention(self, model, batch, monkeypatch):
        use_flex_uncompiled(monkeypatch)
        set_kernel(model, "flex_attention")
        adapter, plain = adapter_for(model.config), model(**batch).logits
        request = AttentionRequest(torch.tensor([[5], [8], [12]]), adapter.usable_layers(), adapter.image_keys(batch))
        with capturing(model):
            assert torch.equal(model(**batch).logits, plain)
            assert torch.equal(model(**batch, attention_request=request).logits, plain)

    @KINDS
    def test_logits_are_the_same_bits_with_the_objective(self, family, model, batch, readings, alignment):
        plain = model(**batch).logits
        head = attach(model, AlignmentConfig(**alignment))
        output = model(**batch, attention_request=request_of(family, model, batch, readings, head.layers))
        assert torch.equal(output.logits, plain)
        assert output.attention_loss.item() > 0
        if alignment:
            assert output.attention_loss.item() < 5  # five words, each below one
        assert "attention_loss" not in model(**batch)

    @torch.no_grad()
    def test_first_choices_of_root_matching_are_those_of_the_logits(self, family, model, batch, readings):
        head = attach(model, AlignmentConfig(match="root"))
        request = request_of(family, model, batch, readings, head.layers)
        request.same_word = lambda chosen, true: False
        logits = model(**batch, attention_request=request).logits
        at_rows = torch.stack([of_sample[rows] for of_sample, rows in zip(logits, request.rows_BR, strict=True)])
        if request.chosen_BR is None:
            assert adapter_for(model.config).backbone(model) is model
            return
        chosen = at_rows.gather(2, request.chosen_BR[..., None])[..., 0]
        torch.testing.assert_close(chosen, at_rows.amax(dim=-1), rtol=1e-4, atol=1e-5)  # equal but for rounded ties

    # 2

    def test_chosen_layers_alone_are_captured(self, model, batch):
        last = adapter_for(model.config).layers(adapter_for(model.config).usable_layers()[-1:])
        assert tuple(captured(model, batch, last).rows) == last

    def test_a_layer_that_does_not_see_the_picture_is_refused(self, model):
        adapter = adapter_for(model.config)
        with pytest.raises(ConfigError, match=r"of which \[101\] do not see the picture") as caught:
            adapter.layers((*adapter.usable_layers(), 101))
        assert f"Expected some of {adapter.usable_layers()}." in str(caught.value)

    # 3

    def test_learned_projections_alone_get_the_gradient(self, family, model, batch, readings):
        """The last layer's own projections get none; earlier ones get it through the hidden states."""
        adapter, head = adapter_for(model.config), attach(model, AlignmentConfig(**LEARN, layers="all"))
        model.train()
        output = model(**batch, attention_request=request_of(family, model, batch, readings, head.layers))
        output.attention_loss.backward()
        for layer in head.layers:
            attention = adapter.attention_module(model, layer)
            parallel = attention.get_submodule("alignment_parallel")
            assert parallel.query.weight.grad.abs().max() > 1e-8
            assert parallel.key.weight.grad.abs().max() > 1e-8
            assert torch.equal(parallel.query.weight, attention.q_proj.weight)
        assert attention.q_proj.weight.grad is None
        assert attention.k_proj.weight.grad is None

    @EVERY_POOLING
    def test_gradients_of_every_pooling(self, family, model, batch, readings, alignment, dtype):
        """They reach a layer's queries and keys (of "learn", its parallel ones), and are finite in bfloat16 too."""
        adapter, head = adapter_for(model.config), attach(model, AlignmentConfig(**alignment))
        model.to(dtype).train()
        inputs = cast(batch, dtype)
        output = model(**inputs, attention_request=request_of(family, model, batch, readings, head.layers))
        assert output.logits.dtype == dtype
        assert output.attention_loss.item() > 0
        if head.aligner is not None:
            assert output.attention_loss.item() < 5  # five words, each below one
        output.attention_loss.backward()
        assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)
        attention = adapter.attention_module(model, head.layers[0])
        names = ("alignment_parallel.query", "alignment_parallel.key") if alignment == LEARN else ("q_proj", "k_proj")
        for name in names:
            assert attention.get_parameter(f"{name}.weight").grad.abs().max() > 1e-8

    @torch.no_grad()
    def test_learned_projections_begin_as_the_models_own(self, family, model, batch, readings):
        losses, rows = [], []
        for alignment in (PUBLISHED, LEARN):
            torch.manual_seed(7)
            head = attach(model, AlignmentConfig(**alignment, layers="all"))
            request = request_of(family, model, batch, readings, head.layers)
            losses.append(model(**batch, attention_request=request).attention_loss)
            rows.append(request.stacked())
            detach(model)
        torch.testing.assert_close(rows[1], rows[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)

    # 4

    @KINDS
    def test_detach_leaves_the_model_as_it_was(self, model, alignment):
        before = traces(model)
        attach(model, AlignmentConfig(**alignment))
        assert traces(model) != before
        with pytest.raises(ConfigError, match="Got a model with an alignment head"):
            attach(model, AlignmentConfig())
        detach(model)
        assert traces(model) == before

    def test_the_model_is_restored_after_an_exception(self, model):
        before = traces(model)
        with pytest.raises(KeyError, match="mine"), capturing(model):
            assert traces(model) != before
            raise KeyError("mine")
        assert traces(model) == before

    def test_the_model_is_restored_after_failed_maps(self, family, model, readings):
        model.train()
        before = traces(model)
        wrong = AnsweredPicture(
            readings[0].image, "what?", "a dog", words_of("a very different text of many words, here")
        )
        bad = AnsweredPicture(Image.new("RGB", (40, 50)), "what?", None, wrong)  # ty: ignore[invalid-argument-type]
        with pytest.raises(Exception):  # noqa: B017, PT011
            student_maps(model, family.processor, [readings[0], bad], GRID)
        assert traces(model) == before

    @KINDS
    @torch.no_grad()
    def test_copies_and_files_of_a_model_in_alignment(self, family, model, batch, readings, alignment):
        """A copy can be detached, and leaves the original as it is; so can what torch saves and loads."""
        before = traces(model)
        head = attach(model, AlignmentConfig(**alignment))
        attached = traces(model)

        def loss_of(aligned) -> Tensor:
            request = request_of(family, aligned, batch, readings, head.layers)
            return aligned(**batch, attention_request=request).attention_loss

        file = io.BytesIO()
        torch.save(model, file)  # all before the first forward: in it transformers adds hooks that cannot be saved

        def copies() -> list:
            file.seek(0)
            return [copy.deepcopy(model), torch.load(file, weights_only=False)]

        aligned = copies()
        for other in copies():
            detach(other)
            assert traces(other) == before
            assert CaptureSession.of(other) is None
            assert traces(model) == attached
        expected = loss_of(model)
        assert expected > 0
        for other in aligned:
            torch.testing.assert_close(loss_of(other), expected, rtol=1e-5, atol=1e-7)

    def test_install_names_the_kernel_that_was_there(self, model):
        before = traces(model)
        assert install(model) == "sdpa"
        assert install(model) == "lavender_sdpa"
        set_kernel(model, "sdpa")
        assert traces(model) == before

    @KINDS
    def test_maps_of_a_model_in_alignment(self, family, model, batch, readings, alignment):
        """They show the model's own attention, never the parallel one, and alignment goes on afterwards."""
        own = student_maps(model, family.processor, readings, GRID)
        head = attach(model, AlignmentConfig(**alignment))
        for name, parameter in model.named_parameters():
            if "alignment_parallel" in name:
                parameter.data = torch.randn_like(parameter)
        before = traces(model)
        during = student_maps(model, family.processor, readings, GRID)
        assert traces(model) == before
        for one, other in zip(during, own, strict=True):
            assert torch.equal(one.maps, other.maps)
        output = model(**batch, attention_request=request_of(family, model, batch, readings, head.layers))
        assert output.attention_loss > 0

    def test_another_kernel_is_refused(self, model):
        set_kernel(model, "paged|eager")
        with pytest.raises(UnsupportedModelError, match=r"Got attn_implementation='paged\|eager'"):
            attach(model, AlignmentConfig())
        assert HEAD_NAME not in dict(model.named_children())

    # 6

    def test_batch_order_and_company_change_nothing(self, family, model, readings):
        together = student_maps(model, family.processor, readings, GRID)
        backwards = student_maps(model, family.processor, readings[::-1], GRID)[::-1]
        alone = student_maps(model, family.processor, readings, GRID, batch_size=1)
        for one, *others, given in zip(together, backwards, alone, readings, strict=True):
            assert one.words == given.words
            for other in others:
                assert other.words == one.words
                torch.testing.assert_close(other.maps, one.maps, rtol=0, atol=1e-5)
        assert (together[0].maps[0] - together[1].maps[0]).abs().max() > 1e-3

    def test_no_words_no_maps(self, family, model, readings):
        maps = student_maps(model, family.processor, [AnsweredPicture(readings[0].image, "what?", "12!", ())], GRID)[0]
        assert maps.maps.shape == (0, *GRID)

    # 7

    def test_reentrant_checkpointing_is_noticed(self, family, batch, readings):
        with pytest.raises(CaptureError, match="Got attention rows without gradient while training"):
            self.gradients(family, batch, readings, {}, use_reentrant=True)

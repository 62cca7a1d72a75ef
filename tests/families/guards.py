"""What would be silently wrong raises: part of the contract of every family."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface

from families.asking import request_of
from families.core import KINDS
from lavender.alignment.objective import attach
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, LavenderError
from lavender.students.kernels import install, kernel_name, set_kernel
from lavender.students.registry import adapter_for


class Guards:
    """Collected as a part of the contract only, whose fixtures it uses."""

    def test_lost_masks_are_noticed(self, model, monkeypatch):
        """A kernel whose form of mask nobody knows gets none, and every row would see padding and later tokens."""
        monkeypatch.delitem(AttentionMaskInterface._global_mapping, kernel_name("sdpa"))
        with pytest.raises(CaptureError, match="Got no form of mask for the kernel 'lavender_sdpa'"):
            install(model)

    def test_a_layer_that_answers_nothing_is_noticed(self, family, model, batch, readings):
        head = attach(model, AlignmentConfig())
        set_kernel(model, "sdpa")
        request = request_of(family, model, batch, readings, head.layers)
        with pytest.raises(CaptureError, match=r"Got no attention from layers \["):
            model(**batch, attention_request=request)

    @KINDS
    def test_rows_without_gradient_are_noticed(self, family, model, batch, readings, alignment):
        head = attach(model, AlignmentConfig(**alignment))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("alignment_head"))
        model.train()
        request = request_of(family, model, batch, readings, head.layers)
        with pytest.raises(CaptureError, match="Got attention rows without gradient while training"):
            model(**batch, attention_request=request)
        head.vlm_is_frozen = True
        assert model(**batch, attention_request=request_of(family, model, batch, readings, head.layers)).attention_loss

    def test_keys_without_boxes_are_noticed(self, family, model, batch, readings):
        head = attach(model, AlignmentConfig())
        request = request_of(family, model, batch, readings, head.layers)
        layout = request.layout
        if layout.views is None:
            request.layout = layout._replace(boxes=layout.boxes[:, :-1])
        else:
            request.layout = layout._replace(boxes=layout.boxes[:, :-1] if layout.boxes.shape[1] > 1 else layout.boxes)
        with pytest.raises(CaptureError):
            model(**batch, attention_request=request)
        request = request_of(family, model, batch, readings, head.layers)
        request.layout = request.layout._replace(pictures=request.layout.pictures[:, :-1])
        with pytest.raises(CaptureError, match=r"Expected a box for each key\."):
            model(**batch, attention_request=request)

    def test_another_number_of_pictures_is_noticed(self, family, model, batch, readings):
        adapter = adapter_for(model.config)
        sizes = [[(one.image.height, one.image.width)] for one in readings]
        with pytest.raises(LavenderError):
            adapter.key_tensors(batch, [sizes[0] * 2, *sizes[1:]], family.processor)
        with pytest.raises(LavenderError):
            adapter.key_tensors(batch, [[], *sizes[1:]], family.processor)

    def test_keys_of_another_batch_are_noticed(self, family, model, batch, readings):
        head = attach(model, AlignmentConfig())
        request = request_of(family, model, batch, readings, head.layers)
        if request.keys_BK is None:  # the layer's keys are all of pictures: the layout tells
            assert request.layout.pictures.shape[1] > 0
            request.layout = request.layout._replace(pictures=torch.zeros(3, 7, dtype=torch.long))
        else:
            request.keys_BK = request.keys_BK + batch["input_ids"].shape[1]
        with pytest.raises(CaptureError):
            model(**batch, attention_request=request)

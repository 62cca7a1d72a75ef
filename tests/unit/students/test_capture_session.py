"""A model answers requests while it has a session: one at a time, left without a trace, and of the model alone."""

from __future__ import annotations

import copy

import pytest
import torch

from lavender.alignment.objective import HEAD_NAME, attach, detach
from lavender.config import AlignmentConfig
from lavender.errors import CaptureError, ConfigError
from lavender.students.capture import AttentionRequest, CaptureSession, capturing
from lavender.students.loading import load_run
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture, processor_inputs
from lavender.world import STUDENT_PATHS
from lavender.world.scenes import scenes


@pytest.fixture(params=["mllama", "llava"])
def student(request):
    return load_run(STUDENT_PATHS[request.param])


def kernel_of(model) -> str:
    return model.config.get_text_config()._attn_implementation


def test_one_session_at_a_time(student):
    model, _ = student
    with capturing(model):
        session = CaptureSession.of(model)
        with capturing(model):
            assert CaptureSession.of(model) is session
        assert CaptureSession.of(model) is session
        assert kernel_of(model) == "lavender_sdpa"
        with pytest.raises(CaptureError, match="Got a model that answers attention requests already"):
            attach(model, AlignmentConfig())
        assert HEAD_NAME not in dict(model.named_children())
    assert CaptureSession.of(model) is None
    assert kernel_of(model) == "sdpa"
    assert not model._forward_pre_hooks


def test_maps_leave_a_model_in_alignment_attached(student):
    model, _ = student
    attach(model, AlignmentConfig())
    session = CaptureSession.of(model)
    with capturing(model):
        assert CaptureSession.of(model) is session
    assert CaptureSession.of(model) is session
    assert kernel_of(model) == "lavender_sdpa"


def test_a_session_keeps_no_request(student):
    """Its rows would stay in memory, and every copy of the model would hold them."""
    model, processor = student
    scene = next(iter(scenes("development", 1)))
    inputs = processor_inputs(processor, [AnsweredPicture(scene.image, "what is it?", "a dog", ())])
    adapter = adapter_for(model.config)
    request = AttentionRequest(torch.tensor([[3]]), adapter.usable_layers(), adapter.image_keys(inputs))
    with capturing(model):
        model(**inputs, attention_request=request)
        assert request.rows
        assert not any(value is request for value in vars(CaptureSession.of(model)).values())
        copy.deepcopy(model)  # rows with gradients cannot be copied


def test_a_copy_of_the_head_copies_no_model(student):
    """PEFT copies what it is told to save beside LoRA (`modules_to_save`)."""
    model, _ = student
    head = attach(model, AlignmentConfig(attention_loss="published", pooling="learn"))
    sizes = [sum(one.numel() for one in module.parameters()) for module in (head, copy.deepcopy(head))]
    assert sizes[0] == sizes[1]
    assert CaptureSession.of(head) is None


def test_detach_needs_a_model_with_a_head(student):
    model, _ = student
    with pytest.raises(ConfigError, match="Got a model without an alignment head"):
        detach(model)
    attach(model, AlignmentConfig())
    detach(model)
    with pytest.raises(ConfigError, match="Got a model without an alignment head"):
        detach(model)

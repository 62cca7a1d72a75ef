"""Decoder layers that torch.compile has compiled: the same rows, losses and gradients as without.

Capture itself stays outside the compiled graph: it stores rows in the request. The compiler is Dynamo with AOTAutograd,
without the code generator behind them, which takes minutes.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lavender.students.capture import AttentionRequest
from lavender.students.kernels import install
from unit.students.test_kernels import MODELS, batch_of, name_kernel, request_of


def step(model: Any, kernel: str, kind: str) -> tuple[Tensor, AttentionRequest, dict[str, Tensor]]:
    name_kernel(model, kernel)
    install(model)
    batch, request = batch_of(kind), request_of(batch_of(kind))
    logits = model(**batch, use_cache=False, attention_request=request).logits
    (logits.square().mean() + request.stacked().square().sum()).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return logits, request, gradients


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch._dynamo looks at it itself
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("kernel", "kind"), [("sdpa", "left"), ("eager", "left"), ("sdpa", "positions")])
def test_compiled_layers_answer_as_others(kernel, kind, checkpointed):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(3)
    model = MODELS["grouped"]().train()
    compiled = copy.deepcopy(model)
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager")
    if checkpointed:
        compiled.gradient_checkpointing_enable({"use_reentrant": False})
    logits, request, gradients = step(model, kernel, kind)
    found, answered, theirs = step(compiled, kernel, kind)
    # the compiler may fuse and reorder sums
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answered.stacked(), request.stacked(), rtol=1e-5, atol=1e-6)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    # capture cuts the graph, and within a checkpoint the compiler gives a layer up that it would have to cut
    assert (torch._dynamo.utils.counters["stats"]["calls_captured"] > 0) != checkpointed

"""A checkpoint is of the loss that goes on."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lavender.errors import ConfigError
from lavender.training.checkpoints import check_alignment_parts

PLAIN, WITH_ALIGNER = (
    {"layer.weight": torch.zeros(2, 2)},
    {"layer.weight": torch.zeros(2, 2), "alignment_head.aligner.0.weight": torch.zeros(1)},
)


def model(has_aligner: bool) -> nn.Module:
    parts = {"layer": nn.Linear(2, 2)} | ({"alignment_head": nn.Linear(1, 1)} if has_aligner else {})
    return nn.ModuleDict(parts)


@pytest.mark.parametrize("has_aligner", [True, False])
def test_the_same_loss(tmp_path, has_aligner):
    check_alignment_parts(str(tmp_path), model(has_aligner))  # a checkpoint of FSDP or DeepSpeed
    save_file(WITH_ALIGNER if has_aligner else PLAIN, tmp_path / "model.safetensors")
    check_alignment_parts(str(tmp_path), model(has_aligner))


def test_another_loss(tmp_path):
    save_file(WITH_ALIGNER, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="with an Aligner, but this loss has none.*'published' was the default"):
        check_alignment_parts(str(tmp_path), model(False))
    save_file(PLAIN, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="without an Aligner, but this loss has one"):
        check_alignment_parts(str(tmp_path), model(True))

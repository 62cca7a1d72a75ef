"""Checkpoints during training: the counts that a resumed run goes on with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

COUNTS_FILE = "coverage_counts.json"
"""What a run had counted when it wrote a checkpoint, in the checkpoint's folder."""


def write_counts(accelerator: Accelerator, counts: Tensor, folder: str) -> None:
    """Write the sum over processes of what was counted, and wait until every process has written its part.

    The main process alone writes what makes a checkpoint complete; it may do so after this.
    """
    total = accelerator.gather(counts.to(accelerator.device)[None]).sum(dim=0)
    if accelerator.is_main_process:
        (Path(folder) / COUNTS_FILE).write_text(json.dumps(total.tolist()))
    accelerator.wait_for_everyone()


def read_counts(accelerator: Accelerator, counts: Tensor, folder: str | None) -> Tensor:
    """The counts with those of a checkpoint added, on the main process alone: they are summed at the end."""
    path = Path(folder or "") / COUNTS_FILE
    if folder is None or not accelerator.is_main_process or not path.is_file():
        return counts
    saved = json.loads(path.read_text())
    saved += [0] * (len(counts) - len(saved))  # of reasons that an older version did not know
    return counts + torch.tensor(saved, device=counts.device)

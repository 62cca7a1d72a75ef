"""metrics.jsonl: one line for each entry that the trainer logs, written as the run goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lavender.files import write_whole


class RunLog(TrainerCallback):
    """Appends what is logged to a file. When training begins or goes on, the file is what the trainer remembers.

    A checkpoint holds what was logged until it was written, so a resumed run has no line twice and misses none.
    """

    def __init__(self, path: Path):
        self._path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            write_whole(self._path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            with self._path.open("a") as lines:
                lines.write(json.dumps(state.log_history[-1]) + "\n")

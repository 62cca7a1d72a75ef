"""What both trainings of the world's weights share: schedule, averaged weights, checkpoints, log."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


def warmup_stable_decay(steps: int, warmup: int, decay_share: float = 0.25) -> Callable[[int], float]:
    """Linear warm-up, constant, then linear decay to zero over the last `decay_share` of the steps."""
    decay = max(1, round(steps * decay_share))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay))

    return factor


class Ema:
    """An exponential moving average of several modules' parameters."""

    def __init__(self, modules: dict[str, nn.Module], decay: float):
        self._parameters = {
            f"{name}.{key}": value for name, module in modules.items() for key, value in module.named_parameters()
        }
        self._average = {key: value.detach().clone() for key, value in self._parameters.items()}
        self._decay, self._updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self._updates += 1
        decay = min(self._decay, self._updates / (self._updates + 10))
        torch._foreach_lerp_(list(self._average.values()), list(self._parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the modules hold the average."""
        kept = {key: value.detach().clone() for key, value in self._parameters.items()}
        with torch.no_grad():
            for key, value in self._parameters.items():
                value.copy_(self._average[key])
        try:
            yield
        finally:
            with torch.no_grad():
                for key, value in self._parameters.items():
                    value.copy_(kept[key])

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state["average"].items():
            self._average[key].copy_(value)
        self._updates = state["updates"]


class Checkpoint:
    """Saves the state of a training every `every` steps and logs a smoothed loss curve beside it."""

    def __init__(self, path: Path, parts: dict[str, Any], every: int = 500):
        self._path, self._parts, self._every = path, parts, every
        self._smooth: dict[str, float] = {}
        self._seconds, self._ticked = 0.0, time.time()

    def load(self) -> int:
        """Restore the parts; the number of steps already done."""
        if not self._path.exists():
            return 0
        state = torch.load(self._path, weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._seconds = state["seconds"]
        return state["step"]

    def tick(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        now = time.time()
        self._seconds, self._ticked = self._seconds + now - self._ticked, now
        for name, value in metrics.items():
            self._smooth[name] = value + 0.98 * (self._smooth.get(name, value) - value)
        if step % 100 == 0 or step == steps:
            line = {
                "step": step,
                "seconds": round(self._seconds, 1),
                **{k: round(v, 5) for k, v in self._smooth.items()},
            }
            with self._path.with_suffix(".jsonl").open("a") as curve:
                curve.write(json.dumps(line) + "\n")
            log.info("%s %s", self._path.stem, line)
        if step % self._every == 0 or step == steps:
            state = {name: part.state_dict() for name, part in self._parts.items()}
            partial = self._path.with_suffix(".partial")
            torch.save(state | {"step": step, "seconds": self._seconds}, partial)
            partial.replace(self._path)

"""What the trainings of the world's weights share: scenes, schedule, averaged weights, updates and checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lavender.world.scenes import Scene, Style, draw_scene

log = logging.getLogger(__name__)
WARMUP_STEPS = 200
SAVE_STEPS, LOG_STEPS = 500, 100


def scene_batches(seeds: range, size: int, style: Style = "mixed") -> Iterator[list[Scene]]:
    """The scenes of the seeds, `size` at a time, in many hands unless the style says otherwise."""
    for start in range(0, len(seeds), size):
        yield [draw_scene(seed, style) for seed in seeds[start : start + size]]


def without_pixels(scenes: Iterable[Scene]) -> list[Scene]:
    """The scenes with empty pictures, which need less memory; captions do not depend on the picture."""
    return [replace(scene, pixels=np.empty((0, 0, 3), np.uint8)) for scene in scenes]


def warmup_stable_decay(steps: int, warmup: int = WARMUP_STEPS, decay_share: float = 0.25) -> Callable[[int], float]:
    """Learning-rate factor of a step: linear warm-up, constant, then linear decay over the last `decay_share`."""
    decay = max(1, round(steps * decay_share))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay))

    return factor


def millions(*modules: nn.Module) -> float:
    """The number of the modules' parameters, in millions."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters()) / 1e6


class Ema:
    """An exponential moving average of several modules' parameters."""

    def __init__(self, modules: Mapping[str, nn.Module], decay: float):
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
        """Inside this context the modules hold the averaged parameters."""
        trained = {key: value.detach().clone() for key, value in self._parameters.items()}
        self._set(self._average)
        try:
            yield
        finally:
            self._set(trained)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for key, parameter in self._parameters.items():
            parameter.copy_(values[key])

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state["average"].items():
            self._average[key].copy_(value)
        self._updates = state["updates"]


class TrainingLoop:
    """Updates the weights of one training, logs its metrics, and saves its state.

    The state is saved every `SAVE_STEPS` steps, PyTorch's random state included; a stopped training continues from the
    last saved one. Smoothed metrics
    of every `LOG_STEPS` steps are written beside it as JSON Lines.

    Args:
        path: where the state is saved.
        modules: name → what is trained.
        optimizer: of all their parameters.
        schedule: its learning-rate schedule.
        steps: the number of steps.
        ema: averaged weights to update after each step.
    """

    def __init__(
        self,
        path: Path,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        steps: int,
        ema: Ema | None = None,
    ):
        self._path, self._steps, self._done = path, steps, 0
        self._optimizer, self._schedule, self._ema = optimizer, schedule, ema
        self._parts: dict[str, Any] = {**modules, "optimizer": optimizer, "schedule": schedule}
        if ema is not None:
            self._parts["ema"] = ema
        self._smoothed: dict[str, float] = {}
        self._seconds, self._last_time = 0.0, time.time()

    def remaining(self) -> range:
        """Restore the saved state, if there is one; the steps that are left to do."""
        if self._path.exists():
            state = torch.load(self._path, weights_only=True)
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            self._seconds, self._done = state["seconds"], state["step"]
            torch.set_rng_state(state["rng"])
        return range(self._done, self._steps)

    def update(self, loss: Tensor, metrics: dict[str, float]) -> None:
        """One optimizer step on the loss, with gradients clipped to norm 1."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in self._optimizer.param_groups for p in group["params"]], 1.0)
        self._optimizer.step()
        self._schedule.step()
        if self._ema is not None:
            self._ema.update()
        self._done += 1
        self._record(metrics)

    def _record(self, metrics: dict[str, float]) -> None:
        now = time.time()
        self._seconds, self._last_time = self._seconds + now - self._last_time, now
        for name, value in metrics.items():
            self._smoothed[name] = value + 0.98 * (self._smoothed.get(name, value) - value)
        is_last = self._done == self._steps
        if self._done % LOG_STEPS == 0 or is_last:
            rounded = {name: round(value, 5) for name, value in self._smoothed.items()}
            line = {"step": self._done, "seconds": round(self._seconds, 1), **rounded}
            with self._path.with_suffix(".jsonl").open("a") as curve:
                curve.write(json.dumps(line) + "\n")
            log.info("%s %s", self._path.stem, line)
        if self._done % SAVE_STEPS == 0 or is_last:
            state = {name: part.state_dict() for name, part in self._parts.items()}
            partial = self._path.with_suffix(".partial")
            torch.save(state | {"step": self._done, "seconds": self._seconds, "rng": torch.get_rng_state()}, partial)
            partial.replace(self._path)

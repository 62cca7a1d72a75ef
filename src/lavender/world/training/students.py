"""Train the world's students: ordinary checkpoints of real classes, with processor.

Two stages, as real VLMs are made. First the vision tower learns to see: from each patch, which names
does the picture hold (a multiple-instance loss; no place is ever told). Then the whole model learns to
caption and to answer questions. It is stopped with room to improve.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavender.world.language import ask_about, caption_scene
from lavender.world.scenes import SPLITS, Scene, draw_scene
from lavender.world.sprites import NAMES
from lavender.world.student_models import CAPTION_PROMPT, STUDENTS, StudentFamily, text_batch
from lavender.world.training.common import Checkpoint, Ema, warmup_stable_decay

log = logging.getLogger(__name__)


class Pictures:
    """The scenes of consecutive seeds, their pixels already through the processor (float16)."""

    def __init__(self, processor, seeds: range):
        self.scenes: list[Scene] = []
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(seeds), 256):
            group = [draw_scene(seed) for seed in seeds[start : start + 256]]
            batch = dict(processor.image_processor([[scene.image] for scene in group], return_tensors="pt"))
            parts.append(
                {
                    key: value.half() if value.is_floating_point() else value
                    for key, value in batch.items()
                    if isinstance(value, Tensor)
                }
            )
            self.scenes += [Scene(one.seed, one.style, np.empty((0, 0, 3), np.uint8), one.things) for one in group]
        self._tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        chosen = {key: value[torch.from_numpy(indices)] for key, value in self._tensors.items()}
        return chosen | {"pixel_values": chosen["pixel_values"].float()}


class PatchNames(nn.Module):
    """Which names does a picture hold, read from its patches: log-sum-exp over patches, one logit a name."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, len(NAMES))
        nn.init.constant_(self.linear.bias, -6.0)

    def forward(self, states: Tensor, shown: Tensor) -> Tensor:
        """`states` (image, patch, width), `shown` bool (image, patch) → (image, name)."""
        logits = self.linear(self.norm(states)).masked_fill(~shown[..., None], -1e4)
        return logits.logsumexp(dim=1)


def train_vision(
    work: Path, family: StudentFamily, model, pictures: Pictures, steps: int, batch: int, seed: int
) -> None:
    """Stage one: vision tower and projector learn which names each picture holds."""
    torch.manual_seed(seed)
    head = PatchNames(model.config.text_config.hidden_size)
    index_of = {name: index for index, name in enumerate(NAMES)}
    targets = torch.zeros(len(pictures.scenes), len(NAMES))
    for row, scene in enumerate(pictures.scenes):
        targets[row, [index_of[name] for name in scene.names]] = 1
    vision = nn.ModuleList(family.vision(model))
    parameters = [*vision.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(steps, 200))
    parts = {"vision": vision, "head": head, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Checkpoint(work / "student_vision.pt", parts)
    for step in range(checkpoint.load(), steps):
        chosen = np.random.default_rng([seed, 1, step]).integers(len(pictures.scenes), size=batch)
        inputs = pictures.batch(chosen)
        logits = head(*family.patches(model, inputs))
        loss = F.binary_cross_entropy_with_logits(logits, targets[chosen], reduction="sum") / batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([one for one in parameters if one.grad is not None], 1.0)
        optimizer.step()
        schedule.step()
        found = (logits.detach() > 0).float()
        agreement = 2 * (found * targets[chosen]).sum() / (found.sum() + targets[chosen].sum())
        checkpoint.tick(step + 1, steps, {"bce": loss.item(), "f1": agreement.item()})


def train_language(
    work: Path, family: StudentFamily, model, processor, pictures: Pictures, steps: int, batch: int, seed: int
) -> Ema:
    """Stage two: everything learns to caption (three of four samples) and to answer questions."""
    torch.manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(steps, 200))
    ema = Ema({"model": model}, decay=0.995)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    checkpoint = Checkpoint(work / "student.pt", parts)
    model.train()
    for step in range(checkpoint.load(), steps):
        rng = np.random.default_rng([seed, 2, step])
        chosen = rng.integers(len(pictures.scenes), size=batch)
        images = pictures.batch(chosen)
        pairs = []
        for index in chosen:
            if rng.random() < 0.75:
                pairs.append((CAPTION_PROMPT, caption_scene(pictures.scenes[index], variant=step).text))
            else:
                questions = ask_about(pictures.scenes[index], variant=step)
                one = questions[int(rng.integers(len(questions)))]
                pairs.append((one.question, one.answer))
        loss = model(**images, **text_batch(family, processor, pairs, images)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update()
        checkpoint.tick(step + 1, steps, {"loss": loss.item()})
    return ema


def train_student(
    name: str, work: Path, out: Path, vision_steps: int, steps: int, num_scenes: int, batch: int = 32, seed: int = 0
) -> Path:
    """Train a base of the named family; an ordinary checkpoint with processor in `out`, half precision."""
    work.mkdir(parents=True, exist_ok=True)
    began, family = time.time(), STUDENTS[name]
    seeds = SPLITS["pretrain"][:num_scenes]
    few = [draw_scene(one) for one in seeds[:1500]]
    processor = family.build_processor(
        [caption_scene(one, v).text for one in few for v in (0, 1)] + [CAPTION_PROMPT] * 50
    )
    torch.manual_seed(seed)
    model = family.build_model(processor)
    log.info("%s: %.2f M parameters", name, sum(p.numel() for p in model.parameters()) / 1e6)
    pictures = Pictures(processor, seeds)
    log.info("%d pictures in %.0f s", num_scenes, time.time() - began)
    train_vision(work, family, model, pictures, vision_steps, batch, seed)
    ema = train_language(work, family, model, processor, pictures, steps, batch, seed)
    with ema.applied():
        model.half().save_pretrained(out)
    processor.save_pretrained(out)
    log.info("%s done in %.0f s", name, time.time() - began)
    return out

"""Train the world's students: ordinary checkpoints of real classes, with their processors.

As for real VLMs there are two stages. First the vision tower and the projector learn which names a picture shows, by a
multiple-instance loss over patches that gets no location. Then the whole model learns to caption and to answer
questions. Training stops early on purpose, so that fine-tuning can still improve the model.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavender.world.language import ask_about, caption_scene
from lavender.world.scenes import SPLITS, Scene, Style
from lavender.world.sprites import NAMES
from lavender.world.student_models import CAPTION_PROMPT, STUDENTS, StudentFamily, text_batch
from lavender.world.training.common import (
    Ema,
    TrainingLoop,
    millions,
    scene_batches,
    warmup_stable_decay,
    without_pixels,
)

log = logging.getLogger(__name__)


class Pictures:
    """The scenes of consecutive seeds, with the image processor's tensors in place of their pixels (float16)."""

    def __init__(self, processor, seeds: range, style: Style):
        self.seeds, self.style = seeds, style
        self.scenes: list[Scene] = []
        parts: list[dict[str, Tensor]] = []
        for group in scene_batches(seeds, 256, style):
            batch = dict(processor.image_processor([[scene.image] for scene in group], return_tensors="pt"))
            parts.append(
                {
                    key: value.half() if value.is_floating_point() else value
                    for key, value in batch.items()
                    if isinstance(value, Tensor)
                }
            )
            self.scenes += without_pixels(group)
        self._tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The model's image inputs of these scenes, float32."""
        chosen = {key: value[torch.from_numpy(indices)] for key, value in self._tensors.items()}
        return chosen | {"pixel_values": chosen["pixel_values"].float()}


class PatchNames(nn.Module):
    """Predicts which names a picture shows: one logit per name, by log-sum-exp over the patches' logits."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, len(NAMES))
        nn.init.constant_(self.linear.bias, -6.0)

    def forward(self, states: Tensor, shown: Tensor) -> Tensor:
        """Logits, (image, name), of `states` (image, patch, width). `shown`, bool (image, patch), selects patches."""
        logits = self.linear(self.norm(states)).masked_fill(~shown[..., None], -1e4)
        return logits.logsumexp(dim=1)


def train_vision(
    work: Path,
    family: StudentFamily,
    model,
    pictures: Pictures,
    steps: int,
    batch: int,
    seed: int,
    paste_weight: float = 0.0,
) -> None:
    """The first stage: vision tower and projector learn which names each picture shows.

    Args:
        paste_weight: weight of `paste_loss`. 0 leaves it out.
    """
    torch.manual_seed(seed)
    head = PatchNames(model.config.text_config.hidden_size)
    index_of = {name: index for index, name in enumerate(NAMES)}
    targets = torch.zeros(len(pictures.scenes), len(NAMES))
    for row, scene in enumerate(pictures.scenes):
        targets[row, [index_of[name] for name in scene.names]] = 1
    vision = nn.ModuleList(family.vision(model))
    optimizer = torch.optim.AdamW([*vision.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(steps))
    modules = {"vision": vision, "head": head}
    loop = TrainingLoop(work / "student_vision.pt", modules, optimizer, schedule, steps)
    for step in loop.remaining():
        chosen = np.random.default_rng([seed, 1, step]).integers(len(pictures.scenes), size=batch)
        inputs = pictures.batch(chosen)
        states, shown = family.patches(model, inputs)
        logits = head(states, shown)
        loss = F.binary_cross_entropy_with_logits(logits, targets[chosen], reduction="sum") / batch
        predicted = (logits.detach() > 0).float()
        f1 = 2 * (predicted * targets[chosen]).sum() / (predicted.sum() + targets[chosen].sum())
        metrics = {"bce": loss.item(), "f1": f1.item()}
        if paste_weight:
            pasted = paste_loss(family, model, inputs, states, np.random.default_rng([seed, 3, step]))
            loss = loss + paste_weight * pasted
            metrics["paste"] = pasted.item()
        loop.update(loss, metrics)


def paste_loss(
    family: StudentFamily, model, inputs: dict[str, Tensor], states: Tensor, rng: np.random.Generator
) -> Tensor:
    """How much patch states depend on what is far from them: a loss that keeps a thing's evidence in its patches.

    A random rectangle of each picture is pasted into the next picture of the batch. Patches inside the rectangle should
    have the states that they have in their own picture. No location of a thing is used.

    Args:
        inputs: the model's image inputs; `pixel_values` are square pictures, (image, 3, side, side).
        states: the patch states of these pictures, (image, patch, width), patches row by row.

    Returns:
        The mean squared difference of the normalised states, a scalar: 0 for a tower that looks at single patches.
    """
    pixels = inputs["pixel_values"]
    side = math.isqrt(states.shape[1])
    size = pixels.shape[-1] // side  # pixels per side of a patch
    height, width = rng.integers(side // 2, side - 1, size=2)
    top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
    rows, columns = slice(top * size, (top + height) * size), slice(left * size, (left + width) * size)
    pasted = pixels.roll(1, dims=0)
    pasted[:, :, rows, columns] = pixels[:, :, rows, columns]
    there, _ = family.patches(model, {**inputs, "pixel_values": pasted})
    difference = F.layer_norm(there, there.shape[-1:]) - F.layer_norm(states, states.shape[-1:])
    inside = difference.unflatten(1, (side, side))[:, top : top + height, left : left + width]
    return inside.square().mean()


def train_language(
    path: Path,
    family: StudentFamily,
    model,
    processor,
    pictures: Pictures,
    steps: int,
    batch: int,
    seed: int,
    names: Collection[str],
) -> Ema:
    """The second stage: the model learns to caption (three of four samples) and to answer questions.

    Args:
        path: where the state is saved.
        names: the names that occur. Scenes that show another one are left out.
    """
    torch.manual_seed(seed + 1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(steps))
    usable = np.array([index for index, scene in enumerate(pictures.scenes) if set(scene.names) <= set(names)])
    log.info("%d of %d scenes show only the %d names", len(usable), len(pictures.scenes), len(names))
    ema = Ema({"model": model}, decay=0.995)
    loop = TrainingLoop(path, {"model": model}, optimizer, schedule, steps, ema)
    model.train()
    for step in loop.remaining():
        rng = np.random.default_rng([seed, 2, step])
        chosen = usable[rng.integers(len(usable), size=batch)]
        images = pictures.batch(chosen)
        pairs = []
        for index in chosen:
            if rng.random() < 0.75:
                pairs.append((CAPTION_PROMPT, caption_scene(pictures.scenes[index], variant=step).text))
            else:
                questions = ask_about(pictures.scenes[index], step, names)
                asked = questions[int(rng.integers(len(questions)))]
                pairs.append((asked.question, asked.answer))
        loss = model(**images, **text_batch(family, processor, pairs, images)).loss
        loop.update(loss, {"loss": loss.item()})
    return ema


def train_student(
    name: str,
    work: Path,
    out: Path,
    family: str,
    vision_steps: int,
    steps: int,
    num_scenes: int,
    batch: int = 32,
    seed: int = 0,
    style: Style = "mixed",
    freeze_vision: bool = True,
    new_names: Collection[str] = (),
    paste_weight: float = 0.0,
) -> Path:
    """Train a student; write it to `out` as an ordinary checkpoint with its processor, float16.

    Students of the same family share pictures and vision stage, if their settings of these are the same.

    Args:
        name: the student's name, of its checkpoint and loss curve in the second stage.
        work: folder of checkpoints and loss curves of the family.
        out: folder of the weights.
        family: a family of `student_models.STUDENTS`.
        vision_steps, steps: optimizer steps of the first and of the second stage.
        num_scenes: training scenes, the first ones of the pretraining split.
        batch: samples per step.
        style: the style of the training scenes.
        freeze_vision: whether the second stage leaves vision tower and projector as they are.
        paste_weight: weight of `paste_loss` in the first stage.
        new_names: names that do not occur in the second stage, neither in pictures nor in texts.
    """
    work.mkdir(parents=True, exist_ok=True)
    began, parts = time.time(), STUDENTS[family]
    seeds = SPLITS["pretrain"][:num_scenes]
    first_scenes = [scene for group in scene_batches(seeds[:1500], 1500, style) for scene in group]
    captions = [caption_scene(scene, variant).text for scene in first_scenes for variant in (0, 1)]
    processor = parts.build_processor(captions + [CAPTION_PROMPT] * 50)
    torch.manual_seed(seed)
    model = parts.build_model(processor)
    log.info("%s: %.2f M parameters", name, millions(model))
    pictures = kept_pictures(work / "pictures.pt", processor, seeds, style)
    log.info("%d pictures after %.0f s", num_scenes, time.time() - began)
    train_vision(work, parts, model, pictures, vision_steps, batch, seed, paste_weight)
    if freeze_vision:
        for module in parts.vision(model):
            module.requires_grad_(False)
    names = [known for known in NAMES if known not in new_names]
    ema = train_language(work / f"{name}.pt", parts, model, processor, pictures, steps, batch, seed, names)
    with ema.applied():
        model.half().save_pretrained(out)
    processor.save_pretrained(out)
    log.info("%s done in %.0f s", name, time.time() - began)
    return out


def kept_pictures(path: Path, processor, seeds: range, style: Style) -> Pictures:
    """The pictures of the seeds: those saved at `path`, or else drawn and saved there."""
    if path.exists():
        saved = torch.load(path, weights_only=False)
        if (saved.seeds, saved.style) == (seeds, style):
            return saved
    pictures = Pictures(processor, seeds, style)
    torch.save(pictures, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
    return pictures

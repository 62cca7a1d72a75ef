"""Train the world's student: an ordinary `MllamaForConditionalGeneration` checkpoint with processor.

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
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from lavender.world.language import ask_about, caption_scene
from lavender.world.scenes import SPLITS, Scene, draw_scene
from lavender.world.sprites import NAMES
from lavender.world.training import Checkpoint, Ema, warmup_stable_decay

log = logging.getLogger(__name__)

CAPTION_PROMPT = "describe the picture."
TILE_SIZE, MAX_TILES = 64, 2
SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}{%- generation %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}{%- endgeneration %}"
    "{%- else %}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|image|>' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def build_processor(texts: list[str], vocabulary: int = 460) -> MllamaProcessor:
    """Llama-3.2-Vision's processor, small: byte-level BPE learned from `texts`, 64-pixel tiles, at most two."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>", model_max_length=512, padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    images = MllamaImageProcessorPil(size={"height": TILE_SIZE, "width": TILE_SIZE}, max_image_tiles=MAX_TILES)
    return MllamaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)


def build_student(processor: MllamaProcessor) -> MllamaForConditionalGeneration:
    """About 2 M parameters: 3 + 1 vision layers, 4 text layers of which two cross-attend, gates opened."""
    tokenizer = processor.tokenizer
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    vision = MllamaVisionConfig(
        hidden_size=96, num_hidden_layers=3, num_global_layers=1, attention_heads=4, intermediate_size=384,
        image_size=TILE_SIZE, patch_size=8, max_num_tiles=MAX_TILES, intermediate_layers_indices=[1],
        vision_output_dim=192, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    text = MllamaTextConfig(
        vocab_size=image_token, hidden_size=128, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, intermediate_size=384, cross_attention_layers=[1, 3],
        max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            parameter.data.fill_(0.7)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id
    )
    return model


class Pictures:
    """The scenes of consecutive seeds, their pixels already through the processor (float16)."""

    def __init__(self, processor: MllamaProcessor, seeds: range):
        self.scenes: list[Scene] = []
        parts: list[dict[str, torch.Tensor]] = []
        for start in range(0, len(seeds), 256):
            group = [draw_scene(seed) for seed in seeds[start : start + 256]]
            batch = processor.image_processor([[scene.image] for scene in group], return_tensors="pt")
            parts.append({
                "pixel_values": batch["pixel_values"].half(),
                "aspect_ratio_ids": batch["aspect_ratio_ids"],
                "aspect_ratio_mask": batch["aspect_ratio_mask"],
            })  # fmt: skip
            self.scenes += [Scene(one.seed, one.style, np.empty((0, 0, 3), np.uint8), one.things) for one in group]
        self._tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        chosen = {key: value[torch.from_numpy(indices)] for key, value in self._tensors.items()}
        return chosen | {"pixel_values": chosen["pixel_values"].float()}


def conversation(prompt: str, answer: str | None = None) -> list[dict]:
    """A user turn with one picture and, if given, the assistant's answer."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    return turns + ([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else [])


def text_batch(processor: MllamaProcessor, pairs: list[tuple[str, str]], num_tiles: list[int]) -> dict:
    """Token ids, cross-attention mask and labels (the answer's tokens only) of (prompt, answer) pairs."""
    tokenizer, rows = processor.tokenizer, []
    for prompt, answer in pairs:
        head = processor.apply_chat_template(conversation(prompt), add_generation_prompt=True)
        head_ids = tokenizer(head, add_special_tokens=False)["input_ids"]
        rows.append((head_ids, tokenizer(answer + "<|eot_id|>", add_special_tokens=False)["input_ids"]))
    length = max(len(head) + len(tail) for head, tail in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    for index, (head, tail) in enumerate(rows):
        size = len(head) + len(tail)
        ids[index, :size], attention[index, :size] = torch.tensor(head + tail), 1
        labels[index, len(head) : size] = torch.tensor(tail)
    spans = [get_cross_attention_token_mask(row, processor.image_token_id) for row in ids.tolist()]
    mask = convert_sparse_cross_attention_mask_to_dense(spans, [[n] for n in num_tiles], MAX_TILES, length)
    return {
        "input_ids": ids, "attention_mask": attention, "labels": labels,
        "cross_attention_mask": torch.from_numpy(mask),
    }  # fmt: skip


class PatchNames(nn.Module):
    """Which names does a picture hold, read from its patches: log-sum-exp over patches, one logit a name."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, len(NAMES))
        nn.init.constant_(self.linear.bias, -6.0)

    def forward(self, states: torch.Tensor, tile_mask: torch.Tensor) -> torch.Tensor:
        """`states` (images, tiles, 1 + patches, width), `tile_mask` (images, tiles) → (images, names)."""
        logits = self.linear(self.norm(states[:, :, 1:]))
        logits = logits.masked_fill(tile_mask[:, :, None, None] == 0, -1e4)
        return logits.flatten(1, 2).logsumexp(dim=1)


def train_vision(work: Path, model, pictures: Pictures, steps: int, batch: int, seed: int) -> None:
    """Stage one: vision tower and projector learn which names each picture holds."""
    torch.manual_seed(seed)
    head = PatchNames(model.config.text_config.hidden_size)
    index_of = {name: index for index, name in enumerate(NAMES)}
    targets = torch.zeros(len(pictures.scenes), len(NAMES))
    for row, scene in enumerate(pictures.scenes):
        targets[row, [index_of[name] for name in scene.names]] = 1
    tower, projector = model.model.vision_model, model.model.multi_modal_projector
    parameters = [*tower.parameters(), *projector.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_stable_decay(steps, 200))
    parts = {"tower": tower, "projector": projector, "head": head, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Checkpoint(work / "student_vision.pt", parts)
    for step in range(checkpoint.load(), steps):
        chosen = np.random.default_rng([seed, 1, step]).integers(len(pictures.scenes), size=batch)
        inputs = pictures.batch(chosen)
        states = projector(tower(**inputs).last_hidden_state).flatten(0, 1)
        logits = head(states, inputs["aspect_ratio_mask"][:, 0])
        loss = F.binary_cross_entropy_with_logits(logits, targets[chosen], reduction="sum") / batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        found = (logits.detach() > 0).float()
        agreement = 2 * (found * targets[chosen]).sum() / (found.sum() + targets[chosen].sum())
        checkpoint.tick(step + 1, steps, {"bce": loss.item(), "f1": agreement.item()})


def train_language(work: Path, model, processor, pictures: Pictures, steps: int, batch: int, seed: int) -> Ema:
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
        texts = text_batch(processor, pairs, images["aspect_ratio_mask"][:, 0].sum(-1).tolist())
        loss = model(**images, **texts).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update()
        checkpoint.tick(step + 1, steps, {"loss": loss.item()})
    return ema


def train_student(
    work: Path, out: Path, vision_steps: int, steps: int, num_scenes: int, batch: int = 32, seed: int = 0
) -> Path:
    """Train the base and write an ordinary checkpoint with processor to `out` (safetensors, half precision)."""
    work.mkdir(parents=True, exist_ok=True)
    began = time.time()
    seeds = SPLITS["pretrain"][:num_scenes]
    few = [draw_scene(seed) for seed in seeds[:1500]]
    processor = build_processor([caption_scene(one, v).text for one in few for v in (0, 1)] + [CAPTION_PROMPT] * 50)
    torch.manual_seed(seed)
    model = build_student(processor)
    log.info("student %.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    pictures = Pictures(processor, seeds)
    log.info("%d pictures in %.0f s", num_scenes, time.time() - began)
    train_vision(work, model, pictures, vision_steps, batch, seed)
    ema = train_language(work, model, processor, pictures, steps, batch, seed)
    with ema.applied():
        model.half().save_pretrained(out)
    processor.save_pretrained(out)
    log.info("student done in %.0f s", time.time() - began)
    return out

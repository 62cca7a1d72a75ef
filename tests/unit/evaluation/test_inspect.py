"""`lavender inspect`: each family from its config alone, a folder with a processor, a checkpoint; and the estimate."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import dynamic_module_utils

from command_line import complaint, lavender
from families.published_configs import PUBLISHED, UNSUPPORTED
from lavender.alignment.losses import per_word_loss
from lavender.alignment.objective import AlignmentHead, AlignmentRequest
from lavender.alignment.pooling import pooled
from lavender.cli import inspect as terminal
from lavender.cli import main
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.config import AlignmentConfig
from lavender.evaluation import memory as footprint
from lavender.students.capture import row_tensors
from lavender.students.families.llava import LlavaAdapter
from lavender.students.image_keys import KeyLayout, grid_boxes, to_grid, word_attention
from lavender.students.registry import FAMILIES, adapter_for

WORDS = ["cat", "green", "eyes", "long", "whiskers"]


@pytest.fixture(scope="module")
def mllama(make_student, processor, tmp_path_factory) -> Path:
    """A folder with a small Mllama's config and processor, without weights."""
    path = tmp_path_factory.mktemp("mllama")
    make_student().config.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def write_config(folder: Path, family: str) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": family} | PUBLISHED[family][0]))
    return folder


@pytest.mark.parametrize("family", sorted(PUBLISHED))
def test_a_published_config_of_each_family(family, tmp_path):
    """The number of parameters is that of the published checkpoint: the modules are the right ones."""
    ran = lavender("inspect", write_config(tmp_path, family))
    assert ran.code == DONE, ran.err
    facts = json.loads(ran.out)
    layers = {"mllama": 8, "idefics": 8, "open_flamingo": 8}.get(family, facts["layers"])
    assert len(facts["usable_layers"]) == layers <= facts["layers"]
    assert facts["family"] == family
    page = terminal.as_text(facts)
    assert facts["class"] in page
    assert max(map(len, page.splitlines())) <= 80
    if family == "minicpmv":
        assert facts["parameters"] is facts["memory"] is None
        assert "the model comes with its own code; read the code, then add --trust-remote-code" in " ".join(
            page.split()
        )
        return
    assert facts["bytes_in_bfloat16"] == 2 * facts["parameters"]
    assert round(facts["parameters"] / 1e9, 2) == PUBLISHED[family][1]
    assert f"{facts['parameters']:,}" in page
    assert "No words of a sample: the folder has neither a processor nor a tokenizer" in " ".join(page.split())
    assert set(facts["memory"]["full"]) == set(facts["memory"]["lora"])
    assert all(value > 0 for arm in ("full", "lora") for value in facts["memory"][arm].values())
    assert facts["memory"]["published"] > 0
    assert facts["memory"]["learn"] > 0
    assert "published loss, in addition" in page


def test_a_config_that_leaves_what_is_asked_to_its_own_code(tmp_path):
    config = json.loads((write_config(tmp_path, "minicpmv") / "config.json").read_text())
    del config["query_num"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = complaint(lavender("inspect", tmp_path), WRONG_USAGE)
    assert "whose config leaves 'query_num' to that code" in line
    assert "--trust-remote-code" in line
    write_config(tmp_path, "minicpmv")
    assert "must run to draw maps" in complaint(
        lavender("inspect", tmp_path, "--picture", tmp_path / "x.png"), WRONG_USAGE
    )


def test_a_config_that_contradicts_itself(tmp_path):
    text = {"model_type": "qwen2", "num_hidden_layers": 6, "layer_types": ["full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl", "text_config": text}))
    assert "`num_hidden_layers` (6)" in complaint(lavender("inspect", tmp_path), FAILED)


def test_words_and_their_tokens_without_weights(mllama):
    facts = json.loads(lavender("inspect", mllama).out)
    sample = facts["sample"]
    assert sample["words"] == [one["word"] for one in sample["located"]] == WORDS
    assert ["".join(one["tokens"]).strip() for one in sample["located"]] == WORDS
    rows = [row for one in sample["located"] for row in one["rows"]]
    assert rows == sorted(set(rows))
    assert rows[-1] < sample["tokens"] - 1
    assert sample["image_keys"] == 2 * (1 + 8 * 8)  # both of its tiles, each with a class token
    assert "no image keys" not in facts["memory"]["assumptions"][0]
    page = terminal.as_text(facts)
    assert all(f"  {word} " in page for word in WORDS)
    assert "130 image keys" in page


def test_a_processor_that_cannot_be_used_is_no_failure(mllama, tmp_path):
    (tmp_path / "config.json").write_text((mllama / "config.json").read_text())
    (tmp_path / "processor_config.json").write_text("{")
    ran = lavender("inspect", tmp_path)
    assert ran.code == DONE
    assert json.loads(ran.out)["sample"]["missing"].startswith("the processor failed on a sample: ")


def test_a_checkpoint_draws_its_maps(make_student, mllama, processor, tmp_path):
    pytest.importorskip("skimage")
    make_student().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    ran = lavender("inspect", tmp_path / "model", "--picture", tmp_path / "maps.png", "--dtype", "bfloat16")
    assert ran.code == DONE, ran.err
    sample = json.loads(ran.out)["sample"]
    assert sample["words"] == WORDS
    assert sample["grid"] == [32, 32]
    assert sample["picture"] == str(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert f"drawn in {tmp_path / 'maps.png'}" in " ".join(terminal.as_text(json.loads(ran.out)).split())


def test_a_lora_run_is_that_of_its_base(make_student, mllama, processor, tmp_path):
    """Its checkpoint holds the adapter alone. The same of the folder of an adapter."""
    make_student().save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    lora = get_peft_model(make_student(), LoraConfig(target_modules=["q_proj"]))
    lora.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    lora.save_pretrained(str(tmp_path / "run" / "checkpoint"))
    processor.save_pretrained(tmp_path / "run" / "checkpoint")
    expected = json.loads(lavender("inspect", tmp_path / "base").out)
    for target in (tmp_path / "run", tmp_path / "run" / "checkpoint"):
        ran = lavender("inspect", target)
        assert ran.code == DONE, ran.err
        assert json.loads(ran.out) == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_terminal_gets_a_page(more, mllama, store_path):
    for target, first in (
        (mllama, "MllamaForConditionalGeneration, family mllama"),
        (store_path, "map store: 5 texts"),
    ):
        with contextlib.redirect_stdout(Terminal()) as out:
            assert main(["inspect", str(target), *more]) == DONE
        if more:
            assert json.loads(out.getvalue())["kind"] in ("model", "map store")
        else:
            assert out.getvalue().startswith(first)


@pytest.mark.parametrize(
    ("model_type", "reason", "do"),
    [("bert", "no vision part", "use a vision-language model"), (UNSUPPORTED, "", "docs/add-a-vlm.md")],
)
def test_models_without_an_adapter(model_type, reason, do, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    line = complaint(lavender("inspect", tmp_path), FAILED)
    assert repr(model_type) in line
    assert "qwen2_5_vl" in line
    assert reason in line
    assert do in line


def test_the_page_that_unsupported_models_point_to_is_there():
    docs = Path(__file__).parents[3] / "docs"
    assert "models.md" in (docs / "add-a-vlm.md").read_text()
    table = (docs / "models.md").read_text().partition("\n## Which models\n")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert set(PUBLISHED) <= listed <= set(FAMILIES)


def test_code_that_comes_with_a_model_runs_on_consent_alone(tmp_path, monkeypatch):
    """LLaVA's own classes, as if they came with the model; importing them leaves a mark."""
    folder, mark = tmp_path / "own", tmp_path / "ran"
    folder.mkdir()
    monkeypatch.setitem(FAMILIES, "own_llava", LlavaAdapter)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (folder / "configuration_own.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlavaConfig\nPath({str(mark)!r}).touch()\n"
        "class OwnConfig(LlavaConfig):\n    model_type = 'own_llava'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlavaForConditionalGeneration\nfrom .configuration_own import OwnConfig\n"
        "class OwnModel(LlavaForConditionalGeneration):\n    config_class = OwnConfig\n"
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "own_llava",
                "text_config": {"num_hidden_layers": 2, "model_type": "llama"},
                "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"},
            }
        )
    )
    line = complaint(lavender("inspect", folder), WRONG_USAGE)
    assert "--trust-remote-code" in line
    assert not mark.exists()
    ran = lavender("inspect", folder, "--trust-remote-code")
    assert mark.exists()
    assert ran.code == DONE, ran.err
    assert json.loads(ran.out)["class"] == "OwnModel"


def test_bytes_by_hand(make_student):
    """Four text layers, 128 wide with 8 heads of 16 and 4 key heads; four of the vision tower, 96 wide."""
    model = make_student()
    found = footprint.footprint(model, adapter_for(model.config), None, None)
    parameters = sum(one.numel() for one in model.parameters())
    lora = 4 * 8 * ((128 + 128) + (128 + 64)) + 4 * 8 * 2 * (96 + 96)
    assert found["lora_parameters"] == lora
    states = ("weights", "gradients", "optimiser")
    assert [found["full"][part] for part in states] == [4 * parameters, 4 * parameters, 8 * parameters]
    assert [found["full_16_bit"][part] for part in states] == [2 * parameters, 2 * parameters, 4 * parameters]
    assert [found["lora"][part] for part in states] == [2 * parameters + 4 * lora, 4 * lora, 8 * lora]
    text = model.config.get_text_config()
    # inputs of the layers, one layer's tensors, a tile of logits
    own = (
        256 * text.num_hidden_layers * 128,
        2 * 256 * (8 * 128 + 4 * text.intermediate_size),
        2 * 256 * text.vocab_size,
    )
    assert found["lora"]["activations"] == 2 * own[0] + own[1] + own[2]
    assert found["full"]["activations"] == 4 * own[0] + own[1] + own[2] + 4 * text.vocab_size * 128
    one_layer = 4 * 32 * 130 * 8  # rows, keys, heads
    kept = 4 * 16 * 130 * (2 * 2 + 1)  # words, keys, their rows on two layers, their maps
    assert found["full"]["alignment: default loss"] == kept + one_layer
    assert [part for part in found["full"] if "alignment" in part] == ["alignment: default loss"]
    assert found["published"] > 2 * one_layer + 4 * 16 * 32**2 * 2 * 8  # rows, and the maps of the heads alone
    assert found["learn"] == 16 * 2 * (128 * 128 + 128 * 64)  # two layers; keys are made from projected states
    assert "256 tokens per step, one picture of 130 image keys (from the config)" in found["assumptions"][0]


def test_the_default_loss_keeps_what_the_estimate_says():
    layers, heads, side, words = 3, 16, 24, footprint.NUM_WORDS
    tokens = footprint.TOKENS_PER_WORD
    tensors = row_tensors([[tuple(range(tokens * word, tokens * (word + 1))) for word in range(words)]])
    tensors |= {"boxes": grid_boxes(side, side)[None].float(), "targets": torch.rand(1, words, 32, 32)}
    tensors |= {"pictures": torch.zeros(1, side**2, dtype=torch.long)}
    request = AlignmentRequest(tuple(range(layers)), tensors)
    attention = torch.rand(layers, 1, heads, tokens * words, side**2).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        request.rows = dict(enumerate(attention.mean(dim=2, keepdim=True)))
        AlignmentHead(heads, tuple(range(layers)), AlignmentConfig())(request)
    held = sum(kept.values()) + sum(rows.nbytes for rows in request.rows.values())
    adapter = SimpleNamespace(usable_layers=lambda: range(layers))
    estimate = footprint._words(adapter, side**2)  # ty: ignore[invalid-argument-type]
    assert held == pytest.approx(estimate, rel=0.05)


def test_the_aligner_keeps_what_the_estimate_says():
    layers, heads, keys = 3, 16, 24 * 24
    words, rows = footprint.NUM_WORDS, footprint.NUM_WORDS * footprint.TOKENS_PER_WORD
    head = AlignmentHead(heads, tuple(range(layers)), AlignmentConfig(attention_loss="published"))
    assert head.aligner is not None
    attention = torch.rand(layers, 1, heads, rows, keys).requires_grad_()
    shares = torch.eye(words).repeat_interleave(footprint.TOKENS_PER_WORD, dim=1)[None] / footprint.TOKENS_PER_WORD
    layout = KeyLayout(grid_boxes(24, 24)[None].float(), torch.zeros(1, keys, dtype=torch.long))
    kept = {attention.data_ptr(): attention.nbytes}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = to_grid(word_attention(attention, shares), layout, torch.zeros(1, words, dtype=torch.long), (32, 32))
        found = pooled(maps.transpose(2, 3)[:, 0], "layer-mean", head.aligner)
        per_word_loss(found, torch.rand(words, 32, 32), "published").sum()
    adapter = SimpleNamespace(usable_layers=lambda: range(layers), num_heads=lambda: heads)
    estimate = footprint._rows(adapter, keys) + footprint._maps(adapter)  # ty: ignore[invalid-argument-type]
    assert sum(kept.values()) == pytest.approx(estimate, rel=0.15)


@pytest.mark.parametrize(
    ("count", "said"), [(12, "12 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (7.25e10, "72.5 GB")]
)
def test_sizes(count, said):
    assert terminal._size(count) == said


@pytest.mark.parametrize(
    ("numbers", "said"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0–2, 5"), ([3, 8, 13], "3, 8, 13")]
)
def test_ranges(numbers, said):
    assert terminal._ranges(numbers) == said

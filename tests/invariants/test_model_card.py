"""Model cards: what a card says of a run, of its exports and of a trainer; and the push of an export to a hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import MllamaForConditionalGeneration

from command_line import complaint, lavender
from hub_server import hub  # noqa: F401
from invariants.test_export import finished  # noqa: F401
from invariants.test_trainer import base, run, trained  # noqa: F401
from lavender import export
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.errors import DataError, FileError
from lavender.training.model_card import hub_id, model_card, run_card

CONFIG = {
    "model": "some/base-7B",
    "data": "some/captions",
    "lora": {"r": 8, "alpha": 32},
    "training": {"align_weight": 0.5, "attention_loss": "mass", "sharpen": 2.0, "learning_rate": 1e-5},
}
COUNTS = {"samples": 1200, "mapped_samples": 1100, "teachers": ["some/diffusion"]}
SCORES = {
    "samples": 64,
    "data": "/home/me/held-out",
    "arguments": {"data": "/home/me/held-out"},
    "arms": {"base": {"answer_nll": 1.5, "content_f1": None}, "tuned": {"answer_nll": 1.25, "content_f1": 0.5}},
}


def test_a_card_says_what_the_model_was_made_from():
    card = model_card(CONFIG, "tuned", True, {"step": 300, "vlm_loss": 0.75}, COUNTS, SCORES, "me/tuned")
    data = card.data.to_dict()
    assert (data["base_model"], data["datasets"]) == ("some/base-7B", ["some/captions"])
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    for said in (
        "[some/base-7B](https://huggingface.co/some/base-7B)",
        "[some/captions](https://huggingface.co/datasets/some/captions), 1,200 samples trained on, repeats counted",
        ", 1,100 of them with maps",
        "| teacher of the maps | [some/diffusion](https://huggingface.co/some/diffusion) |",
        "L_VLM + λ · L_att, λ = 0.5",
        "`mass`, maps to the power of 2.0",
        "an adapter: LoRA, r 8, alpha 32",
        "300, learning rate 1e-05",
        "vlm_loss 0.75",
        '"me/tuned"',
        "`lavender eval` on 64 samples of `held-out`:",
        "| tuned | 1.2500 | 0.5000 |",
        "| base | 1.5000 | – |",
        "arXiv:2502.06814",
        "github.com/huggingface/trl",
    ):
        assert said in card.content, said
    assert "/home/me" not in card.content
    assert "None" not in card.content


def test_a_card_of_folders_and_of_little_known():
    """No path of this computer, and no link to what is not on a hub."""
    config = {"model": "/home/me/models/base", "training": {"align_weight": 0}}
    card = model_card(config, "plain", False, {})
    assert "base_model" not in card.data.to_dict()
    assert "A fine-tuned version of `base`, trained by plain fine-tuning" in card.content
    assert "| data | not recorded |" in card.content
    assert "/home/me" not in card.content
    assert "(https://huggingface.co/" not in card.content


def test_a_folder_of_two_names_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/first") == "runs/first"
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert hub_id("runs/first") is None


def test_cards_of_a_run_and_its_exports(finished, places, tmp_path):  # noqa: F811
    adapter = ModelCard.load(finished / "checkpoint" / "README.md")
    assert adapter.data.library_name == "peft"
    assert f"An adapter of `{Path(places['model']).name}`" in adapter.content
    (teacher,) = json.loads((finished / "coverage.json").read_text())["teachers"]
    assert f"| teacher of the maps | `{teacher}` |" in adapter.content
    assert "λ = 0.5" in adapter.content
    merged = ModelCard.load(export(finished, tmp_path / "merged") / "README.md")
    assert merged.data.library_name == "transformers"
    assert "## Scores" not in merged.content
    assert str(finished.parent) not in merged.content + adapter.content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("coverage.json", '{"samples": 3,'),
        ("coverage.json", "[3]"),
        ("coverage.json", '{"samples": 3}'),
        ("eval.json", "{}"),
        ("metrics.jsonl", "3"),
        ("metrics.jsonl", "\u00fc".encode("latin-1")),
    ],
)
def test_a_damaged_file_of_a_run_is_an_error(name, content, finished, tmp_path):  # noqa: F811
    damaged = tmp_path / "run"
    shutil.copytree(finished, damaged)
    (damaged / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"damaged: .*run .* Do this: delete the damaged file"):
        export(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (damaged / name).unlink()
    if name == "coverage.json":
        with pytest.raises(FileError, match="no coverage.json: it is not finished"):
            export(damaged, tmp_path / "out")
        return
    assert (export(damaged, tmp_path / "out") / "README.md").is_file()


def test_a_local_path_is_no_hub_id_wherever_the_export_runs(finished, tmp_path, monkeypatch):  # noqa: F811
    """`models/student` is a folder where the run trained, and nothing where it is exported."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"model": "models/student", "data": "data/pics"}
    assert config["record"]["local"] == ["data"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    card = run_card(folder, is_adapter=True)
    assert "base_model" not in card.data.to_dict()
    assert "datasets" not in card.data.to_dict()
    assert "(https://huggingface.co/models" not in card.content
    assert "An adapter of `student`" in card.content
    config["record"]["content"]["model"] = "commit 0123"
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"trust_remote_code": True}))
    card = run_card(folder, is_adapter=True)
    assert card.data.to_dict()["base_model"] == "models/student"
    assert 'from_pretrained("models/student", trust_remote_code=True)' in card.content


def test_the_card_of_a_trainer(run, base, tmp_path):  # noqa: F811
    trainer = trained(run, base, "lora")
    trainer.create_model_card("mine", "some/captions", "a-tag")
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.data.tags is not None
    assert "a-tag" in card.data.tags
    assert card.data.datasets == ["some/captions"]
    assert f"An adapter of `{Path(base).name}`" in card.content
    assert "None" not in card.content
    assert "trust_remote_code" not in card.content


@pytest.mark.parametrize("part", ["model", "processor"])
def test_the_card_of_a_trainer_names_own_code(part, run, base, tmp_path, monkeypatch):  # noqa: F811
    trainer = trained(run, base, "lora")
    kind = type(trainer.model.get_base_model() if part == "model" else trainer.processing_class)
    monkeypatch.setattr(kind, "__module__", "transformers_modules.somebody.model")  # as of code that came with it
    trainer.create_model_card()
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.content.count(", trust_remote_code=True)") == 2  # the base and the processor


@pytest.mark.parametrize("option", [(), ("--adapter",)])
def test_an_export_is_uploaded_with_its_card(option, finished, hub, tmp_path):  # noqa: F811
    ran = lavender("export", finished, "--out", tmp_path / "out", "--push", "someone/model", "--json", *option)
    assert ran.code == DONE, ran.err
    assert json.loads(ran.out)["commit"] == f"{hub.url}/someone/model/commit/{'a' * 40}"
    assert (hub.made["organization"], hub.made["name"]) == ("someone", "model")
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert b'from_pretrained("someone/model")' in hub.files["README.md"] or option
    if option:
        assert "adapter_model.safetensors" in hub.files
    else:
        MllamaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_a_hub_that_refuses_is_asked_before_the_work(finished, hub, tmp_path):  # noqa: F811
    hub.refuses = True
    ran = lavender("export", finished, "--out", tmp_path / "out", "--push", "someone/model")
    assert "nothing was uploaded" in complaint(ran, FAILED)
    assert not (tmp_path / "out").exists()
    assert "--public without --push" in complaint(
        lavender("export", finished, "--out", tmp_path / "two", "--public"), WRONG_USAGE
    )


def test_no_repository_is_made_for_what_cannot_be_exported(finished, hub, tmp_path):  # noqa: F811
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for words, said, code in (
        ((tmp_path / "typo", "--out", tmp_path / "out"), "no checkpoint in", FAILED),
        ((finished, "--out", tmp_path / "full"), "which is not empty", WRONG_USAGE),
    ):
        assert said in complaint(lavender("export", *words, "--push", "someone/typo"), code)
    assert hub.made == {}

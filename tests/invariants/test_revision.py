"""An adapter of a base at another commit than the hub's main branch is merged into the weights of that commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

TUNE = """
import json, sys
import torch
from datasets import load_dataset
from peft import LoraConfig
from lavender import LavenderConfig, LavenderTrainer, export
from lavender.evaluation.harness.running import checkpoint_digest
from lavender.data.fingerprints import digest_of_model

torch.set_num_threads(1)
data, store, out = sys.argv[1:]
rows = load_dataset("parquet", data_files=data, split="train", cache_dir=out + "/cache")
args = LavenderConfig(
    output_dir=out + "/trainer", maps=store, max_steps=1, bf16=False, use_cpu=True, max_length=None, report_to="none",
    probe_size=0, learning_rate=0.0, disable_tqdm=True, model_init_kwargs={"revision": "EARLIER", "dtype": "float32"},
)
lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
trainer = LavenderTrainer("someone/base", args, train_dataset=rows, peft_config=lora)
trainer.train()
export(trainer, out + "/adapter", merge=False)
export(trainer, out + "/merged")
print("DIGESTS", digest_of_model("someone/base"), "and", checkpoint_digest("someone/base"))
"""
EARLIER, MAIN = "a" * 40, "b" * 40


def test_the_base_is_that_of_the_adapter(make_student, processor, dataset, store_path, tmp_path):
    """In the hub's cache, as a download leaves it: two commits with other weights. LoRA learns nothing at rate 0."""
    folder = tmp_path / "hub" / "models--someone--base"
    weights = {}
    for number, commit in enumerate((EARLIER, MAIN)):
        student = make_student()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += number
        student.save_pretrained(folder / "snapshots" / commit)
        processor.save_pretrained(folder / "snapshots" / commit)
        weights[commit] = load_file(folder / "snapshots" / commit / "model.safetensors")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(MAIN)
    dataset.select([0, 1]).to_parquet(tmp_path / "data.parquet")
    script = TUNE.replace("EARLIER", EARLIER)
    command = [sys.executable, "-c", script, str(tmp_path / "data.parquet"), str(store_path), str(tmp_path)]
    changed = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | changed)
    assert ran.returncode == 0, ran.stderr
    assert f"DIGESTS commit {MAIN} and someone/base at commit {MAIN}\n" in ran.stdout
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == weights[EARLIER].keys()
    assert [name for name, one in merged.items() if not torch.equal(one, weights[EARLIER][name])] == []
    assert [name for name, one in merged.items() if not torch.equal(one, weights[MAIN][name])]
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("someone/base", EARLIER)

"""Bases of studies: a trained vision tower beside random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from lavender.students.loading import load_run
from lavender.world import STUDENT_PATH
from lavender.world.student_models import new_beside_tower
from lavender.world.studies.attributes import STUDY
from lavender.world.studies.cells import base_path, prepare_base

TOWER = "model.vision_model."


def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def test_the_tower_is_kept_and_all_other_weights_are_new():
    trained, processor = load_run(STUDENT_PATH)
    model = new_beside_tower(trained, processor, 5)
    before, after = states(trained), states(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith(TOWER))
    others = [name for name in before if not name.startswith(TOWER)]
    assert {"model.multi_modal_projector.weight", "lm_head.weight"} <= set(others)
    assert not [name for name in others if torch.equal(after[name], before[name])]
    gates = [value for name, value in after.items() if name.endswith(("attn_gate", "mlp_gate")) and TOWER not in name]
    assert len(gates) == 4
    assert {round(float(gate), 4) for gate in gates} == {0.7}


def test_the_seed_decides_the_new_weights():
    trained, processor = load_run(STUDENT_PATH)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = states(new_beside_tower(trained, processor, 5))
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers stay"
    torch.manual_seed(4)
    again, other = (states(new_beside_tower(trained, processor, seed)) for seed in (5, 6))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_base_is_made_once(tmp_path: Path):
    arm = STUDY.arms(False)["binding-connecting recipe 3200"]
    path = base_path(tmp_path, arm)
    prepare_base(tmp_path, arm)
    model, _ = load_run(path)
    expected = states(new_beside_tower(*load_run(STUDENT_PATH), 0))
    assert all(torch.equal(value, expected[name]) for name, value in states(model).items())
    written = (path / "model.safetensors").stat().st_mtime_ns
    prepare_base(tmp_path, arm)
    assert (path / "model.safetensors").stat().st_mtime_ns == written
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]

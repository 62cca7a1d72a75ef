"""W&B, in its offline mode, and Trackio get both losses, attention mass and the probe's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from closeness import close
from invariants.test_trainer import logged, run  # noqa: F401

NAMES = ("vlm_loss", "attention_loss", "attention_mass", "probe_attention_mass")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_and_pictures(name, run, tmp_path, monkeypatch):  # noqa: F811
    """At the same steps. What the library is told is seen on its way, and its files are where it keeps them."""
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", tmp_path), ("TRACKIO_DIR", tmp_path)):
        monkeypatch.setenv(variable, str(value))
    library = pytest.importorskip(name, reason="the extra `track` is not installed")
    told: list[dict[str, Any]] = []
    log = library.sdk.wandb_run.Run.log if name == "wandb" else library.Run.log

    def listen(self: Any, *args: Any, **kwargs: Any) -> None:
        told.append(dict(args[0] if args else kwargs["metrics"]))
        log(self, *args, **kwargs)

    monkeypatch.setattr(library.sdk.wandb_run.Run if name == "wandb" else library.Run, "log", listen)
    trainer = run(max_steps=2, probe_size=8, probe_steps=1, report_to=name, output_dir=str(tmp_path / "out"))
    for one in NAMES:
        assert [entry[f"train/{one}"] for entry in told if f"train/{one}" in entry] == close(logged(trainer, one))
    pictures = [entry for entry in told if any(key.startswith("probe/") for key in entry)]
    assert [entry["train/global_step"] for entry in pictures] == [0, 1, 2]
    assert [len(entry) for entry in pictures] == [1 + 4] * 3
    assert len(files(tmp_path, ".png")) == 3 * 4


def files(folder: Path, ending: str) -> list[Path]:
    return [path for path in folder.rglob(f"*{ending}") if path.is_file() and "out" not in path.parts]

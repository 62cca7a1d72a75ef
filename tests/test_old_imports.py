"""Module paths from before the packages still work, with a warning that names the new ones."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

import pytest

import lavender
from lavender.data import samples
from lavender.students import base
from lavender.students.families import flamingo
from lavender.students.loading import load_run
from lavender.teachers.diffusion import stable_diffusion
from lavender.training import run, run_config, settings
from lavender.world.studies.registry import STUDIES


@pytest.fixture
def afresh():
    """No old module is imported before the test, and none stays."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if isinstance(module, lavender._OldModule):
            del sys.modules[name]


def imported(path: str) -> tuple[Any, list[str]]:
    """The module, and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        module = import_module(path)
    return module, [str(warning.message) for warning in caught]


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("lavender.run", "load_run", load_run),
        ("lavender.run", "RunConfig", run_config.RunConfig),
        ("lavender.run", "_prepared", run._prepared),
        ("lavender.run", "_training_keys", settings.training_keys),
        ("lavender.vlm.flamingo", "published", flamingo.published),
        ("lavender.vlm.base", "VlmAdapter", base.VlmAdapter),
        ("lavender.diffusion.unet", "StableDiffusion", stable_diffusion.StableDiffusion),
        ("lavender.studies.registry", "STUDIES", STUDIES),
    ],
)
def test_an_old_path_works_and_names_the_new_one(path, name, value):
    module, warned = imported(path)
    assert getattr(module, name) is value
    assert warned[-1].startswith(f"{path} is deprecated: use lavender.")


@pytest.mark.usefixtures("afresh")
def test_every_old_path_leads_somewhere():
    for old in lavender._MOVED:
        module, warned = imported(f"lavender.{old}")
        assert isinstance(module, lavender._OldModule), old
        assert all("is deprecated: use lavender." in text for text in warned)


@pytest.mark.usefixtures("afresh")
def test_what_is_set_at_an_old_path_counts_at_the_new_one(monkeypatch):
    old, _ = imported("lavender.run")
    monkeypatch.setattr(run, "_prepared", run._prepared)  # restores it
    old._prepared = 3
    assert run._prepared == 3


def test_packages_that_kept_their_names_are_no_old_paths():
    assert lavender.data.read_samples is samples.read_samples
    with pytest.raises(ModuleNotFoundError):
        import_module("lavender.dance")
    with pytest.raises(ModuleNotFoundError):
        imported("lavender.vlm.dance")

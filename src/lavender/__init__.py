"""Diffusion Instruction Tuning: fine-tune a vision-language model with the word maps of a diffusion model.

The public names are imported when first used, so `import lavender` is quick and loads no torch. What fewer users need
is in `lavender.training` and `lavender.config`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader

    from lavender.config import ExtractionConfig
    from lavender.data.samples import read_samples, to_dataset
    from lavender.data.store import MapStore
    from lavender.maps import WordMaps
    from lavender.students.word_maps import AnsweredPicture, student_maps
    from lavender.teachers.diffusion.teacher import Teacher
    from lavender.teachers.extract import extract
    from lavender.training.exporting import export
    from lavender.training.trainer import LavenderConfig, LavenderTrainer

    __version__: str

__all__ = [
    "AnsweredPicture",
    "ExtractionConfig",
    "LavenderConfig",
    "LavenderTrainer",
    "MapStore",
    "Teacher",
    "WordMaps",
    "export",
    "extract",
    "read_samples",
    "student_maps",
    "to_dataset",
]

_HOMES = {
    "AnsweredPicture": "lavender.students.word_maps",
    "ExtractionConfig": "lavender.config",
    "LavenderConfig": "lavender.training.trainer",
    "LavenderTrainer": "lavender.training.trainer",
    "MapStore": "lavender.data.store",
    "Teacher": "lavender.teachers.diffusion.teacher",
    "WordMaps": "lavender.maps",
    "export": "lavender.training.exporting",
    "extract": "lavender.teachers.extract",
    "read_samples": "lavender.data.samples",
    "student_maps": "lavender.students.word_maps",
    "to_dataset": "lavender.data.samples",
}

_OLD_NAMES = {
    "AlignmentArguments": ("lavender.training", "AlignmentArguments"),
    "AlignmentConfig": ("lavender.config", "AlignmentConfig"),
    "AlignmentMixin": ("lavender.training", "AlignmentMixin"),
    "Reading": ("lavender", "AnsweredPicture"),
}


def lazy_attributes(
    package: str,
    homes: Mapping[str, str],
    old_names: Mapping[str, tuple[str, str]] | None = None,
    computed: Mapping[str, Callable[[], Any]] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the module-level `__getattr__` and `__dir__` (PEP 562) of a package that imports its names when first used.

    Args:
        package: the package's `__name__`.
        homes: per public name, the module that defines it. No submodule of the package may have a public name:
            importing it would put the module in the place of the name.
        computed: per other name, the function that makes its value.
        old_names: per former name, the package and name to use instead. Using one gives a DeprecationWarning.
    """

    def get_attribute(name: str) -> Any:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        if computed and name in computed:
            return computed[name]()
        if old_names and name in old_names:
            home, new_name = old_names[name]
            warnings.warn(
                f"{package}.{name} is deprecated: use `from {home} import {new_name}`", DeprecationWarning, stacklevel=2
            )
            return getattr(import_module(home), new_name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def list_attributes() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *(computed or ())})

    return get_attribute, list_attributes


def _version() -> str:
    """The version; reading it takes longer than all the rest of `lavender --help`."""
    from importlib.metadata import version

    return version("lavender-vlm")


__getattr__, __dir__ = lazy_attributes(__name__, _HOMES, _OLD_NAMES, {"__version__": _version})


_MOVED = {
    "aligner": "alignment.aligner",
    "alignment_data": "alignment.collator alignment.examples students.capture",
    "alignment_mixin": "training.mixin",
    "annotations": "teachers.annotations",
    "annotations.extraction": "teachers.annotations.extract",
    "annotations.layout": "teachers.annotations.base",
    "annotations.names": "teachers.annotations.category_names",
    "arguments": "training.arguments",
    "attention": "students.word_maps students.capture",
    "checkpoints": "training.exporting",
    "comparison": "evaluation.compare",
    "demo": "world.demo",
    "diagnosis": "evaluation.check",
    "diffusion": "teachers.diffusion",
    "diffusion.frames": "teachers.diffusion.views",
    "diffusion.modes": "teachers.diffusion.denoising",
    "diffusion.sd3": "teachers.diffusion.stable_diffusion_3",
    "diffusion.unet": "teachers.diffusion.stable_diffusion",
    "diffusion.windows": "teachers.diffusion.text_windows",
    "evaluation.maps": "evaluation.map_scores",
    "evaluation.text": "evaluation.answers",
    "extraction": "teachers.extract",
    "footprint": "evaluation.memory",
    "grids": "students.image_keys",
    "images": "data.images",
    "inspection": "evaluation.inspect",
    "judgement": "evaluation.runs",
    "loading": "students.loading training.exporting",
    "locate": "students.locate",
    "losses": "alignment.losses",
    "metrics": "training.metrics",
    "objective": "alignment.objective",
    "pooling": "alignment.pooling students.image_keys",
    "probe": "training.probe",
    "processes": "training.distributed training.checkpoints",
    "report": "evaluation.report.page evaluation.report.figure",
    "run": "training.run training.run_config training.settings",
    "run_config": "training.run_config",
    "run_folder": "training.run_folder",
    "stages": "training.schedule",
    "store": "data.store data.store_writer data.store_format",
    "studies": "world.studies",
    "summary": "teachers.summary",
    "trainable": "training.trainable",
    "trainer": "training.trainer",
    "vlm": "students students.families",
    "weighting": "training.schedule",
}
"""Old module → the modules that hold its names now. A submodule that is not listed moved with its package."""


class _OldModule(ModuleType):
    """A module under its old name. It reads and sets names in the modules that hold them now."""

    def _home(self, name: str) -> tuple[ModuleType, str]:
        for home in vars(self).get("_homes", ()):
            for new_name in (name, name.removeprefix("_")):  # what was private may have become public
                if new_name in vars(home):
                    return home, new_name
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __getattr__(self, name: str) -> Any:
        return getattr(*self._home(name))

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            setattr(*self._home(name), value)
        except AttributeError:  # its own: `__path__`, or a submodule
            super().__setattr__(name, value)


class _OldImports:
    """Makes `import lavender.run` and other old paths work, with a DeprecationWarning.

    A finder and loader by its methods: the base classes of `importlib.abc` take long to import.
    """

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        homes = self._homes(fullname.removeprefix("lavender."))
        if not homes:
            return None
        return ModuleSpec(fullname, cast("Loader", self), loader_state=homes, is_package=True)

    def _homes(self, old: str) -> list[str]:
        if old in _MOVED:
            return [f"lavender.{home}" for home in _MOVED[old].split()]
        package, _, module = old.partition(".")
        homes = [f"lavender.{home}.{module}" for home in _MOVED.get(package, "").split() if module]
        return [home for home in homes if find_spec(home) is not None]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        homes = module.__spec__.loader_state
        vars(module)["_homes"] = [import_module(home) for home in homes]
        warnings.warn(f"{module.__name__} is deprecated: use {' or '.join(homes)}", DeprecationWarning, stacklevel=2)


sys.meta_path.append(cast("Any", _OldImports()))

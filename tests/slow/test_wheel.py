"""The sdist, and the wheel that is built from it, installed alone: complete, typed, running the demo offline."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from trove_classifiers import classifiers

from lavender.world.scenes import SPLITS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
GUARD = "from offline import no_network\n_guard = no_network()\n_guard.__enter__()\n"


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder of both, built with the installed hatchling, because an isolated build needs a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def in_sdist(dist) -> dict[str, bytes]:
    """The small files of the sdist, without its top folder."""
    (built,) = dist.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        return {
            member.name.partition("/")[2]: file.read() if member.size < 1_000_000 else b""
            for member in archive
            if (file := archive.extractfile(member)) is not None
        }


Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Python:
    """Runs Python with the installed wheel first on its path, an empty HOME, and no network even in child processes."""
    root = tmp_path_factory.mktemp("installed")
    target, guard, home = root / "target", root / "guard", root / "home"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    guard.mkdir()
    home.mkdir()
    (guard / "offline.py").write_bytes((ROOT / "tests" / "offline.py").read_bytes())
    (guard / "sitecustomize.py").write_text(GUARD)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": f"{guard}{os.pathsep}{target}",
        "LANG": "C.UTF-8",
    }

    def run(*arguments: str, timeout: int = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment, timeout=timeout)

    return run


def output_of(ran: subprocess.CompletedProcess[str]) -> str:
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran.stdout


def test_it_holds_every_module_and_weight_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    weights = "lavender/world/weights"
    for name in (
        "lavender/__init__.py",
        "lavender/py.typed",
        "lavender/evaluation/report/templates/report.html",
        f"{weights}/teacher/model_index.json",
        f"{weights}/teacher/unet/diffusion_pytorch_model.safetensors",
        f"{weights}/teacher/vae/diffusion_pytorch_model.safetensors",
        f"{weights}/teacher/text_encoder/model.safetensors",
        f"{weights}/student_mllama/model.safetensors",
        f"{weights}/student_mllama/processor_config.json",
        f"{weights}/student_mllama/tokenizer.json",
        f"{weights}/student_mllama/chat_template.jinja",
        f"{weights}/student_mllama_new_words/model.safetensors",
    ):
        assert name in names, name
    package = ROOT / "src" / "lavender"
    modules = {str(path.relative_to(package.parent)) for path in package.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lavender", "lavender_vlm"}
    assert not [name for name in names if "__pycache__" in name or ".tmp" in name]


def test_the_sdist_holds_what_tests_pages_and_make_need(in_sdist):
    for name in ("README.md", "LICENSE", "SECURITY.md", "Makefile", "constraints.txt", "zensical.toml", "PKG-INFO"):
        assert name in in_sdist, name
    for folder in ("src", "tests", "docs", "examples", "benchmarks"):
        tracked = subprocess.run(
            ["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True, check=True
        )
        missing = set(tracked.stdout.split("\0")) - {""} - set(in_sdist)
        assert not missing, sorted(missing)[:5]
    assert not [name for name in in_sdist if "__pycache__" in name or name.startswith((".venv", "build/"))]


def test_the_metadata_are_valid(in_sdist, wheel):
    """As an index checks them: fields and their forms, versions, classifiers; the README is the description."""
    archive = zipfile.ZipFile(wheel)
    (in_wheel,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    assert archive.read(in_wheel) == in_sdist["PKG-INFO"]
    metadata = Metadata.from_email(in_sdist["PKG-INFO"], validate=True)
    assert metadata.description == (ROOT / "README.md").read_text()
    assert metadata.description_content_type == "text/markdown"
    assert set(metadata.classifiers or ()) <= classifiers
    assert metadata.requires_python is not None
    supported = {one.rpartition(" ")[2] for one in metadata.classifiers or () if re.search(r"Python :: 3\.\d+$", one)}
    assert {version for version in ("3.10", "3.11", "3.12", "3.13") if metadata.requires_python.contains(version)} == (
        supported
    )


def test_its_metadata_names_the_command_and_the_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "lavender = lavender.cli:main" in archive.read(entry_points).decode()
    assert [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]


def test_it_is_imported_from_where_it_was_installed(python):
    script = (
        "import lavender, lavender.world, importlib.metadata as m; "
        "print(lavender.__file__, lavender.__version__, m.version('lavender-vlm'), "
        "lavender.world.TEACHER_PATH.is_dir())"
    )
    path, version, metadata_version, has_teacher = output_of(python("-c", script)).split()
    assert "installed" in path
    assert not Path(path).is_relative_to(ROOT)
    assert version == metadata_version
    assert has_teacher == "True"


def test_the_command_line_has_help(python):
    assert "--out" in output_of(python("-m", "lavender.cli", "demo", "--help"))


def test_the_network_is_refused(python):
    ran = python("-c", "import socket; socket.create_connection(('192.0.2.1', 443), timeout=1)")
    assert ran.returncode != 0
    assert "NetworkRefusedError" in ran.stderr


@pytest.fixture(scope="module")
def demo(python, tmp_path_factory) -> Path:
    """The output of `lavender demo` from the wheel at full size, which takes some minutes."""
    out = tmp_path_factory.mktemp("demo") / "lavender-demo"
    output_of(python("-m", "lavender.cli", "demo", "--out", str(out), timeout=1500))
    return out


def test_the_demo_writes_its_page(demo):
    page = (demo / "report.html").read_text()
    for text in ("teacher", "base", "plain", "aligned", "true mask", "One seed", "lavender study"):
        assert text in page, text
    shown = {int(seed) for seed in re.findall(r"scene (\d{7})", page)}
    assert shown
    assert shown <= {*SPLITS["sealed"][1000:1200]}
    assert (demo / "figure.png").stat().st_size > 10_000


def test_the_demo_writes_every_documented_number(demo):
    results = json.loads((demo / "results.json").read_text())
    teacher, student = results["teacher"], results["students"]["mllama_new_words"]
    for key in ("pointing", "iou_fixed", "wrong_word_pointing", "entropy", "uniform_pointing", "centre_pointing"):
        assert math.isfinite(teacher[key]), key
    assert teacher["pointing_by_mention"]
    for key in ("new_names", "known_names", "all_names", "single_things", "new_pointing", "new_attention_mass"):
        assert set(student[key]) == {"base", "plain", "aligned"}
        for values in student[key].values():
            assert len(values) == len(results["seeds"])
            assert all(math.isfinite(value) for value in values)
    assert results["seconds"]
    assert all(seconds >= 0 for seconds in results["seconds"].values())

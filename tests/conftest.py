"""What every test can rely on: no network, the same random numbers each time, tiny models.

torch has one thread, or as many as OMP_NUM_THREADS says.

The models are real ones with random weights, made in the process. Fixtures of a session are shared: a test
that changes a model takes its own from `make_student`.
"""

from __future__ import annotations

import copy
import gc
import os
import tempfile

# Read once, when the libraries are imported; child processes inherit both.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# An error that the library did not foresee shows its traceback, and warnings of other libraries fail a test.
os.environ["LAVENDER_DEBUG"] = "1"
# Where a test switches that off, these warnings go here, not to the user's log.
os.environ["LAVENDER_LOG"] = os.path.join(tempfile.gettempdir(), "lavender-tests.log")

import random
import sys
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from offline import no_network

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import StableDiffusionPipeline
    from transformers import MllamaForConditionalGeneration, MllamaProcessor

    from lavender.world.scenes import Scene

pytest.register_assert_rewrite("slow.pages")
PARTS = ("answers", "batches", "by_hand", "contract", "core", "geometry", "guards", "look", "parts", "words")
pytest.register_assert_rewrite(*(f"families.{part}" for part in PARTS))

SEED = 20250206
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 1)
LONGEST = (
    *("test_wheel.py", "test_train.py", "test_gradients.py", "test_study.py", "test_real_photographs.py"),
    *("test_kill_training.py", "test_documented_commands.py", "test_fuzz.py", "test_two_processes.py"),
)
PROMPT = "describe the picture."


def pytest_report_header() -> str:
    """What the numbers of this run may depend on; the instruction sets are those in force, not the processor's."""
    import torch

    cpu, isa = torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA", "not limited")
    return f"torch {torch.__version__}: {cpu} kernels, oneDNN {isa}, {THREADS} thread(s)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that at the end no worker waits for another; then those of many tests."""
    tests = Counter(item.path for item in items)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), -tests[item.path], str(item.path)))


def pytest_collection_finish() -> None:
    """Set torch's threads before the first fixture of a module or session trains something.

    Modules and tests are taken out of garbage collection: the end of each training runs one, over all objects there.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(THREADS)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Generator[None, None, None]:
    """Before all other fixtures, those of a session included."""
    with no_network():
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Seed every generator, and set torch's threads: its sums then have one order."""
    random.seed(SEED)
    np.random.seed(SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def some_scenes() -> list[Scene]:
    """Six development scenes: one to four things each, four picture sizes, upright and lying."""
    from lavender.world.scenes import scenes

    return list(scenes("development", 6))


@pytest.fixture(scope="session")
def captions(some_scenes) -> list[str]:
    """One caption a scene, with 1 to 4 nouns."""
    from lavender.world.language import caption_scene

    return [caption_scene(scene).text for scene in some_scenes]


@pytest.fixture(scope="session")
def processor(captions) -> MllamaProcessor:
    """Mllama's processor: tiles of 64 pixels, two at most, a vocabulary in which most words have several tokens."""
    from lavender.world.student_models import build_mllama_processor

    return build_mllama_processor([*captions, PROMPT], vocabulary=300)


@pytest.fixture(scope="session")
def make_student(processor) -> Callable[[], MllamaForConditionalGeneration]:
    """Makes a fresh Mllama of random weights, each time the same."""
    import torch

    from lavender.world.student_models import build_mllama

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        student = build_mllama(processor).eval()
    return lambda: copy.deepcopy(student)  # in a third of the time of building


@pytest.fixture(scope="session")
def pipeline() -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of random weights: 64-pixel pictures, 16 × 16 latents, 48 tokens."""
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from lavender.world import TEACHER_PATH
    from lavender.world.training.teacher import build_scheduler, build_text_encoder, build_unet, build_vae

    # the shipped one: a tokenizer trained anew differs from process to process
    tokenizer = CLIPTokenizer.from_pretrained(TEACHER_PATH / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return StableDiffusionPipeline(
            vae=build_vae().eval(),
            unet=build_unet().eval(),
            text_encoder=build_text_encoder(tokenizer).eval(),
            tokenizer=tokenizer,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@pytest.fixture(scope="session")
def store_path(some_scenes, captions, tmp_path_factory) -> Path:
    """A store with a random map, 11 × 13, for each noun of the captions of all scenes but the last; each unsure."""
    import torch

    from lavender.data.images import image_id
    from lavender.data.store import MapStore
    from lavender.maps import WordMaps, to_heat
    from lavender.words import content_words

    path = tmp_path_factory.mktemp("store") / "maps"
    generator = torch.Generator().manual_seed(SEED)
    with MapStore.writer(path, {"made by": "tests"}, {}, (11, 13)) as writer:
        for scene, caption in zip(some_scenes[:-1], captions, strict=False):
            words = content_words(caption, ("noun",))
            maps = to_heat(torch.rand(len(words), 11, 13, generator=generator))
            confidence = torch.linspace(0.25, 0.75, len(words))
            writer.add(WordMaps(image_id(scene.image), caption, words, maps, confidence=confidence))
    return path


@pytest.fixture(scope="session")
def dataset(some_scenes, captions) -> Dataset:
    """The scenes with their captions as TRL wants them: `images` and `messages`."""
    from lavender.data.samples import Sample, to_dataset
    from lavender.world.student_models import conversation

    return to_dataset(
        Sample(f"scene {scene.seed}", (scene.image,), conversation(PROMPT, caption))
        for scene, caption in zip(some_scenes, captions, strict=True)
    )

"""What every test can rely on: no network, the same random numbers each time, one thread for torch."""

from __future__ import annotations

import os

# Read once, when the libraries are imported; child processes inherit both.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
import sys
from collections.abc import Generator

import numpy as np
import pytest

from offline import no_network

SEED = 20250206


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Generator[None, None, None]:
    """Before all other fixtures, those of a session included."""
    with no_network():
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Seed every generator, and keep torch to one thread: its sums then have one order."""
    random.seed(SEED)
    np.random.seed(SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)
        torch.set_num_threads(1)

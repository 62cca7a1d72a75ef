"""Imports what every cell of a study needs, without the warnings of other libraries.

They take about 10 seconds of CPU time, an eighth of a short cell. The process from which cells are forked imports
them once.
"""

import logging
from importlib import import_module

logging.disable(logging.WARNING)
for name in ("training.trainer", "training.run", "world.judging", "world.studies.cells"):
    import_module(f"lavender.{name}")

"""`lavender check`: can alignment help this model? The numbers on stdout, the verdict on stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from lavender.cli.options import add_limit, add_trust_remote_code
from lavender.cli.stopping import DONE
from lavender.cli.terminal import show
from lavender.files import expanded

HELP = "estimate, before training, how much alignment can help a model"
DESCRIPTION = """Compare the loss of mapped words from the whole picture with the loss from the patches of each word
alone. The difference is an upper bound on what alignment can gain. Prints JSON."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=os.path.expanduser, help="model folder, hub id, or run folder")
    parser.add_argument("--data", type=expanded, required=True, help="folder or file of pictures and texts")
    parser.add_argument("--maps", type=expanded, required=True, help="map store of this data")
    add_limit(parser)
    add_trust_remote_code(parser)


def run(options: argparse.Namespace) -> int:
    from lavender.evaluation.check import check_model

    result = check_model(options.model, options.data, options.maps, options.limit, options.trust_remote_code)
    print(json.dumps(result, indent=1))
    show(_verdict(result), sys.stderr)
    return DONE


def _verdict(result: dict[str, Any]) -> str:
    error = result["gain_standard_error"] or 0.0
    if result["gain"] < 2 * error:
        return "Knowing where a word is does not lower this model's loss: expect little from alignment."
    return (
        f"Knowing where a word is can lower this model's loss by at most {result['gain']:.3f} ± {error:.3f} "
        f"of {result['loss']['whole']:.3f} nats per token."
    )

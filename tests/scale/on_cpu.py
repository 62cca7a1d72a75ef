"""`lavender` as `accelerate launch` starts it in tests, with stand-ins for GPUs: KIND COMMANDS.

The commands are a JSON list of lists of arguments. They run in turn, in the same processes and the same process group.
"""

import contextlib
import gc
import json
import sys
from unittest import mock

from accelerate import PartialState

from lavender.cli import main
from scale.worker import without_gpus


def run_all(kind: str, commands: list[list[str]]) -> int:
    """The exit code of the first command that fails; 0 if none does."""
    with (
        without_gpus(kind),
        # bf16 is refused where neither a GPU nor use_cpu is; DeepSpeed and FSDP2 run on the CPU without use_cpu
        mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True),
    ):
        for number, command in enumerate(commands, 1):
            is_last = number == len(commands)  # it ends the process group, as each does in processes of its own
            with contextlib.nullcontext() if is_last else mock.patch.object(PartialState, "destroy_process_group"):
                code = main(command)
            if code:
                return code
            gc.freeze()  # what was imported: the end of each training runs a garbage collection
    return 0


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1], json.loads(sys.argv[2])))

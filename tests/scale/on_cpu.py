"""`lavender` as `accelerate launch` starts it in tests, with stand-ins for checks that there are GPUs: KIND, verb, …"""

import contextlib
import sys
from unittest import mock

from lavender.cli import main
from scale.worker import gloo_for_all

if __name__ == "__main__":
    # bf16 is refused where neither a GPU nor use_cpu is; DeepSpeed and FSDP2 run on the CPU without use_cpu
    with (
        gloo_for_all() if sys.argv[1] == "fsdp2" else contextlib.nullcontext(),
        mock.patch("transformers.training_args.is_torch_bf16_gpu_available", return_value=True),
    ):
        sys.exit(main(sys.argv[2:]))

"""`lavender` with FSDP2 on the CPU: what `accelerate launch` starts in tests."""

import sys

from lavender.cli import main
from scale.worker import gloo_for_all

if __name__ == "__main__":
    with gloo_for_all():
        sys.exit(main(sys.argv[1:]))

"""`python -m lavender.cli`."""

import sys

from lavender.cli import main

sys.exit(main())

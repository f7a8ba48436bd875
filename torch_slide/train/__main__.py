"""Entry point of ``python -m torch_slide.train``."""

import sys

from torch_slide.train.cli import main

if __name__ == "__main__":
    sys.exit(main())

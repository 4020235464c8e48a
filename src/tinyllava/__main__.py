"""The command line as ``python -m tinyllava``, also under torchrun and accelerate launch."""

import sys

from tinyllava.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m snello`: what torchrun and `accelerate launch` can start."""

import sys

from snello.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m minillama`: the command line."""
import sys

from minillama.cli import main

if __name__ == "__main__":
    sys.exit(main())

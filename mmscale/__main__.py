# `python -m mmscale`: the same as the `mmscale` command. Nothing else lives here.
"""Entry point of `python -m mmscale`."""

import sys

from mmscale.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Entry point of `python -m mmscale`.

`python -m mmscale`: the same as the `mmscale` command. Nothing else lives here, but for a rank's signals.
"""

import os
import signal
import sys

if "MMSCALE_LAUNCHER" in os.environ and not os.environ.get("MMSCALE_ATTEMPT_ID", "train-").startswith("train-"):
    # A rank of a launched job: a request to save that comes while torch is imported waits, and does not kill it.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))

from mmscale.cli import main

if __name__ == "__main__":
    sys.exit(main())

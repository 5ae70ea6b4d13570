"""The uploading process. Rank 0 starts it (upload_process.py).

Its standard input has one line of settings, then requests; its standard output one JSON object per event. It ends with
its parent. A separate process, so that uploads share no memory, lock or signal with training.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mmscale.checkpoint.mirror.mirror_settings import MirrorSettings
from mmscale.checkpoint.mirror.reasons import without_secrets
from mmscale.checkpoint.mirror.uploads import Uploader

LOOK, FINISH = "look", "finish"  # requests: a checkpoint was committed; end when the mirror is up to date
UPLOADED, FAILED, REFUSED, IDLE = "mirror_uploaded", "mirror_failed", "mirror_refused", "idle"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0  # after a failure; doubled each time
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Serve requests until standard input ends or the mirror is up to date after FINISH."""
    for name in _IGNORED:
        # The trainer saves after such a signal, and that checkpoint is uploaded too.
        signal.signal(name, signal.SIG_IGN)
    os.nice(5)
    parent = os.getppid()
    settings = MirrorSettings.parse(sys.stdin.readline())
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    # Created when it is needed, because some stores connect then, which may fail.
    _serve(functools.cache(settings.uploader), requests)


def _serve(uploader: Callable[[], Uploader], requests: queue.Queue[str]) -> None:
    asked: list[str] = []
    pause = 0.0
    while True:
        problem = _try(uploader)
        if problem is None:
            _say(IDLE, after=len(asked))
            pause = 0.0
            if FINISH in asked:
                return
            asked.append(requests.get())
        else:
            pause = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2.0 * pause))
            _say(FAILED, reason=problem, retry_s=round(pause, 1))
            time.sleep(pause * random.uniform(0.75, 1.25))
        while not requests.empty():  # one pass serves all of them
            asked.append(requests.get())


def _try(made: Callable[[], Uploader]) -> str | None:
    """Bring the mirror up to date; returns the reason if that failed."""
    try:
        uploader = made()
        before = set(uploader.refused)
        uploader.bring_up_to_date(lambda done: _say(UPLOADED, **asdict(done)))
    except Exception as error:  # stores raise all kinds of errors; recorded, then tried again
        return without_secrets(f"{type(error).__name__}: {error}")
    for name in sorted(set(uploader.refused) - before):
        _say(REFUSED, name=name, reason=uploader.refused[name])
    return None


def _say(event: str, **fields: Any) -> None:
    try:
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(1)


def _listen(requests: queue.Queue[str]) -> None:
    for line in sys.stdin:
        requests.put(line.strip())
    os._exit(1)  # the trainer is gone


def _end_with(parent: int) -> None:
    """End when the parent does.

    Forked writers and guards keep the parent's end of the pipe open, so EOF does not suffice.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()

"""What rank 0 prints is kept for `mmscale logs`, once training has begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.config.load import resolve
from mmscale.errors import DataError
from mmscale.resilience.lease import Fence
from mmscale.train.log.run_logs import open_run_logs

MODEL = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}
CONFIG = resolve({"model": {"kind": "dense", **MODEL}, "data": {"path": "d"}})
LOG = Path("logs") / "attempt_3" / "rank_0.log"


@pytest.mark.parametrize("transcribed", [True, False])
def test_lines_are_written_from_the_beginning_of_training_on(tmp_path: Path, transcribed: bool) -> None:
    with open_run_logs(tmp_path, attempt=3, rank=0, fence=Fence(tmp_path, None), transcribed=transcribed) as logs:
        logs.transcript.say("banner")
        assert not (tmp_path / LOG).exists()
        logs.begin(CONFIG, tmp_path, attempt=3)
        logs.transcript.say("step 1")
        if transcribed:
            assert (tmp_path / LOG).read_text() == "banner\nstep 1\n"
    assert (tmp_path / LOG).exists() is transcribed


def test_an_attempt_that_never_begins_leaves_no_log(tmp_path: Path) -> None:
    with open_run_logs(tmp_path, attempt=3, rank=0, fence=Fence(tmp_path, None), transcribed=True) as logs:
        logs.transcript.say("nothing to do")
    assert not (tmp_path / LOG).exists()


def begin_and_raise(folder: Path, error: Exception) -> None:
    with open_run_logs(folder, attempt=3, rank=0, fence=Fence(folder, None), transcribed=True) as logs:
        logs.begin(CONFIG, folder, attempt=3)
        raise error


def test_the_error_that_ended_it_is_the_last_line(tmp_path: Path) -> None:
    for error, expected in (
        (DataError("a document is broken", remedy="mend it"), "error: a document is broken\n  fix: mend it\n"),
        (ZeroDivisionError("n"), "ZeroDivisionError: n\n"),
    ):
        with pytest.raises(type(error)):
            begin_and_raise(tmp_path, error)
        assert (tmp_path / LOG).read_text().endswith(expected)

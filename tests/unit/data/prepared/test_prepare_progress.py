# mmscale/data/progress.py, modalities/{patches,fit}.py: long parts show progress, small data has few codes.
"""Tests of what preparing a data set shows, and of the number of image codes."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from rich.console import Console

from mmscale.data import progress
from mmscale.data.modalities.image_kinds import load_image_tokenizer
from mmscale.data.modalities.image_tokens import KMeansTokenizer, ResidualTokenizer
from mmscale.data.modalities.patches import cluster
from mmscale.data.prepared.prepare import prepare
from mmscale.data.progress import Detail, Reporter
from tests.unit.data.samples import config, corpus, image, text, write_jsonl

KMEANS = {"kind": "kmeans", "size": 8, "channels": 1, "patch": 2}  # 16 patches an image


def pictures(folder: Path, count: int, *, grey_levels: int) -> Path:
    """docs.jsonl with `count` random pictures of 8 x 8 pixels."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        pixels = (rng.integers(0, grey_levels, (8, 8)) * (255 // (grey_levels - 1))).astype(np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        records.append({"id": f"d{number}", "content": [text(f"picture {number}"), image(f"{number}.png")]})
    return write_jsonl(folder / "docs.jsonl", records)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Details that every part of a preparation told, by the part's name."""
    seen: dict[str, list[str]] = {}
    original = Reporter.part

    @contextlib.contextmanager
    def part(self: Reporter, what: str) -> Iterator[Detail]:
        with original(self, what) as update:
            own = seen.setdefault(what, [])

            def both(detail: str) -> None:
                own.append(detail)
                update(detail)

            yield both

    monkeypatch.setattr(Reporter, "part", part)
    return seen


# -------------------------------------------------------------------------------------------------------- the codebook


@pytest.mark.parametrize(
    ("count", "grey_levels", "codes", "residual", "books", "noted"),
    [
        (60, 256, 64, 0, [24], "24 of 64"),  # 960 patches
        (60, 256, 64, 32, [24, 24], "48 of 64"),
        (60, 256, 24, 0, [24], ""),  # as many as the data allow
        (10, 256, 64, 0, [16], "16 of 64"),  # never fewer than 16
        (60, 2, 64, 0, [16], ""),  # all 16 patches that there are: nothing was left out
    ],
)
def test_codes_are_bounded_by_the_patches(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    count: int,
    grey_levels: int,
    codes: int,
    residual: int,
    books: list[int],
    noted: str,
) -> None:
    file = pictures(tmp_path / "in", count, grey_levels=grey_levels)
    settings = config(
        documents=[str(file)],
        vocab={"text": 300, "image": codes},
        image=KMEANS | {"residual": residual},
        held_out=0,
    )
    manifest = prepare(settings, tmp_path / "out")
    tokenizer = load_image_tokenizer(tmp_path / "out" / "image_tokenizer")
    sizes = (
        [tokenizer.base.vocab_size, len(tokenizer.residual_RD)]
        if isinstance(tokenizer, ResidualTokenizer)
        else [tokenizer.vocab_size]
    )
    assert sizes == books
    assert manifest.ranges == ((0, 300), (300, 300 + codes))  # the vocabulary stays: other ids are unused
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    if noted:
        (note,) = notes
        assert f"{count * 16} patches" in note and f"at most {noted} image codes" in note and "unused" in note
    else:
        assert notes == []


def test_telling_does_not_change_the_centres() -> None:
    from sklearn.cluster import MiniBatchKMeans

    rng = np.random.default_rng(0)
    points: NDArray[np.uint8] = rng.integers(0, 256, (3000, 12), dtype=np.uint8)
    weights = rng.integers(1, 9, 3000)
    told: list[str] = []
    centres = cluster(points, weights, 20, on_progress=told.append)
    plain = MiniBatchKMeans(20, batch_size=4096, max_iter=10, n_init=3, random_state=0, reassignment_ratio=0)
    np.testing.assert_array_equal(centres, plain.fit(points.astype(np.float32), sample_weight=weights).cluster_centers_)
    steps = [f"k-means step {n + 1} of 10" for n in range(plain.n_steps_)]
    assert told == [f"k-means start {n} of 3" for n in (1, 2, 3)] + steps


# ------------------------------------------------------------------------------------------------------------ progress


@pytest.mark.parametrize("residual", [0, 16])
def test_every_part_tells_how_far_it_is(tmp_path: Path, parts: dict[str, list[str]], residual: int) -> None:
    file = pictures(tmp_path / "in", 60, grey_levels=256)
    image_settings = KMEANS | {"residual": residual}
    settings = config(documents=[str(file)], vocab={"text": 300, "image": 40}, image=image_settings)
    prepare(settings, tmp_path / "out")
    assert list(parts) == ["listing documents", "text tokenizer", "image tokenizer", "tasks", "digests"]
    assert parts["text tokenizer"] == ["reading text, part 1 of 1", "choosing merges"]
    told = parts["image tokenizer"]
    assert told[0].startswith("reading images, ") and told[-1] == "measuring what is lost"
    assert "k-means start 3 of 3" in told and any(detail.startswith("k-means step 1 of ") for detail in told)
    assert ("second codebook, k-means start 1 of 3" in told) == bool(residual)


@pytest.fixture
def lines_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_LINE", 0.0)
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.001)


def reporter_of(terminal: bool, said: threading.Event) -> tuple[Reporter, io.StringIO]:
    """A reporter, and what it writes; `said` is set by its first write."""

    class Written(io.StringIO):
        def write(self, content: str) -> int:
            if content.strip():
                said.set()
            return super().write(content)

    reporter, stream = Reporter(enabled=True), Written()
    reporter._console = Console(file=stream, force_terminal=terminal, width=100)
    return reporter, stream


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_a_long_part_is_shown_while_it_lasts(lines_at_once: None, terminal: bool, counted: bool) -> None:
    said = threading.Event()
    reporter, stream = reporter_of(terminal, said)
    context: Any = reporter.bar("documents", 9) if counted else reporter.part("fitting")
    with context as update:
        update(4 if counted else "step [1] of 9")
        for _ in range(2):  # the first line may have been on its way already
            said.clear()
            assert said.wait(300)
    shown = stream.getvalue()
    assert ("documents" if counted else "fitting: step [1] of 9") in shown
    if not terminal:
        assert shown.splitlines()[-1].startswith("documents: 4 of 9, " if counted else "fitting: step [1] of 9, ")
        assert shown.endswith(" s\n") and "\x1b" not in shown


@pytest.mark.parametrize("counted", [False, True])
def test_a_short_part_writes_no_line(counted: bool) -> None:
    reporter, stream = reporter_of(False, threading.Event())
    context: Any = reporter.bar("documents", 9) if counted else reporter.part("fitting")
    with context as update:
        update(4 if counted else "step 1")
    assert stream.getvalue() == "" and progress._FIRST_LINE == 2.0
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_part_that_fails_ends_its_lines(lines_at_once: None) -> None:
    reporter, _ = reporter_of(False, threading.Event())
    with pytest.raises(ValueError, match="broken"), reporter.part("fitting"):
        raise ValueError("broken")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_without_progress_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines_at_once: None
) -> None:
    settings = config(documents=[str(corpus(tmp_path / "in", 8))], image=KMEANS | {"size": 4})
    prepare(settings, tmp_path / "out", progress=False)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert isinstance(load_image_tokenizer(tmp_path / "out" / "image_tokenizer"), KMeansTokenizer)

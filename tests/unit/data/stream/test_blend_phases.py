"""Blends whose weights change by step: any position alone, sources in their order, the right shares in each phase."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.checkpoint.layout import Store
from mmscale.config.derived import blend_phases, mean_shares
from mmscale.config.load import resolve
from mmscale.data.prepared.identity import compare, identities
from mmscale.data.prepared.manifest import read_blend
from mmscale.data.prepared.share import nominal_share
from mmscale.data.stream.blend_phases import BlendPhases
from mmscale.data.stream.blending import blend, blended
from mmscale.data.stream.mixture import open_mixture
from mmscale.data.stream.segment_settings import Segment
from mmscale.data.stream.segments import Place, resume_stream
from mmscale.data.vocab import Vocabulary
from mmscale.errors import ConfigError
from mmscale.train.data_place import find_place
from tests.unit.data.corpora import SMALL_MODEL, VOCAB, corpus, prepare

WEIGHTS = st.lists(st.sampled_from([0.0, 1.0, 2.0, 7.5]), min_size=3, max_size=3).filter(any)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), WEIGHTS), min_size=1, max_size=4),
    start=st.integers(0, 120),
    count=st.integers(0, 60),
)
def test_any_stretch_is_that_of_the_stream_read_one_by_one(
    lengths: list[tuple[int, list[float]]], start: int, count: int
) -> None:
    """By definition: each phase takes what is due first, and a source continues where the phase before left it."""
    phases, at, sources, places = [], 0, [], []
    taken = [0, 0, 0]
    for number, (length, weights) in enumerate(lengths):
        phases.append((at, weights))
        size = length if number + 1 < len(lengths) else 400
        for source in blend(np.array(weights) / sum(weights), start=0, count=size)[0].tolist():
            sources.append(source)
            places.append(taken[source])
            taken[source] += 1
        at += length
    made = BlendPhases(phases)
    found = made.stretch(start, count)
    assert found[0].tolist() == sources[start : start + count]
    assert found[1].tolist() == places[start : start + count]
    assert made.counts(start).tolist() == [sources[:start].count(one) for one in range(3)]


def test_one_phase_is_the_blend_without_phases() -> None:
    share = np.array([0.25, 0.75])
    made = BlendPhases([(0, share)])
    for found, wanted in zip(made.stretch(7, 50), blend(share, start=7, count=50), strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(made.counts(31), blended(share, count=31))
    behind = BlendPhases([(-20, (1, 0)), (-5, (0, 1)), (10, (1, 0))])  # phases that are over
    assert behind.stretch(0, 12)[0].tolist() == [1] * 10 + [0] * 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    for number, name in enumerate("abc"):
        prepare(folder / name, corpus(90, seed=number))
    return folder


def config(folders: Path, weights: dict[str, Any], *, batch: int = 4, **train: Any) -> Any:
    return resolve(
        {
            "vocab": VOCAB,
            "data": {
                "blend": [{"path": str(folders / name), "weight": weight} for name, weight in weights.items()],
                "deal_window": 8,
                "cache": "/dev/null/none",
            },
            "model": SMALL_MODEL | {"seq_length": 160},
            "train": {"micro_batch_size": 2, "global_batch_size": batch, "steps": 40} | train,
        }
    )


def live(made: Any, consumed: int, segments: list[dict[str, Any]], *, step: int | None = None) -> Place:
    """The position of a run whose steps were all of one size, unless it says at which step it is."""
    mixture = open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab))
    found = identities(made, read_blend(made))
    step = consumed // made.train.global_batch_size if step is None else step
    return resume_stream(made, mixture, data=found, consumed=consumed, step=step, segments=segments)


def read(place: Place, consumed: int, count: int) -> list[tuple[int, tuple[int, ...]]]:
    """Source and documents of the sequences from a position of the run on."""
    first = (consumed - place.mixture.start) // 2
    rows = [row for number in range(first, first + count // 2) for row in place.mixture.documents(number)]
    return [(source, tuple(documents.tolist())) for source, documents in rows]


def shares(rows: list[tuple[int, tuple[int, ...]]]) -> list[float]:
    counted = Counter(source for source, _ in rows)
    return [round(counted[one] / len(rows), 3) for one in range(3)]


SCHEDULE = {"a": {0: 0.7, 20: 0.35}, "b": 0.3, "c": {0: 0, 20: 0.35}}


def test_shares_change_at_their_step_and_a_resume_is_exact(folders: Path) -> None:
    made = config(folders, SCHEDULE)
    whole = read(live(made, 0, []), 0, 160)
    # within a window that is dealt (8 sequences) around step 20
    assert shares(whole[:72]) == pytest.approx([0.7, 0.3, 0.0], abs=0.03)
    assert shares(whole[88:]) == pytest.approx([0.35, 0.3, 0.35], abs=0.03)
    segments, cut = [], []
    for consumed in range(0, 160, 20):
        place = live(made, consumed, segments)
        assert place.lines == []
        segments = place.segments
        cut += read(place, consumed, 20)
    assert cut == whole
    assert len(segments) == 1
    passes = live(made, 0, []).mixture.passes(160)
    sizes = [stream.first_epoch for stream in live(made, 0, []).mixture.streams]
    assert np.multiply(passes, sizes).round().tolist() == [84, 48, 28]


def test_a_schedule_that_changes_reads_on_and_is_shown(folders: Path) -> None:
    before, after = config(folders, SCHEDULE), config(folders, SCHEDULE | {"c": {0: 0, 30: 1.0}, "a": 0.7})
    old, new = (identities(one, read_blend(one)) for one in (before, after))
    lines, _ = compare(old, new)
    assert any(line.startswith("data: later weights of") and "from step 30" in line for line in lines)
    assert compare(old, old) == ([], [])
    place = live(before, 0, [])
    done = read(place, 0, 48)
    following = live(after, 48, place.segments)
    assert any("no document is read twice" in line for line in following.lines)
    rows = read(following, 48, 60)
    for source in range(2):
        counts = Counter(d for own, found in done + rows[:20] if own == source for d in found)
        times = [counts[document] for document in range(90)]
        assert max(times) - min(times) <= 1 and sum(times) > 40
    assert shares(rows[:60])[2] == 0.0
    assert shares(read(following, 48, 200)[80:])[2] == pytest.approx(0.5, abs=0.05)  # step 30 is 72 sequences later


def test_steps_are_counted_as_large_as_they_were(folders: Path) -> None:
    """After 10 steps of 4 sequences a run goes on with 8: step 20 is 80 sequences later."""
    place = live(config(folders, SCHEDULE), 0, [])
    following = live(config(folders, SCHEDULE, batch=8), 40, place.segments, step=10)
    segment = Segment.model_validate(following.segments[-1])
    assert segment.blend[1:] == [(80, (0.35, 0.3, 0.35))]
    rows = read(following, 40, 160)
    assert shares(rows[:72])[2] == 0.0
    assert shares(rows[88:])[2] == pytest.approx(0.35, abs=0.04)


@pytest.mark.parametrize("older", [False, pytest.param(True, marks=pytest.mark.long)])
def test_phases_that_come_after_a_change_of_the_batch(folders: Path, older: bool) -> None:
    """10 steps of 4 sequences and 10 of 8, then weights that change at step 30: 80 sequences later, whatever was kept.

    A change of the batch alone begins no segment, and older checkpoints did not keep the batch.
    """
    plain: dict[str, Any] = {"a": 0.7, "b": 0.3, "c": 0}
    segments = live(config(folders, plain), 0, []).segments
    segments = live(config(folders, plain, batch=8), 40, segments, step=10).segments
    if older:
        del segments[-1]["batch"]
    changed = {"a": {0: 0.7, 30: 0.35}, "b": 0.3, "c": {0: 0, 30: 0.35}}
    place = live(config(folders, changed, batch=8), 120, segments, step=20)
    (later,) = Segment.model_validate(place.segments[-1]).blend[1:]
    assert later == (80, (0.35, 0.3, 0.35))
    rows = read(place, 120, 160)
    assert shares(rows[:72])[2] == 0.0
    assert shares(rows[88:])[2] == pytest.approx(0.35, abs=0.04)


@pytest.mark.parametrize("batch", [4, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("step", [0, 5])
def test_a_stage_behind_the_run_has_the_weights_of_its_last_step(folders: Path, batch: int, step: int) -> None:
    """Auxiliary routers count steps of their own from 0, whether or not their batch begins a segment."""
    segments = live(config(folders, SCHEDULE), 0, []).segments
    made, consumed = config(folders, SCHEDULE, batch=batch, steps=20), 160 + 4 * step
    place = find_place(
        made,
        open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab)),
        SimpleNamespace(step=step, sequences=consumed, stream=segments),  # type: ignore[arg-type]
        data=identities(made, read_blend(made)),
        store=Store(folders),
        first=True,
        begins_from={"step": 40},
        settings_of=lambda one: one,
    )
    assert len(place.segments) == (1 if batch == 4 else 2)
    assert shares(read(place, consumed, 80)) == pytest.approx([0.35, 0.3, 0.35], abs=0.06)


def test_the_first_phase_decides_static_shares(folders: Path) -> None:
    made = config(folders, SCHEDULE)
    assert mean_shares(made) == pytest.approx([0.525, 0.3, 0.175])
    assert mean_shares(config(folders, SCHEDULE, steps=20)) == pytest.approx([0.7, 0.3, 0.0])
    assert blend_phases(made) == [(0, (0.7, 0.3, 0.0)), (20, (0.35, 0.3, 0.35))]
    assert nominal_share(made) == nominal_share(config(folders, {"a": 0.7, "b": 0.3, "c": 0}, steps=7))
    dumped = made.model_dump(mode="json")  # as a run keeps it
    assert blend_phases(type(made).model_validate(dumped)) == blend_phases(made)


def test_a_temperature_makes_shares_more_alike(folders: Path) -> None:
    weights = {"a": 16.0, "b": 1.0, "c": {0: 4.0, 20: 0.0}}

    def phases(temperature: float) -> list[tuple[int, tuple[float, ...]]]:
        made = config(folders, weights)
        return blend_phases(made.model_copy(update={"data": made.data.model_copy(update={"temperature": temperature})}))

    assert phases(1.0) == [(0, (16.0, 1.0, 4.0)), (20, (16.0, 1.0, 0.0))]
    assert phases(2.0) == [(0, (4.0, 1.0, 2.0)), (20, (4.0, 1.0, 0.0))]
    made = config(folders, weights)
    hot = made.model_copy(update={"data": made.data.model_copy(update={"temperature": 2.0})})
    assert shares(read(live(hot, 0, []), 0, 70)) == pytest.approx([4 / 7, 1 / 7, 2 / 7], abs=0.03)
    assert [one.weight for one in identities(hot, read_blend(hot))] == [4.0, 1.0, 2.0]


@pytest.mark.parametrize("weights", [(16.0, 1.0, 4.0), (0.016, 0.001, 0.004)])
def test_a_small_temperature_is_the_largest_weight_alone(folders: Path, weights: tuple[float, ...]) -> None:
    made = config(folders, dict(zip("abc", weights, strict=True)))
    made = made.model_copy(update={"data": made.data.model_copy(update={"temperature": 0.002})})
    ((_, found),) = blend_phases(made)
    assert found[0] > 0 and [one / sum(found) for one in found] == pytest.approx([1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({5: 1.0}, "do not begin at step 0"),
        ({}, "do not begin at step 0"),
        ({0: 1.0, 9: 0.0}, "from step 9 on every source has weight 0"),
        ({0: 0.0}, "every source has weight 0, so there is no training data"),
        ({0: -1.0}, "at least 0"),
        ({-1: 1.0}, "is -1, wants"),
    ],
)
def test_weights_that_say_nothing_are_refused(folders: Path, weight: dict[int, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(folders, {"a": weight})

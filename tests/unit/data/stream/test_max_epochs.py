"""Sources that are read a limited number of times: exactly, at any position, after any change, refused if too short."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmscale.config import Config
from mmscale.config.load import resolve
from mmscale.data.prepared import table_facts
from mmscale.data.prepared.identity import compare, identities
from mmscale.data.prepared.manifest import read_blend
from mmscale.data.stream import packing_cache
from mmscale.data.stream.blend_phases import BlendPhases
from mmscale.data.stream.blending import blend
from mmscale.data.stream.loader import BatchLoader
from mmscale.data.stream.mixture import Mixture, open_mixture
from mmscale.data.stream.segments import Place, resume_stream
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError
from mmscale.tables.settings import DATA_ORDERS
from mmscale.train.log.exposure import exposure, planned_sources
from tests.unit.data.corpora import SMALL_MODEL, VOCAB, corpus, prepare

SIZES = {"a": 90, "b": 40, "c": 17}
BATCH = 4
NAMES = tuple(SIZES)
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"a": 1.0, "b": 1.0, "c": 1.0},
    {"a": {0: 0.7, 6: 0.35}, "b": 0.3, "c": {0: 0.0, 6: 0.35}},
    {"a": {0: 1.0, 3: 4.0, 9: 0.0}, "b": {0: 2.0, 9: 1.0}, "c": {0: 0.0, 3: 1.0}},
)


def at_most(number: int, most: int) -> int | None:
    return number if number <= most else None


def one_by_one(
    phases: Sequence[tuple[int, Sequence[float]]], limits: Sequence[int | None], most: int
) -> tuple[list[int], list[int]]:
    """Sources and places by definition: a new blend begins with each phase, and whenever a source has given all."""
    sources: list[int] = []
    places: list[int] = []
    taken = [0] * len(limits)
    begun: tuple[Any, int] | None = None
    while len(sources) < most:
        weights = next(found for start, found in reversed(phases) if start <= len(sources))
        left = [
            0.0 if limit is not None and taken[one] >= limit else float(weight)
            for one, (weight, limit) in enumerate(zip(weights, limits, strict=True))
        ]
        if not any(left):
            break
        number = next(n for n, (start, _) in reversed(list(enumerate(phases))) if start <= len(sources))
        if begun is None or begun[0] != (number, left):
            begun = ((number, left), len(sources))
        share = np.array(left) / sum(left)
        (source,), _ = blend(share, start=len(sources) - begun[1], count=1)
        sources.append(int(source))
        places.append(taken[source])
        taken[source] += 1
    return sources, places


WEIGHTS = st.lists(st.sampled_from([0.0, 1.0, 2.0, 7.5]), min_size=3, max_size=3).filter(any)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 25), WEIGHTS), min_size=1, max_size=4),
    limits=st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=3, max_size=3),
    start=st.integers(0, 90),
    count=st.integers(0, 40),
)
def test_any_stretch_is_that_of_the_stream_read_one_by_one(
    lengths: list[tuple[int, list[float]]], limits: list[int | None], start: int, count: int
) -> None:
    phases: list[tuple[int, list[float]]] = []
    at = 0
    for length, weights in lengths:
        phases.append((at, weights))
        at += length
    sources, places = one_by_one(phases, limits, 130)
    made = BlendPhases(phases, [None if one is None else partial(at_most, one) for one in limits])
    found = made.stretch(start, count)
    assert found[0].tolist() == sources[start : start + count]
    assert found[1].tolist() == places[start : start + count]
    assert made.counts(start).tolist() == [sources[:start].count(one) for one in range(3)]
    assert made.end(130) == (len(sources) if len(sources) < 130 else None)


@pytest.fixture(scope="module", params=list(DATA_ORDERS))
def order(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each order in turn. Few documents are packed together, so that streams reach several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_cache, "_BLOCK_DOCUMENTS", 100)
        patch.setitem(DATA_ORDERS, "blocks", dataclasses.replace(DATA_ORDERS["blocks"], block=12, chunk=2, above=30))
        patch.setattr(table_facts, "LARGE", 40)
        yield str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    for number, (name, size) in enumerate(SIZES.items()):
        prepare(folder / name, corpus(size, seed=number))
    return folder


def config(
    folders: Path, weights: dict[str, Any], limits: dict[str, int], *, order: str = "epochs", **data: Any
) -> Config:
    sources = [
        {"path": str(folders / name), "weight": weight, "max_epochs": limits.get(name)}
        for name, weight in weights.items()
    ]
    return resolve(
        {
            "vocab": VOCAB,
            "data": {"blend": sources, "order": order, "deal_window": 8, "pack_window": 40, "cache": "/dev/null/none"}
            | data,
            "model": SMALL_MODEL | {"seq_length": 160},
            "train": {"micro_batch_size": 2, "global_batch_size": BATCH, "steps": 40},
        }
    )


@dataclass
class Run:
    """A run that only reads.

    Attributes:
        rows: source and documents of each sequence that it has read.
    """

    consumed: int = 0
    segments: list[dict[str, Any]] = field(default_factory=list)
    rows: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def place(self, made: Config, steps: int) -> Place:
        """Its position before some further steps."""
        opened = open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab))
        return resume_stream(
            made,
            opened,
            data=identities(made, read_blend(made)),
            consumed=self.consumed,
            step=self.consumed // BATCH,
            segments=self.segments,
            ahead=steps * BATCH,
        )

    def read(self, made: Config, steps: int) -> Place:
        """Go on with a configuration for some steps."""
        place = self.place(made, steps)
        first = (self.consumed - place.mixture.start) // 2
        for number in range(first, first + steps * BATCH // 2):
            self.rows += [(source, tuple(found.tolist())) for source, found in place.mixture.documents(number)]
        self.consumed += steps * BATCH
        self.segments = place.segments
        return place

    def times(self, source: int) -> list[int]:
        """How often each document of a source was read."""
        read = Counter(one for own, found in self.rows if own == source for one in found)
        return [read[one] for one in range(SIZES[NAMES[source]])]


def steps_of(mixture: Mixture) -> int:
    """All steps that a stream with an end has."""
    end = mixture.end(100_000)
    assert end is not None
    return end // BATCH


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schedule=st.sampled_from(SCHEDULES),
    limits=st.fixed_dictionaries({}, optional={name: st.integers(1, 3) for name in NAMES}),
    temperature=st.sampled_from([1.0, 2.5]),
    cuts=st.lists(st.integers(0, 15), min_size=1, max_size=3),
)
def test_a_run_that_stops_anywhere_reads_what_a_whole_one_reads(
    folders: Path, order: str, schedule: dict[str, Any], limits: dict[str, int], temperature: float, cuts: list[int]
) -> None:
    made = config(folders, schedule, limits, order=order, temperature=temperature)
    opened = open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab))
    end = opened.end(160)
    steps = 40 if end is None else end // BATCH
    whole, cut = Run(), Run()
    whole.read(made, steps)
    for some in cuts:
        some = min(some, steps - cut.consumed // BATCH)
        assert cut.read(made, some).lines == []
    cut.read(made, steps - cut.consumed // BATCH)
    assert cut.rows == whole.rows
    assert len(cut.segments) == 1
    for source, name in enumerate(NAMES):
        if name in limits:
            assert max(whole.times(source)) <= limits[name]
    assert all(found for _, found in whole.rows)  # no sequence is empty


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(
            st.fixed_dictionaries({name: st.integers(1, 3) for name in NAMES}),
            st.integers(1, 9),
        ),
        min_size=1,
        max_size=3,
    ),
    last=st.fixed_dictionaries({name: st.integers(1, 3) for name in NAMES}),
)
def test_limits_that_change_count_passes_of_the_whole_run(
    folders: Path, order: str, changes: list[tuple[dict[str, int], int]], last: dict[str, int]
) -> None:
    """A document is read as often as the last limit says, or as often as it was already."""
    run = Run()
    made: Config | None = None
    for limits, wanted in changes:
        made = config(folders, SCHEDULES[0], limits, order=order)
        left = steps_of(run.place(made, 0).mixture) - (run.consumed - run.place(made, 0).mixture.start) // BATCH
        run.read(made, min(wanted, left))
    before = [run.times(source) for source in range(3)]
    made = config(folders, SCHEDULES[0], last, order=order)
    mixture = run.place(made, 0).mixture
    left = steps_of(mixture) - (run.consumed - mixture.start) // BATCH
    run.read(made, left)
    missing = 0
    for source, name in enumerate(NAMES):
        wanted_times = [max(last[name], times) for times in before[source]]
        times = run.times(source)
        assert all(one <= most for one, most in zip(times, wanted_times, strict=True))
        missing += sum(most - one for one, most in zip(times, wanted_times, strict=True))
    unread = (mixture._blend.end(100_000) or 0) - (run.consumed - mixture.start)
    assert unread < BATCH + 2  # what does not fill a step, or a micro-batch
    assert missing <= unread * (160 // 5)  # documents of 5 tokens at least
    with pytest.raises(DataError, match="leaves data for 0 of the 1 steps to come"):
        run.place(made, 1)


def test_the_weight_of_a_source_that_has_ended_goes_to_the_others(folders: Path, order: str) -> None:
    run = Run()
    place = run.read(config(folders, SCHEDULES[0], {"c": 2}, order=order), 40)
    assert run.times(2) == [2] * SIZES["c"]
    ended = max(number for number, (source, _) in enumerate(run.rows) if source == 2)
    counted = Counter(source for source, _ in run.rows[ended + 8 :])
    assert counted[0] == pytest.approx(counted[1], abs=8) and len(counted) == 2
    assert place.segments[0]["parts"][2]["limit"] == sum(source == 2 for source, _ in run.rows)
    assert place.segments[0]["parts"][0]["limit"] is None
    passes = place.mixture.passes(160)
    assert passes[2] == pytest.approx(2.0, abs=0.3) and passes[1] > 2.5


def test_data_that_ends_too_early_is_refused_before_the_first_step(folders: Path, order: str) -> None:
    made = config(folders, SCHEDULES[0], {"a": 1, "b": 1, "c": 2}, order=order)
    mixture = open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab))
    steps = steps_of(mixture)
    Run().read(made, steps)
    with pytest.raises(DataError, match=rf"leaves data for {steps} of the 40 steps to come") as error:
        Run().place(made, 40)
    assert f"{folders / 'c'}: 2" in error.value.cause and "max_epochs" in error.value.remedy
    with pytest.raises(DataError, match="all sources have been read as often as max_epochs allows"):
        mixture.documents((mixture.end(10_000) or 0) // 2)
    with pytest.raises(DataError, match="all sources have been read as often"):
        mixture.documents(10_000)
    held = pickle.loads(pickle.dumps(mixture))  # as worker processes get it
    assert held.end(10_000) == mixture.end(10_000)


def test_the_ranks_of_any_layout_share_the_same_sequences(folders: Path) -> None:
    made = config(folders, SCHEDULES[1], {"b": 1, "c": 2})
    opened = open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab))
    alone = [opened.micro_batch(number).tokens for number in range(40)]
    loaders = [BatchLoader(opened, dp_rank=rank, dp_size=2, micro_batches_per_step=2) for rank in range(2)]
    for step in range(20):
        for rank, loader in enumerate(loaders):
            (found,) = next(loader).micro_batches
            np.testing.assert_array_equal(found.tokens, alone[2 * step + rank])


def test_a_source_that_is_gone_had_its_limit(folders: Path, tmp_path: Path) -> None:
    """The segment before is closed by the limits that it kept: no source is read from a wrong position."""
    for name in NAMES:
        shutil.copytree(folders / name, tmp_path / name)
    run = Run()
    run.read(config(tmp_path, SCHEDULES[0], {"c": 1}), 28)
    shutil.rmtree(tmp_path / "c")
    made = config(tmp_path, {"a": 1.0, "b": 1.0}, {})
    place = run.place(made, 2)
    window = run.consumed // 8 * 8
    closed = place.segments[0]["parts"]
    assert sum(part["taken"] for part in closed) == window
    assert closed[2]["taken"] == sum(source == 2 for source, _ in run.rows)


def test_the_start_event_has_the_passes_of_the_whole_run(folders: Path) -> None:
    """Also those that were read under other settings: it agrees with the documents that are counted."""
    run = Run()
    run.read(config(folders, SCHEDULES[0], {"c": 2}), 20)
    made = config(folders, {"a": 3.0, "b": 1.0, "c": 1.0}, {"c": 4})
    place = run.place(made, 20)
    found = planned_sources(made, place.mixture, step=20, sequences=run.consumed)
    assert [Path(one["path"]).name for one in found] == list(NAMES)
    assert [one["max_epochs"] for one in found] == [None, None, 4]
    assert found[0]["passes"][0][0] == 20 and found[0]["passes"][-1][0] == 40
    said = exposure(made, place.mixture, sequences=run.consumed + 20 * BATCH, parameters={})
    for one in found:  # the start line and the event say the same
        assert f"{one['passes'][-1][1]:.2g} passes over {one['path']}" in said
    assert " without " not in said
    holes = made.model_copy(update={"objective": made.objective.model_copy(update={"cm3_rate": 0.5})})
    given = exposure(holes, place.mixture, sequences=run.consumed + 20 * BATCH, parameters={"total": 10})
    assert " tokens without holes, " in given  # they are not counted
    later = exposure(made, place.mixture, sequences=run.consumed + 20 * BATCH, parameters={}, begins_at=run.consumed)
    only = one["passes"][-1][1] - one["passes"][0][1]  # of a stage that begins here
    assert f"{only:.2g} passes over {one['path']}" in later
    for source, one in enumerate(found):
        assert one["passes"][0][1] == pytest.approx(np.mean(run.times(source)), abs=0.35)
    run.read(made, 20)
    for source, one in enumerate(found):
        assert one["passes"][-1][1] == pytest.approx(np.mean(run.times(source)), abs=0.35)
        assert sum(one["tokens"].values()) == place.mixture.sources[source].tokens


def test_a_changed_limit_is_a_change_of_the_data(folders: Path) -> None:
    old, new = (
        identities(made, read_blend(made))
        for made in (config(folders, SCHEDULES[0], {"a": 2}), config(folders, SCHEDULES[0], {"a": 3, "b": 1}))
    )
    assert compare(old, new)[0] == [
        f"data: max_epochs of {folders / 'a'}: 2 -> 3",
        f"data: max_epochs of {folders / 'b'}: no limit -> 1",
    ]

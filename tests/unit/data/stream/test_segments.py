"""A run goes on with what it has not read: other weights, sources, their order, batch and sequence length."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmscale.config import Config
from mmscale.config.load import resolve
from mmscale.data.prepared import table_facts
from mmscale.data.prepared.identity import SourceIdentity, identities
from mmscale.data.prepared.manifest import read_blend
from mmscale.data.stream.blending import blend, blended
from mmscale.data.stream.blocks import Division
from mmscale.data.stream.loader import BatchLoader
from mmscale.data.stream.mixture import Mixture, open_mixture
from mmscale.data.stream.segments import resume_stream
from mmscale.data.stream.sequences import StreamStart
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError
from mmscale.tables.settings import DATA_ORDERS
from tests.unit.data.corpora import SMALL_MODEL, VOCAB, corpus, prepare

SIZES = {"a": 150, "b": 70, "c": 23}
GLOBAL = 8
DATA: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True, params=list(DATA_ORDERS))
def order(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each order in turn. Few documents are packed together, so that streams reach several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATA_ORDERS, "blocks", dataclasses.replace(DATA_ORDERS["blocks"], block=12, chunk=2, above=40))
        patch.setattr(table_facts, "LARGE", 40)
        patch.setitem(DATA, "order", request.param)
        yield str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segments")
    for number, (name, size) in enumerate(SIZES.items()):
        prepare(folder / name, corpus(size, seed=number))
    return folder


def config(folders: Path, blend: dict[str, float], **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "vocab": VOCAB,
        "data": {
            "blend": [{"path": str(folders / name), "weight": weight} for name, weight in blend.items()],
            "order": changes.pop("order", DATA["order"]),
            "pack_window": 40,
            "deal_window": changes.pop("deal_window", 24),
            "seed": changes.pop("data_seed", None),
            "document_multiple": changes.pop("document_multiple", 1),
            "cache": changes.pop("cache", "/dev/null/none"),  # which cannot be written: nothing waits for the disk
        },
        "model": SMALL_MODEL | {"seq_length": changes.pop("seq_length", 128)},
        "train": {"micro_batch_size": changes.pop("micro_batch_size", 2), "global_batch_size": GLOBAL},
        "run": {"seed": changes.pop("seed", 1)},
    }
    assert not changes
    return resolve(settings)


def test_the_order_has_a_seed_of_its_own(folders: Path) -> None:
    def order(**seeds: Any) -> list[int]:
        made = config(folders, {"a": 1.0}, **seeds)
        reader = Reader(folders)
        reader.live(made, 2)
        assert reader.segments[0]["seed"] == seeds.get("data_seed", seeds["seed"])
        mixture = open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab))
        return [d for number in range(4) for _, found in mixture.documents(number) for d in found.tolist()]

    assert order(seed=1) == order(seed=2, data_seed=1) != order(seed=1, data_seed=2)


LEFT = re.compile(r"(\d+) of (?:its|(\d+) begun epochs of) (\d+) documents are left")


@dataclass
class Reader:
    """A run that only reads.

    Attributes:
        read: of each source, how often each document was read.
    """

    folders: Path
    consumed: int = 0
    segments: list[dict[str, Any]] = field(default_factory=list)
    read: dict[str, Counter[int]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps that were done."""
        return self.consumed // GLOBAL

    def live(self, made: Config, steps: int, **before: Any) -> None:
        """Go on with a configuration for some steps."""
        data = identities(made, read_blend(made))
        opened = open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab))
        place = resume_stream(
            made, opened, data=data, consumed=self.consumed, step=self.step, segments=self.segments, **before
        )
        self.segments, self.lines = place.segments, place.lines
        for left, epochs, documents in LEFT.findall("\n".join(self.lines)):
            assert 0 < int(left) <= int(epochs or 1) * int(documents), self.lines
        loader = BatchLoader(
            place.mixture,
            dp_rank=0,
            dp_size=1,
            micro_batches_per_step=GLOBAL // made.train.micro_batch_size,
        )
        loader.load_state_dict({"consumed_sequences": self.consumed})
        first = loader._next
        for number in range(first, first + steps * GLOBAL // made.train.micro_batch_size):
            self._count(place.mixture, number, data)
        self.consumed += steps * GLOBAL

    def _count(self, mixture: Mixture, number: int, data: list[SourceIdentity]) -> None:
        for source, documents in mixture.documents(number):
            self.read.setdefault(Path(data[source].path).name, Counter()).update(documents.tolist())

    def unread(self) -> dict[str, tuple[int, Counter[int]]]:
        """Of each source: epochs that were begun, and how often each document is still to be read in these."""
        made = config(self.folders, dict.fromkeys(SIZES, 1.0), seed=99)
        opened = open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab))
        data = identities(made, read_blend(made))
        mixture = resume_stream(
            made, opened, data=data, consumed=self.consumed, step=self.step, segments=self.segments
        ).mixture
        found = {}
        for name, begin in zip(SIZES, mixture.begins, strict=True):
            left: Counter[int] = Counter()
            for _, documents in begin.leftovers:
                left.update(documents.tolist())
            left.update(rest_of(begin, SIZES[name]))
            found[name] = (begin.epoch, left)
        return found

    def twice_or_never(self) -> dict[str, list[int]]:
        """Documents that were read more or less often than epochs of their source were begun, counting what is left."""
        return {
            name: [d for d in range(SIZES[name]) if self.read.get(name, Counter())[d] + left[d] != epochs]
            for name, (epochs, left) in self.unread().items()
        }


def rest_of(begin: StreamStart, documents: int) -> list[int]:
    """Documents of the blocks of a begun epoch of which nothing was read."""
    rest = begin.rest
    if rest is None:
        return []
    division = Division(documents, DATA_ORDERS["blocks"])
    blocks = range(rest.first, len(division))
    where = {"seed": rest.seed, "position": rest.position, "epoch": rest.epoch}
    found = np.concatenate([division.members(number, **where) for number in blocks])
    assert len(found) == rest.documents
    return [int(document) for document in found]


NONE: dict[str, list[int]] = {name: [] for name in SIZES}
CHANGES = st.fixed_dictionaries(
    {
        "blend": st.permutations(list(SIZES))
        .flatmap(
            lambda names: st.lists(st.sampled_from([0.0, 1.0, 2.0, 9.0]), min_size=1, max_size=len(SIZES)).map(
                lambda weights: dict(zip(names, weights, strict=False))
            )
        )
        .filter(lambda blend: any(blend.values())),
        "micro_batch_size": st.sampled_from([1, 2, 4, 8]),
        "seq_length": st.sampled_from([100, 128, 256]),
        "deal_window": st.sampled_from([8, 24, 64]),
        "document_multiple": st.sampled_from([1, 4]),
        "seed": st.sampled_from([1, 2]),
        "data_seed": st.sampled_from([None, 2]),
        "steps": st.integers(0, 12),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CHANGES, min_size=1, max_size=4))
def test_no_document_is_read_twice_or_left_out_within_an_epoch(folders: Path, lives: list[dict[str, Any]]) -> None:
    run = Reader(folders)
    for life in lives:
        run.live(config(folders, **{key: value for key, value in life.items() if key != "steps"}), life["steps"])
    assert run.twice_or_never() == NONE


@pytest.mark.parametrize(
    "change",
    [
        {"blend": {"a": 1.0, "b": 1.0}},
        {"blend": {"a": 9.0, "b": 1.0, "c": 5.0}},
        {"blend": {"b": 1.0, "a": 9.0}},
        {"blend": {"a": 1.0}},
        {"seq_length": 256},
        {"micro_batch_size": 4},
        {"document_multiple": 8},
    ],
    ids=str,
)
def test_each_change_goes_on_with_what_was_not_read(folders: Path, change: dict[str, Any]) -> None:
    run = Reader(folders)
    first: dict[str, Any] = {"blend": {"a": 9.0, "b": 1.0}}
    run.live(config(folders, **first), 3)
    assert run.lines == []
    before = {name: Counter(counts) for name, counts in run.read.items()}
    run.live(config(folders, **(first | change)), 3)
    assert "no document is read twice" in run.lines[0] and len(run.lines) == 1 + len(
        change.get("blend", first["blend"])
    )
    assert all(run.read[name] >= counts for name, counts in before.items())
    assert run.twice_or_never() == NONE


def test_while_nothing_changes_the_stream_is_that_of_its_beginning(folders: Path) -> None:
    made = config(folders, {"a": 2.0, "b": 1.0})
    opened = open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab))
    data = identities(made, read_blend(made))
    fresh = resume_stream(made, opened, data=data, consumed=0, step=0, segments=[])
    again = resume_stream(made, opened, data=data, consumed=80, step=80 // GLOBAL, segments=fresh.segments)
    assert fresh.mixture is again.mixture is opened
    assert fresh.segments == again.segments and len(fresh.segments) == 1 and again.lines == []
    moved = [one.model_copy(update={"path": "elsewhere"}) for one in data]
    assert (
        resume_stream(made, opened, data=moved, consumed=80, step=80 // GLOBAL, segments=fresh.segments).mixture
        is opened
    )


def test_a_segment_is_a_pure_function_of_what_is_kept(folders: Path, tmp_path: Path) -> None:
    """A run that is stopped in its second segment reads what it would have read; the cache is no part of it."""
    first, second = config(folders, {"a": 1.0, "b": 2.0}), config(folders, {"b": 1.0, "c": 1.0}, seq_length=256)
    whole, halves = Reader(folders), Reader(Path(shutil.copytree(folders, tmp_path / "copy")))
    other = config(halves.folders, {"b": 1.0, "c": 1.0}, seq_length=256, cache=None)
    whole.live(first, 4)
    whole.live(second, 7)
    halves.live(config(halves.folders, {"a": 1.0, "b": 2.0}, cache=None), 4)
    halves.live(other, 3)
    segments = list(halves.segments)
    for cache in halves.folders.glob("*/.cache"):
        shutil.rmtree(cache)
    halves.live(other, 4)
    assert halves.lines == [] and halves.segments == segments
    assert halves.read == whole.read


def test_checkpoints_from_before_segments_were_kept(folders: Path) -> None:
    """Their one number belongs to the settings that they were written with."""
    first = config(folders, {"a": 9.0, "b": 1.0}, order="epochs")  # there was no other
    run = Reader(folders)
    run.live(first, 5)
    run.segments = []
    run.live(config(folders, {"a": 1.0, "b": 1.0}), 5, saved=first.model_dump(mode="json"))
    assert len(run.segments) == 2 and run.twice_or_never() == NONE
    same = Reader(folders, consumed=40)
    same.live(first, 1, saved=first.model_dump(mode="json"))
    assert len(same.segments) == 1 and same.lines == []


def test_a_source_that_is_gone_costs_the_window_in_hand(folders: Path, tmp_path: Path) -> None:
    """How sequences were dealt cannot be told without it: those of the last window are read again, and this is said."""
    shutil.copytree(folders, tmp_path / "copy")
    run = Reader(tmp_path / "copy")
    run.live(config(run.folders, {"a": 1.0, "b": 1.0}, deal_window=24), 4)  # 32 sequences: 8 of the second window
    shutil.rmtree(run.folders / "b")
    run.live(config(run.folders, {"a": 1.0}), 4)
    assert "up to 8 sequences of its last window are read twice" in run.lines[0]
    counts = run.read["a"]
    assert max(counts.values()) <= 2


def test_counts_of_a_blend_are_those_of_its_stretches() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.dirichlet(np.ones(rng.integers(1, 6)))
        if len(weights) > 2:
            weights[1] = 0.0
            weights /= weights.sum()
        count = int(rng.integers(0, 300))
        sources, _ = blend(weights, start=0, count=count)
        assert blended(weights, count=count).tolist() == np.bincount(sources, minlength=len(weights)).tolist()


def test_a_run_keeps_the_order_that_it_began_with(folders: Path, order: str) -> None:
    """Also a run from before orders were remembered: it goes on as it would have without the new one."""
    other = next(name for name in DATA_ORDERS if name != order)
    whole, changed = Reader(folders), Reader(folders)
    whole.live(config(folders, {"a": 1.0, "b": 2.0}), 9)
    changed.live(config(folders, {"a": 1.0, "b": 2.0}), 4)
    assert [segment["order"] for segment in changed.segments] == [order]
    if order == "epochs":
        del changed.segments[0]["order"]
    changed.live(config(folders, {"a": 1.0, "b": 2.0}, order=other), 5)
    assert changed.read == whole.read and changed.lines == []


def test_an_order_of_a_newer_version_is_refused(folders: Path) -> None:
    run = Reader(folders)
    made = config(folders, {"a": 1.0})
    run.live(made, 1)
    run.segments[0]["order"] = "spirals"
    with pytest.raises(DataError, match="reads its documents in the order 'spirals'; this version has epochs, blocks"):
        run.live(made, 1)

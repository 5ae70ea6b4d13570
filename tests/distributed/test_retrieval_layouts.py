"""Documents with neighbours under every layout: equal to one process, from a prepared data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.config import Config
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.neighbours import write_neighbours
from mmscale.data.stream.mixture import open_mixture
from mmscale.data.vocab import BOI, BOS, EOI, EOS, Vocabulary
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof import trial
from tests.distributed.layouts import References, assert_passes, config, judge, start
from tests.support import run_ranks
from tests.unit.data.corpora import prepare

VOCABULARY = Vocabulary(("text", "image"), ((0, 64), (64, 128)))
DOCUMENTS = 60
TWO_RANKS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "ep2": {"ep": 2},
    "dp2": {},
    "cp2": {"cp": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents, half of them with an image, each with three neighbours."""
    rng, documents = np.random.default_rng(0), []
    for number in range(DOCUMENTS):
        image = [BOI, *rng.integers(64, 128, 6), EOI] if number % 2 else []
        documents.append(np.array([BOS, *rng.integers(5, 64, rng.integers(2, 12)), *image, EOS]))
    place = prepare(tmp_path_factory.mktemp("retrieval") / "set", documents, vocabulary=VOCABULARY)
    table = (np.arange(DOCUMENTS)[:, None] + np.arange(1, 4)) % DOCUMENTS
    write_neighbours(place, {"train": table}, of=identity_of(place, read_manifest(place)), made={})
    return place


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials read the prepared data set."""
    monkeypatch.setattr(
        trial,
        "SyntheticMixture",
        lambda settings, **_: open_mixture(settings, "train", vocabulary=VOCABULARY),
    )


def settings(folder: Path, model: str, *, loss: bool, parallel: dict[str, Any] | None = None) -> Config:
    return config(
        model,
        data={
            "path": str(folder),
            "retrieval": {"neighbours": 2, "loss": loss},
            "document_multiple": 4,
            "cache": str(folder / "cache"),
        },
        parallel=parallel,
    )


@pytest.fixture
def references(tmp_path: Path) -> References:
    """References of this data, not of the synthetic batches of other tests."""
    return References(tmp_path)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        ("moma", True),
        ("dense", False),
        *[
            pytest.param(model, loss, marks=pytest.mark.exhaustive)
            for model, loss in [("moma", False), ("moma_token_choice", True), ("mot", True), ("moma_depth_joint", True)]
        ],
    ],
)
def test_layouts_equal_one_process(
    folder: Path, references: References, model: str, loss: bool, tmp_path: Path
) -> None:
    alone = settings(folder, model, loss=loss)
    mixture = open_mixture(alone, "train", vocabulary=VOCABULARY)
    batch = mixture.micro_batch(0)
    assert (batch.tokens == BOS).sum() > (batch.position_ids == 0).sum() - len(batch.tokens), "there are neighbours"
    references.get(alone)

    def steps(ranks: RankEnv) -> None:
        start(ranks)
        for name, parallel in TWO_RANKS.items():
            if name == "ep2" and model in ("dense", "mot"):
                continue
            found = judge(references, settings(folder, model, loss=loss, parallel=parallel), ranks, tmp_path / name)
            assert_passes(found, f"{model} {name}")
        groups.finalize()

    run_ranks(steps, world_size=2)

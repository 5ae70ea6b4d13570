"""Documents with neighbours under every layout: equal to one process, from a prepared data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.config import Config
from mmscale.config.train.schema import LossWeightsConfig
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.neighbours import write_neighbours
from mmscale.data.stream.mixture import open_mixture
from mmscale.data.vocab import BOI, BOS, EOI, EOS, HOLES, Vocabulary
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.proof import trial
from tests.distributed.layouts import References, assert_passes, config, judge, start
from tests.distributed.test_loss_weight_layouts import WEIGHTS, equals_one_process
from tests.support import run_ranks
from tests.unit.data.corpora import prepare

VOCABULARY = Vocabulary(("text", "image"), ((0, 64), (64, 128)), reserved=True)
DOCUMENTS = 60
TWO_RANKS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "ep2": {"ep": 2},
    "dp2": {},
    "cp2": {"cp": 2},
}
# In `make test`: documents on several ranks, and parts of one document.
SHORT = ("ep2", "cp2")
LONG = tuple(name for name in TWO_RANKS if name not in SHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents, half of them with an image, each with three neighbours."""
    rng, documents = np.random.default_rng(0), []
    for number in range(DOCUMENTS):
        image = [BOI, *rng.integers(64, 128, 6), EOI] if number % 2 else []
        documents.append(np.array([BOS, *rng.integers(32, 64, rng.integers(2, 12)), *image, EOS]))
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


def settings(folder: Path, model: str, *, loss: bool, masked: float, parallel: dict[str, Any] | None = None) -> Config:
    made = config(
        model,
        data={
            "path": str(folder),
            "retrieval": {"neighbours": 2, "loss": loss},
            "document_multiple": 4,
            "cache": str(folder / "cache"),
        },
        parallel=parallel,
    )
    objective = made.objective.model_copy(update={"cm3_rate": masked})
    vocab = made.vocab.model_copy(update={"reserved": True})
    return made.model_copy(update={"objective": objective, "vocab": vocab})


@pytest.fixture
def references(tmp_path: Path) -> References:
    """References of this data, not of the synthetic batches of other tests."""
    return References(tmp_path)


@pytest.mark.parametrize(
    ("model", "loss", "masked", "names"),
    [
        ("moma", True, 0.0, SHORT),
        pytest.param("moma", True, 0.0, LONG, marks=pytest.mark.long),
        pytest.param("dense", False, 0.8, tuple(TWO_RANKS), marks=pytest.mark.long),
        *[
            pytest.param(model, loss, masked, tuple(TWO_RANKS), marks=pytest.mark.exhaustive)
            for model, loss, masked in [
                ("moma", False, 0.8),
                ("moma_token_choice", True, 0.0),
                ("mot", True, 0.8),
                ("moma_depth_joint", True, 0.0),
            ]
        ],
    ],
)
def test_layouts_equal_one_process(
    folder: Path,
    references: References,
    model: str,
    loss: bool,
    masked: float,
    names: tuple[str, ...],
    tmp_path: Path,
) -> None:
    alone = settings(folder, model, loss=loss, masked=masked)
    mixture = open_mixture(alone, "train", vocabulary=VOCABULARY)
    batch = mixture.micro_batch(0)
    assert (batch.tokens == BOS).sum() > (batch.position_ids == 0).sum() - len(batch.tokens), "there are neighbours"
    assert bool((batch.tokens == VOCABULARY.reserved_id(HOLES[0])).any()) is bool(masked), "there are holes"
    references.get(alone)

    def steps(ranks: RankEnv) -> None:
        start(ranks)
        for name in names:
            parallel = TWO_RANKS[name]
            if name == "ep2" and model in ("dense", "mot"):
                continue
            found = judge(
                references, settings(folder, model, loss=loss, masked=masked, parallel=parallel), ranks, tmp_path / name
            )
            assert_passes(found, f"{model} {name}")
        groups.finalize()

    run_ranks(steps, world_size=2)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        pytest.param("moma", SHORT, marks=pytest.mark.long),
        *(pytest.param(model, None, marks=pytest.mark.exhaustive) for model in ("dense_tied", "moma_token_choice")),
    ],
)
def test_layouts_weigh_composites_alike(
    folder: Path, model: str, names: tuple[str, ...] | None, tmp_path: Path
) -> None:
    """Neighbours, holes and loss weights: a composite is one document with one weight for each modality."""

    def weighted(model: str, parallel: dict[str, Any] | None = None) -> Config:
        made = settings(folder, model, loss=True, masked=0.8, parallel=parallel)
        weights = LossWeightsConfig.model_validate(WEIGHTS)
        return made.model_copy(update={"train": made.train.model_copy(update={"loss_weights": weights})})

    equals_one_process(model, 2, tmp_path, weighted, names)

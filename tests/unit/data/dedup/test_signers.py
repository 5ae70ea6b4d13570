"""Programs that compute signatures: both estimate the Jaccard index, and a data set is deduplicated by either."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from mmscale.cli import main
from mmscale.data.dedup import apply, shared, signers, words
from mmscale.data.dedup.pairs import DuplicateRule
from mmscale.data.progress import Reporter
from mmscale.errors import DataError, UsageError
from mmscale.tables.minhash import MINHASHES
from tests.unit.data.dedup.test_dedup import changed, document, jaccard, kept_of, made, sentence
from tests.unit.data.samples import text

SILENT = Reporter(enabled=False)


@pytest.fixture(params=MINHASHES)
def name(request: pytest.FixtureRequest) -> str:
    if request.param != signers.NUMPY:
        pytest.importorskip(request.param)
    return signers.exact_name(request.param)


def shingles_of(own: list[str]) -> words.Hashes:
    return np.unique(words.shingles(words.hashes_of(own), words.SHINGLE))


def test_estimates_are_those_of_independent_minima(name: str) -> None:
    """Without bias, and with the spread of a binomial distribution or less."""
    sign, errors, rng = signers.signer(name), [], np.random.default_rng(7)
    for wanted in (0.3, 0.5, 0.8, 0.9) * 20:
        own = sentence(300, rng)
        other = changed(own, wanted)
        j = jaccard(own, other)
        equal = (sign(shingles_of(own)) == sign(shingles_of(other))).mean()
        errors.append((equal - j) / np.sqrt(j * (1 - j) / words.MINIMA))
    assert abs(np.mean(errors)) < 3 / np.sqrt(len(errors))
    assert 0.5 < np.std(errors) < 1.5


@pytest.mark.parametrize("count", [1, 4, 5, 255, 256, 257, 3000])
def test_the_shape_and_the_type_do_not_depend_on_the_length(name: str, count: int) -> None:
    own = sentence(count)
    found = signers.signer(name)(shingles_of(own))
    assert found.shape == (words.MINIMA,) and found.dtype == np.uint32
    np.testing.assert_array_equal(found, signers.signer(name)(shingles_of(own)))


@pytest.mark.parametrize("tasks", [None, 3])
def test_planted_duplicates_are_found_and_nothing_else(name: str, tasks: int | None, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    originals = [sentence(120, rng) for _ in range(60)]
    everything = [*originals, *(changed(own, 0.8) for own in originals[:30])]
    everything += [changed(own, 0.4) for own in originals[30:40]]
    folder = made(tmp_path, [document(n, text(" ".join(own))) for n, own in enumerate(everything)])
    rule = DuplicateRule(minhash=name)
    if tasks is None:
        apply.dedup(folder, rule=rule, reporter=SILENT)
    else:
        for stage in shared.plan_tasks(folder, rule=rule, tasks=tasks).stages(workers=1):
            for task in stage:
                task()
    stays = set(kept_of(folder))
    assert stays >= set(range(60)) | set(range(90, 100))
    assert np.mean([n not in stays for n in range(60, 90)]) >= 0.95


def test_two_programs_have_different_signatures() -> None:
    pytest.importorskip("rensa")
    one, other = (signers.signer(signers.exact_name(name)) for name in MINHASHES)
    own = shingles_of(sentence(100))
    assert (one(own) != other(own)).all()


def test_another_version_on_another_machine_is_refused() -> None:
    pytest.importorskip("rensa")
    with pytest.raises(DataError, match=r"signatures are made by rensa 0, and this machine has rensa [1-9]"):
        signers.signer("rensa 0")


def test_a_missing_package_and_an_unknown_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match="rensa is not installed"):
        signers.exact_name("rensa")
    monkeypatch.undo()
    assert main(["data", "dedup", str(tmp_path), "--minhash", "simhash"]) == 2
    assert "--minhash 'simhash' is none of numpy, rensa" in capsys.readouterr().err

"""Tests of permutations whose elements are computed alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.data.stream.feistel import ROUNDS, Shuffle


def shuffle(count: int, seed: int) -> Shuffle:
    return Shuffle(count, keys=np.random.Philox(key=seed).random_raw(ROUNDS))


@settings(deadline=None)
@given(count=st.integers(1, 5000), seed=st.integers(0, 2**32))
def test_it_is_a_permutation_of_any_count(count: int, seed: int) -> None:
    found = shuffle(count, seed).at(np.arange(count))
    np.testing.assert_array_equal(np.sort(found), np.arange(count))


@settings(deadline=None)
@given(count=st.integers(1, 10**12), seed=st.integers(0, 2**32), data=st.data())
def test_places_are_found_alone_in_domains_of_any_size(count: int, seed: int, data: st.DataObject) -> None:
    places = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20, unique=True)))
    whole = shuffle(count, seed)
    found = whole.at(places)
    assert ((found >= 0) & (found < count)).all() and len(set(found.tolist())) == len(places)
    np.testing.assert_array_equal(whole.place_of(found), places)
    assert [int(whole.at(np.array([place]))[0]) for place in places] == found.tolist()


def test_numbers_are_spread_evenly_over_places() -> None:
    """Chi-square over number x place, small domains and large ones: 4 standard deviations at most."""
    for count, bins in ((5, 5), (16, 16), (37, 37), (4096, 16), (100_003, 16)):
        seeds = 300 if count < 100 else 8
        table = np.zeros((bins, bins))
        for seed in range(seeds):
            found = shuffle(count, seed).at(np.arange(count))
            np.add.at(table, (np.arange(count) * bins // count, found * bins // count), 1)
        rows = np.diff(np.searchsorted(np.arange(count) * bins // count, np.arange(bins + 1)))
        expected = seeds * np.outer(rows, rows) / count
        degrees = (bins - 1) ** 2
        chi = ((table - expected) ** 2 / expected).sum()
        assert abs(chi - degrees) < 4 * np.sqrt(2 * degrees) + 1, (count, chi, degrees)


def test_neighbours_do_not_stay_together_and_seeds_differ() -> None:
    count = 65_536
    one, other = (shuffle(count, seed).at(np.arange(count)) for seed in (1, 2))
    assert (np.abs(np.diff(one)) < 32).mean() < 0.002  # 0.001 of a random order
    assert (one == other).mean() < 0.001
    assert abs(np.corrcoef(one, np.arange(count))[0, 1]) < 0.02


def test_an_order_stays_the_same_over_versions() -> None:
    assert shuffle(10, 7).at(np.arange(10)).tolist() == GOLDEN


GOLDEN = [9, 0, 4, 2, 5, 3, 6, 8, 1, 7]

"""Which experts of each group an expert-parallel rank holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mmscale.config.derived import experts_of_ranks


def test_seven_and_one_are_two_on_each_of_four_ranks() -> None:
    assert experts_of_ranks({"text": 7, "image": 1}, 4) == {
        "text": (range(2), range(2, 4), range(4, 6), range(6, 7)),
        "image": (range(0), range(0), range(0), range(1)),
    }


def test_a_group_that_is_divisible_is_cut_into_equal_blocks() -> None:
    assert experts_of_ranks({"text": 4, "image": 4}, 2) == dict.fromkeys(("text", "image"), (range(2), range(2, 4)))


@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=5), ranks=st.integers(1, 9))
def test_every_expert_has_one_rank_and_ranks_hold_equally_many(counts: list[int], ranks: int) -> None:
    places = experts_of_ranks({str(number): count for number, count in enumerate(counts)}, ranks)
    for own, count in zip(places.values(), counts, strict=True):
        assert [expert for held in own for expert in held] == list(range(count))
        assert max(map(len, own)) - min(map(len, own)) <= 1
    held = [sum(len(own[rank]) for own in places.values()) for rank in range(ranks)]
    assert max(held) - min(held) <= 1

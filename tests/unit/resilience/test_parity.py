"""XOR parity against a reference that goes byte by byte: who is in a group, what is kept, what is rebuilt."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmscale.resilience import parity


def random_images(sizes: Sequence[int], seed: int) -> list[parity.Bytes]:
    drawn = np.random.default_rng(seed)
    return [drawn.integers(0, 256, size * parity.ALIGN, np.uint8) for size in sizes]


def slow_parity(images: Sequence[parity.Bytes], member: int) -> list[int]:
    """RAID 5 from its definition: byte b of member m's k-th piece belongs to the k-th stripe that is not its own."""
    chunk = parity.chunk_bytes([image.size for image in images])
    kept = [0] * chunk
    for other, image in enumerate(images):
        stripes = [stripe for stripe in range(len(images)) if stripe != other]
        for place, byte in enumerate(image.tolist()):
            if stripes[place // chunk] == member:
                kept[place % chunk] ^= byte
    return kept


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (5, 5, 5), (4, 0, 7), (9, 8, 7, 6), (1, 1, 1, 1, 1), (2, 13, 5)])
def test_parity_is_that_of_the_definition(sizes: tuple[int, ...]) -> None:
    images = random_images(sizes, seed=sum(sizes))
    for member in range(len(sizes)):
        assert parity.parity_of(images, member=member).tolist() == slow_parity(images, member)


@given(st.lists(st.integers(0, 12), min_size=2, max_size=6).filter(any), st.integers(0, 99), st.data())
def test_any_one_member_is_rebuilt_from_the_others(sizes: list[int], seed: int, data: st.DataObject) -> None:
    images = random_images(sizes, seed)
    parities = [parity.parity_of(images, member=member) for member in range(len(images))]
    lengths = [image.size for image in images]
    lost = data.draw(st.integers(0, len(images) - 1))
    wanted = images[lost].copy()
    images[lost][:] = 0  # not looked at
    parities[lost][:] = 0
    assert np.array_equal(parity.rebuild(images, parities, lengths, lost=lost), wanted)


def test_two_lost_members_are_not_rebuilt() -> None:
    images = random_images((4, 4, 4, 4), seed=1)
    parities = [parity.parity_of(images, member=member) for member in range(4)]
    wanted = images[0].copy()
    images[0][:] = images[1][:] = 0
    assert not np.array_equal(parity.rebuild(images, parities, [256] * 4, lost=0), wanted)


@pytest.mark.parametrize(("members", "overhead"), [(2, 1.0), (3, 0.5), (4, 1 / 3), (8, 1 / 7)])
def test_memory_that_parity_takes(members: int, overhead: float) -> None:
    size = 100_000 * parity.ALIGN
    assert parity.chunk_bytes([size] * members) / size == pytest.approx(overhead, rel=1e-4)
    assert parity.chunk_bytes([size]) == 0


@pytest.mark.parametrize(
    ("nodes", "size", "groups"),
    [
        (["a"], 4, [(0,)]),
        (["a"] * 4, 4, [(0, 1, 2, 3)]),
        (["a"] * 6, 4, [(0, 1, 2), (3, 4, 5)]),
        (["a"] * 3, 2, [(0, 1, 2)]),
        (["a"] * 5, 4, [(0, 1), (2, 3, 4)]),
        # Two ranks on each of four nodes: members of a group stand on different nodes.
        (["a", "a", "b", "b", "c", "c", "d", "d"], 4, [(0, 2, 4, 6), (1, 3, 5, 7)]),
        (["a", "b", "a", "b"], 2, [(0, 1), (2, 3)]),
    ],
)
def test_groups(nodes: list[str], size: int, groups: list[tuple[int, ...]]) -> None:
    assert parity.groups_of(nodes, size=size) == groups


@given(st.integers(1, 9), st.integers(1, 5), st.integers(2, 5))
def test_every_rank_is_in_one_group_on_as_many_nodes_as_there_are(number: int, per_node: int, size: int) -> None:
    nodes: list[Hashable] = [rank // per_node for rank in range(number * per_node)]
    groups = parity.groups_of(nodes, size=size)
    assert sorted(rank for group in groups for rank in group) == list(range(len(nodes)))
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= size + (len(nodes) % size == 1)
    assert min(sizes) > 1 or len(nodes) == 1
    for group in groups:
        assert len({nodes[rank] for rank in group}) == min(len(group), number)

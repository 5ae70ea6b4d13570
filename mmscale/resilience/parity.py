"""XOR parity of a group of ranks, rotated over its members as in RAID 5, and the rebuilding of a lost member.

Pure maths on byte arrays; no torch, no files, no sockets. With n members there are n stripes. Member m stores the
parity of stripe m, and its own image is cut into n - 1 pieces, one for each of the other stripes. So one copy of the
state needs 1 / (n - 1) more memory, and two members mirror each other. Any one member can be rebuilt from the others;
two cannot.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

ALIGN = 64  # bytes; all images and pieces are multiples of this, so that XOR works on words


def groups_of(nodes: Sequence[Hashable], *, size: int) -> list[tuple[int, ...]]:
    """Assign ranks to parity groups, with members on different nodes if there are enough nodes.

    No group is larger than `size`, and sizes differ by at most one, so 6 ranks in groups of 4 are 3 + 3. A rank that
    would be alone joins another group: 3 ranks in groups of 2 are one group of 3. A world of one rank has no parity.

    Args:
        nodes: node of each rank.
        size: wanted members of a group, at least 2.

    Returns:
        The ranks of each group; a rank's place in its group is its member number.
    """
    order = list(dict.fromkeys(nodes))
    seen: dict[Hashable, int] = {}
    places = []
    for rank, node in enumerate(nodes):
        places.append((seen.setdefault(node, 0), order.index(node), rank))
        seen[node] += 1
    # First the first rank of each node, then the second ones: neighbours in this order are on different nodes.
    ranks = [rank for _, _, rank in sorted(places)]
    world = len(ranks)
    number = max(1, min(-(-world // size), world // 2))
    cuts = [world * index // number for index in range(number + 1)]
    return [tuple(ranks[begin:end]) for begin, end in pairwise(cuts)]


def chunk_bytes(lengths: Sequence[int]) -> int:
    """Bytes of a member's parity: the longest image in as many pieces as there are other members; 0 for one member.

    Args:
        lengths: bytes of each member's image, multiples of ALIGN. Shorter ones count as filled up with zeros.
    """
    if len(lengths) < 2:
        return 0
    piece = -(-max(lengths) // (len(lengths) - 1))
    return -(-piece // ALIGN) * ALIGN


def piece(*, member: int, stripe: int, length: int, chunk: int) -> slice:
    """The slice of a member's image that belongs to another member's stripe; it may be short or empty.

    Args:
        member: whose image it is.
        stripe: number of the stripe, another one than `member`, which keeps the parity of that stripe.
        length: of the image [bytes].
        chunk: of the group, from `chunk_bytes`.
    """
    assert member != stripe
    index = stripe if stripe < member else stripe - 1
    return slice(min(index * chunk, length), min((index + 1) * chunk, length))


def xor_into(target: Bytes, source: Bytes) -> None:
    """XOR a source into a target, in place, over the shorter of both; lengths are multiples of 8."""
    size = min(target.size, source.size)
    words = target[:size].view(np.uint64)
    np.bitwise_xor(words, source[:size].view(np.uint64), out=words)


def parity_of(images: Sequence[Bytes], *, member: int) -> Bytes:
    """The parity that a member keeps, from the images of all others (its own is ignored)."""
    lengths = [image.size for image in images]
    chunk = chunk_bytes(lengths)
    parity = np.zeros(chunk, np.uint8)
    for other, image in enumerate(images):
        if other != member:
            xor_into(parity, image[piece(member=other, stripe=member, length=image.size, chunk=chunk)])
    return parity


def contribution_bytes(lengths: Sequence[int], *, member: int, lost: int, stripe: int) -> int:
    """Bytes that a survivor adds to one stripe of a lost member's image.

    Args:
        lengths: bytes of each member's image.
        member: the survivor.
        lost: the lost member.
        stripe: which stripe; not the lost member's own, whose parity is lost too and is not needed.
    """
    chunk = chunk_bytes(lengths)
    wanted = piece(member=lost, stripe=stripe, length=lengths[lost], chunk=chunk)
    if stripe == member:
        return wanted.stop - wanted.start
    given = piece(member=member, stripe=stripe, length=lengths[member], chunk=chunk)
    return min(given.stop - given.start, wanted.stop - wanted.start)


def contribution(image: Bytes, parity: Bytes, lengths: Sequence[int], *, member: int, lost: int, stripe: int) -> Bytes:
    """A survivor's contribution to one stripe of a lost member's image; the XOR over all survivors is that part of it.

    Args:
        image: the survivor's image.
        parity: the survivor's parity.
        lengths: bytes of each member's image.
        member: the survivor.
        lost: the lost member.
        stripe: as for `contribution_bytes`.
    """
    size = contribution_bytes(lengths, member=member, lost=lost, stripe=stripe)
    if stripe == member:
        return parity[:size]
    begin = piece(member=member, stripe=stripe, length=image.size, chunk=chunk_bytes(lengths)).start
    return image[begin : begin + size]


def rebuild(images: Sequence[Bytes], parities: Sequence[Bytes], lengths: Sequence[int], *, lost: int) -> Bytes:
    """A lost member's image, uint8 [lengths[lost]], from those of all others.

    Args:
        images: of all members; the lost one's is ignored.
        parities: of all members; likewise.
        lengths: bytes of each member's image.
        lost: the lost member.
    """
    image = np.zeros(lengths[lost], np.uint8)
    for stripe in range(len(lengths)):
        if stripe == lost:
            continue
        place = piece(member=lost, stripe=stripe, length=lengths[lost], chunk=chunk_bytes(lengths))
        for member in range(len(lengths)):
            if member != lost:
                part = contribution(images[member], parities[member], lengths, member=member, lost=lost, stripe=stripe)
                xor_into(image[place], part)
    return image

"""Facts about documents for `mmscale plan --data`: of a prepared data set, or of unprepared document files.

Reads manifests and records, opens some pictures for their sizes, and tokenizes nothing. No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from mmscale.config import PrepareConfig
from mmscale.data.documents.readers import list_files, scan_files
from mmscale.data.documents.schema import Document, DocumentSlice, Item, Rejected, SplitName, Text
from mmscale.data.modalities.image_files import open_image
from mmscale.data.modalities.modality import Report, Sample
from mmscale.data.modalities.table import MODALITIES
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import HELD_OUT, MANIFEST, TRAIN, common_tokenizers, parts_of, read_manifest
from mmscale.data.prepared.selection import read_selection
from mmscale.data.prepared.table_facts import table_facts
from mmscale.data.vocab import IMAGE
from mmscale.errors import DataError
from mmscale.plan.sizing_inputs import Facts, Items

_RECORDS = 20_000  # records read from the beginning of files; the others are assumed to be similar
_PICTURES = 200  # number of pictures that are opened
_CHARACTERS = 3_000_000  # of text up to which a text tokenizer is tried: 2 s
_ITEMS = 16  # items read of each other modality, to find out how many tokens they have


def survey(where: Sequence[str]) -> Facts:
    """Facts about folders of prepared data sets, or about document files.

    Args:
        where: folders, or files (globs allowed).

    Raises:
        DataError: they are missing or damaged, hold no documents, or cannot be blended.
    """
    prepared = [Path(one) for one in where if (Path(one) / MANIFEST).is_file()]
    if len(where) == 1 and Path(where[0]).is_dir() and not prepared:
        raise DataError(
            f"data: {where[0]} is a folder without a prepared data set",
            remedy=f"name the document files instead: --data '{where[0]}/*.jsonl'",
        )
    if not prepared:
        return _of_files(where)
    if len(prepared) < len(where):
        other = next(one for one in where if Path(one) not in prepared)
        raise DataError(
            f"data: prepared data sets and document files together: {other} is no prepared data set",
            remedy=f"prepare it first: mmscale data prepare --documents ... --like {prepared[0]} --out DIR",
        )
    facts = [_of_folder(folder) for folder in dict.fromkeys(prepared)]
    return facts[0] if len(facts) == 1 else _of_blend(facts)


def _of_blend(facts: Sequence[Facts]) -> Facts:
    """Facts about several prepared data sets together."""
    first, *others = facts
    for one in others:
        if (one.ids, one.marked, one.reserved) != (first.ids, first.marked, first.reserved):
            raise DataError(
                f"data: {one.where[0]} has other ids than {first.where[0]}",
                remedy=f"prepare it again with --like {first.where[0]} to mix both",
            )
    common_tokenizers({Path(one.where[0]): read_manifest(Path(one.where[0])).tokenizers for one in facts})
    return replace(
        first,
        where=tuple(one.where[0] for one in facts),
        documents=sum(one.documents for one in facts),
        images=sum(one.images for one in facts),
        tokens={name: sum((one.tokens or {}).get(name, 0) for one in facts) for name in first.tokens or {}},
        tokens_of=tuple(number for one in facts for number in one.tokens_of),
        longest=max(one.longest or 0 for one in facts),
        held_out=sum(one.held_out or 0 for one in facts),
    )


def _of_folder(folder: Path) -> Facts:
    manifest = read_manifest(folder)
    ranges = zip(manifest.modalities, manifest.ranges, strict=True)
    parts_of(folder, manifest, TRAIN)  # raises: there are none
    longest = max(
        table_facts(folder, manifest, split).longest for split, own in manifest.splits.items() if own.documents
    )
    chosen = read_selection(folder, of=identity_of(folder, manifest))
    tokens = {name: manifest.splits[TRAIN].tokens(name) for name in manifest.modalities}
    if chosen is not None:
        tokens = {name: round(count) for name, count in chosen.tokens.items()}
    each = manifest.tokens_per_image
    return Facts(
        where=(str(folder),),
        documents=manifest.splits[TRAIN].documents if chosen is None else round(chosen.copies),
        images=tokens.get("image", 0) // each if each else 0,
        ids={name: end - start for name, (start, end) in ranges},
        marked=manifest.marked,
        reserved=manifest.reserved,
        tokens=tokens,
        tokens_of=(sum(tokens.values()),),
        longest=longest,
        held_out=manifest.splits[HELD_OUT].documents if HELD_OUT in manifest.splits else 0,
    )


def _of_files(where: Sequence[str]) -> Facts:
    slices = scan_files(list_files(where), slice_records=_RECORDS, threads=1)
    total = sum(piece.count for piece in slices)
    share = max(1, _RECORDS // max(1, len(slices)))
    read: list[Document] = []
    rejected: list[Rejected] = []
    for piece in slices:
        own: list[Document] = []
        for record in piece.read():
            if isinstance(record, Document):
                own.append(record)
            else:
                rejected.append(record)
            if len(own) >= share:
                break
        read += own
    if not read:
        raise DataError(
            f"data: there is no readable document in {', '.join(where)}",
            remedy="`mmscale data prepare` lists what is wrong with each in rejected.jsonl",
        )
    scale = max(1.0, total / len(read)) if len(read) >= share else 1.0
    texts = [sum(len(one.text) for one in document.content if isinstance(one, Text)) for document in read]
    sizes = [sum(len(one.text.encode()) for one in document.content if isinstance(one, Text)) for document in read]
    numbers = [len(document.images) for document in read]
    pictures = [image for document in read for image in document.images]
    edges, channels = _looked_at(pictures[:: max(1, len(pictures) // _PICTURES)])
    return Facts(
        where=tuple(where),
        documents=round(scale * len(read)),
        images=round(scale * sum(numbers)),
        characters=round(scale * sum(texts)),
        text_ids=_text_ids(read) if scale == 1.0 and sum(texts) <= _CHARACTERS else None,
        edge=round(median(edges)) if edges else None,
        channels=channels,
        most_images=max(numbers),
        most_bytes=max(sizes),
        distinct_images=max(1, round(scale * len({_name(image) for image in pictures}))) if pictures else None,
        others=tuple(_others(read, slices, scale)),
        held_out=_held_out(read, scale),
        rejected=len(rejected),
        first_rejected=f"{rejected[0].where}: {rejected[0].reason}" if rejected else "",
    )


def _held_out(read: Sequence[Document], scale: float) -> int | None:
    """Documents whose own `split` holds them out; None: the hash of the group decides, or no such document was read."""
    number = sum(document.split == HELD_OUT for document in read)
    decided = scale == 1.0 and all(document.split is not None for document in read)
    return round(scale * number) if number or decided else None


def _text_ids(read: Sequence[Document]) -> int:
    """Ids that a text tokenizer learns from all texts, at most as many as fit into two bytes."""
    texts = (one.text for document in read for one in document.content if isinstance(one, Text))
    return TextTokenizer.train(texts, size=1 << 16).vocab_size


class _Few(Sample):
    """Only the first items: enough to fit a temporary tokenizer."""

    def items(self, split: SplitName, limit: int) -> Iterator[Item]:
        """As in the base class."""
        return itertools.islice(super().items(split, limit), _ITEMS)


def _others(read: Sequence[Document], slices: Sequence[DocumentSlice], scale: float) -> Iterator[Items]:
    """Items of modalities besides text and images.

    Args:
        read: the documents that were read.
        slices: their origin.
        scale: total number of documents divided by the number that was read.

    Raises:
        DataError: no item of a modality can be read.
    """
    for name, modality in MODALITIES.items():
        counts = [len(document.items(name)) for document in read]
        if name == IMAGE or not any(counts):
            continue
        silent = Report(lambda _: None, lambda _: None)
        codec = modality.fit({}, _Few(name, slices, PrepareConfig()), _ITEMS, silent)
        if codec is None:
            raise DataError(
                f"data: no {name} of the documents can be read",
                remedy="`mmscale data prepare` lists what is wrong with each in rejected.jsonl",
            )
        yield Items(name, round(scale * sum(counts)), max(counts), codec.tokens_per_item)


def _looked_at(pictures: Iterable[Item]) -> tuple[list[int], int]:
    """Shorter edges of pictures [pixels], and the number of channels: 1 if all are grey, otherwise 3."""
    edges, grey = [], True
    for image in pictures:
        with contextlib.suppress(Exception):  # an unreadable picture is reported when the documents are prepared
            source = image.source
            if isinstance(source, np.ndarray):
                edges.append(min(source.shape[:2]))
                grey = grey and (source.ndim == 2 or source.shape[-1] == 1)
                continue
            with open_image(source) as opened:
                edges.append(min(opened.size))
                grey = grey and opened.mode in ("1", "L", "LA", "I", "I;16")
    return edges, 1 if edges and grey else 3


def _name(image: Item) -> str:
    if isinstance(image.source, Path):
        return str(image.source)
    content = image.source if isinstance(image.source, bytes) else image.source.tobytes()
    return hashlib.sha256(content).hexdigest()

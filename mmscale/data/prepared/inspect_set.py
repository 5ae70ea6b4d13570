"""Shows the content of a prepared data set, and one document as text and files (`mmscale data inspect`).

It does not change the data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
from numpy.typing import NDArray

from mmscale import bounded
from mmscale.data.documents.schema import TRAIN, VALIDATION
from mmscale.data.modalities.fit import QUALITY
from mmscale.data.modalities.image_files import to_picture
from mmscale.data.modalities.table import MODALITIES, decode_item, folder_of, load_codec, open_codecs, remarks
from mmscale.data.modalities.text_tokens import TextTokenizer, open_text_tokenizer
from mmscale.data.prepared.content_facts import content_facts
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.label_masks import label_counts, map_label_counts
from mmscale.data.prepared.leaks import kept_companion
from mmscale.data.prepared.manifest import Manifest, Part, read_manifest, read_table
from mmscale.data.prepared.neighbours import (
    NO_NEIGHBOUR,
    check_numbers,
    open_table,
    read_neighbours,
    table_of,
)
from mmscale.data.prepared.parts import read_document, total_tallies
from mmscale.data.prepared.selection import read_selection
from mmscale.data.prepared.shared_content import in_training
from mmscale.data.prepared.split_keys import comparable
from mmscale.data.vocab import IMAGE, Vocabulary
from mmscale.errors import DataError, shell_command

_FACTS = ("size", "channels", "grid", "rate")  # attributes of tokenizers to show, if they exist
_NOT_SHOWN = ("split", "images", "items", "note")  # measured values of a tokenizer that are not shown
_SHEET_WIDTH = 640  # pixels
_SHEET_IMAGE = 128  # edge of an image on the sheet [pixels]
_SHEET_GAP = 8  # pixels
_SHEET_LINE = 16  # height of a line of Pillow's built-in font [pixels]


def summary(folder: Path) -> dict[str, Any]:
    """Documents, tokens, lengths, vocabulary and tokenizers of a data set, ready for JSON.

    Raises:
        DataError: the data set is missing, unfinished or damaged.
    """
    manifest = read_manifest(folder, setting="the path")
    text = open_text_tokenizer(folder)
    ranges = dict(zip(manifest.modalities, manifest.ranges, strict=True))
    facts, companion = content_facts(folder, manifest), kept_companion(folder, manifest)
    own = [] if facts is None else facts.leaks()
    marked = facts is not None and facts.shared.lines()
    commands = [shell_command("data", "inspect", folder, "--held-out").strip("`")] if marked else []
    return {
        "folder": str(folder),
        "splits": {name: _split_summary(folder, manifest, name) for name in manifest.splits},
        "vocabulary": {
            "fingerprint": manifest.vocabulary,
            "ranges": {name: list(pair) for name, pair in ranges.items()},
        },
        "text_tokenizer": {"fingerprint": manifest.text_tokenizer, "ids_in_use": text.vocab_size},
        **{f"{name}_tokenizer": _codec_summary(folder, manifest, name) for name in _listed(manifest)},
        "tasks": [task.name for task in manifest.tasks],
        "rejected": manifest.rejected,
        "selection": _selection(folder, manifest),
        "neighbours": _tables(folder, manifest),
        "held_out_in_training": None if facts is None else _lists(facts.shared.named()),
        "groups_in_both_splits": None if facts is None or facts.groups is None else facts.groups.both,
        "leaks": [*own, *([] if companion is None else companion.lines(folder))],
        "marked_by": [*commands, *([] if companion is None else companion.marked_by(folder))],
        "repeated": None if facts is None else _lists(facts.repeated.named()),
        "repetitions": {} if facts is None else dict(facts.repeated.rows()),
    }


def _lists(pairs: Mapping[str, tuple[int, int] | None]) -> dict[str, list[int] | None]:
    return {key: None if pair is None else list(pair) for key, pair in pairs.items()}


def lines(folder: Path, split: str, *, trained_on: Path | None = None) -> Iterator[str]:
    """Every document of a split as one line, with marks for its items and for content that training has too.

    Args:
        folder: the data set.
        split: name of the split.
        trained_on: another data set whose training documents held-out ones are compared with; None: its own.

    Raises:
        DataError: a data set is missing or damaged, there is no such split, or the sets cannot be compared.
    """
    manifest = read_manifest(folder, setting="the path")
    if split not in manifest.splits:
        raise DataError(f"data: {folder} has no split {split!r}", remedy=f"one of {', '.join(manifest.splits)}")
    text = open_text_tokenizer(folder)
    trained = None if trained_on is None else (trained_on, _other_set(folder, manifest, trained_on))
    known: frozenset[int] = frozenset()
    if split == VALIDATION and comparable(manifest):
        known = in_training(folder, manifest, trained=trained)
    where = "training" if trained_on is None else f"training of {trained_on}"
    number = 0
    for part in manifest.splits[split].parts:
        for index in range(part.documents):
            mark = f"  (in {where} too)" if number in known else ""
            yield _marked(read_document(folder, part, index), text, manifest).replace("\n", " ") + mark
            number += 1


def _other_set(folder: Path, manifest: Manifest, other: Path) -> Manifest:
    """The manifest of a data set whose tokens can be compared with those of `folder`."""
    found = read_manifest(other, setting="--trained-on")
    if not (comparable(manifest) and comparable(found)):
        raise DataError(
            "data inspect --trained-on: documents of a Megatron corpus are not compared",
            remedy="`mmscale data dedup` compares them",
        )
    common = manifest.tokenizers.keys() & found.tokenizers.keys()
    if manifest.vocabulary != found.vocabulary or any(manifest.tokenizers[n] != found.tokenizers[n] for n in common):
        raise DataError(
            f"data inspect --trained-on: {other} and {folder} have other tokenizers, so equal content has other tokens",
            remedy=f"prepare it like the other one: data prepare --like {folder}",
        )
    return found


def _split_summary(folder: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    split = manifest.splits[name]
    tables = [read_table(folder, part) for part in split.parts]
    found: dict[str, Any] = {
        "documents": split.documents,
        "tokens": {modality: split.tokens(modality) for modality in manifest.modalities},
        "share": {modality: round(share, 4) for modality, share in manifest.share(name).items()},
    }
    if tables:
        lengths = np.concatenate([table[:, :-1].sum(axis=1) for table in tables])
        found["document_tokens"] = {
            "mean": round(float(lengths.mean()), 2),
            "shortest": int(lengths.min()),
            "longest": int(lengths.max()),
        }
    return found


def _selection(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """Which training documents runs exclude or repeat; None: they read each once per epoch."""
    found = read_selection(folder)
    if found is None:
        return None
    return {
        "current": found.of == identity_of(folder, manifest),
        "layers": [layer.key for layer in found.layers],
        "kept": found.kept,
        "documents": found.documents,
        "copies": round(found.copies, 2),
        "tokens": {name: round(count) for name, count in found.tokens.items()},
        "share": {name: round(share, 4) for name, share in found.share().items()},
    }


def _tables(folder: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The tables of neighbours; None: there are none."""
    found = read_neighbours(folder)
    if found is None:
        return None
    tables = {split: table.key for split, table in found.splits.items()}
    return {"current": found.of == identity_of(folder, manifest), "columns": found.columns, "tables": tables} | {
        "made": found.made
    }


def _listed(manifest: Manifest) -> tuple[str, ...]:
    """Modalities whose tokenizers are described. Image is always included, with null if there is no tokenizer."""
    return tuple(dict.fromkeys((IMAGE, *manifest.tokens_per_item)))


def _codec_summary(folder: Path, manifest: Manifest, name: str) -> dict[str, Any] | None:
    place = folder / folder_of(name)
    if name not in MODALITIES or not place.is_dir():
        return None
    codec = load_codec(name, place)
    try:
        measured = bounded.read_object(place / QUALITY)
    except (OSError, ValueError):
        measured = {}
    return {
        "fingerprint": manifest.tokenizers.get(name),
        "kind": codec.kind,
        "codes": codec.vocab_size,
        **{key: _plain(getattr(codec, key)) for key in _FACTS if hasattr(codec, key)},
        **({key: _plain(value) for key, value in asdict(codec.fitting).items()} if hasattr(codec, "fitting") else {}),
        f"tokens_per_{name}": codec.tokens_per_item,
        "remarks": remarks(name, total_tallies(folder).get(name, {}), codec),
    } | {key: value for key, value in measured.items() if key not in _NOT_SHOWN}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def draw_sample(folder: Path, index: int, out: Path, *, split: str = TRAIN, neighbours: int = 0) -> dict[str, Any]:
    """Convert one document back: its text, its items as files (PNG for images), and all of it on one contact sheet.

    Args:
        folder: the data set.
        index: number of the document in its split.
        out: folder of the files; made if it is missing.
        split: name of the split.
        neighbours: how many of its neighbours to place before it, the nearest ones, as evaluations do.

    Returns:
        `text` (special tokens and items as marks), `content` (pieces as in a document file), `files` by modality,
        `images` (those of them), `sheet` (a file), `tokens` per modality, `loss` (modalities whose labels are trained
        on), `labels` (those labels per modality; in conversations only those of answers), `neighbours` (their
        numbers). Tokens, loss and labels are those of the document without its neighbours.

    Raises:
        DataError: the data set is missing or damaged, or there is no such document, or it has no neighbours.
    """
    manifest = read_manifest(folder, setting="the path")
    part, position = _locate(folder, manifest, split, index)
    ids = read_document(folder, part, position)
    before = _neighbours(folder, manifest, split, index)[:neighbours] if neighbours else []
    ids = np.concatenate([*(read_document(folder, *_locate(folder, manifest, TRAIN, one)) for one in before), ids])
    row = read_table(folder, part)[position]
    listed = map_label_counts(folder, part)[position][None] if part.masked else None
    labels = label_counts(row[None], listed)[0]
    text, codecs = open_text_tokenizer(folder), open_codecs(folder)
    out.mkdir(parents=True, exist_ok=True)

    content: list[dict[str, Any]] = []
    drawn: list[NDArray[np.uint8]] = []
    files: dict[str, list[str]] = {IMAGE: []}
    for modality, run in _runs(ids, manifest.vocab):
        if modality == manifest.modalities[0]:
            content += [{"type": "text", "text": piece} for piece in _texts(run, text, manifest)]
            continue
        codes = run - manifest.ranges[manifest.modalities.index(modality)][0]
        values = decode_item(modality, codes, codecs.get(modality))
        if values is None:
            content.append({"type": "tokens", "modality": modality, "ids": codes.tolist()})
            continue
        kind, own = MODALITIES[modality], files.setdefault(modality, [])
        file = out / f"{split}-{index}-{modality}-{len(own)}{kind.written}"
        kind.write(values, file, codecs[modality])
        own.append(str(file))
        drawn.append(kind.picture(values, codecs[modality]))
        content.append({"type": modality, "path": file.name})
    sheet = out / f"{split}-{index}-sheet.png"
    marked = _marked(ids, text, manifest)
    _contact_sheet(marked, drawn).save(sheet, format="PNG")
    return {
        "split": split,
        "index": index,
        "text": marked,
        "content": content,
        "images": files[IMAGE],
        "files": files,
        "sheet": str(sheet),
        "tokens": dict(zip(manifest.modalities, row[:-1].tolist(), strict=True)),
        "loss": [name for bit, name in enumerate(manifest.modalities) if int(row[-1]) >> bit & 1],
        "labels": dict(zip(manifest.modalities, labels.tolist(), strict=True)),
        "neighbours": before,
    }


def _neighbours(folder: Path, manifest: Manifest, split: str, index: int) -> list[int]:
    """The neighbours of a document, the nearest first. Weights of documents are not applied."""
    table = table_of(folder, split, of=identity_of(folder, manifest))
    found = open_table(folder, split, table.key, documents=manifest.splits[split].documents)[index]
    check_numbers(found, bank=manifest.splits[TRAIN].documents, folder=folder)
    return [number for number in found.tolist() if number != NO_NEIGHBOUR]


def _locate(folder: Path, manifest: Manifest, split: str, index: int) -> tuple[Part, int]:
    if split not in manifest.splits:
        raise DataError(f"data: {folder} has no split {split!r}", remedy=f"one of {', '.join(manifest.splits)}")
    position = index
    for part in manifest.splits[split].parts:
        if 0 <= position < part.documents:
            return part, position
        position -= part.documents
    last = manifest.splits[split].documents - 1
    raise DataError(f"data: split {split} of {folder} has no document {index}", remedy=f"ask for 0..{last}")


def _runs(ids: NDArray[np.int64], vocabulary: Vocabulary) -> list[tuple[str, NDArray[np.int64]]]:
    """Runs of ids of one modality; two neighbouring images are separated by their <eoi> and <boi>."""
    modality = vocabulary.modality_of(ids)
    borders = np.flatnonzero(np.diff(modality)) + 1
    return [
        (vocabulary.names[int(vocabulary.modality_of(run[:1])[0])], run) for run in np.split(ids, borders) if len(run)
    ]


def _texts(run: NDArray[np.int64], tokenizer: TextTokenizer, manifest: Manifest) -> list[str]:
    """Text between special tokens."""
    pieces = np.split(run, np.flatnonzero(run < len(manifest.vocab.specials)))
    # A piece may start with the special token, which decoding omits.
    decoded = (tokenizer.decode(piece) for piece in pieces)
    return [piece for piece in decoded if piece]


def _marked(ids: NDArray[np.int64], tokenizer: TextTokenizer, manifest: Manifest) -> str:
    """The whole document in one line: `<s><boi>[image 0: 16 tokens]<eoi>this is a seven</s>`."""
    vocabulary, specials = manifest.vocab, manifest.vocab.specials
    pieces: list[str] = []
    seen: Counter[str] = Counter()
    for modality, run in _runs(ids, vocabulary):
        if modality == manifest.modalities[0]:
            for piece in np.split(run, np.flatnonzero(run < len(specials))):
                if len(piece) and piece[0] < len(specials):
                    pieces.append(specials[piece[0]])
                pieces.append(tokenizer.decode(piece))
            continue
        number = f" {seen[modality]}" if vocabulary.marks(modality) else ""
        pieces.append(f"[{modality}{number}: {len(run)} tokens]")
        seen[modality] += 1
    return "".join(pieces)


def _contact_sheet(text: str, images: Sequence[NDArray[np.uint8]]) -> PIL.Image.Image:
    """The text above the images, enlarged without smoothing so that single pixels are visible."""
    width = (_SHEET_WIDTH - 2 * _SHEET_GAP) // 7  # the built-in font is about 7 pixels wide
    # the built-in font has no glyphs beyond Latin-1
    shown = text.encode("latin-1", "replace").decode("latin-1")
    lines = [shown[at : at + width] for at in range(0, len(shown), width)][:40]
    lines = [line.replace("\n", " ") for line in lines]
    columns = _SHEET_WIDTH // (_SHEET_IMAGE + _SHEET_GAP)
    rows = -(-len(images) // columns)
    top = _SHEET_GAP + _SHEET_LINE * len(lines)
    height = top + rows * (_SHEET_IMAGE + _SHEET_GAP) + _SHEET_GAP
    sheet = PIL.Image.new("RGB", (_SHEET_WIDTH, height), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((_SHEET_GAP, _SHEET_GAP + number * _SHEET_LINE), line, fill="black")
    for number, pixels in enumerate(images):
        row, column = divmod(number, columns)
        picture = to_picture(pixels).convert("RGB").resize((_SHEET_IMAGE,) * 2, PIL.Image.Resampling.NEAREST)
        sheet.paste(
            picture, (_SHEET_GAP + column * (_SHEET_IMAGE + _SHEET_GAP), top + row * (_SHEET_IMAGE + _SHEET_GAP))
        )
    return sheet

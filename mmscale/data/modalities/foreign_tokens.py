"""Converts a `.tiktoken` file to a tokenizer.json.

The result is compared with the ranks of the file on a sample of texts, so that no id differs unnoticed.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mmscale import bounded
from mmscale.errors import DataError

SUFFIX = ".tiktoken"
# Cuts texts into pieces before bytes are merged: the pattern of cl100k_base (GPT-4; Llama 3's differs for digits).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MOST_BYTES = 256 << 20
_SAMPLE = (
    "The quick brown fox's 12345 jumps over\r\n\r\n  the lazy dog!  it'll  ",
    "for (int i = 0; i < n; ++i) {\n\treturn x[i] += 0x1F;\n}\n",
    "Größe, naïve, 東京タワー, Привет мир, مرحبا, 🙂🙃 e\u0301",
    "<s> <boi> https://example.org/?q=a+b&c=%20#d ----====____ ....",
)


def converted(file: Path, *, pattern: str = PATTERN) -> dict[str, Any]:
    """The content of a tokenizer.json with the ids of a `.tiktoken` file.

    Args:
        file: each line has a token in base64 and its rank, which is its id.
        pattern: regular expression that cuts texts into pieces; the file does not contain it.

    Raises:
        DataError: the file is damaged, lacks a byte, or the conversion gives other ids than its ranks.
    """
    ranks = _read(file)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"text tokenizer: {file} has no token for byte {missing[0]}", remedy="copy the file again")
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        (spelled(left), spelled(right))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1 and (parts := _joined(token, ranks, below=rank)) is not None
        for left, right in (parts,)
    ]
    tokenizer = Tokenizer(models.BPE({spelled(token): rank for token, rank in ranks.items()}, merges))
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for text in _SAMPLE:
        pieces = [text[start:end] for _, (start, end) in cut.pre_tokenize_str(text)]
        wanted = [rank for piece in pieces for rank in _by_ranks(piece.encode(), ranks)]
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if found != wanted:
            raise DataError(
                f"text tokenizer: converted from {file}, {text[:30]!r} has other tokens than its ranks give",
                remedy="convert it with its own library into a tokenizer.json",
            )
    content: dict[str, Any] = bounded.parse_json(tokenizer.to_str())
    return content


def _read(file: Path) -> dict[bytes, int]:
    try:
        lines = bounded.read_bytes(file, most=_MOST_BYTES).splitlines()
        pairs = [line.split() for line in lines if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError, binascii.Error) as error:
        raise DataError(
            f"text tokenizer: {file} cannot be read: {error}", remedy="name a .tiktoken file: base64 and rank in a line"
        ) from error
    if len(set(ranks.values())) < len(pairs) or b"" in ranks:
        raise DataError(f"text tokenizer: {file} has a token or a rank twice", remedy="copy the file again")
    return ranks


def _letters() -> dict[int, str]:
    """The character that byte-level tokenizers use for each byte (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


def _joined(token: bytes, ranks: Mapping[bytes, int], *, below: int) -> tuple[bytes, bytes] | None:
    """The two tokens whose merge gives this one; None if merging with lower ranks does not lead to it."""
    parts = _parts(token, ranks, below=below)
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _by_ranks(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Ids as tiktoken computes them: the neighbouring pair with the lowest rank is merged, until none is left."""
    if piece in ranks:
        return [ranks[piece]]
    return [ranks[part] for part in _parts(piece, ranks, below=1 << 62)]


def _parts(piece: bytes, ranks: Mapping[bytes, int], *, below: int) -> list[bytes]:
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while len(parts) > 1:
        rank, at = min((ranks.get(parts[at] + parts[at + 1], below), at) for at in range(len(parts) - 1))
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts

"""Converts a `.model` file of sentencepiece (BPE or Unigram) to a tokenizer.json.

sentencepiece itself encodes a sample of texts, and the result has to give the same ids. What a tokenizer.json cannot
express exactly is refused. Optional packages: sentencepiece and protobuf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from mmscale import bounded
from mmscale.errors import DataError

SUFFIX = ".model"
_MOST_BYTES = 256 << 20
_ROUNDING = 2.0**-23  # relative, of a sum of float32
_SPACE = "▁"  # what sentencepiece writes for a space
# Unigram finds the most probable pieces, and a special token is a piece of the vocabulary like any other. So "<" of a
# text is replaced by this character, in pieces too: no text contains a special token then. Unicode guarantees that
# U+FDD0 never becomes a character; a text with it would be read as one with "<".
_LESS, _LESS_BYTE, _HIDDEN = "<", "<0x3C>", "\ufdd0"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_KINDS = {3: "Word", 4: "Char"}
# ModelProto.SentencePiece.Type
_NORMAL, _USER_DEFINED, _UNUSED, _BYTE = 1, 4, 5, 6
_TOGETHER = 64  # pieces of the vocabulary that are a text of the sample
_SAMPLE = (
    "The quick brown fox's 12345 jumps over\r\n\r\n  the lazy dog!  it'll  ",
    "  leading and trailing spaces  \n\tfor (int i = 0; i < n; ++i) {\n\treturn x[i] += 0x1F;\n}\n",
    "Größe, naïve, 東京タワー, Привет мир, مرحبا, 🙂🙃 e\u0301 ﬁ ½ ａ",
    "<s> </s> <unk> <0x41> ▁ ▁▁a https://example.org/?q=a+b&c=%20#d ----====____ ....",
    " ",
    "a",
)


def converted(file: Path) -> dict[str, Any]:
    """The content of a tokenizer.json with the ids of a `.model` file.

    Args:
        file: written by sentencepiece.

    Raises:
        DataError: a package is missing, the file is damaged, of another kind than BPE and Unigram, has a setting that a
            tokenizer.json cannot express, or the conversion gives other ids.
    """
    reference, model = _read(file)
    _check(file, model)
    unigram, spec = model.trainer_spec.model_type == _UNIGRAM, model.normalizer_spec
    tokenizer = Tokenizer((_unigram if unigram else _bpe)(model, unknown=reference.unk_id()))
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    back: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if unigram:
        steps.append(normalizers.Replace(_LESS, _HIDDEN))
        back.insert(0, decoders.Replace(_HIDDEN, _LESS))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if spec.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    for text in (*_SAMPLE, *_of_pieces(model)):
        found, wanted = tokenizer.encode(text, add_special_tokens=False).ids, reference.encode(text)
        if found != wanted and not (unigram and _tied(model, found, wanted)):
            raise DataError(
                f"text tokenizer: converted from {file}, {text[:30]!r} has other tokens than sentencepiece gives",
                remedy="use a tokenizer.json that was made for the model",
            )
    content: dict[str, Any] = bounded.parse_json(tokenizer.to_str())
    return content


def hides_specials(content: dict[str, Any]) -> bool:
    """Whether no text can contain the special tokens of a Unigram tokenizer.json: it is one that `converted` made."""
    steps = (content.get("normalizer") or {}).get("normalizers") or [{}]
    last = steps[-1]
    return last.get("pattern") == {"String": _LESS} and last.get("content") == _HIDDEN


def _bpe(model: Any, *, unknown: int) -> models.BPE:
    """The model; `unknown` is the id of the piece for unknown characters."""
    pieces = [piece.piece for piece in model.pieces]
    return models.BPE(
        {piece: number for number, piece in enumerate(pieces)},
        list(_merges(model)),
        unk_token=pieces[unknown],
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _unigram(model: Any, *, unknown: int) -> models.Unigram:
    """As `_bpe`. Pieces that are not for text have names with "<", which no text contains.

    If "<" has no piece, its byte is the piece of what replaces it. Then no other piece contains "<", so its score is
    the same in every way to cut a text.
    """
    least = min((piece.score for piece in model.pieces if piece.type == _NORMAL), default=0.0)
    known = any(piece.piece == _LESS and piece.type == _NORMAL for piece in model.pieces)
    pieces = []
    for piece in model.pieces:
        if piece.type == _BYTE and piece.piece == _LESS_BYTE and not known:
            pieces.append((_HIDDEN, least))
        elif piece.type == _NORMAL:
            pieces.append((piece.piece.replace(_LESS, _HIDDEN), piece.score))
        else:  # scores of these would change that of unknown characters, which is below all others
            pieces.append((piece.piece if _LESS in piece.piece else f"<{piece.piece}>", least))
    return models.Unigram(pieces, unk_id=unknown, byte_fallback=model.trainer_spec.byte_fallback)


def _tied(model: Any, one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two ways to cut a text are equally probable, within the rounding of sentencepiece's float32 sums.

    Which of them sentencepiece takes then depends on the text before: of `=====`, the first or the last two of `==`,
    `==`, `=`.
    """
    pieces = model.pieces
    others = [sorted(number for number in ids if pieces[number].type != _NORMAL) for ids in (one, other)]
    first, second = (
        math.fsum(pieces[number].score for number in ids if pieces[number].type == _NORMAL) for ids in (one, other)
    )
    most = _ROUNDING * max(len(one), len(other)) * abs(first)
    return others[0] == others[1] and abs(first - second) <= most


def _read(file: Path) -> tuple[Any, Any]:
    """The file as sentencepiece opens it, and its content."""
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise DataError(
            f"text tokenizer: {file} needs the packages sentencepiece and protobuf: {error}",
            remedy="pip install 'mmscale[sentencepiece]', or name a tokenizer.json",
        ) from error
    try:
        content = bounded.read_bytes(file, most=_MOST_BYTES)
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(content)
        if not model.pieces:
            raise ValueError("it has no pieces")
        return sentencepiece.SentencePieceProcessor(model_proto=content), model
    except Exception as error:  # protobuf and sentencepiece raise errors of their own
        raise DataError(
            f"text tokenizer: {file} cannot be read: {str(error).splitlines()[0] if str(error) else 'it is damaged'}",
            remedy="name a .model file of sentencepiece",
        ) from error


def _check(file: Path, model: Any) -> None:
    """Refuse what a tokenizer.json with movable ids cannot express exactly."""
    kind, types = model.trainer_spec.model_type, {piece.type for piece in model.pieces}
    pieces = [piece.piece for piece in model.pieces]
    reasons = {
        f"it is a {_KINDS.get(kind, kind)} model, not BPE or Unigram": kind not in (_BPE, _UNIGRAM),
        "it has user-defined pieces": _USER_DEFINED in types,
        "it has unused pieces": _UNUSED in types,
        "it has a piece twice": len(set(pieces)) < len(pieces),
        "its spaces end words (treat_whitespace_as_suffix)": model.trainer_spec.treat_whitespace_as_suffix,
        "its spaces are not written as ▁ (escape_whitespaces)": not model.normalizer_spec.escape_whitespaces,
        "it changes texts that it decodes (denormalizer)": bool(model.denormalizer_spec.precompiled_charsmap),
    }
    for reason, found in reasons.items():
        if found:
            raise DataError(
                f"text tokenizer: {file} cannot be converted exactly: {reason}",
                remedy="use a BPE or Unigram model without it, or a tokenizer.json whose ids can be moved (BPE, "
                "WordPiece or WordLevel)",
            )


def _merges(model: Any) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that are joined, the best first: sentencepiece joins the pair that makes the best piece."""
    normal = {piece.piece: (-piece.score, number) for number, piece in enumerate(model.pieces) if piece.type == _NORMAL}
    for piece in sorted(normal, key=normal.__getitem__):
        for cut in range(1, len(piece)):
            if piece[:cut] in normal and piece[cut:] in normal:
                yield piece[:cut], piece[cut:]


def _of_pieces(model: Any) -> Iterator[str]:
    """Texts that together hold every normal piece, in an order that puts unlike pieces side by side."""
    pieces = [piece.piece.replace(_SPACE, " ") for piece in model.pieces if piece.type == _NORMAL]
    rows = max(1, len(pieces) // _TOGETHER)
    for row in range(rows):
        yield "".join(pieces[row::rows])

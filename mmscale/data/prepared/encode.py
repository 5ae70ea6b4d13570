"""Converts documents to token ids: `<s>` text, begin token, item codes, end token, pre-tokenised ids, `</s>`.

parts.py writes them to files. No torch here (except a `vq` image tokenizer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.documents.schema import Document, Item, Rejected, Special, Text, Tokens, article
from mmscale.data.modalities.modality import Codec, Tally, Values, count
from mmscale.data.modalities.table import read_item
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.vocab import BOS, EOS, NO_MODALITY, Vocabulary

Ids = NDArray[np.int64]
TEXT, TOKENS, UNKNOWN = "text", "tokens", "unknown"  # keys of a tally, for tokenizers that do not know every word
_NOTED = 0.001  # share of unknown tokens from which on they are reported


@dataclass(frozen=True, eq=False)
class Encoded:
    """A document as token ids.

    Attributes:
        ids: int64 [tokens].
        tokens: tokens of each modality, int64 [modalities]; begin and end tokens count as text.
        loss: bit m set: labels of modality m are trained on.
        document: the encoded document.
        text_bytes: of its texts, of answers if it has any, in UTF-8; None if some of them were given as tokens, whose
            bytes are unknown.
        trained: for each token whether it is trained on as a label, bool [tokens]; None: `loss` says it for all but
            the first.
    """

    ids: Ids
    tokens: Ids
    loss: int
    document: Document
    text_bytes: int | None = None
    trained: NDArray[np.bool_] | None = None

    def labels(self, vocabulary: Vocabulary) -> Ids:
        """Labels of each modality that are trained on, int64 [modalities]."""
        if self.trained is not None:
            return np.bincount(vocabulary.modality_of(self.ids[self.trained]), minlength=len(self.tokens))
        labels = self.tokens.copy()
        labels[0] -= 1  # a document's first token, which is text, is never a label
        return labels * (self.loss >> np.arange(len(labels)) & 1)


class DocumentEncoder:
    """Converts documents to ids of one vocabulary.

    Args:
        vocabulary: id ranges.
        text: text tokenizer; its ids are those of the first range.
        codecs: tokenizers of other modalities by name; documents with items of any other are rejected.
        max_tokens: longer documents are rejected [tokens].
        salvage: modalities of which damaged items are read as far as possible.

    Attributes:
        tallies: by modality, counts of conversions of items since the last `take_tallies`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        text: TextTokenizer,
        codecs: Mapping[str, Codec],
        max_tokens: int,
        salvage: tuple[str, ...] = (),
    ) -> None:
        self.vocabulary, self.text, self.codecs, self.max_tokens = vocabulary, text, codecs, max_tokens
        self.salvage = salvage
        self.tallies: dict[str, Tally] = {name: {} for name in codecs}

    def encode(self, documents: Sequence[Document]) -> list[Encoded | Rejected]:
        """Encode several documents, in order; their items and texts are tokenized in batches."""
        documents, kept = [one for one in documents if not self._too_much_text(one)], documents
        texts = [piece.text for document in documents for piece in document.content if isinstance(piece, Text)]
        encoded = self.text.encode_batch(texts)
        if self.text.unknown is not None:
            unknown = sum(int((ids == self.text.unknown).sum()) for ids in encoded)
            count(self.tallies.setdefault(TEXT, {}), {TOKENS: sum(map(len, encoded)), UNKNOWN: unknown})
        text_ids = iter(encoded)
        drafts: list[list[Ids | Item] | Rejected] = []
        values: dict[str, list[Values]] = {name: [] for name in self.codecs}
        for document in documents:
            own_texts = [next(text_ids) for piece in document.content if isinstance(piece, Text)]
            try:
                draft = self._draft(document, own_texts)
                items = [piece for piece in draft if isinstance(piece, Item)]
                read = [self._read(item) for item in items]
            except BadDocumentError as error:
                drafts.append(Rejected(document.where, document.id, str(error)))
                continue
            drafts.append(draft)
            for item, one in zip(items, read, strict=True):
                values[item.modality].append(one)
        codes = {name: iter(self._codes(name, own)) for name, own in values.items()}
        found = iter(
            draft if isinstance(draft, Rejected) else self._finish(document, draft, codes)
            for document, draft in zip(documents, drafts, strict=True)
        )
        return [next(found) if not (why := self._too_much_text(one)) else _rejected(one, why) for one in kept]

    def _too_much_text(self, document: Document) -> str:
        """Why the text is certainly too long, before it is tokenized; "" if it may fit.

        The number of tokens is at least the number of characters divided by the longest token. Without this bound a
        word of several megabytes would take minutes.
        """
        length = sum(len(piece.text) for piece in document.content if isinstance(piece, Text))
        most = self.max_tokens * self.text.longest
        return f"the document is too long: {length:,} characters are more than {self.max_tokens:,} tokens" * (
            length > most
        )

    def _read(self, item: Item) -> Values:
        name = item.modality
        return read_item(item, self.codecs[name], self.tallies[name], salvage=name in self.salvage)

    def take_tallies(self) -> dict[str, Tally]:
        """The counts since the last call, by modality."""
        taken = {name: tally for name, tally in self.tallies.items() if tally}
        self.tallies = {name: {} for name in self.codecs}
        return taken

    def _draft(self, document: Document, texts: list[Ids]) -> list[Ids | Item]:
        """The pieces in order, with items not yet encoded; does every check that needs no file."""
        remaining = iter(texts)
        draft: list[Ids | Item] = [_ids(BOS)]
        length = 2
        for piece in document.content:
            if isinstance(piece, Text):
                ids = next(remaining)
            elif isinstance(piece, Tokens):
                ids = self._pretokenised(piece)
            elif isinstance(piece, Special):
                ids = _ids(self._reserved(piece))
            else:
                begin, end = self._marks(piece)
                draft += [_ids(begin), piece, _ids(end)]
                length += self.codecs[piece.modality].tokens_per_item + 2
                continue
            draft.append(ids)
            length += len(ids)
        if length == 2:
            raise BadDocumentError("the document is empty")
        if length > self.max_tokens:
            raise BadDocumentError(
                f"the document is too long: {length} tokens, max_document_tokens is {self.max_tokens}"
            )
        self._loss_bits(document)
        return [*draft, _ids(EOS)]

    def _reserved(self, piece: Special) -> int:
        if not self.vocabulary.reserved:
            raise BadDocumentError("messages need tokens that the vocabulary does not have: set vocab.reserved=true")
        return self.vocabulary.reserved_id(piece.token)

    def _marks(self, item: Item) -> tuple[int, int]:
        """Ids of the begin and end tokens of an item.

        Raises:
            BadDocumentError: the vocabulary or the data set has no such modality.
        """
        name = item.modality
        if name not in self.vocabulary.names:
            raise BadDocumentError(f"the document has {article(name)}, but the vocabulary has no modality {name}")
        marks = self.vocabulary.marks(name)
        if marks is None:
            raise BadDocumentError(
                f"the document has {article(name)}, but {name} has no begin and end tokens: give it marks: true in "
                "vocab.modalities"
            )
        if name not in self.codecs:
            raise BadDocumentError(f"the document has {article(name)}, but the data set has no {name} tokenizer")
        return marks

    def _pretokenised(self, piece: Tokens) -> Ids:
        """Ids moved into the modality's range; codes of items get begin and end tokens, like encoded items."""
        if piece.modality not in self.vocabulary.names:
            known = ", ".join(self.vocabulary.names)
            raise BadDocumentError(f"the vocabulary has no modality {piece.modality!r}, only {known}")
        low, high = self.vocabulary.range_of(piece.modality)
        if max(piece.ids) >= high - low:
            raise BadDocumentError(f"id {max(piece.ids)} is outside the {high - low} ids of modality {piece.modality}")
        if low == 0 and min(piece.ids) < len(self.vocabulary.specials):
            raise BadDocumentError(f"id {min(piece.ids)} of modality {piece.modality} is a special token")
        ids = np.asarray(piece.ids, dtype=np.int64) + low
        marks, codec = self.vocabulary.marks(piece.modality), self.codecs.get(piece.modality)
        if marks is None:
            return ids
        if codec is not None and len(ids) != codec.tokens_per_item:
            raise BadDocumentError(
                f"{article(piece.modality)} has {len(ids)} tokens instead of {codec.tokens_per_item}"
            )
        return np.concatenate([_ids(marks[0]), ids, _ids(marks[1])])

    def _loss_bits(self, document: Document) -> int:
        names = self.vocabulary.names
        if document.loss is None:
            return (1 << len(names)) - 1
        for name in document.loss:
            if name not in names:
                raise BadDocumentError(f"loss names {name!r}, the vocabulary has {', '.join(names)}")
        return sum(1 << index for index, name in enumerate(names) if name in document.loss)

    def _codes(self, name: str, values: list[Values]) -> Ids:
        if not values:
            return np.zeros((0, 0), np.int64)
        low, high = self.vocabulary.range_of(name)
        codes = self.codecs[name].encode(np.stack(values))
        assert codes.min() >= 0 and codes.max() < high - low, f"{name} codes leave the {name} range"
        return codes + low

    def _finish(self, document: Document, draft: list[Ids | Item], codes: Mapping[str, Iterator[Ids]]) -> Encoded:
        pieces = [next(codes[piece.modality]) if isinstance(piece, Item) else piece for piece in draft]
        ids = np.concatenate(pieces)
        modality = self.vocabulary.modality_of(ids)
        assert modality.min() > NO_MODALITY, "padding inside a document"
        tokens = np.bincount(modality, minlength=len(self.vocabulary.names)).astype(np.int64)
        loss = self._loss_bits(document)
        trained = _trained(document, pieces)
        if trained is not None:
            trained &= (loss >> modality.astype(np.int64) & 1).astype(bool)
        return Encoded(ids, tokens, loss, document, self._text_bytes(document), trained)

    def _text_bytes(self, document: Document) -> int | None:
        answers = document.answers or (True,) * len(document.content)
        content = [piece for piece, trained in zip(document.content, answers, strict=True) if trained]
        if any(isinstance(piece, Tokens) and piece.modality == self.vocabulary.names[0] for piece in content):
            return None
        return sum(len(piece.text.encode()) for piece in content if isinstance(piece, Text))


def _trained(document: Document, pieces: Sequence[Ids]) -> NDArray[np.bool_] | None:
    """For each token whether it belongs to an answer; None: the document has no answers.

    Args:
        document: of which an item has become three pieces: its begin token, codes and end token.
        pieces: ids of `<s>`, of its content and of `</s>`.
    """
    if document.answers is None:
        return None
    numbers = [3 if isinstance(piece, Item) else 1 for piece in document.content]
    of_pieces = np.concatenate([[False], np.repeat(document.answers, numbers), [False]])
    return np.repeat(of_pieces, [len(piece) for piece in pieces])


def text_remarks(tally: Mapping[str, float]) -> list[str]:
    """A sentence about words that the text tokenizer does not know; empty if there are hardly any."""
    tokens, unknown = tally.get(TOKENS, 0), tally.get(UNKNOWN, 0)
    if unknown < _NOTED * max(1, tokens):
        return []
    return [
        f"note: the text tokenizer has no token for {unknown / tokens:.1%} of the texts, which all become one and the "
        "same: choose one with all bytes (data.prepare.text.load)"
    ]


def _rejected(document: Document, reason: str) -> Rejected:
    return Rejected(document.where, document.id, reason)


def _ids(*numbers: int) -> Ids:
    return np.array(numbers, dtype=np.int64)

"""Documents to token ids: `<s>` text, `<boi>` image codes `<eoi>`, pre-tokenised ids, `</s>`.

Writing them to files is parts.py. No torch here (a `vq` image tokenizer brings its own).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmscale.data.documents import BadDocumentError, Document, Image, Rejected, Text, Tokens
from mmscale.data.image_files import load_image
from mmscale.data.image_tokens import ImageTokenizer
from mmscale.data.text_tokens import TextTokenizer
from mmscale.data.vocab import BOI, BOS, EOI, EOS, NO_MODALITY, SPECIAL_TOKENS, Vocabulary

IMAGE = "image"  # name of the modality that image codes belong to

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Encoded:
    """A document as token ids.

    Attributes:
        ids: int64 [tokens].
        tokens: tokens of each modality, int64 [modalities]; <boi> and <eoi> count as text.
        loss: bit m set: labels of modality m are trained on.
        document: what was encoded.
    """

    ids: Ids
    tokens: Ids
    loss: int
    document: Document


class DocumentEncoder:
    """Turns documents into ids of one vocabulary.

    Args:
        vocabulary: id ranges.
        text: text tokenizer; its ids are those of the first range.
        image: image tokenizer; None: documents with images are rejected.
        max_tokens: longer documents are rejected [tokens].
    """

    def __init__(
        self, vocabulary: Vocabulary, *, text: TextTokenizer, image: ImageTokenizer | None, max_tokens: int
    ) -> None:
        self.vocabulary, self.text, self.image, self.max_tokens = vocabulary, text, image, max_tokens

    def encode(self, documents: Sequence[Document]) -> list[Encoded | Rejected]:
        """Encode several documents at once, in order; images and texts go through their tokenizers together."""
        texts = [piece.text for document in documents for piece in document.content if isinstance(piece, Text)]
        text_ids = iter(self.text.encode_batch(texts))
        drafts: list[list[Ids | Image] | Rejected] = []
        pixels: list[NDArray[np.uint8]] = []
        for document in documents:
            own_texts = [next(text_ids) for piece in document.content if isinstance(piece, Text)]
            try:
                draft = self._draft(document, own_texts)
                own_pixels = [self._pixels(image) for image in document.images]
            except BadDocumentError as error:
                drafts.append(Rejected(document.where, document.id, str(error)))
                continue
            drafts.append(draft)
            pixels += own_pixels
        codes = iter(self._codes(pixels))
        return [
            draft if isinstance(draft, Rejected) else self._finish(document, draft, codes)
            for document, draft in zip(documents, drafts, strict=True)
        ]

    def _draft(self, document: Document, texts: list[Ids]) -> list[Ids | Image]:
        """Pieces in order, images still as images; every check that needs no picture."""
        remaining = iter(texts)
        draft: list[Ids | Image] = [_ids(BOS)]
        length = 2
        for piece in document.content:
            if isinstance(piece, Text):
                ids = next(remaining)
            elif isinstance(piece, Tokens):
                ids = self._pretokenised(piece)
            else:
                if self.image is None or IMAGE not in self.vocabulary.names:
                    raise BadDocumentError("the document has an image, but the vocabulary has no modality image")
                draft += [_ids(BOI), piece, _ids(EOI)]
                length += self.image.tokens_per_image + 2
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

    def _pretokenised(self, piece: Tokens) -> Ids:
        """Ids moved into the modality's range; image codes get their <boi> and <eoi>, as those of pictures do."""
        if piece.modality not in self.vocabulary.names:
            known = ", ".join(self.vocabulary.names)
            raise BadDocumentError(f"the vocabulary has no modality {piece.modality!r}, only {known}")
        low, high = self.vocabulary.range_of(piece.modality)
        if max(piece.ids) >= high - low:
            raise BadDocumentError(f"id {max(piece.ids)} is outside the {high - low} ids of modality {piece.modality}")
        if low == 0 and min(piece.ids) < len(SPECIAL_TOKENS):
            raise BadDocumentError(f"id {min(piece.ids)} of modality {piece.modality} is a special token")
        ids = np.asarray(piece.ids, dtype=np.int64) + low
        if piece.modality != IMAGE:
            return ids
        if self.image is not None and len(ids) != self.image.tokens_per_image:
            raise BadDocumentError(f"an image has {len(ids)} tokens instead of {self.image.tokens_per_image}")
        return np.concatenate([_ids(BOI), ids, _ids(EOI)])

    def _loss_bits(self, document: Document) -> int:
        names = self.vocabulary.names
        if document.loss is None:
            return (1 << len(names)) - 1
        for name in document.loss:
            if name not in names:
                raise BadDocumentError(f"loss names {name!r}, the vocabulary has {', '.join(names)}")
        return sum(1 << index for index, name in enumerate(names) if name in document.loss)

    def _pixels(self, image: Image) -> NDArray[np.uint8]:
        assert self.image is not None
        return load_image(image, size=self.image.size, channels=self.image.channels)

    def _codes(self, pixels: list[NDArray[np.uint8]]) -> Ids:
        if not pixels:
            return np.zeros((0, 0), np.int64)
        assert self.image is not None
        low, high = self.vocabulary.range_of(IMAGE)
        codes = self.image.encode(np.stack(pixels))
        assert codes.min() >= 0 and codes.max() < high - low, "image codes leave the image range"
        return codes + low

    def _finish(self, document: Document, draft: list[Ids | Image], codes: Iterator[Ids]) -> Encoded:
        pieces = [next(codes) if isinstance(piece, Image) else piece for piece in draft]
        ids = np.concatenate(pieces)
        modality = self.vocabulary.modality_of(ids)
        assert modality.min() > NO_MODALITY, "padding inside a document"
        tokens = np.bincount(modality, minlength=len(self.vocabulary.names)).astype(np.int64)
        return Encoded(ids, tokens, self._loss_bits(document), document)


def _ids(*numbers: int) -> Ids:
    return np.array(numbers, dtype=np.int64)

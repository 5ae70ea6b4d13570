"""Settings of the vocabulary (`vocab`)."""

from __future__ import annotations

from itertools import pairwise

from mmscale.config.section import Count, Name, Section, setting


class ModalityVocab(Section):
    """One modality's share of the vocabulary."""

    name: Name = setting("Name of the modality, e.g. text or image.")
    size: Count = setting(
        "Number of token ids of this modality; the first modality includes the special tokens.", unit="ids"
    )
    marks: bool = setting(
        "Put each item between a begin and an end token of this modality, whose ids follow the other special tokens. "
        "Documents with files of the modality, and generation, need these tokens. Images always have `<boi>` and "
        "`<eoi>`.",
        False,
    )


class VocabConfig(Section):
    """Token ids: one contiguous range per modality, in this order, then padding up to a multiple."""

    modalities: tuple[ModalityVocab, ...] = setting(
        "Modalities in id order; the first one is text and includes the special tokens.",
        (ModalityVocab(name="text", size=57_344), ModalityVocab(name="image", size=8_192)),
        source="Chameleon, arXiv 2405.09818: 65,536 ids of which 8,192 are image codes",
    )
    reserved: bool = setting(
        "Reserve ids of the first range, after the special tokens, for chat (a token for each role, and the end of a "
        "message) and for infilling (16 holes, and the end of what fills one). Models and data must agree.",
        False,
    )
    pad_multiple: Count = setting(
        "The number of embedding rows is rounded up to a multiple of this; TP must divide it.", 128, unit="ids"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modalities in id order."""
        return tuple(modality.name for modality in self.modalities)

    @property
    def marked(self) -> tuple[str, ...]:
        """Names of the modalities with separate begin and end tokens."""
        return tuple(modality.name for modality in self.modalities if modality.marks)

    @property
    def size(self) -> int:
        """Number of ids that can occur [ids]."""
        return sum(modality.size for modality in self.modalities)

    @property
    def padded_size(self) -> int:
        """Rows of the embedding and of the output layer [ids]."""
        return -(-self.size // self.pad_multiple) * self.pad_multiple

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Half-open id range of each modality."""
        starts = [0]
        for modality in self.modalities:
            starts.append(starts[-1] + modality.size)
        return tuple(pairwise(starts))

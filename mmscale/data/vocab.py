"""The id ranges of modalities, the special tokens, and the modality of an id.

Data, model and export use the same table. No torch; no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmscale.config import VocabConfig
from mmscale.errors import ConfigError, DataError

# Ids of the special tokens, at the beginning of the first (text) range: BOI and EOI are predicted from text context, as
# in Chameleon's vocabulary. Padding is id 0 and is not routed.
PAD, BOS, EOS, BOI, EOI = range(5)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<boi>", "<eoi>")
# Further ids of the text range with `vocab.reserved`: holes of infilling and the end of what fills one (CM3, arXiv
# 2201.07520), then the beginnings of chat messages by role and the end of a message.
HOLES = tuple(f"<mask:{number}>" for number in range(16))
END_OF_FILL = "<eom>"
SYSTEM, USER, ASSISTANT, TOOL = ROLES = ("<system>", "<user>", "<assistant>", "<tool>")
END_OF_TURN = "<eot>"
RESERVED = (*HOLES, END_OF_FILL, *ROLES, END_OF_TURN)
IMAGE = "image"  # the modality that BOI and EOI belong to
NO_MODALITY = -1


@dataclass(frozen=True)
class Vocabulary:
    """Half-open, contiguous id ranges of the modalities.

    Attributes:
        names: modalities in id order; the first one is text and holds the special tokens.
        ranges: half-open id range of each modality.
        marked: further modalities with separate begin and end tokens, in the order of these tokens.
        reserved: whether it has the tokens RESERVED, for infilling and chat.
    """

    names: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    marked: tuple[str, ...] = ()
    reserved: bool = False

    @classmethod
    def from_config(cls, config: VocabConfig) -> Vocabulary:
        """The vocabulary of a configuration.

        Raises:
            ConfigError: the text range cannot hold the special tokens.
        """
        made = cls(config.names, config.ranges, config.marked, config.reserved)
        if config.modalities[0].size < len(made.specials):
            raise ConfigError(
                f"vocab.modalities: {config.modalities[0].name} has {config.modalities[0].size} ids, "
                f"fewer than the {len(made.specials)} special tokens",
                remedy="give the first modality more ids",
            )
        return made

    @property
    def specials(self) -> tuple[str, ...]:
        """Names of the special tokens; their ids count from 0."""
        marks = tuple(token for name in self.marked for token in (f"<begin_{name}>", f"<end_{name}>"))
        return SPECIAL_TOKENS + marks + (RESERVED if self.reserved else ())

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids after which generation stops: the end of a document, and with reserved ids that of a message."""
        return (EOS, self.reserved_id(END_OF_TURN)) if self.reserved else (EOS,)

    @property
    def never_generated(self) -> tuple[int, ...]:
        """Ids of special tokens that follow no token of a document: padding, `<s>`, and those of infilling."""
        return PAD, BOS, *(self.reserved_id(token) for token in (*HOLES, END_OF_FILL) if self.reserved)

    def reserved_id(self, token: str) -> int:
        """Id of one of the tokens RESERVED.

        Raises:
            ConfigError: the vocabulary does not have them.
        """
        if not self.reserved:
            raise ConfigError(
                f"the vocabulary has no token {token}",
                remedy="set vocab.reserved=true, and prepare and train with it",
            )
        return len(SPECIAL_TOKENS) + 2 * len(self.marked) + RESERVED.index(token)

    def marks(self, name: str) -> tuple[int, int] | None:
        """Ids of the begin and the end token of a modality's items; None if it has none."""
        if name in self.marked:
            begin = len(SPECIAL_TOKENS) + 2 * self.marked.index(name)
            return begin, begin + 1
        return (BOI, EOI) if name == IMAGE and IMAGE in self.names else None

    @property
    def size(self) -> int:
        """Number of possible ids [ids]."""
        return self.ranges[-1][1]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, ranges and special tokens: equal for equal vocabularies."""
        content = json.dumps([self.names, self.ranges, self.specials])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def range_of(self, name: str) -> tuple[int, int]:
        """Half-open id range of a modality.

        Raises:
            ConfigError: there is no such modality.
        """
        if name not in self.names:
            raise ConfigError(
                f"vocab.modalities has no {name!r}, only {', '.join(self.names)}", remedy="add it or rename it"
            )
        return self.ranges[self.names.index(name)]

    def modality_of(self, ids: NDArray[np.integer]) -> NDArray[np.int8]:
        """Index of each id's modality, -1 for padding; same shape as `ids`.

        Raises:
            DataError: an id is in no modality's range: no expert would take it, and no loss would count it.
        """
        ends = np.array([end for _, end in self.ranges])
        given = np.asarray(ids)
        outside = (given < 0) | (given >= self.size)
        if outside.any():
            raise DataError(
                f"token id {int(given[outside][0])} belongs to no modality of vocab.modalities, whose ids are 0 to "
                f"{self.size - 1}",
                remedy="prepare the data with this vocabulary, or give vocab.modalities the sizes of the data's",
            )
        modality = np.searchsorted(ends, ids, side="right").astype(np.int8)
        modality[np.asarray(ids) == PAD] = NO_MODALITY
        return modality

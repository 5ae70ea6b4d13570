"""Converts a data set's text tokenizer to a Hugging Face fast tokenizer with a name for every id.

Names of image tokens are for printing and look-up; text never becomes such a token, or a special token. Unused ids
have names too, so that `len(tokenizer)` is the number of the embedding's rows, to which users resize it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from checkpoints_tools.huggingface.chat_template import chat_template
from mmscale import bounded
from mmscale.data.modalities.model_vocabulary import ids_of, with_ids
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.vocab import BOS, SPECIAL_TOKENS, Vocabulary
from mmscale.errors import DataError


def fast_tokenizer(text: TextTokenizer, vocabulary: Vocabulary, *, rows: int, context: int) -> Any:
    """Transformers' PreTrainedTokenizerFast; without further options it puts `<s>` before a text.

    With reserved ids it has a chat template, and reads special tokens in a text unless `split_special_tokens` is set.

    Args:
        text: the data set's tokenizer.
        vocabulary: id ranges.
        rows: of the model's embedding.
        context: longest sequence [tokens].

    Raises:
        DataError: a word of the tokenizer has the name of an image token or of an unused id.
    """
    from transformers import PreTrainedTokenizerFast

    content = bounded.parse_json(text.tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    named = {
        f"<{name}_{number - first}>": number
        for name, (first, end) in zip(vocabulary.names[1:], vocabulary.ranges[1:], strict=True)
        for number in range(first, end)
    }
    used = {*text.tokenizer.get_vocab(with_added_tokens=True).values(), *named.values()}
    named |= {f"<unused_{number}>": number for number in range(rows) if number not in used}
    words = ids_of(content["model"])
    taken = sorted(named.keys() & words.keys())
    if taken:
        raise DataError(
            f"text tokenizer: the word {taken[0]!r} would be taken for an image token or an unused id",
            remedy="rename the modality in vocab.modalities, or choose another text tokenizer",
        )
    # Added to the model's vocabulary too, because an added token that is missing there gets the next free id.
    content["model"] = with_ids(content["model"], words | named)
    content["added_tokens"] += [{"id": number, "content": name} | flags for name, number in named.items()]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[(SPECIAL_TOKENS[BOS], BOS)]
    )
    pad, bos, eos, boi, eoi = SPECIAL_TOKENS
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=[boi, eoi],
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        # A server renders a chat template to a string and encodes that, so its special tokens must be read as such. The
        # processor encodes texts of users with the opposite.
        split_special_tokens=not vocabulary.reserved,
    )
    if vocabulary.reserved:
        made.chat_template = chat_template()
    ids = made.convert_tokens_to_ids([*vocabulary.specials, *named])
    assert ids == [*range(len(vocabulary.specials)), *named.values()], "tokenizers gave other ids than asked for"
    assert len(made) == rows, "the tokenizer has other ids than the embedding"
    return made


def write_text_tokenizer(folder: Path, text: TextTokenizer, vocabulary: Vocabulary, *, rows: int, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    fast_tokenizer(text, vocabulary, rows=rows, context=context).save_pretrained(folder)

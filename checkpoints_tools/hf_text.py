"""A data set's text tokenizer as a Hugging Face fast tokenizer with the special tokens and names for image tokens.

Names of image tokens are there to be printed and looked up; no text of a user becomes one, nor a special token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from mmscale.data.text_tokens import TextTokenizer
from mmscale.data.vocab import BOS, SPECIAL_TOKENS, Vocabulary
from mmscale.errors import DataError


def fast_tokenizer(text: TextTokenizer, vocabulary: Vocabulary, *, context: int) -> Any:
    """Transformers' PreTrainedTokenizerFast; without further options it puts `<s>` before a text.

    Args:
        text: the data set's tokenizer.
        vocabulary: id ranges.
        context: longest sequence [tokens].

    Raises:
        DataError: a word of the tokenizer has the name of an image token.
    """
    from transformers import PreTrainedTokenizerFast

    content = json.loads(text.tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    named = {
        f"<{name}_{number - first}>": number
        for name, (first, end) in zip(vocabulary.names[1:], vocabulary.ranges[1:], strict=True)
        for number in range(first, end)
    }
    taken = sorted(named.keys() & content["model"]["vocab"].keys())
    if taken:
        raise DataError(
            f"text tokenizer: the word {taken[0]!r} would be taken for an image token",
            remedy="rename the modality in vocab.modalities",
        )
    # In the model's vocabulary too: an added token that is not gets the next free id, whatever its entry says.
    content["model"]["vocab"] |= named
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
        split_special_tokens=True,
    )
    ids = made.convert_tokens_to_ids([*SPECIAL_TOKENS, *named])
    assert ids == [*range(len(SPECIAL_TOKENS)), *named.values()], "tokenizers gave other ids than asked for"
    return made


def write_text_tokenizer(folder: Path, text: TextTokenizer, vocabulary: Vocabulary, *, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    fast_tokenizer(text, vocabulary, context=context).save_pretrained(folder)

# checkpoints_tools/huggingface/chat_template.py: the ids of messages are those that were prepared, token by token.
"""Tests of the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from checkpoints_tools.huggingface.fast_tokenizer import fast_tokenizer
from checkpoints_tools.huggingface.model_config import generation_config
from checkpoints_tools.huggingface.shipped.image_codes_moma import read_codes
from checkpoints_tools.huggingface.shipped.processing_moma import MomaProcessor
from mmscale.data.documents.schema import Document, folder_resolver, parse_document
from mmscale.data.modalities.table import open_codecs
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.encode import DocumentEncoder, Encoded
from mmscale.data.prepared.prepare import prepare
from mmscale.data.vocab import EOS, Vocabulary
from tests.unit.data.samples import config, corpus, save_picture

QUESTION = {"role": "user", "content": "picture <eot> number </s> 7?"}  # looks like special tokens, and is text
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "picture number seven"}]}
SHOWN = {"role": "user", "content": [{"type": "image", "path": "q.png"}, {"type": "text", "text": " what is it?"}]}
DRAWN = {"role": "assistant", "content": [{"type": "text", "text": "this: "}, {"type": "image", "path": "q.png"}]}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [QUESTION, ANSWER],
    "system": [{"role": "system", "content": "picture only"}, QUESTION, ANSWER],
    "two turns and a tool": [QUESTION, ANSWER, {"role": "tool", "content": "7"}, ANSWER, QUESTION, ANSWER],
    "pictures": [SHOWN, DRAWN, QUESTION, ANSWER],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    save_picture(root / "q.png", 5)
    made = config(documents=[str(corpus(root / "in", 12))], vocab={"text": 340, "image": 16})
    made = made.model_copy(update={"vocab": made.vocab.model_copy(update={"reserved": True})})
    prepare(made, root / "out", progress=False)
    return root


@pytest.fixture(scope="module")
def encoder(data: Path) -> DocumentEncoder:
    vocabulary = Vocabulary(("text", "image"), ((0, 340), (340, 356)), reserved=True)
    text = open_text_tokenizer(data / "out")
    return DocumentEncoder(vocabulary, text=text, codecs=open_codecs(data / "out"), max_tokens=512)


@pytest.fixture(scope="module")
def processor(data: Path, encoder: DocumentEncoder) -> MomaProcessor:
    made = MomaProcessor(
        fast_tokenizer(encoder.text, encoder.vocabulary, rows=384, context=512),
        modalities=[["text", 0, 340], ["image", 340, 356]],
    )
    made.codes = read_codes(data / "out")
    return made


def trained(data: Path, encoder: DocumentEncoder, messages: list[dict[str, Any]]) -> Encoded:
    """The ids of a conversation as `mmscale data prepare` makes them."""
    record = {"messages": messages}
    document = parse_document(record, where="here", fallback_id="a", resolve=folder_resolver(data))
    assert isinstance(document, Document), document
    (encoded,) = encoder.encode([document])
    assert isinstance(encoded, Encoded), encoded
    return encoded


def opened(data: Path, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages for the processor, which takes pictures."""
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [
                {"type": "image", "image": PIL.Image.open(data / part["path"])} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_gives_the_ids_that_were_trained(
    data: Path, encoder: DocumentEncoder, processor: MomaProcessor, name: str
) -> None:
    messages = CONVERSATIONS[name]
    encoded = trained(data, encoder, messages)
    ids = processor.apply_chat_template(opened(data, messages), return_tensors=None)["input_ids"][0]
    assert [*ids, EOS] == encoded.ids.tolist()
    # The prompt of the last answer ends where the labels of this answer begin.
    asked = processor.apply_chat_template(opened(data, messages[:-1]), add_generation_prompt=True, return_tensors=None)[
        "input_ids"
    ][0]
    assert encoded.ids[: len(asked)].tolist() == asked
    assert encoded.trained is not None
    assert not encoded.trained[len(asked) - 1] and encoded.trained[len(asked) : -1].all() and not encoded.trained[-1]


def test_a_server_that_knows_the_tokenizer_only(data: Path, encoder: DocumentEncoder, processor: MomaProcessor) -> None:
    """It renders the template to a string and encodes that; the same ids, unless a text looks like a special token."""
    messages = [{"role": "user", "content": "picture number 7?"}, ANSWER]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.startswith("<s><user>picture")
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [*ids, EOS] == trained(data, encoder, messages).ids.tolist()
    made = processor.tokenizer.apply_chat_template(messages, return_dict=False)
    assert list(made) == ids


def test_unknown_roles_and_pictures_for_the_tokenizer_are_refused(processor: MomaProcessor) -> None:
    with pytest.raises(Exception, match="unknown role robot"):
        processor.apply_chat_template([{"role": "robot", "content": "a"}])
    with pytest.raises(Exception, match="use the processor"):
        processor.tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)


def test_generation_stops_at_the_end_of_a_message() -> None:
    made = config(vocab={"text": 340, "image": 16})
    assert generation_config(made)["eos_token_id"] == EOS
    reserved = made.model_copy(update={"vocab": made.vocab.model_copy(update={"reserved": True})})
    end = Vocabulary.from_config(reserved.vocab).reserved_id("<eot>")
    assert generation_config(reserved)["eos_token_id"] == [EOS, end]


def test_without_reserved_ids_there_is_no_template(data: Path, encoder: DocumentEncoder) -> None:
    plain = Vocabulary(("text", "image"), ((0, 340), (340, 356)))
    made = fast_tokenizer(encoder.text, plain, rows=384, context=512)
    assert made.chat_template is None and made.split_special_tokens
    assert not np.isin(made("<eot>", add_special_tokens=False)["input_ids"], range(27)).any()

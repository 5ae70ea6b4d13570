"""Text and images to token ids of one sequence, and back, for mixed-modal models in transformers 5.

Shipped beside the weights, with the text tokenizer and the image tokenizer that the model was trained with. Text of a
user never becomes a special token or an image token, whatever it says.

Letters: H W C height, width, channels; B rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.generation import LogitsProcessor
from transformers.processing_utils import ProcessorMixin

from .image_codes_moma import FOLDER, Codes, read_codes, write_codes
from .pixels_moma import load_pixels
from .versions_moma import warn_if_untested

PLACEHOLDER = "<image>"


class ImageGrammar(LogitsProcessor):
    """Generated images can be decoded: `<boi>`, the image's tokens, `<eoi>`, and no image token anywhere else.

    For `generate(..., logits_processor=[processor.image_grammar()])`.

    Args:
        first, end: half-open range of image tokens.
        tokens: length of an image.
        boi, eoi: ids around an image.
        codes: how many ids of the range have a code, from the first; None: all. The others are never generated.
    """

    def __init__(self, first: int, end: int, *, tokens: int, boi: int, eoi: int, codes: int | None = None) -> None:
        self.first, self.end, self.tokens, self.boi, self.eoi = first, end, tokens, boi, eoi
        self.end_of_codes = end if codes is None else min(first + codes, end)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocabulary] with what may not come next at -inf."""
        masked = torch.full_like(scores, float("-inf"))
        recent = input_ids[:, -(self.tokens + 1) :]
        for row, ids in enumerate(recent.tolist()):
            since = ids[::-1].index(self.boi) if self.boi in ids else None
            if since is not None and self.eoi not in ids[len(ids) - since :]:
                image = slice(self.first, self.end_of_codes)
                allowed = image if since < self.tokens else slice(self.eoi, self.eoi + 1)
                masked[row, allowed] = scores[row, allowed]
            else:
                masked[row] = scores[row]
                masked[row, self.first : self.end] = float("-inf")
                masked[row, self.eoi] = float("-inf")
        return masked


@dataclass(frozen=True)
class _Image:
    """A piece of a document that is an image, also where it is a string."""

    value: Any


def _piece(piece: Any) -> Any:
    """A piece of `content`: text as it is, an image wrapped; dictionaries as in chat messages."""
    if not isinstance(piece, dict) or "type" not in piece:
        return piece if isinstance(piece, str) else _Image(piece)
    if piece["type"] == "text":
        return str(piece["text"])
    found = next((piece[key] for key in ("image", "path", "url") if key in piece), None)
    if piece["type"] != "image" or found is None:
        raise ValueError(f'a piece of type {piece["type"]!r} is neither {{"type": "text"}} nor {{"type": "image"}}')
    return _Image(found)


# Stands in a rendered template for what a message says; of a private area of Unicode.
_MARK = re.compile("\ue000(\\d+)\ue001")


def _marked(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages with a mark instead of every text and image, and these."""
    pieces: list[Any] = []

    def mark(piece: Any) -> str:
        pieces.append(piece)
        return f"\ue000{len(pieces) - 1}\ue001"

    marked = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            marked.append({**message, "content": mark(content)})
        else:
            texts = [{"type": "text", "text": mark(_piece(piece))} for piece in content]
            marked.append({**message, "content": texts})
    return marked, pieces


def _images_in_order(images: Any, counts: list[int]) -> list[Any]:
    """All images, in the order of the placeholders.

    Args:
        images: one image, several, or a list of images for each text.
        counts: placeholders of each text.

    Raises:
        ValueError: there are more or fewer than placeholders.
    """
    several = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
    given = list(images) if several else [images]
    if not any(one is None or isinstance(one, list | tuple) for one in given):
        if sum(counts) != len(given):
            raise ValueError(f"the text has {sum(counts)} {PLACEHOLDER} for {len(given)} images")
        return given
    lists = [[] if one is None else list(one) if isinstance(one, list | tuple) else [one] for one in given]
    if len(lists) != len(counts):
        raise ValueError(f"there are {len(counts)} texts and {len(lists)} lists of images")
    for number, (own, count) in enumerate(zip(lists, counts, strict=True)):
        if len(own) != count:
            raise ValueError(f"text {number} has {count} {PLACEHOLDER} for {len(own)} images")
    return [image for own in lists for image in own]


# Arguments that transformers passes to any processor, and the values that ask for nothing.
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "truncation": (None, False, "do_not_truncate"),
    "return_attention_mask": (None, True),
    "return_token_type_ids": (None, False),
    "return_mm_token_type_ids": (None, False),
    "return_offsets_mapping": (None, False),
    "videos": (None,),
    "audio": (None,),
    "pad_to_multiple_of": (None,),
}


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Refuse arguments that would be ignored.

    Raises:
        ValueError: an argument asks for what there is not.
        TypeError: it is unknown.
    """
    for name, value in kwargs.items():
        if name not in _ASKS_NOTHING:
            raise TypeError(f"MomaProcessor got an unexpected keyword argument {name!r}")
        if not any(value is harmless or value == harmless for harmless in _ASKS_NOTHING[name]):
            why = ": it would cut images; shorten the prompt" if name == "truncation" else ""
            raise ValueError(f"{name}={value!r} is not supported{why}")


class MomaProcessor(ProcessorMixin):
    """Makes token ids of text and images, and text and images of token ids.

    `processor(text="a <image> of <image>", images=[one, other])`, or piece by piece, `processor(content=["a ", one,
    " of ", other])`; lists of these for a batch. Documents begin with `<s>`. A string is a path among `images`, and
    text in `content`, where a path is a `pathlib.Path` or `{"type": "image", "image": ...}`.

    Args:
        tokenizer: of text.
        modalities: `[name, first id, one past the last id]` of each.
    """

    def __init__(self, tokenizer: Any = None, modalities: list | None = None, **kwargs: Any) -> None:
        warn_if_untested()
        super().__init__(tokenizer, **kwargs)
        self.modalities = [list(entry) for entry in modalities or []]
        self.codes: Codes | None = None
        ranges = {name: (first, end) for name, first, end in self.modalities}
        self.image_range = ranges.get("image", (0, 0))
        self.boi, self.eoi = tokenizer.convert_tokens_to_ids(["<boi>", "<eoi>"])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read tokenizers from a folder or a repository."""
        made = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        made.codes = read_codes(pretrained_model_name_or_path, **kwargs)
        return made

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write everything that `from_pretrained` reads; the base class would forget the image tokenizer."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.codes is not None:
            write_codes(self.codes, Path(save_directory) / FOLDER)
        return files

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What goes into processor_config.json."""
        codes, self.codes = self.codes, None
        try:
            found = super().to_dict(**kwargs)
        finally:
            self.codes = codes
        return {key: value for key, value in found.items() if key not in ("codes", "image_range", "boi", "eoi")}

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes."""
        return ["input_ids", "attention_mask"]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        content: Sequence[Any] | None = None,
        *,
        draw: bool = False,
        max_length: int | None = None,
        padding: bool | str | None = True,
        padding_side: str = "left",
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Token ids, padded on the left.

        Args:
            text: one text or several; with images, each `<image>` in it stands for the next of them.
            images: one image or several, in order; for several texts also a list of each one's images. See
                `pixels_moma.load_pixels` for what an image is.
            content: instead of both, the pieces of one document, or a list of documents.
            draw: end with `<boi>`, so that the model goes on with an image.
            max_length: longest prompt [tokens]; default: the model's context.
            padding: to the longest prompt (True, "longest"), to `max_length` ("max_length"), or not (False).
            padding_side: "left", or "right" for training.
            add_special_tokens: begin with `<s>`.
            return_tensors: "pt" or "np"; None: lists.
            kwargs: what transformers passes to every processor, where it asks for nothing.

        Raises:
            ValueError: placeholders and images do not match, an image cannot be read, or a prompt is too long.
            TypeError: an argument is unknown.
        """
        _refuse_unknown(kwargs)
        documents = self._documents(text, images, content)
        rows = [self.encode(document, draw=draw, begin=add_special_tokens) for document in documents]
        limit = max_length or self.tokenizer.model_max_length
        for row in rows:
            if len(row) > limit:
                raise ValueError(f"a prompt has {len(row)} tokens, the model's context is {limit}; shorten it")
        ids, mask = self._padded(rows, limit if padding == "max_length" else max(map(len, rows)), padding, padding_side)
        return BatchFeature({"input_ids": ids, "attention_mask": mask}, tensor_type=return_tensors)

    def _padded(self, rows: list[list[int]], width: int, padding: Any, side: str) -> tuple[list[Any], list[Any]]:
        """Rows of equal length, and 1 where they are not padding."""
        if padding not in (True, False, None, "longest", "max_length", "do_not_pad") or side not in ("left", "right"):
            raise ValueError(f"padding={padding!r} to the side {side!r} is not known")
        if padding in (False, None, "do_not_pad"):
            return rows, [[1] * len(row) for row in rows]
        pad, right = self.tokenizer.pad_token_id, side == "right"
        ids = [row + [pad] * (width - len(row)) if right else [pad] * (width - len(row)) + row for row in rows]
        ones = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return ids, [own if right else own[::-1] for own in ones]

    def _documents(self, text: Any, images: Any, content: Any) -> list[list[Any]]:
        """Pieces of each document; images are wrapped, so that a path that is a string is no text."""
        if content is not None:
            if text is not None or images is not None:
                raise ValueError("give either content, or text and images")
            batch = bool(content) and all(isinstance(piece, list | tuple) for piece in content)
            return [[_piece(piece) for piece in document] for document in (content if batch else [content])]
        texts = [text or ""] if text is None or isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("text is an empty list: give at least one text")
        for number, one in enumerate(texts):
            if not isinstance(one, str):
                raise ValueError(f"text {number} is of type {type(one).__name__}, not str")
        if images is None:
            return [[piece] for piece in texts]  # "<image>" is text then
        counts = [piece.count(PLACEHOLDER) for piece in texts]
        rest = _images_in_order(images, counts)
        documents = []
        for piece in texts:
            document: list[Any] = []
            for number, part in enumerate(piece.split(PLACEHOLDER)):
                document += [_Image(rest.pop(0))] if number else []
                document += [part] if part else []
            documents.append(document)
        return documents

    def encode(self, document: Sequence[Any], *, draw: bool = False, begin: bool = True) -> list[int]:
        """Ids of one document's texts (strings) and images (anything else), `<s>` first."""
        ids = [self.tokenizer.bos_token_id] if begin else []
        for piece in document:
            if isinstance(piece, str):
                ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            else:
                image = piece.value if isinstance(piece, _Image) else piece
                codes = self._codes_needed().encode(self.pixels(image)[None])[0] + self.image_range[0]
                ids += [self.boi, *codes.tolist(), self.eoi]
        return [*ids, self.boi] if draw else ids

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        draw: bool = False,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> Any:
        """Token ids of chat messages; special tokens are those of the template, never those that a message spells out.

        Args:
            conversation: messages `{"role", "content"}`, or a list of conversations. Content is a text, or a list of
                `{"type": "text", "text"}` and `{"type": "image", "image"}`, all of which the template sees as texts.
            chat_template: Jinja; default: the processor's, then the tokenizer's.
            add_generation_prompt: end where the assistant begins.
            tokenize: False: the text, with `<image>` for images.
            draw: end with `<boi>`, so that the model goes on with an image.
            return_tensors: "pt" or "np"; None: lists.
            kwargs: variables of the template.

        Raises:
            ValueError: there is no template, or a piece is neither text nor image.
        """
        template = chat_template or self.chat_template or self.tokenizer.chat_template
        if template is None:
            raise ValueError("there is no chat template: give chat_template, or set processor.chat_template")
        kwargs = {key: value for key, value in kwargs.items() if key != "return_dict"}
        several = bool(conversation) and not isinstance(conversation[0], dict)
        found: list[Any] = []
        for messages in conversation if several else [conversation]:
            marked, pieces = _marked(messages)
            text = self.tokenizer.apply_chat_template(
                marked, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False, **kwargs
            )
            parts = [pieces[int(part)] if odd % 2 else part for odd, part in enumerate(_MARK.split(text))]
            if not tokenize:
                found.append("".join(PLACEHOLDER if isinstance(part, _Image) else part for part in parts))
                continue
            own = self.tokenizer.bos_token_id
            ids: list[int] = []
            for odd, part in enumerate(parts):
                ids += self.encode([part], begin=False) if odd % 2 else self._literal(part)
            found.append([*([] if ids[:1] == [own] else [own]), *ids, *([self.boi] if draw else [])])
        if not tokenize:
            return found if several else found[0]
        ids, mask = self._padded(found, max(map(len, found)), True, "left")
        return BatchFeature({"input_ids": ids, "attention_mask": mask}, tensor_type=return_tensors)

    def _literal(self, text: str) -> list[int]:
        """Ids of a template's own text, whose special tokens are special."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return ids

    def pixels(self, image: Any) -> np.ndarray:
        """An image as the tokenizer wants it, uint8 [H, W, C]: short side resized, centre cropped."""
        codes = self._codes_needed()
        return load_pixels(image, size=codes.size, channels=codes.channels)

    def pieces(self, ids: Any) -> list[Any]:
        """Texts and Pillow images of one sequence of ids.

        Left out: an image that is not whole, or that has an id without a code (`image_grammar` generates neither).
        """
        numbers = [int(number) for number in ids if int(number) != self.tokenizer.pad_token_id]
        first, end = self.image_range
        found: list[Any] = []
        start = 0
        while start < len(numbers):
            inside = first <= numbers[start] < end
            stop = start
            while stop < len(numbers) and (first <= numbers[stop] < end) == inside:
                stop += 1
            part = numbers[start:stop]
            if inside:
                codes = self._codes_needed()
                if len(part) == codes.tokens and max(part) - first < codes.count:
                    found.append(self._picture(part))
            elif text := self.tokenizer.decode(part, skip_special_tokens=True):
                found.append(text)
            start = stop
        return found

    def _picture(self, ids: list[int]) -> PIL.Image.Image:
        pixels = self._codes_needed().decode(np.array([ids]) - self.image_range[0])[0]
        return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def image_grammar(self) -> ImageGrammar:
        """Keeps generated images whole."""
        codes = self._codes_needed()
        return ImageGrammar(*self.image_range, tokens=codes.tokens, boi=self.boi, eoi=self.eoi, codes=codes.count)

    def _codes_needed(self) -> Codes:
        if self.codes is None:
            raise ValueError("this model was trained without images: there is no image tokenizer")
        return self.codes


__all__ = ["ImageGrammar", "MomaProcessor"]

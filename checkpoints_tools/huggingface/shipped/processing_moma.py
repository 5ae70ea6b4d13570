"""Converts text, images and other items to token ids of one sequence and back, for models in transformers 5.

Shipped next to the weights, with the text tokenizer and the image tokenizer that the model was trained with. Text of a
user never becomes a special token or an image token, whatever it contains.

Letters: H W C height, width, channels; B rows.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .codecs_moma import CODECS
from .content_moma import MARK, PLACEHOLDER, ImagePart, ItemPart, images_in_order, marked_messages, part_of, shown
from .decoding_moma import contrastive, guidance, special_grammar
from .grammar_moma import Grammar, ImageGrammar
from .guidance_moma import ALPHA
from .image_codes_moma import FOLDER, Codes, read_codes, write_codes
from .infilling_moma import HOLE, FillingGrammar, Holes, fill
from .items_moma import ItemCodec, ItemPiece, codec_folder
from .likelihood_moma import likelihoods
from .pixels_moma import load_pixels
from .versions_moma import warn_if_untested


def _kind(number: int, ranges: dict[str, tuple[int, int]]) -> str | None:
    """The modality that an id belongs to; None: text."""
    return next((name for name, (first, end) in ranges.items() if first <= number < end), None)


# Arguments that transformers passes to all processors, with their values that have no effect.
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
        ValueError: an argument requests an unsupported feature.
        TypeError: it is unknown.
    """
    for name, value in kwargs.items():
        if name not in _ASKS_NOTHING:
            raise TypeError(f"MomaProcessor got an unexpected keyword argument {name!r}")
        if not any(value is harmless or value == harmless for harmless in _ASKS_NOTHING[name]):
            why = ": it would cut images; shorten the prompt" if name == "truncation" else ""
            raise ValueError(f"{name}={value!r} is not supported{why}")


class MomaProcessor(ProcessorMixin):
    """Converts text and images to token ids, and token ids to text and images.

    `processor(text="a <image> of <image>", images=[one, other])`, or piece by piece, `processor(content=["a ", one,
    " of ", other])`; lists of these for a batch. Documents begin with `<s>`. A string is a path in `images`, and text
    in `content`, where a path is a `pathlib.Path` or `{"type": "image", "image": ...}`.

    Other modalities (audio) are given in `content` as `{"type": "audio", "path": ...}`.

    Args:
        tokenizer: of text.
        modalities: `[name, first id, one past the last id]` of each.
        marked: names of those with separate begin and end tokens, `<begin_NAME>` and `<end_NAME>`.
    """

    HOLE = HOLE

    def __init__(
        self, tokenizer: Any = None, modalities: list | None = None, marked: list | None = None, **kwargs: Any
    ) -> None:
        warn_if_untested()
        super().__init__(tokenizer, **kwargs)
        self.modalities = [list(entry) for entry in modalities or []]
        self.marked = list(marked or [])
        self.codes: Codes | None = None
        self.codecs: dict[str, ItemCodec] = {}
        ranges = {name: (first, end) for name, first, end in self.modalities}
        self.image_range = ranges.get("image", (0, 0))
        self.boi, self.eoi = tokenizer.convert_tokens_to_ids(["<boi>", "<eoi>"])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read tokenizers from a folder or a repository."""
        made = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        made.codes = read_codes(pretrained_model_name_or_path, **kwargs)
        for name in made.marked:
            if name in CODECS:
                made.add_codec(CODECS[name], codec_folder(str(pretrained_model_name_or_path), CODECS[name], kwargs))
        return made

    def add_codec(self, modality: Any, folder: Path | None = None, *, codec: Any = None) -> None:
        """Add support for items of a modality.

        Args:
            modality: its class.
            folder: of its fitted tokenizer.
            codec: the tokenizer itself instead.
        """
        name = modality.name
        first, end = {one: (start, stop) for one, start, stop in self.modalities}[name]
        opens, closes = self.tokenizer.convert_tokens_to_ids([f"<begin_{name}>", f"<end_{name}>"])
        codec = modality.load(folder) if codec is None else codec
        self.codecs[name] = ItemCodec(modality, codec, first, end, opens, closes)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Write everything that `from_pretrained` reads; the base class would omit the image tokenizer."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.codes is not None:
            write_codes(self.codes, Path(save_directory) / FOLDER)
        for name, item in self.codecs.items():
            item.codec.save(Path(save_directory) / f"{name}_tokenizer")
        return files

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The content of processor_config.json."""
        codes, codecs, self.codes, self.codecs = self.codes, self.codecs, None, {}
        try:
            found = super().to_dict(**kwargs)
        finally:
            self.codes, self.codecs = codes, codecs
        own = ("codes", "codecs", "image_range", "boi", "eoi", *(() if self.marked else ("marked",)))
        return {key: value for key, value in found.items() if key not in own}

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask"]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        content: Sequence[Any] | None = None,
        *,
        draw: bool | str = False,
        max_length: int | None = None,
        padding: bool | str | None = True,
        padding_side: str = "left",
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Token ids, padded on the left.

        Args:
            text: one text or several; with images, each `<image>` in it is replaced by the next of them.
            images: one image or several, in order; for several texts also a list of each one's images. See
                `pixels_moma.load_pixels` for the types of images.
            content: instead of both, the pieces of one document, or a list of documents.
            draw: end with `<boi>`, so that the model continues with an image; a modality's name: with its begin token.
            max_length: longest prompt [tokens]; default: the model's context.
            padding: to the longest prompt (True, "longest"), to `max_length` ("max_length"), or not (False).
            padding_side: "left", or "right" for training.
            add_special_tokens: begin with `<s>`.
            return_tensors: "pt" or "np"; None: lists.
            kwargs: arguments that transformers passes to every processor, with values that have no effect.

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
        """Pieces of each document; images are wrapped, so that a path given as a string is not text."""
        if content is not None:
            if text is not None or images is not None:
                raise ValueError("give either content, or text and images")
            batch = bool(content) and all(isinstance(piece, list | tuple) for piece in content)
            return [[part_of(piece) for piece in document] for document in (content if batch else [content])]
        texts = [text or ""] if text is None or isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("text is an empty list: give at least one text")
        for number, one in enumerate(texts):
            if not isinstance(one, str):
                raise ValueError(f"text {number} is of type {type(one).__name__}, not str")
        if images is None:
            return [[piece] for piece in texts]  # without images "<image>" is text
        counts = [piece.count(PLACEHOLDER) for piece in texts]
        rest = images_in_order(images, counts)
        documents = []
        for piece in texts:
            document: list[Any] = []
            for number, part in enumerate(piece.split(PLACEHOLDER)):
                document += [ImagePart(rest.pop(0))] if number else []
                document += [part] if part else []
            documents.append(document)
        return documents

    def encode(self, document: Sequence[Any], *, draw: bool | str = False, begin: bool = True) -> list[int]:
        """Ids of one document's texts (strings), items as in `content`, and images (anything else), `<s>` first."""
        ids = [self.tokenizer.bos_token_id] if begin else []
        for piece in document:
            if isinstance(piece, str):
                ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            elif isinstance(piece, ItemPart):
                ids += self._item(piece)
            else:
                image = piece.value if isinstance(piece, ImagePart) else piece
                codes = self._codes_needed().encode(self.pixels(image)[None])[0] + self.image_range[0]
                ids += [self.boi, *codes.tolist(), self.eoi]
        return [*ids, *self._opening(draw)]

    def _item(self, piece: ItemPart) -> list[int]:
        item = self._codec_needed(piece.modality)
        source = Path(piece.value) if isinstance(piece.value, str) else piece.value
        values = item.modality.read(source, item.codec)
        return [item.opens, *(item.codec.encode(values[None])[0] + item.first).tolist(), item.closes]

    def _opening(self, draw: bool | str) -> list[int]:
        """The end of a prompt: nothing, or the begin token of a modality."""
        if not draw:
            return []
        return [self.boi] if draw in (True, "image") else [self._codec_needed(str(draw)).opens]

    def _codec_needed(self, name: str) -> ItemCodec:
        if name not in self.codecs:
            known = ", ".join(["text", *(["image"] if self.codes else []), *self.codecs])
            raise ValueError(f"this model has no tokenizer of {name!r}, only of {known}")
        return self.codecs[name]

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        draw: bool | str = False,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> Any:
        """Token ids of chat messages; special tokens come from the template only, never from the text of a message.

        Args:
            conversation: messages `{"role", "content"}`, or a list of conversations. Content is a text, or a list of
                `{"type": "text", "text"}`, `{"type": "image", "image"}` and the like, which the template sees as texts.
            chat_template: Jinja; default: the processor's, then the tokenizer's.
            add_generation_prompt: end where the assistant begins.
            tokenize: False: the text, with `<image>` for images.
            draw: end with `<boi>`, so that the model continues with an image.
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
            marked, pieces = marked_messages(messages)
            text = self.tokenizer.apply_chat_template(
                marked, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False, **kwargs
            )
            parts = [pieces[int(part)] if odd % 2 else part for odd, part in enumerate(MARK.split(text))]
            if not tokenize:
                found.append("".join(shown(part) for part in parts))
                continue
            own = self.tokenizer.bos_token_id
            ids: list[int] = []
            for odd, part in enumerate(parts):
                ids += self.encode([part], begin=False) if odd % 2 else self._literal(part)
            found.append([*([] if ids[:1] == [own] else [own]), *ids, *self._opening(draw)])
        if not tokenize:
            return found if several else found[0]
        ids, mask = self._padded(found, max(map(len, found)), True, "left")
        return BatchFeature({"input_ids": ids, "attention_mask": mask}, tensor_type=return_tensors)

    def _literal(self, text: str) -> list[int]:
        """Ids of a template's own text, in which special tokens are special."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return ids

    def pixels(self, image: Any) -> np.ndarray:
        """An image in the form that the tokenizer needs, uint8 [H, W, C], with size and fit as in the training data."""
        codes = self._codes_needed()
        return load_pixels(image, size=codes.size, channels=codes.channels, fit=codes.fit, background=codes.background)

    def pieces(self, ids: Any) -> list[Any]:
        """Texts, Pillow images and `ItemPiece`s of one sequence of ids.

        Omitted: items that are incomplete, or that have an id without a code (`grammar` generates neither).
        """
        numbers = [int(number) for number in ids if int(number) != self.tokenizer.pad_token_id]
        ranges = {"image": self.image_range} | {name: (one.first, one.end) for name, one in self.codecs.items()}
        found: list[Any] = []
        for kind, group in itertools.groupby(numbers, key=lambda number: _kind(number, ranges)):
            part = list(group)
            if kind == "image":
                codes = self._codes_needed()
                if len(part) == codes.tokens and max(part) - self.image_range[0] < codes.count:
                    found.append(self._picture(part))
            elif kind is not None:
                found += self._item_piece(kind, part)
            elif text := self.tokenizer.decode(part, skip_special_tokens=True):
                found.append(text)
        return found

    def _item_piece(self, name: str, ids: list[int]) -> list[ItemPiece]:
        item = self.codecs[name]
        if len(ids) != item.codec.tokens_per_item or max(ids) - item.first >= item.codec.vocab_size:
            return []
        return [ItemPiece(name, np.asarray(item.codec.decode(np.array([ids]) - item.first)[0]), item)]

    def _picture(self, ids: list[int]) -> PIL.Image.Image:
        pixels = self._codes_needed().decode(np.array([ids]) - self.image_range[0])[0]
        return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def image_grammar(self) -> ImageGrammar:
        """Keeps generated images complete."""
        codes = self._codes_needed()
        return ImageGrammar(*self.image_range, tokens=codes.tokens, boi=self.boi, eoi=self.eoi, codes=codes.count)

    def item_grammars(self) -> list[ImageGrammar]:
        """The grammar of each modality whose items the model generates."""
        images = [] if self.codes is None else [self.image_grammar()]
        return [*images, *(item.grammar() for item in self.codecs.values())]

    def grammar(self) -> Grammar:
        """Keeps generated items of all modalities complete, and excludes special tokens that cannot follow."""
        return Grammar([*self.item_grammars(), special_grammar(self)])

    def guidance(self, model: Any, scale: float, *, unconditional: str = "none") -> Grammar:
        """Guidance of items, for `logits_processor=[processor.guidance(model, 2.0), processor.grammar()]`."""
        return guidance(self, model, scale=scale, unconditional=unconditional)

    def contrastive(self, model: Any, *, k: int, alpha: float = ALPHA, unconditional: str = "none") -> Grammar:
        """Contrastive decoding (CD-K): `logits_processor=[processor.grammar(), processor.contrastive(model, k=1)]`."""
        return contrastive(self, model, k=k, alpha=alpha, unconditional=unconditional)

    def likelihoods(self, model: Any, prompts: Any, sequences: Any, *, text: str | None = None) -> list[float]:
        """How likely the text of each prompt is after the item drawn for it (likelihood_moma.py)."""
        return likelihoods(self, model, prompts, sequences, text=text)

    def infill(self, model: Any, content: Sequence[Any], **generation: Any) -> list[Any]:
        """A document with its holes filled, as `pieces`; for models trained with causal masking (CM3).

        Args:
            model: the model.
            content: pieces as in `__call__`, with holes: `processor.HOLE` in a text, and images with a mask on the
                grid of their tokens, `{"type": "image", "image": ..., "mask": (x, y, width, height)}`.
            generation: arguments of `generate`, e.g. do_sample=False.

        Raises:
            ValueError: the model has no tokens for holes, there is no hole, a mask is outside of its image, or there
                is no room.
        """
        return self.pieces(Holes(self, content).filled(fill(self, model, content, **generation)))

    def _codes_needed(self) -> Codes:
        if self.codes is None:
            raise ValueError("this model was trained without images: there is no image tokenizer")
        return self.codes


__all__ = ["FillingGrammar", "Grammar", "ImageGrammar", "ItemCodec", "ItemPiece", "MomaProcessor"]

"""Text and images to token ids of one sequence, and back, for mixed-modal models in transformers 5.

Shipped beside the weights, with the text tokenizer and the image tokenizer that the model was trained with. Text of a
user never becomes a special token or an image token, whatever it says.

Letters: n images, H W C height, width, channels, T tokens of an image, K codes, D numbers of a patch.
"""

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.generation import LogitsProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

FOLDER = "image_tokenizer"
SETTINGS = "image_tokenizer.json"
PLACEHOLDER = "<image>"
MAX_PIXELS = 100_000_000  # larger pictures may be bombs: a PNG of a few kB can unpack to gigabytes


class LevelsCodes:
    """Every pixel's brightness, rounded to one of `levels`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.size, self.channels, self.levels = settings["size"], settings["channels"], settings["levels"]
        self.tokens = self.size * self.size * self.channels

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Uint8 [n, H, W, C] -> int64 [n, T]."""
        levels = np.rint(images.astype(np.float64) * ((self.levels - 1) / 255))
        return levels.astype(np.int64).reshape(len(images), -1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Int [n, T] -> uint8 [n, H, W, C]."""
        pixels = np.rint(codes * (255 / (self.levels - 1))).astype(np.uint8)
        return pixels.reshape(len(codes), self.size, self.size, self.channels)


class KMeansCodes:
    """Every patch's nearest entry of a codebook, in exact whole numbers; of equals the lower one."""

    def __init__(self, settings: dict[str, Any], codebook: np.ndarray) -> None:
        self.size, self.channels, self.patch = settings["size"], settings["channels"], settings["patch"]
        self.codebook = codebook  # uint8 [K, D]
        exact = np.float32 if 2 * codebook.shape[1] * 255**2 < 2**24 else np.float64
        self._book = codebook.astype(exact)
        self._norm = (self._book**2).sum(axis=1)
        self.tokens = (self.size // self.patch) ** 2

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Uint8 [n, H, W, C] -> int64 [n, T]."""
        n, p, rows = len(images), self.patch, self.size // self.patch
        blocks = images.reshape(n, rows, p, rows, p, self.channels).transpose(0, 1, 3, 2, 4, 5)
        patches = blocks.reshape(n * rows * rows, -1).astype(self._book.dtype)
        codes = [
            np.argmin(self._norm - 2 * (patches[start : start + 4096] @ self._book.T), axis=1)
            for start in range(0, len(patches), 4096)
        ]
        return np.concatenate(codes).reshape(n, self.tokens)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Int [n, T] -> uint8 [n, H, W, C]."""
        n, p, rows = len(codes), self.patch, self.size // self.patch
        patches = self.codebook[codes].reshape(n, rows, rows, p, p, self.channels)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(n, self.size, self.size, self.channels)


class ResidualCodes(KMeansCodes):
    """Two codebooks in a row: the second one for what the first one leaves of a patch; two tokens a patch."""

    def __init__(self, settings: dict[str, Any], codebook: np.ndarray, residual: np.ndarray) -> None:
        super().__init__(settings, codebook)
        self.residual = residual  # int16 [R, D]
        self._entries = np.concatenate([codebook.astype(np.int64), residual.astype(np.int64)])
        self.tokens *= 2

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Uint8 [n, H, W, C] -> int64 [n, T]."""
        n, p, rows = len(images), self.patch, self.size // self.patch
        blocks = images.reshape(n, rows, p, rows, p, self.channels).transpose(0, 1, 3, 2, 4, 5)
        patches = blocks.reshape(n * rows * rows, -1).astype(np.int64)
        first = _nearest(patches, self.codebook)
        second = _nearest(patches - self.codebook[first], self.residual) + len(self.codebook)
        return np.stack([first, second], axis=1).reshape(n, self.tokens)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Int [n, T] -> uint8 [n, H, W, C]."""
        n, p, rows = len(codes), self.patch, self.size // self.patch
        sums = self._entries[codes].reshape(n, rows * rows, 2, -1).sum(axis=2)
        patches = np.clip(sums, 0, 255).astype(np.uint8).reshape(n, rows, rows, p, p, self.channels)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(n, self.size, self.size, self.channels)


def _nearest(patches: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Index of each patch's nearest entry, exact: of equals the lower one."""
    entries = book.astype(np.float64)
    norm = (entries**2).sum(axis=1)
    found = [
        np.argmin(norm - 2 * (patches[start : start + 4096].astype(np.float64) @ entries.T), axis=1)
        for start in range(0, len(patches), 4096)
    ]
    return np.concatenate(found)


class VQCodes:
    """Codes of a VQ-VAE of transformers (Janus, Emu3, Chameleon), on the CPU in fp32."""

    _BATCH = 8  # fixed: convolutions may sum differently for another batch size

    def __init__(self, settings: dict[str, Any], model: torch.nn.Module) -> None:
        self.model, self.size = model.eval().float(), settings["size"]
        self.channels = settings["channels"]
        self._mean, self._std = (torch.tensor(settings[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        self._rows = self.size // 2 ** (len(model.config.channel_multiplier) - 1)  # type: ignore[union-attr, arg-type]
        self._sized = type(model).__name__ == "Emu3VQVAE"
        self.tokens = self._rows**2

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> np.ndarray:
        """Uint8 [n, H, W, C] -> int64 [n, T]."""
        found = []
        for start in range(0, len(images), self._BATCH):
            part = images[start : start + self._BATCH]
            filled = np.zeros((self._BATCH, *part.shape[1:]), np.uint8)
            filled[: len(part)] = part
            pixels = (torch.from_numpy(filled).permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std
            more = (torch.tensor([[self.size, self.size]] * self._BATCH),) if self._sized else ()
            codes = self.model.encode(pixels, *more).image_tokens  # type: ignore[operator]
            codes = torch.stack(list(codes)) if self._sized else codes
            found.append(codes.reshape(self._BATCH, -1)[: len(part)].numpy().astype(np.int64))
        return np.concatenate(found)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Int [n, T] -> uint8 [n, H, W, C]."""
        if not hasattr(self.model, "decode"):
            raise ValueError(f"{type(self.model).__name__} has no decoder: its codes cannot be drawn")
        drawn = []
        for start in range(0, len(codes), self._BATCH):
            part = torch.from_numpy(np.ascontiguousarray(codes[start : start + self._BATCH], dtype=np.int64))
            pixels = self.model.decode(part.reshape(-1, self._rows, self._rows) if self._sized else part)  # type: ignore[operator]
            pixels = pixels[:, 0] if pixels.ndim == 5 else pixels
            pixels = (pixels * self._std + self._mean).clamp(0, 1) * 255
            drawn.append(pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        return np.concatenate(drawn)


Codes = LevelsCodes | KMeansCodes | ResidualCodes | VQCodes


class ImageGrammar(LogitsProcessor):
    """Generated images are whole: `<boi>`, the image's tokens, `<eoi>`, and no image token anywhere else.

    For `generate(..., logits_processor=[processor.image_grammar()])`.

    Args:
        first, end: half-open range of image tokens.
        tokens: length of an image.
        boi, eoi: ids around an image.
    """

    def __init__(self, first: int, end: int, *, tokens: int, boi: int, eoi: int) -> None:
        self.first, self.end, self.tokens, self.boi, self.eoi = first, end, tokens, boi, eoi

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocabulary] with what may not come next at -inf."""
        masked = torch.full_like(scores, float("-inf"))
        recent = input_ids[:, -(self.tokens + 1) :]
        for row, ids in enumerate(recent.tolist()):
            since = ids[::-1].index(self.boi) if self.boi in ids else None
            if since is not None and self.eoi not in ids[len(ids) - since :]:
                allowed = slice(self.first, self.end) if since < self.tokens else slice(self.eoi, self.eoi + 1)
                masked[row, allowed] = scores[row, allowed]
            else:
                masked[row] = scores[row]
                masked[row, self.first : self.end] = float("-inf")
                masked[row, self.eoi] = float("-inf")
        return masked


class MomaProcessor(ProcessorMixin):
    """Makes token ids of text and images, and text and images of token ids.

    `processor(text="a <image> of <image>", images=[one, other])`, or piece by piece, `processor(content=["a ", one,
    " of ", other])`; lists of these for a batch. Documents begin with `<s>`.

    Args:
        tokenizer: of text.
        modalities: `[name, first id, one past the last id]` of each.
    """

    def __init__(self, tokenizer: Any = None, modalities: list | None = None, **kwargs: Any) -> None:
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
            _write_codes(self.codes, Path(save_directory) / FOLDER)
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
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Token ids, padded on the left.

        Args:
            text: one text or several; with images, each `<image>` in it stands for the next of them.
            images: Pillow images, paths or uint8 arrays, in order.
            content: instead of both, the pieces of one document, or a list of documents.
            draw: end with `<boi>`, so that the model goes on with an image.
            max_length: longest prompt [tokens]; default: the model's context.
            return_tensors: "pt" or "np"; None: lists.
            kwargs: ignored; pipelines pass the tokenizer's.

        Raises:
            ValueError: placeholders and images do not match, an image cannot be read, or a prompt is too long.
        """
        del kwargs
        documents = self._documents(text, images, content)
        rows = [self.encode(document, draw=draw) for document in documents]
        limit = max_length or self.tokenizer.model_max_length
        for row in rows:
            if len(row) > limit:
                raise ValueError(f"a prompt has {len(row)} tokens, the model's context is {limit}; shorten it")
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return BatchFeature({"input_ids": ids, "attention_mask": mask}, tensor_type=return_tensors)

    def _documents(self, text: Any, images: Any, content: Any) -> list[list[Any]]:
        if content is not None:
            if text is not None or images is not None:
                raise ValueError("give either content, or text and images")
            return [list(content)] if not content or not isinstance(content[0], list | tuple) else list(content)
        texts = [text or ""] if text is None or isinstance(text, str) else list(text)
        if images is None:
            return [[piece] for piece in texts]  # "<image>" is text then
        rest = list(images) if isinstance(images, list | tuple) else [images]
        wanted = sum(piece.count(PLACEHOLDER) for piece in texts)
        if wanted != len(rest):
            raise ValueError(f"the text has {wanted} {PLACEHOLDER} for {len(rest)} images")
        documents = []
        for piece in texts:
            document: list[Any] = []
            for number, part in enumerate(piece.split(PLACEHOLDER)):
                document += [rest.pop(0)] if number else []
                document += [part] if part else []
            documents.append(document)
        return documents

    def encode(self, document: Sequence[Any], *, draw: bool = False) -> list[int]:
        """Ids of one document's texts and images, `<s>` first."""
        ids = [self.tokenizer.bos_token_id]
        for piece in document:
            if isinstance(piece, str):
                ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            else:
                codes = self._codes_needed().encode(self.pixels(piece)[None])[0] + self.image_range[0]
                ids += [self.boi, *codes.tolist(), self.eoi]
        return [*ids, self.boi] if draw else ids

    def pixels(self, image: Any) -> np.ndarray:
        """An image as the tokenizer wants it, uint8 [H, W, C]: short side resized, centre cropped."""
        codes = self._codes_needed()
        return load_pixels(image, size=codes.size, channels=codes.channels)

    def pieces(self, ids: Any) -> list[Any]:
        """Texts and Pillow images of one sequence of ids; an image that is not whole is left out."""
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
            if inside and len(part) == self._codes_needed().tokens:
                found.append(self._picture(part))
            elif not inside and (text := self.tokenizer.decode(part, skip_special_tokens=True)):
                found.append(text)
            start = stop
        return found

    def _picture(self, ids: list[int]) -> PIL.Image.Image:
        pixels = self._codes_needed().decode(np.array([ids]) - self.image_range[0])[0]
        return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def image_grammar(self) -> ImageGrammar:
        """Keeps generated images whole."""
        return ImageGrammar(*self.image_range, tokens=self._codes_needed().tokens, boi=self.boi, eoi=self.eoi)

    def _codes_needed(self) -> Codes:
        if self.codes is None:
            raise ValueError("this model was trained without images: there is no image tokenizer")
        return self.codes


def load_pixels(image: Any, *, size: int, channels: int) -> np.ndarray:
    """Pixels of one image, uint8 [size, size, channels], as the training data had them.

    Args:
        image: a path, bytes, a Pillow image or a uint8 array.
        size: edge of the result [pixels].
        channels: 1 (grey) or 3 (RGB); transparency is laid on white.

    Raises:
        ValueError: it cannot be read.
    """
    name = str(image)[:200] if isinstance(image, str | Path) else f"of type {type(image).__name__}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = _open(image)
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"it has {opened.width}x{opened.height} pixels, too many")
            picture = _convert(PIL.ImageOps.exif_transpose(opened), channels)
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        raise ValueError(f"image {name} cannot be read: {error}") from error
    if picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(edge * scale)) for edge in picture.size)
        picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture, dtype=np.uint8).reshape(size, size, channels)


def _open(image: Any) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return PIL.Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)
    return PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)


def _convert(picture: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    if picture.mode.startswith("I;16"):  # convert("L") would clip 16-bit grey at 255 instead of scaling it
        picture = PIL.Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = PIL.Image.alpha_composite(white, picture)
    return picture.convert("L" if channels == 1 else "RGB")


def read_codes(source: Any, **kwargs: Any) -> Codes | None:
    """The image tokenizer of a folder or repository; None where there is none."""
    source = str(source)
    known = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}

    def file(name: str, *, needed: bool = True) -> Path | None:
        found = cached_file(
            source, f"{FOLDER}/{name}", **known, _raise_exceptions_for_missing_entries=needed
        )  # a local path stays as it is
        return Path(found) if found else None

    settings_file = file(SETTINGS, needed=False)
    if settings_file is None:
        return None
    settings = json.loads(settings_file.read_text())
    if settings["kind"] == "levels":
        return LevelsCodes(settings)
    if settings["kind"] in ("kmeans", "kmeans-residual"):
        names = ["codebook.npy", "residual.npy"][: 1 if settings["kind"] == "kmeans" else 2]
        books = [np.load(file(name), allow_pickle=False) for name in names]  # type: ignore[arg-type]
        return KMeansCodes(settings, *books) if len(books) == 1 else ResidualCodes(settings, *books)
    if settings["kind"] == "vq":
        import transformers

        config_file = file("model/config.json")
        assert config_file is not None
        name = {"chameleon_vqgan": "ChameleonVQVAE", "janus_vqgan": "JanusVQVAE", "emu3_vqgan": "Emu3VQVAE"}[
            json.loads(config_file.read_text())["model_type"]
        ]
        model = getattr(transformers, name).from_pretrained(
            source, subfolder=f"{FOLDER}/model", dtype=torch.float32, **known
        )
        return VQCodes(settings, model)
    raise ValueError(f"{settings_file} is of unknown kind {settings['kind']!r}")


def _write_codes(codes: Codes, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"size": codes.size, "channels": codes.channels}
    if isinstance(codes, LevelsCodes):
        settings |= {"kind": "levels", "levels": codes.levels}
    elif isinstance(codes, KMeansCodes):
        settings |= {"kind": "kmeans", "patch": codes.patch}
        np.save(folder / "codebook.npy", codes.codebook)
        if isinstance(codes, ResidualCodes):
            settings["kind"] = "kmeans-residual"
            np.save(folder / "residual.npy", codes.residual)
    else:
        settings |= {"kind": "vq", "mean": codes._mean.flatten().tolist(), "std": codes._std.flatten().tolist()}
        codes.model.save_pretrained(folder / "model")  # type: ignore[operator]
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


__all__ = ["ImageGrammar", "MomaProcessor"]

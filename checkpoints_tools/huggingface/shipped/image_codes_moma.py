"""Image tokenizers of mixed-modal models in transformers 5: pixels to codes and back, and their files.

Shipped next to the weights. pixels_moma.py converts pictures of other sizes and formats.

Each class has `tokens`, the length of an image, and `count`: codes are 0..count-1. A small data set has a small
codebook, so `count` may be less than the number of image ids of the model.

Letters: n images, H W C height, width, channels, T tokens of an image, K codes, D numbers of a patch.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import cached_file

FOLDER = "image_tokenizer"
SETTINGS = "image_tokenizer.json"
_MOST_BYTES = 1 << 20  # of a file of settings
_WHITE = (255, 255, 255)


class Pictures:
    """The format of a tokenizer's pictures.

    Attributes:
        size: edge [pixels].
        channels: 1 (grey) or 3 (RGB).
        fit: conversion of pictures that are not square, as in `pixels_moma.load_pixels`.
        background: colour under transparent pixels and of padding.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.size, self.channels = settings["size"], settings["channels"]
        self.fit = settings.get("fit", "crop")
        red, green, blue = settings.get("background", _WHITE)
        self.background = (red, green, blue)

    def shape(self) -> dict[str, Any]:
        """Entries for a settings file; fit and background only if they are not the defaults."""
        found = {"size": self.size, "channels": self.channels}
        found |= {} if self.fit == "crop" else {"fit": self.fit}
        return found if self.background == _WHITE else found | {"background": list(self.background)}


class LevelsCodes(Pictures):
    """Every pixel's brightness, rounded to one of `levels`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.levels = settings["levels"]
        self.tokens = self.size * self.size * self.channels
        self.count = self.levels

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Uint8 [n, H, W, C] -> int64 [n, T]."""
        levels = np.rint(images.astype(np.float64) * ((self.levels - 1) / 255))
        return levels.astype(np.int64).reshape(len(images), -1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Int [n, T] -> uint8 [n, H, W, C]."""
        pixels = np.rint(codes * (255 / (self.levels - 1))).astype(np.uint8)
        return pixels.reshape(len(codes), self.size, self.size, self.channels)


class KMeansCodes(Pictures):
    """The nearest entry of a codebook for every patch, in exact integers; of equal distances the lower index."""

    def __init__(self, settings: dict[str, Any], codebook: np.ndarray) -> None:
        super().__init__(settings)
        self.patch = settings["patch"]
        self.codebook = codebook  # uint8 [K, D]
        exact = np.float32 if 2 * codebook.shape[1] * 255**2 < 2**24 else np.float64
        self._book = codebook.astype(exact)
        self._norm = (self._book**2).sum(axis=1)
        self.tokens = (self.size // self.patch) ** 2
        self.count = len(codebook)

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
    """Two codebooks, the second one for the residual of the first; two tokens per patch."""

    def __init__(self, settings: dict[str, Any], codebook: np.ndarray, residual: np.ndarray) -> None:
        super().__init__(settings, codebook)
        self.residual = residual  # int16 [R, D]
        self._entries = np.concatenate([codebook.astype(np.int64), residual.astype(np.int64)])
        self.tokens *= 2
        self.count = len(self._entries)

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
    """Index of each patch's nearest entry, exact; of equal distances the lower index."""
    entries = book.astype(np.float64)
    norm = (entries**2).sum(axis=1)
    found = [
        np.argmin(norm - 2 * (patches[start : start + 4096].astype(np.float64) @ entries.T), axis=1)
        for start in range(0, len(patches), 4096)
    ]
    return np.concatenate(found)


class VQCodes(Pictures):
    """Codes of a VQ-VAE of transformers (Janus, Emu3, Chameleon), on the CPU in fp32."""

    _BATCH = 8  # fixed, because convolutions may sum in another order for another batch size

    def __init__(self, settings: dict[str, Any], model: torch.nn.Module) -> None:
        super().__init__(settings)
        self.model = model.eval().float()
        self._mean, self._std = (torch.tensor(settings[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        self._rows = self.size // 2 ** (len(model.config.channel_multiplier) - 1)  # type: ignore[union-attr, arg-type]
        self._sized = type(model).__name__ == "Emu3VQVAE"
        self.tokens = self._rows**2
        self.count = int(getattr(model.config, "num_embeddings", None) or model.config.codebook_size)  # type: ignore[union-attr, arg-type]

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


def read_codes(source: Any, **kwargs: Any) -> Codes | None:
    """The image tokenizer of a folder or repository; None if there is none."""
    source = str(source)
    known = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}

    def file(name: str, *, needed: bool = True) -> Path | None:
        found = cached_file(
            source, f"{FOLDER}/{name}", **known, _raise_exceptions_for_missing_entries=needed
        )  # a local path is not changed
        return Path(found) if found else None

    settings_file = file(SETTINGS, needed=False)
    if settings_file is None:
        return None
    settings = _read_object(settings_file)
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
            _read_object(config_file)["model_type"]
        ]
        model = getattr(transformers, name).from_pretrained(
            source, subfolder=f"{FOLDER}/model", dtype=torch.float32, **known
        )
        return VQCodes(settings, model)
    raise ValueError(f"{settings_file} is of unknown kind {settings['kind']!r}")


def _read_object(file: Path) -> dict[str, Any]:
    """Read a small JSON file. This module is self-contained in exports, so it cannot use mmscale.bounded."""
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, more than the {_MOST_BYTES:,} that are read")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found


def write_codes(codes: Codes, folder: Path) -> None:
    """Write the files that `read_codes` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = codes.shape()
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


__all__ = ["FOLDER", "Codes", "read_codes", "write_codes"]

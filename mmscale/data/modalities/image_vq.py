"""Image tokenizer around a VQ-VAE of transformers (Chameleon, Janus, Emu3), read from a local folder.

It runs on the CPU, or on a GPU after `use_device`, and never downloads anything. It does not train a VQ-VAE.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmscale import bounded
from mmscale.data.modalities.image_settings import Fitting, write_settings
from mmscale.data.modalities.patches import Codes, Pixels
from mmscale.errors import DataError
from mmscale.runtime import device, stopwatch
from mmscale.runtime.file_modes import apply_umask

# Maps model_type of config.json to a class of transformers.
_CLASSES = {"chameleon_vqgan": "ChameleonVQVAE", "janus_vqgan": "JanusVQVAE", "emu3_vqgan": "Emu3VQVAE"}
# Complete models, of which only this part is read.
_WHOLE = {"janus": "JanusVQVAE", "emu3": "Emu3VQVAE"}
_PART = {r"^(model\.)?vqmodel\.": ""}
# Images of a forward pass; fixed, so that codes do not depend on how documents are divided into parts.
_BATCH = 8
# On a GPU: of 512 x 512 pixels (2 GB for each activation of Chameleon's first layers), and at most.
_GPU_BATCH, _MOST_GPU_BATCH = 16, 64
_MODEL = "model"


class VQTokenizer:
    """Codes of a neural vector-quantised autoencoder.

    Args:
        model: ChameleonVQVAE, JanusVQVAE or Emu3VQVAE.
        size: edge of the images [pixels].
        mean: subtracted from each channel of an image in 0..1.
        std: divisor of each channel after that.
        fitting: how pictures get this size.

    Raises:
        DataError: the model does not support images of this size.
    """

    kind = "vq"
    measured_items = 64  # for the reported quality: a CPU takes seconds for each

    def __init__(
        self, model: Any, *, size: int, mean: list[float], std: list[float], fitting: Fitting | None = None
    ) -> None:
        self.model, self.size, self.fitting = model.eval().float(), size, fitting or Fitting()
        config = model.config
        self.channels = int(config.in_channels)
        factor = 2 ** (len(config.channel_multiplier) - 1)
        if size % factor:
            raise DataError(
                f"image tokenizer: {type(model).__name__} shrinks by {factor}, which does not divide {size} pixels",
                remedy="set data.prepare.image.size to a multiple",
            )
        self.grid = (size // factor, size // factor)
        patches = getattr(config, "num_patches", self.grid[0])
        if patches != self.grid[0]:
            raise DataError(
                f"image tokenizer: {type(model).__name__} makes {patches} x {patches} codes of images of "
                f"{patches * factor} pixels, but the size is {size}",
                remedy=f"set data.prepare.image.size to {patches * factor}",
            )
        self.vocab_size = int(getattr(config, "num_embeddings", None) or config.codebook_size)
        self._mean, self._std = mean, std
        self._digest = ""
        self._device, self._batch = torch.device("cpu"), _BATCH

    def use_device(self, number: int) -> None:
        """Compute on a CUDA device from now on, in larger batches.

        Products stay in fp32 (no TF32) and kernels deterministic, so that codes are those of the CPU except where two
        entries of the codebook are equally near up to rounding.

        Args:
            number: of this process among those that share the devices of the machine.

        Raises:
            ConfigError: there is no device.
        """
        where = device.numbered(number)
        stopwatch.full_precision()
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self._place(where, batch=gpu_batch(self.size))

    def _place(self, where: torch.device, *, batch: int) -> None:
        self._device, self._batch = where, batch
        self.model = self.model.to(where)

    @classmethod
    def from_pretrained(cls, path: Path, *, size: int, channels: int, fitting: Fitting | None = None) -> VQTokenizer:
        """Read the model from a local folder of `save_pretrained`: the VQ-VAE alone, or a whole Janus or Emu3 model.

        Pixel normalisation comes from preprocessor_config.json if there is one, otherwise pixels are mapped to -1..1.

        Raises:
            DataError: the folder is missing, holds another model or incomplete weights.
        """
        remedy = "name a local folder of a JanusVQVAE, Emu3VQVAE or ChameleonVQVAE in data.prepare.image.path"
        try:
            model_type = bounded.read_object(path / "config.json").get("model_type")
        except (OSError, ValueError) as error:
            raise DataError(f"image tokenizer: {path} is not a model folder: {error}", remedy=remedy) from error
        name = _CLASSES.get(str(model_type)) or _WHOLE.get(str(model_type))
        if name is None:
            raise DataError(f"image tokenizer: {path} holds a model of type {model_type!r}", remedy=remedy)
        try:
            transformers = importlib.import_module("transformers")
            model_class = getattr(transformers, name)
        except ModuleNotFoundError as error:
            raise DataError("image tokenizer: kind vq needs transformers", remedy="pip install transformers") from error
        try:
            with _quiet():
                whole = None  # use the whole model's configuration, because Janus computes the number of patches there
                if model_type in _WHOLE:
                    whole = transformers.AutoConfig.from_pretrained(path, local_files_only=True).vq_config
                model, report = model_class.from_pretrained(
                    path,
                    config=whole,
                    local_files_only=True,
                    output_loading_info=True,
                    dtype=torch.float32,
                    key_mapping=_PART if whole is not None else None,
                )
                if whole is not None:  # remove the name mapping, which transformers would invert when saving
                    weights = model.state_dict()
                    model = model_class(whole)
                    model.load_state_dict(weights)
        except Exception as error:  # transformers and safetensors raise their own kinds
            raise DataError(f"image tokenizer: {path} cannot be loaded: {error}", remedy=remedy) from error
        # transformers initialises missing weights randomly and only warns
        if report["missing_keys"] or report.get("mismatched_keys"):
            missing = sorted(report["missing_keys"]) or sorted(map(str, report["mismatched_keys"]))
            raise DataError(f"image tokenizer: {path} lacks weights such as {missing[0]}", remedy=remedy)
        if model.config.in_channels != channels:
            raise DataError(
                f"image tokenizer: {path} takes {model.config.in_channels} channels, the configuration says {channels}",
                remedy=f"set data.prepare.image.channels to {model.config.in_channels}",
            )
        mean, std = _normalisation(path, channels)
        return cls(model, size=size, mean=mean, std=std, fitting=fitting)

    @property
    def tokens_per_item(self) -> int:
        """Tokens of an image."""
        return int(self.grid[0] * self.grid[1])

    @torch.inference_mode()
    def encode(self, images_nHWC: Pixels) -> Codes:
        """Images uint8 [n, H, W, C] to codes int64 [n, T]."""
        starts = range(0, len(images_nHWC), self._batch)
        pieces = [self._encode(images_nHWC[start : start + self._batch]) for start in starts]
        return np.concatenate(pieces) if pieces else np.zeros((0, self.tokens_per_item), np.int64)

    def _encode(self, images_nHWC: Pixels) -> Codes:
        n = len(images_nHWC)
        # Convolutions may sum in another order for another batch size. The batch is padded, so that an image's codes do
        # not depend on the other images.
        filled = np.zeros((self._batch, *images_nHWC.shape[1:]), np.uint8)
        filled[:n] = images_nHWC
        codes = self._codes(torch.from_numpy(filled).to(self._device))
        return codes.reshape(self._batch, -1)[:n].cpu().numpy().astype(np.int64)

    def _codes(self, images_nHWC: Tensor) -> Tensor:
        """A batch of images uint8 to codes, on the device."""
        pixels = images_nHWC.permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - self._column(self._mean)) / self._column(self._std)
        if type(self.model).__name__ == "Emu3VQVAE":
            sizes = torch.tensor([[self.size, self.size]] * len(pixels))
            return torch.stack(list(self.model.encode(pixels, sizes).image_tokens))
        return self.model.encode(pixels).image_tokens

    @torch.inference_mode()
    def decode(self, codes_nT: Codes) -> Pixels:
        """Codes int [n, T] to images uint8 [n, H, W, C].

        Raises:
            DataError: the class has no decoder (ChameleonVQVAE).
        """
        if not hasattr(self.model, "decode"):
            raise DataError(
                f"image tokenizer: transformers' {type(self.model).__name__} has no decoder, its codes cannot be drawn",
                remedy="use JanusVQVAE or Emu3VQVAE to draw images",
            )
        drawn = []
        for start in range(0, len(codes_nT), _BATCH):
            some = np.ascontiguousarray(codes_nT[start : start + _BATCH], dtype=np.int64)
            codes = torch.from_numpy(some).to(self._device)
            if type(self.model).__name__ == "Emu3VQVAE":
                codes = codes.reshape(-1, *self.grid)
            pixels = self.model.decode(codes)
            pixels = pixels[:, 0] if pixels.ndim == 5 else pixels  # Emu3 returns frames
            pixels = (pixels * self._column(self._std) + self._column(self._mean)).clamp(0, 1) * 255
            drawn.append(pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(drawn)

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, device=self._device).view(1, -1, 1, 1)

    def _settings(self) -> dict[str, Any]:
        own = {"kind": self.kind, "size": self.size, "channels": self.channels, "mean": self._mean, "std": self._std}
        return own | self.fitting.changed()

    def fingerprint(self) -> str:
        """Hash of the class, the settings and every weight."""
        if not self._digest:
            digest = hashlib.sha256(json.dumps([type(self.model).__name__, self._settings()]).encode())
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
            self._digest = digest.hexdigest()[:16]
        return self._digest

    def save(self, folder: Path) -> None:
        """Write settings and model, so that the data set does not need the original folder.

        Raises:
            DataError: the model could not be written.
        """
        write_settings(folder, self._settings())
        try:
            with _quiet():
                self.model.save_pretrained(folder / _MODEL)
                apply_umask(folder / _MODEL)
        except Exception as error:  # safetensors reports a full disk as its own kind
            raise DataError(
                f"data: {folder / _MODEL} could not be written: {error}", remedy="free some space and run it again"
            ) from error

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> VQTokenizer:
        """Read what `save` wrote; `settings` are the content of its settings file."""
        loaded = cls.from_pretrained(folder / _MODEL, size=settings["size"], channels=settings["channels"])
        own = {key: settings[key] for key in ("size", "mean", "std")}
        return cls(loaded.model, **own, fitting=Fitting.of(settings))


def gpu_batch(size: int) -> int:
    """Images of a forward pass on a GPU.

    Args:
        size: edge of the images [pixels].
    """
    return max(_BATCH, min(_MOST_GPU_BATCH, _GPU_BATCH * 512**2 // size**2))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers, which draws a progress bar for every file in every worker, and lists unused weights."""
    # Imported here, because transformers may be missing where this module is imported.
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def _normalisation(path: Path, channels: int) -> tuple[list[float], list[float]]:
    file = path / "preprocessor_config.json"
    settings = bounded.read_object(file) if file.is_file() else {}
    mean, std = (settings.get(key) or [0.5] * channels for key in ("image_mean", "image_std"))
    return [float(value) for value in mean], [float(value) for value in std]

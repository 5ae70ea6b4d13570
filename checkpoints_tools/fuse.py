"""Fuses a text model and an image model of one shape (JAM, arXiv 2309.15564).

As a Mixture-of-Transformers (arXiv 2411.04996): the weights of every layer become those of the text modality, or of
the other ones. Embedding and output layer have rows of each model by id. A sequence of text tokens alone then has
exactly the text model's hidden states and logits of text ids, and a sequence of image tokens alone those of the image
model. The FLOPs are those of one model. Or as the mean of all weights, JAM's uniform baseline.

The result is a checkpoint of step 0 with weights only.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.average import Mean, check_alike
from checkpoints_tools.fused_settings import ONE_CONFIGURATION, check_dense, fused_settings, fused_tokenizers
from checkpoints_tools.huggingface import from_hf
from checkpoints_tools.new_run import NewRun
from checkpoints_tools.refusals import HF_CONFIG, Named, check_fuse
from checkpoints_tools.sources import open_source, summary
from mmscale.checkpoint import rewrite
from mmscale.checkpoint.settings import config_of
from mmscale.checkpoint.tensors import OPTIMIZER, Region, TensorEntry, TensorSource, origin_of, unknown_tensor
from mmscale.config import Config
from mmscale.errors import shell_command
from mmscale.layers import LayerTensor, TensorPart, model_tensors
from mmscale.runtime.environment import code_version
from mmscale.train.learned_data import made_from


def fuse(text: Named, image: Named, out: Path, *, average: bool = False, steps: int | None = None) -> dict[str, Any]:
    """Write the fused model as the checkpoint of a new run.

    Args:
        text: the model of the first modality: a run and step, an archive, or a Hugging Face folder (step None).
        image: the model of all other modalities.
        out: the folder of the new run.
        average: the mean of all weights instead of a Mixture-of-Transformers.
        steps: `train.steps` of the new run; None: the text model's.

    Returns:
        A summary of the new checkpoint, and `fused` (how), `steps` and `next`.

    Raises:
        UsageError: both names are the same.
        CheckpointError: one is missing or damaged, or not of a dense model without Mixture-of-Depths; shapes,
            vocabularies or tokenizers differ; `out` has checkpoints.
        ConfigError: the new model breaks a rule between settings.
    """
    check_fuse(text, image, out, average=average, steps=steps)
    with _opened(text) as one, _opened(image) as other:
        check_alike(one, other, remedy=ONE_CONFIGURATION)
        tokenizers = fused_tokenizers(one, other)
        old = config_of(one.info(), where=one.path)
        check_dense(old, one)
        new = fused_settings(old, config_of(other.info(), where=other.path), untie=not average, steps=steps)
        weights = Mean([one, other], [0.5, 0.5]) if average else FusedWeights(one, other, new)
        how = "average" if average else "Mixture-of-Transformers"
        origin = origin_of("fuse", [one, other], fused=how)
        for parent, (path, _) in zip(origin["parents"], (text, image), strict=True):
            parent["path"] = str(path)  # not that of an imported export
        made = rewrite.into_run(
            FusedBeginning(weights, new, tokenizers, made_from(one.info(), other.info())),
            out,
            origin=origin,
            weights=True,
            code_version=code_version(),
        )
    data = () if new.data.path or new.data.blend else ("data.path=DATA",)
    return summary(made) | {
        "fused": how,
        "steps": new.train.steps,
        "next": shell_command("train", out / "config.yaml", "checkpoint.allow_missing=true", *data),
    }


@contextlib.contextmanager
def _opened(named: Named) -> Iterator[TensorSource]:
    """The tensors of a run, an archive or a Hugging Face folder; the latter is imported for the time being."""
    path, step = named
    if not (path / HF_CONFIG).is_file():
        yield open_source(path, step)
        return
    with tempfile.TemporaryDirectory(prefix=f"{path.name}-") as folder:
        from_hf.import_(path, Path(folder) / "run")
        yield open_source(Path(folder) / "run", 0)


class FusedWeights:
    """The weights of the Mixture-of-Transformers, made as they are read.

    Args:
        text: of the first modality's model.
        image: of the others'.
        new: configuration of the fused model.
    """

    def __init__(self, text: TensorSource, image: TensorSource, new: Config) -> None:
        self.path = text.path
        self._text, self._image = text, image
        self._first, (_, self._begin) = new.vocab.names[0], new.vocab.ranges[0]
        self._tensors = {tensor.name: tensor for tensor in model_tensors(new)}

    def names(self, *, weights: bool = False) -> list[str]:
        """Names of all weights, sorted; there is no optimizer."""
        return sorted(self._tensors)

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a weight."""
        if name not in self._tensors:
            raise unknown_tensor(name, self.names(), where=self.path)
        tensor = self._tensors[name]
        return TensorEntry(name, tensor.shape, self._text.entry(self._tied(tensor)).dtype)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A weight, or a box of it."""
        tensor, tied = self._tensors[name], self._tied(self._tensors[name])
        whole = (self._text if tensor.modality in (None, self._first) else self._image).read(tied)
        if tensor.part in (TensorPart.EMBEDDING, TensorPart.OUTPUT):
            # Rows of the text model up to its last id, then those of the image model.
            whole = torch.cat((self._text.read(tied)[: self._begin], self._image.read(tied)[self._begin :]))
        return whole if region is None else whole[tuple(region)].clone()

    def objects(self) -> dict[str, bytes]:
        """Serialized objects of the text model, without those of linears that are untied."""
        gone = [f".{t.name.rpartition('.')[0].partition('layers.')[2].partition('.')[2]}." for t in self._untied()]
        return {name: value for name, value in self._text.objects().items() if not any(one in name for one in gone)}

    def _untied(self) -> list[LayerTensor]:
        return [tensor for tensor in self._tensors.values() if tensor.untied]

    def _tied(self, tensor: LayerTensor) -> str:
        """The name that a weight has in both models."""
        return f"{tensor.name.removesuffix(f'.{tensor.modality}')}.weight" if tensor.untied else tensor.name


class FusedBeginning(NewRun):
    """A run that has not begun, with some weights (a `TensorSource`).

    Args:
        weights: of the model.
        config: of the new run.
        tokenizers: fingerprints of the tokenizers that the weights belong to.
        learned: metadata about the data that they were trained on.
    """

    def __init__(
        self, weights: FusedWeights | Mean, config: Config, tokenizers: dict[str, str], learned: dict[str, Any]
    ) -> None:
        super().__init__(weights.path, config, tokenizers)
        self._weights, self._learned = weights, learned
        self.entry, self.read, self.objects = weights.entry, weights.read, weights.objects

    def info(self) -> dict[str, Any]:
        """As of every new run, and what the weights were trained on."""
        return super().info() | self._learned

    def names(self, *, weights: bool = False) -> list[str]:
        """Names of the weights; there is nothing else."""
        return [name for name in self._weights.names(weights=True) if not name.startswith(OPTIMIZER)]

"""Weights of dense models saved by torchtitan or Megatron-LM, under the names of a Hugging Face folder.

Both write torch.distributed.checkpoint's format. The folder must also have the model's config.json and tokenizer.json,
which the two programs do not save. Only tensors of the model are read; the pickled index is read by a strict reader,
and pickled objects are never opened.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from checkpoints_tools.huggingface.foreign import KINDS, refuse_others
from mmscale.checkpoint import integrity, tensor_index, torch_files
from mmscale.checkpoint.tensors import ReadInto
from mmscale.errors import CheckpointError

INDEX = ".metadata"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_AGAIN = "copy the folder again, or save the model again"
_LAYER = re.compile(r"^(layers|decoder\.layers)\.(\d+)\.")
# Tensors that are not weights: training state, and rotary angles that follow from config.json.
_BESIDE = re.compile(
    r"^(chained_\d+\.)?(optimizer|optim|lr_scheduler|opt_param_scheduler|train_state|dataloader|rng_state|"
    r"rerun_state_machine_state)(\.|$)|^(model\.)?(freqs_cis|rope_cache|rotary_pos_emb\.inv_freq)$"
)


@dataclass(frozen=True)
class Origin:
    """The origin of one tensor of the model.

    Attributes:
        name: in the checkpoint.
        take: computes the model's tensor from the stored one; works on the device 'meta' too.
        layer: index of the layer if the stored tensor holds all layers [L, ...]; `take` gets this layer only. None: it
            holds one.
    """

    name: str
    take: Callable[[Tensor], Tensor] = lambda stored: stored
    layer: int | None = None


class DcpFiles:
    """The weights of a folder by the names of transformers; as `ModelFiles`.

    Args:
        folder: with `.metadata` and its files.
        content: config.json of the model.

    Raises:
        CheckpointError: config.json is of a model that cannot be imported, the index cannot be read, the names are
            those of neither program, or some tensors do not belong to the model.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        refuse_others(content)
        # The parts of a fused tensor are read shortly after one another, alternating between weights and biases.
        self._load_fused = functools.lru_cache(maxsize=2)(self._load)
        self.folder = folder
        self._index = tensor_index.read(folder)
        self._reader = FileSystemReader(folder)
        self._reader.storage_data = self._index.storage_data
        entries = self._index.state_dict_metadata.items()
        self._stored = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
        number = _Numbers.of(content)
        for program, (sign, origins) in PROGRAMS.items():
            prefix = next((name.removesuffix(sign) for name in self._stored if name in (sign, f"model.{sign}")), None)
            if prefix is not None:
                self.program = program
                self._origins = {
                    name: replace(origin, name=prefix + origin.name)
                    for name, origin in origins(number, frozenset(name.removeprefix(prefix) for name in self._stored))
                }
                self._parts: defaultdict[tuple[str, int | None], list[str]] = defaultdict(list)
                for name, origin in self._origins.items():
                    self._parts[origin.name, origin.layer].append(name)
                self._refuse_more_layers(number)
                self._refuse_unnamed(number)
                return
        raise CheckpointError(
            f"{folder} holds tensors of neither {' nor '.join(PROGRAMS)}: {', '.join(sorted(self._stored)[:3])}",
            remedy="name a checkpoint of a dense model that one of them has saved",
        )

    def _refuse_more_layers(self, number: _Numbers) -> None:
        """Refuse a checkpoint with more layers than config.json, because the others would be dropped."""
        layers = {int(found[2]) for name in self._stored if (found := _LAYER.match(name.removeprefix("model.")))}
        stacked = {entry.size[0] for name, entry in self._stored.items() if entry.size and _STACKED.match(name)}
        for count in ({max(layers) + 1} if layers else set()) | stacked:
            if count > number.layers:
                raise CheckpointError(
                    f"{self.folder} holds {count} layers, config.json says {number.layers}",
                    remedy="put the model's own config.json into the folder",
                )

    def _refuse_unnamed(self, number: _Numbers) -> None:
        """Refuse weights from which no tensor of the model is computed, because the model would differ without them."""
        named = {origin.name for origin in self._origins.values()}
        unnamed = sorted(name for name in self._stored if name not in named and not _BESIDE.match(name))
        if unnamed:
            raise CheckpointError(
                f"{self.folder} holds tensors that a dense {number.kind} model of {self.program} does not have: "
                f"{integrity.describe(unnamed)}",
                remedy="put the model's own config.json into the folder, or choose a dense Qwen3, Qwen2 or Llama model",
            )

    def names(self) -> set[str]:
        """Names of the model's tensors that the checkpoint contains."""
        return {name for name, origin in self._origins.items() if origin.name in self._stored}

    def file(self, name: str) -> Path:
        """The file to name in errors about a tensor."""
        return self.folder / INDEX

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; nothing is read.

        Raises:
            CheckpointError: there is no such tensor.
        """
        stored = torch.empty(self._box(name).sizes, dtype=self.dtype(name), device="meta")
        return tuple(self._taken(name, stored).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements.

        Raises:
            CheckpointError: there is no such tensor, or its type is not supported for weights.
        """
        found = self._entry(name).properties.dtype
        if found not in _TYPES:
            raise CheckpointError(
                f"{self.folder}: {self._origins[name].name} is of type {found}", remedy="save the model's own weights"
            )
        return found

    def read(self, name: str) -> Tensor:
        """A tensor of the model.

        Raises:
            CheckpointError: it cannot be read.
        """
        self._entry(name)
        parts = self._parts[self._origins[name].name, self._origins[name].layer]
        if len(parts) == 1:
            return self._taken(name, self._load(name)).contiguous()
        return self._taken(name, self._load_fused(parts[0])).clone(memory_format=torch.contiguous_format)

    def _box(self, name: str) -> ChunkStorageMetadata:
        """The part of the stored tensor that belongs to one of the model: all of it, or a layer [1, ...]."""
        size, layer = self._entry(name).size, self._origins[name].layer
        if layer is None:
            return ChunkStorageMetadata(torch.Size([0] * len(size)), size)
        if not size or layer >= size[0]:
            raise self._misfit(name, size)
        return ChunkStorageMetadata(torch.Size([layer] + [0] * (len(size) - 1)), torch.Size([1, *size[1:]]))

    def _load(self, name: str) -> Tensor:
        """The box of a tensor, from the files."""
        entry, stored_name, box = self._entry(name), self._origins[name].name, self._box(name)
        stored = torch.empty(box.sizes, dtype=self.dtype(name))
        items = create_read_items_for_chunk_list(stored_name, entry, [box])
        if sum(item.lengths.numel() for item in items) != stored.numel():
            raise CheckpointError(f"{self.folder / INDEX} does not say where all of {stored_name} is", remedy=_AGAIN)
        try:
            with torch_files.weights_only():
                self._reader.read_data(LoadPlan(items), ReadInto(stored)).wait()
        except Exception as error:  # torch may raise any exception on a damaged file
            first = (str(error).strip().splitlines() or [""])[0]
            raise CheckpointError(
                f"{self.folder} cannot be read: {type(error).__name__}: {first}", remedy=_AGAIN
            ) from None
        return stored

    def _entry(self, name: str) -> TensorStorageMetadata:
        origin = self._origins.get(name)
        if origin is None or origin.name not in self._stored:
            raise CheckpointError(
                f"{self.folder} has no tensor {name if origin is None else origin.name}",
                remedy="it is not the model of its config.json",
            )
        return self._stored[origin.name]

    def _taken(self, name: str, stored: Tensor) -> Tensor:
        """The model's tensor, computed from the box."""
        origin = self._origins[name]
        try:
            return origin.take(stored if origin.layer is None else stored[0])
        except (RuntimeError, IndexError):
            raise self._misfit(name, stored.shape) from None

    def _misfit(self, name: str, shape: torch.Size) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: {self._origins[name].name} {list(shape)} does not fit config.json",
            remedy="put the model's own config.json into the folder",
        )


@dataclass(frozen=True)
class _Numbers:
    """The values of config.json that names and shapes depend on.

    Attributes:
        kind: model_type.
        qk_norm, qkv_bias: as the settings of that name.
        layers, heads, groups, width: of the model; groups are key/value heads, width is that of a head.
        rows: of the vocabulary, without padding.
    """

    kind: str
    qk_norm: bool
    qkv_bias: bool
    layers: int
    heads: int
    groups: int
    width: int
    rows: int

    @classmethod
    def of(cls, content: dict[str, Any]) -> _Numbers:
        """The values of a config.json that `refuse_others` has accepted."""
        heads = content["num_attention_heads"]
        return cls(
            kind=content["model_type"],
            **KINDS[content["model_type"]],
            layers=content["num_hidden_layers"],
            heads=heads,
            groups=content.get("num_key_value_heads") or heads,
            width=content.get("head_dim") or content["hidden_size"] // heads,
            rows=content["vocab_size"],
        )


Named = Iterator[tuple[str, Origin]]
_ROTATES_NEIGHBOURS = frozenset({"llama"})  # kinds for which torchtitan rotates neighbouring channels of a head


def _torchtitan(number: _Numbers, there: frozenset[str]) -> Named:
    """Names of torchtitan.

    Llama (torchtitan/models/llama3) rotates neighbouring channels; Qwen3 rotates halves as here.
    """

    def rotated(heads: int) -> Callable[[Tensor], Tensor]:
        if number.kind not in _ROTATES_NEIGHBOURS:
            return lambda stored: stored

        def take(stored: Tensor) -> Tensor:
            inner = stored.shape[1:]
            pairs = stored.view(heads, number.width // 2, 2, *inner)
            return pairs.transpose(1, 2).reshape(heads * number.width, *inner)

        return take

    yield "model.embed_tokens.weight", Origin("tok_embeddings.weight")
    for layer in range(number.layers):
        here, target = f"layers.{layer}.", f"model.layers.{layer}."
        for one, heads in (("q", number.heads), ("k", number.groups)):
            yield f"{target}self_attn.{one}_proj.weight", Origin(f"{here}attention.w{one}.weight", rotated(heads))
            if number.qk_norm:
                yield f"{target}self_attn.{one}_norm.weight", Origin(f"{here}attention.{one}_norm.weight")
        for ours, theirs in (
            ("self_attn.v_proj", "attention.wv"),
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            yield f"{target}{ours}.weight", Origin(f"{here}{theirs}.weight")
    yield "model.norm.weight", Origin("norm.weight")
    yield "lm_head.weight", Origin("output.weight")


_STACKED = re.compile(r"^(model\.)?decoder\.layers\.(self_attention|mlp)\.")


def _megatron(number: _Numbers, there: frozenset[str]) -> Named:
    """GPTModel's names, with separate tensors for layers, or one with a leading axis [L, ...] for all of them."""
    stacked = any(_STACKED.match(name) for name in there)

    def origin(layer: int, *names: str, take: Callable[[Tensor], Tensor] = lambda stored: stored) -> Origin:
        """The first of some names that the checkpoint has. Transformer-Engine's linears include the norm before."""
        here = "decoder.layers." if stacked else f"decoder.layers.{layer}."
        name = next((here + name for name in names if here + name in there), here + names[0])
        return Origin(name, take, layer if stacked else None)

    def part(which: slice, heads: int) -> Callable[[Tensor], Tensor]:
        """Query, key or value heads of the fused projection, which is ordered by key/value heads."""

        def take(fused: Tensor) -> Tensor:
            inner = fused.shape[1:]
            return fused.view(number.groups, -1, number.width, *inner)[:, which].reshape(heads * number.width, *inner)

        return take

    def rows(stored: Tensor) -> Tensor:
        return stored[: number.rows]

    yield "model.embed_tokens.weight", Origin("embedding.word_embeddings.weight", rows)
    parts = (
        ("q", slice(None, -2), number.heads),
        ("k", slice(-2, -1), number.groups),
        ("v", slice(-1, None), number.groups),
    )
    for layer in range(number.layers):
        target = f"model.layers.{layer}."
        for kind in ("weight", "bias") if number.qkv_bias else ("weight",):
            for one, which, heads in parts:
                fused = origin(layer, f"self_attention.linear_qkv.{kind}", take=part(which, heads))
                yield f"{target}self_attn.{one}_proj.{kind}", fused
        yield f"{target}self_attn.o_proj.weight", origin(layer, "self_attention.linear_proj.weight")
        if number.qk_norm:
            for one in "qk":
                yield f"{target}self_attn.{one}_norm.weight", origin(layer, f"self_attention.{one}_layernorm.weight")
        for place, half in (("gate", 0), ("up", 1)):
            take = _half(half)
            yield f"{target}mlp.{place}_proj.weight", origin(layer, "mlp.linear_fc1.weight", take=take)
        yield f"{target}mlp.down_proj.weight", origin(layer, "mlp.linear_fc2.weight")
        for ours, own, fused_name in (
            ("input_layernorm", "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            ("post_attention_layernorm", "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ):
            yield f"{target}{ours}.weight", origin(layer, own, fused_name)
    yield "model.norm.weight", Origin("decoder.final_layernorm.weight")
    yield "lm_head.weight", Origin("output_layer.weight", rows)


def _half(which: int) -> Callable[[Tensor], Tensor]:
    return lambda stored: stored.chunk(2)[which]


# For each program, a tensor that all of its models have, and the names of its tensors.
PROGRAMS: dict[str, tuple[str, Callable[[_Numbers, frozenset[str]], Named]]] = {
    "torchtitan": ("tok_embeddings.weight", _torchtitan),
    "Megatron-LM": ("embedding.word_embeddings.weight", _megatron),
}

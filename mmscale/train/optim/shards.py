"""Saves the distributed optimizer's state without gathering: every data-parallel rank writes the part that it owns.

megatron-core's `fully_reshardable` format gathers master weights and moments of all ranks on every rank before a save:
12 bytes per parameter through the network while training waits. Here the same tensors are described as boxes of each
rank's own part (boxes.py), so nothing is sent. Names, shapes and values on disk are the same. megatron-core's code
loads them; stored_moments.py does if moments are compact in the checkpoint or in this run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from mmscale.checkpoint.tensors import TensorEntry
from mmscale.tables.settings import MOMENTS as MOMENT_FORMATS
from mmscale.train.optim.adam import require_slow_start
from mmscale.train.optim.adam_compact import MOMENTS, CompactAdam, ShardPlace
from mmscale.train.optim.boxes import boxes_of
from mmscale.train.optim.matrix_exchange import exchanges_of
from mmscale.train.optim.matrix_layout import MatrixLayout
from mmscale.train.optim.muon import Muon
from mmscale.train.optim.stored_moments import MomentReader, cell_of, moment_boxes, stores_others

PREFIX = "optimizer.state"
_MAIN = "param"
_LEAST_CELL = 8  # elements; with smaller cells the scales would make a checkpoint larger than with fp32 moments


class ShardwiseOptimizer(DistributedOptimizer):
    """megatron-core's distributed optimizer, saving without communication; an instance is made by `save_shardwise`.

    Attributes:
        stored: the tensors of the checkpoint that is going to be read; None: unknown, moments are assumed to be stored
            as they are here.
    """

    stored: Mapping[str, TensorEntry] | None = None
    _reader: MomentReader | None = None
    # The tensors that `_reader` fills, by parameter; assigned as a whole, never modified.
    _taken: Mapping[Tensor, Mapping[str, Tensor]] = {}

    def sharded_state_dict(
        self,
        model_sharded_state_dict: ShardedStateDict = {},  # noqa: B006  as megatron-core has it
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """As megatron-core's method, which would create fp32 moments before reading any."""
        if is_loading and isinstance(self.optimizer, CompactAdam):
            self.optimizer.initialize()
        return super().sharded_state_dict(model_sharded_state_dict, is_loading, sharding_type, metadata)

    def sharded_param_state_fully_reshardable(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict | None:
        """This rank's part of master weights and moments, as boxes of the global tensors.

        Args:
            model_sharded_state_dict: describes the place of each parameter in its global tensor.
            is_loading: if moments are fp32 here and in the checkpoint, megatron-core's own method is used, with which
                every rank reads complete parameters.
            metadata: how megatron-core names and splits state.
        """
        self._reader, self._taken = None, {}
        if is_loading and not self._small:
            return super().sharded_param_state_fully_reshardable(model_sharded_state_dict, is_loading, metadata)
        sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        places = {entry.data: entry for entry in nested_values(sharded)}
        state: dict[str, ShardedTensor] = {}
        if is_loading:
            self._reader = MomentReader(PREFIX, self.stored)
        for parameter, start, end in self._owned():
            pieces = list(boxes_of(places[parameter], parameter, start, end))
            tensors = self._get_main_param_and_optimizer_states(parameter)
            found: list[ShardedTensor] = []
            place, cell = self._place(parameter), self._cell(parameter)
            if self._reader is not None:
                main, moments = self._targets(parameter)
                found = self._reader.ask(pieces, main, moments, place, cell=cell)
            else:
                found += [piece.shard(f"{PREFIX}.{_MAIN}", tensors[_MAIN].detach().view(-1)) for piece in pieces]
                for moment in place.moments:
                    found += moment_boxes(PREFIX, moment, pieces, tensors, place, cell=cell)
            state |= {str(len(state) + number): box for number, box in enumerate(found)}
        if self._reader is not None and self._reader.restarted:
            require_slow_start(self.optimizer.param_groups[0]["betas"])
        return state

    def load_parameter_state_from_fully_reshardable(self, state_dict: dict[Any, Any]) -> None:
        """Copy the tensors that were read into the optimizer."""
        if self._reader is None:
            super().load_parameter_state_from_fully_reshardable(state_dict)
            return
        self._reader.take([state_dict[str(number)] for number in range(len(state_dict))])
        with torch.no_grad():
            for parameter, tensors in self._taken.items():
                self._set_main_param_and_optimizer_states(parameter, tensors)
        self._reader, self._taken = None, {}

    def _targets(self, parameter: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The tensors into which the master weights and moments of this rank's part are read.

        Only for CompactAdam are these the optimizer's own tensors. megatron-core replaces the state of all other
        optimizers before it copies loaded tensors, and Transformer-Engine's Adam has its own representation. For those,
        fp32 copies are read, and `_set_main_param_and_optimizer_states` copies them into the optimizer.
        """
        main = self._main(parameter)
        if isinstance(self.optimizer, CompactAdam):
            return main, self.optimizer.state[main]
        made = {name: torch.empty_like(main, dtype=torch.float32) for name in (_MAIN, *MOMENTS)}
        self._taken = {**self._taken, parameter: made}
        return made[_MAIN], made

    @property
    def _small(self) -> bool:
        return isinstance(self.optimizer, CompactAdam) or (
            self.stored is not None and stores_others(PREFIX, self.stored)
        )

    def _owned(self) -> Iterator[tuple[Tensor, int, int]]:
        """Every parameter of which this rank owns a part, with the flat range [start, end) of that part."""
        for buckets in self.gbuf_ranges:
            for by_bucket in buckets.values():
                for bucket in by_bucket:
                    for parameter, ranges in bucket["param_map"].items():
                        yield parameter, ranges["param"].start, ranges["param"].end

    def _main(self, parameter: Tensor) -> Tensor:
        group, order = self.model_param_group_index_map[parameter]
        main: Tensor = self.optimizer.param_groups[group]["params"][order]
        return main

    def _place(self, parameter: Tensor) -> ShardPlace:
        inner = self.optimizer
        return inner.place(self._main(parameter)) if isinstance(inner, CompactAdam) else ShardPlace()

    def _cell(self, parameter: Tensor) -> int:
        """Number of elements that always share a scale, wherever ranks' parts of this parameter begin.

        The same on all ranks.
        """
        buffer, _, bucket = self.model_param_gbuf_map[parameter]
        data: Tensor = self.buffers[buffer].buckets[bucket].grad_data
        return cell_of(parameter.shape, shard=data.numel() // self.data_parallel_group.size())

    def place_shards(self) -> None:
        """Tell the optimizer of this rank's shards the place of each shard in its parameter."""
        inner = self.optimizer
        if not isinstance(inner, CompactAdam):
            return
        for parameter, start, _ in self._owned():
            small = parameter.ndim >= 2 and (
                not MOMENT_FORMATS[inner.moments].in_groups or self._cell(parameter) >= _LEAST_CELL
            )
            inner.places[self._main(parameter)] = ShardPlace.at(start, inner.compact if small else None)

    def hold_matrices(self, layouts: Mapping[Tensor, MatrixLayout], tensor_parallel: ProcessGroup) -> None:
        """Give Muon the matrices of all ranks and this rank's shards of them.

        Args:
            layouts: of the parameters that Muon updates.
            tensor_parallel: the ranks that share these parameters.
        """
        assert isinstance(self.optimizer, Muon)
        exchanges = exchanges_of(self, layouts, tensor_parallel)
        owned = [parameter for exchange in exchanges for parameter in exchange.parameters]
        self.optimizer.hold(exchanges, {parameter: self._main(parameter) for parameter in owned})


def save_shardwise(optimizer: MegatronOptimizer) -> list[ShardwiseOptimizer]:
    """Make every distributed optimizer in it save its own shards, without gathering.

    Returns:
        Those that have parameters on this rank.
    """
    found = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if type(part) is DistributedOptimizer:
            # Get_megatron_optimizer always creates its own class; ours differs in methods only.
            part.__class__ = ShardwiseOptimizer
            if not part.is_stub_optimizer:
                part.place_shards()
                found.append(part)
    return found


def expect(optimizer: MegatronOptimizer, stored: Mapping[str, TensorEntry] | None) -> None:
    """Set the tensors of the checkpoint that will be read, so that moments of any type can be converted."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, ShardwiseOptimizer):
            part.stored = stored

"""Records the tokens that experts and depth layers choose, and repeats the choices in another run.

Used for comparing layouts. In bf16 another order of summation changes hidden states in the last of 8 bits, and with
them the logits of routers. Of two tokens with close logits the other one may then be chosen, and its gradients are
those of a different token. If the second run repeats the choices of the first, only rounding differences remain. The
number of choices that the second run would have made differently is counted.

Shapes: S tokens of a sequence, B sequences of the micro-batch, E experts of a group, K tokens of a depth layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path

import torch
from torch import Tensor

from mmscale.model.ranking import Ranking
from mmscale.model.routing import Selection, chosen_by


class Choices:
    """The choices of one step, in one file for each micro-batch.

    Args:
        folder: where the files are.
        repeat: repeat the recorded choices; otherwise record.

    Attributes:
        compared: number of tokens that were chosen in the recorded run, in the micro-batches that this rank has
            processed.
        differing: number of those that this run would not have chosen.
    """

    def __init__(self, folder: Path, *, repeat: bool) -> None:
        self._folder, self._repeat = folder, repeat
        self._kept: dict[int, dict[Hashable, Tensor]] = {}
        self._counts: dict[tuple[int, Hashable], tuple[int, int]] = {}

    @property
    def compared(self) -> int:
        """Chosen tokens that were compared; see the class."""
        return sum(chosen for chosen, _ in self._counts.values())

    @property
    def differing(self) -> int:
        """Compared tokens that this run would not have chosen; see the class."""
        return sum(missed for _, missed in self._counts.values())

    def save(self) -> None:
        """Write the recorded choices."""
        assert not self._repeat
        self._folder.mkdir(parents=True)
        for micro_batch, kept in self._kept.items():
            torch.save(kept, self._file(micro_batch))

    def experts(
        self,
        choose: Callable[[Ranking], Selection],
        rank: Ranking,
        *,
        shape: torch.Size,
        micro_batch: int,
        place: Hashable,
    ) -> Selection:
        """The choice of a group of experts.

        Args:
            choose: returns the choice for a ranking function.
            rank: this run's own ranking function.
            shape: [S, B, E].
            micro_batch: number of the micro-batch, the same under every layout.
            place: identifies the choice within the micro-batch: layer and group.
        """
        own = choose(rank)
        taken = chosen_by(own, shape[0] * shape[1]).view(shape)
        kept = self._recorded(taken, micro_batch, place)
        return own if kept is None else choose(lambda _: kept.float())

    def tokens(self, taken: Tensor, *, micro_batch: int, place: Hashable) -> Tensor:
        """The choice of the tokens of a group (token choice): [S, B, E] bool, before any are dropped."""
        kept = self._recorded(taken, micro_batch, place)
        return taken if kept is None else kept

    def depth(self, index: Tensor, length: int, *, micro_batch: int, place: Hashable) -> Tensor:
        """The choice of a Mixture-of-Depths layer, recorded or repeated.

        Args:
            index: positions [K, B] that this run chose, ascending.
            length: S.
            micro_batch: number of the micro-batch, the same under every layout.
            place: identifies the layer within the micro-batch.

        Returns:
            Positions [K, B], ascending.
        """
        taken = torch.zeros(length, index.shape[1], dtype=torch.bool, device=index.device).scatter_(0, index, True)
        kept = self._recorded(taken, micro_batch, place)
        if kept is None:
            return index
        return (~kept).to(torch.uint8).sort(dim=0, stable=True).indices[: index.shape[0]]

    def _recorded(self, taken: Tensor, micro_batch: int, place: Hashable) -> Tensor | None:
        """Record what was taken, or return the recorded choice and count the differences."""
        if not self._repeat:
            self._kept.setdefault(micro_batch, {})[place] = taken.cpu()
            return None
        if micro_batch not in self._kept:
            self._kept[micro_batch] = torch.load(self._file(micro_batch), weights_only=True)  # noqa: TID251 (its own)
        kept = self._kept[micro_batch][place].to(taken.device)
        # Assigned, not added: recompute repeats the choice, which must be counted once.
        self._counts[micro_batch, place] = (int(kept.sum()), int((kept & ~taken).sum()))
        return kept

    def _file(self, micro_batch: int) -> Path:
        return self._folder / f"{micro_batch}.pt"

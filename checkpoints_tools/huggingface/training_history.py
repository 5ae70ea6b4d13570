"""What a model was trained with that the settings of its newest attempt do not say: masked documents, and other data.

Runs keep it in their checkpoints (the order of the data), exports in their config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mmscale.config import Config
from mmscale.data.stream.causal_masking import Masking, masking_of
from mmscale.train.learned_data import read_before, recorded

if TYPE_CHECKING:
    from checkpoints_tools.huggingface.run_weights import RunWeights

_MASKING, _BEFORE = "masking", "read_before"  # keys in config.json
_SPANS = ("partial", "whole", "none")  # `objective.image_spans`; a model that learned one can fill what later ones have


@dataclass(frozen=True)
class TrainingHistory:
    """What a model was trained with.

    Attributes:
        masking: causal masking with the newest rate above 0, and parts of images if any attempt masked such; None: no
            document was masked.
        before: paths and identities of data that the newest settings do not name.
    """

    masking: Masking | None
    before: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of_run(cls, source: RunWeights) -> TrainingHistory:
        """From a checkpoint of a run. Older ones say nothing except their own settings."""
        stream = source.stream
        masked = [Masking(**one["masking"]) for one in stream if one.get("masking")]
        now = masking_of(source.config)
        masked += [now] if now is not None and not stream else []
        before = (*read_before(stream), *recorded(source.main.info()))
        if not masked:
            return cls(None, before)
        spans = next(name for name in _SPANS if name in {one.image_spans for one in masked})
        return cls(Masking(masked[-1].rate, spans), before)

    @classmethod
    def of_export(cls, held: Mapping[str, Any], config: Config) -> TrainingHistory:
        """From the content of an export's settings; exports of older versions know their configuration only.

        Args:
            held: what `as_fields` made, among other fields.
            config: the configuration in it.

        Raises:
            TypeError, ValueError: it is damaged.
        """
        before = tuple((str(path), str(identity)) for path, identity in held.get(_BEFORE, ()))
        if _MASKING not in held:
            return cls(masking_of(config), before)
        masking = held[_MASKING]
        if masking is not None and masking["image_spans"] not in _SPANS:
            raise ValueError(f"{_MASKING}.image_spans is {str(masking['image_spans'])[:60]!r}")
        return cls(None if masking is None else Masking(float(masking["rate"]), masking["image_spans"]), before)

    def as_fields(self) -> dict[str, Any]:
        """Plain data for config.json."""
        masking = None if self.masking is None else asdict(self.masking)
        return {_MASKING: masking, _BEFORE: [list(one) for one in self.before]}

    def applied_to(self, config: Config) -> Config:
        """The configuration with the causal masking that the model has learned, whatever its newest settings say."""
        found = self.masking
        if found is None:
            return config
        learned = {"cm3_rate": found.rate, "image_spans": found.image_spans}
        return config.model_copy(update={"objective": config.objective.model_copy(update=learned)})

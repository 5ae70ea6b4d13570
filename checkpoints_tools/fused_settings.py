"""The configuration of a fused model, and what is refused. No torch: fuse.py makes the tensors."""

from __future__ import annotations

from checkpoints_tools.new_schedules import begun_again
from mmscale.checkpoint.named import Described
from mmscale.config import Config, rules
from mmscale.errors import CheckpointError
from mmscale.tables.settings import UNTIED

ONE_CONFIGURATION = "fuse models of one configuration, which differ in their training data only"


def fused_tokenizers(one: Described, other: Described) -> dict[str, str]:
    """Fingerprints of the tokenizers of both models, by modality."""
    mine, theirs = one.info().get("tokenizers", {}), other.info().get("tokenizers", {})
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name] != theirs[name]:
            raise CheckpointError(
                f"{one.path} and {other.path} have different tokenizers of {name}: the same id stands for something "
                "else",
                remedy="train both on data that was prepared with the same tokenizers",
            )
    return {**theirs, **mine}


def check_dense(old: Config, source: Described) -> None:
    """Refuse models that are not plain dense ones."""
    model = old.model
    for key, wrong in (
        (f"model.kind = {model.kind}", model.has_experts),
        ("model.depth", model.depth is not None),
        (f"model.untie = [{', '.join(model.untie)}]", bool(model.untie)),
    ):
        if wrong:
            raise CheckpointError(
                f"{source.path} has {key}, but only plain dense models can be fused",
                remedy="fuse dense models first; `mmscale ckpt upcycle` then makes experts",
            )


def fused_settings(old: Config, other: Config, *, untie: bool, steps: int | None) -> Config:
    """Those of the text model. If the other one was trained on other data, the new run has none yet."""
    settings = old.model_dump(mode="json")
    if (old.data.path, old.data.blend) != (other.data.path, other.data.blend):
        settings["data"] |= {"path": None, "blend": []}
    if untie:
        settings["model"]["untie"] = list(UNTIED)
    settings["train"]["steps"] = steps or old.train.steps
    new = Config.model_validate(begun_again(settings, old, done=0))
    rules.check(new)
    return new

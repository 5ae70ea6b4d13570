"""The configuration of an upcycled model, and what is refused. No tensors: upcycle.py makes those."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from checkpoints_tools.new_schedules import begun_again
from mmscale.config import Config, rules
from mmscale.config.experts.schema import TokenChoiceConfig
from mmscale.data.prepared.share import nominal_share
from mmscale.errors import CheckpointError, MmscaleError, UsageError


def upcycled_settings(
    old: Config,
    experts: Mapping[str, int],
    untie: Sequence[str],
    *,
    done: int,
    steps: int | None,
    top_k: int | None = None,
    ungated: Sequence[str] = (),
    split: int | None = None,
) -> Config:
    """The new run's configuration.

    Args:
        old: the configuration of the source.
        experts: as in `upcycle`.
        untie: likewise.
        done: steps of the source.
        top_k: likewise.
        ungated: likewise.
        split: likewise.
        steps: `train.steps` of the new run; None: the old run's remaining steps, or as many again if there are none.

    Raises:
        UsageError, CheckpointError, ConfigError: as `upcycle`.
    """
    _check(old, experts, untie, top_k)
    _check_ungated(old, experts, ungated, split)
    if split is not None:
        _check_split(old, experts, split)
    per_modality = set(experts) == set(old.vocab.names)
    settings = old.model_dump(mode="json")
    kept = [part for part in old.model.untie if part != "ffn" or not experts]  # experts take the FFN's place
    settings["model"]["untie"] = [*kept, *untie]
    if experts:
        settings["model"]["kind"] = "moma" if per_modality else "moe"
        settings["model"]["experts"] |= {"counts": dict(experts)}
        if top_k is not None:
            chosen = old.model.experts.token_choice or TokenChoiceConfig()
            settings["model"]["experts"]["token_choice"] = chosen.model_dump(mode="json") | {"top_k": top_k}
        settings["model"]["experts"]["ungated"] = [*old.model.experts.ungated, *ungated]
        if split is not None:
            settings["model"]["ffn_hidden_size"] = old.model.ffn_hidden_size // split
            settings["model"]["experts"] |= {"shared": 1, "shared_ffn_hidden_size": old.model.ffn_hidden_size}
        elif settings["model"]["experts"]["token_choice"] is None:  # parts of an FFN differ without noise
            settings["model"]["experts"]["noise"] = "gumbel"
        settings["model"]["auxiliary"]["mode"] = "off"
    settings["train"]["steps"] = steps or (old.train.steps - done if old.train.steps > done else old.train.steps)
    if experts and old.model.experts.share == "auto":  # a dense run has never measured it
        with contextlib.suppress(MmscaleError):  # training will try again
            share = nominal_share(Config.model_validate(settings))
            settings["model"]["experts"]["share"] = {name: round(value, 6) for name, value in share.items()}
    new = Config.model_validate(begun_again(settings, old, done=done))
    rules.check(new)
    return new


def _check(old: Config, experts: Mapping[str, int], untie: Sequence[str], top_k: int | None) -> None:
    """Refuse what does not fit the source.

    Raises:
        UsageError, CheckpointError: as `upcycle`.
    """
    if not experts and not untie:
        raise UsageError(
            "there is nothing to do", remedy="give --experts text=4,image=4, or --untie attention,norms, or both"
        )
    if twice := sorted(set(untie) & set(old.model.untie)):
        raise UsageError(f"--untie names {', '.join(twice)}, which the model has untied already", remedy="leave it out")
    several = {name: count for name, count in old.model.experts.counts.items() if count > 1}
    if several and experts:
        raise CheckpointError(
            f"the model has {', '.join(f'{count} experts of {name}' for name, count in several.items())} already",
            remedy="upcycle a dense model, or one with one expert of each group",
        )
    names, groups = set(old.vocab.names), set(old.model.experts.counts)
    per_modality = set(experts) == names
    wanted = f"{', '.join(f'{name}=N' for name in old.vocab.names)}, or one name for a mixed group"
    if experts and not per_modality and (len(experts) != 1 or set(experts) & names):
        raise UsageError(f"--experts names {', '.join(experts) or 'nothing'}", remedy=f"name {wanted}")
    if experts and old.model.has_experts and set(experts) != groups:
        raise UsageError(
            f"--experts names {', '.join(experts)}, the model has groups {', '.join(sorted(groups))}",
            remedy="name these groups: the FFN of one cannot become the experts of another",
        )
    per_norm = "norms" in old.model.untie and old.model.norm_placement.per_expert
    if experts and not per_modality and ("ffn" in old.model.untie or per_norm):
        raise UsageError(
            f"--experts names one mixed group, but model.untie = [{', '.join(old.model.untie)}]: each modality has an "
            "FFN or a norm of its own",
            remedy=f"name {', '.join(f'{name}=N' for name in old.vocab.names)}",
        )
    _check_choice(old, experts, top_k)


def _check_ungated(old: Config, experts: Mapping[str, int], ungated: Sequence[str], split: int | None) -> None:
    """Refuse ungated groups that cannot be made from the source."""
    if not ungated:
        return
    if wrong := [name for name in ungated if experts.get(name) != 1]:
        raise UsageError(
            f"--ungated names {wrong[0]}, to which --experts does not give one expert",
            remedy=f"write e.g. --experts {wrong[0]}=1,... --ungated {wrong[0]}",
        )
    if old.model.has_experts:
        raise UsageError(
            "--ungated: the experts of this model have gates, with which their outputs were trained to be multiplied",
            remedy="leave --ungated out, or upcycle a dense model",
        )
    if split is not None:
        raise UsageError(
            "--ungated with --split: the whole FFN is the shared expert already", remedy="give one of them"
        )


def _check_split(old: Config, experts: Mapping[str, int], split: int) -> None:
    """Refuse FFNs that cannot be cut into `split` experts beside a shared one."""
    width = old.model.ffn_hidden_size
    if width % split:
        raise UsageError(
            f"--split {split} does not divide model.ffn_hidden_size = {width}", remedy="use a divisor of the width"
        )
    if odd := {name: count for name, count in experts.items() if count % split}:
        name, count = next(iter(odd.items()))
        raise UsageError(
            f"--experts {name}={count} is no multiple of --split {split}: some parts of the FFN would be missing",
            remedy="leave --experts out, or give multiples",
        )
    if old.model.has_experts:
        raise UsageError(
            f"--split cuts the FFN of a dense model, but model.kind = {old.model.kind} has experts",
            remedy="leave --split out, or upcycle a dense model",
        )
    if "ffn" in old.model.untie or ("norms" in old.model.untie and old.model.norm_placement.per_expert):
        raise UsageError(
            f"--split: with model.untie = [{', '.join(old.model.untie)}] each modality has an FFN or a norm of its "
            "own, but one shared expert would take the place of all",
            remedy="leave --split out",
        )


def _check_choice(old: Config, experts: Mapping[str, int], top_k: int | None) -> None:
    """Refuse a partly frozen model, and a number of choices without new experts or for one whose experts choose."""
    if old.optim.freeze:
        raise CheckpointError(
            f"the model was trained with optim.freeze = [{', '.join(old.optim.freeze)}]: its optimizer has no "
            "state for the frozen weights, from which new ones would be made",
            remedy="convert it with `mmscale convert to-hf` and from-hf, and upcycle the result",
        )
    if top_k is not None and not experts:
        raise UsageError(
            "--top-k is a number of the new experts, of which there are none", remedy="give --experts, too"
        )
    if top_k is not None and old.model.experts_choose:
        raise UsageError(
            "--top-k: the experts of this model choose tokens, and its FFNs were trained on the tokens that they chose",
            remedy="leave --top-k out, or upcycle a dense model",
        )

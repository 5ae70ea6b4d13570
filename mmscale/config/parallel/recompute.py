"""Rules about what is recomputed in backward (`parallel.recompute`, `recompute_modules`, `loss_chunk`)."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config
from mmscale.tables.settings import LOSSES


def _modules(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.recompute != "selective":
        return
    if not parallel.recompute_modules:
        yield Problem(
            "parallel.recompute = selective with parallel.recompute_modules = []: nothing would be recomputed",
            "name core_attn, mlp or both, or use parallel.recompute=none",
        )
    if "mlp" in parallel.recompute_modules and config.model.experts.cuda_graph:
        yield Problem(
            "model.experts.cuda_graph with mlp in parallel.recompute_modules: graphs keep activations permanently, "
            "so recomputing experts would save no memory",
            "use parallel.recompute_modules=[core_attn], or model.experts.cuda_graph=false",
        )


def _loss(config: Config) -> Iterator[Problem]:
    if config.parallel.loss_chunk and config.train.loss not in LOSSES:
        yield Problem(
            f"parallel.loss_chunk with train.loss = {config.train.loss}: a plug-in gets the logits of all tokens",
            "use parallel.loss_chunk=0 or train.loss=cross_entropy",
        )


RULES: tuple[Rule, ...] = (_modules, _loss)

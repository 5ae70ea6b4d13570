"""Rules about what is recomputed in backward (`parallel.recompute`, `parallel.recompute_modules`)."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.problem import Problem, Rule
from mmscale.config.schema import Config


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
            "model.experts.cuda_graph with mlp in parallel.recompute_modules: graphs keep their activations for good, "
            "so recomputing experts would save nothing",
            "use parallel.recompute_modules=[core_attn], or model.experts.cuda_graph=false",
        )


RULES: tuple[Rule, ...] = (_modules,)

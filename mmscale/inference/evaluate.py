"""Evaluates a run (`mmscale eval`): losses, perplexities and task accuracies on held-out data, under any routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.data.prepared.leaks import leaks_of_settings
from mmscale.data.stream.answer_requests import AnswerRequest, Answers
from mmscale.data.stream.bits import bits_per_byte
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.packed import fill_rows, pack_rows
from mmscale.inference.batch_count import Place, counted, silent
from mmscale.inference.built_in_tasks import built_in
from mmscale.inference.chosen_data import check_tokenizers_of, with_data, with_neighbours
from mmscale.inference.document_losses import document_sums
from mmscale.inference.model import RunModel, open_run, stepper_of
from mmscale.inference.scores import measured, passes_of
from mmscale.model.auxiliary import RouterLearning
from mmscale.runs.recorded_leaks import FIELD
from mmscale.runtime.rank_env import RankEnv
from mmscale.tables.plugins import Use
from mmscale.tables.routings import Routing
from mmscale.train.steps.answers import answers
from mmscale.train.steps.auxiliary_routers import figures, table
from mmscale.train.steps.evaluation import evaluate, extent_of


def evaluate_run(
    run: Path,
    *,
    step: int | None,
    data: Path | None,
    batches: int | None,
    routing: Routing = Routing.BATCH,
    env: RankEnv | None = None,
    tasks: Sequence[Use] = (),
    questions: Mapping[str, Path] = MappingProxyType({}),
    neighbours: int | Literal["random"] | None = None,
    own_tasks: Sequence[str] = (),
    at: Place = silent,
) -> dict[str, Any]:
    """Evaluate a run's checkpoint in this process, or over tensor-parallel ranks, which all call it.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        data: a prepared data set; None: the run's own.
        batches: global batches; None: the whole held-out split.
        routing: mode by which experts are assigned to tokens.
        env: as in `open_run`.
        tasks: plug-ins with other tasks.
        questions: files of questions by name.
        neighbours: of each held-out document, as data.retrieval.evaluation; None: as the run says.
        own_tasks: built-in tasks, keys of `EVAL_TASKS`.
        at: shows the batch that is evaluated.

    Returns:
        `run`, `step`, `routing`, `sees_later_tokens` (whether experts or depth layers chose among them), `loss`,
        `loss/<modality>`, `perplexity/<modality>`, `accuracy/<task>` and `tasks`;
        with several data sets `source/<name>/loss` and the like, of each set in `data.validation`
        `validation/<name>/loss` and the like. With causal routings also `batch`, the losses of batch routing
        on the same data, and `gap`, how much larger the causal ones are; with `causal` also `routers`, the quality
        of the auxiliary routers' decisions against the true choice, a row for each layer and modality. `leaks`, what
        the evaluated documents share with training documents of the run, if there is something to say.

    Raises:
        UsageError: the checkpoint does not support that routing, or the number of neighbours is out of range.
        DataError: the data set is missing, damaged, or made with other tokenizers.
    """
    with open_run(run, step=step, env=env) as model:
        model.require(routing)
        config = with_neighbours(model.config, neighbours)
        if data is not None:
            config = with_data(config, data)
        check_tokenizers_of(config, model.tokenizers, run, model.step)
        routes = model.config.model.routes
        result: dict[str, Any] = {"run": str(run), "step": model.step, "routing": routing.value}
        result["sees_later_tokens"] = routes and routing.leaks
        if lines := leaks_of_settings(model.config, config, read=model.trained_on, before=model.trained_before):
            result[FIELD] = lines
        scorer = _RunScorer(model, routing, batches, at)
        result |= measured(scorer, config, tasks=tasks, questions=questions)
        result |= built_in(own_tasks, scorer, config, step=model.step)
        if routes and not routing.leaks:
            result |= _against_batch(model, config, batches, result, routing, at)
        return result


@dataclass(frozen=True)
class _RunScorer:
    """A run's checkpoint under one routing mode, evaluated on a number of global batches."""

    model: RunModel
    routing: Routing
    batches: int | None
    at: Place = silent

    def losses(self, data: Mixture) -> dict[str, float]:
        """The losses, computed as in training."""
        return _losses(self.model, data, self.batches, self.routing, at=self.at)

    def answers(self, asked: Sequence[AnswerRequest]) -> Answers:
        """The answers, computed as in training."""
        model = self.model
        return answers(
            asked,
            config=model.config,
            stepper=stepper_of(model),
            groups=model.groups,
            routing=self.routing,
            on_batch=counted(self.at, "questions, batch"),
        )

    def document_sums(self, documents: Sequence[NDArray[np.int64]], trained: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Sums over the labels of each document, [n, K, 3]."""
        return document_sums(self.model, documents, trained, routing=self.routing)

    def log_probabilities(self, documents: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """For each document [tokens, vocabulary]; documents share sequences, as in training."""
        length, size = self.model.config.model.seq_length, self.model.config.train.micro_batch_size
        rows = fill_rows(documents, seq_length=length)
        found: list[NDArray[np.float32]] = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            content = [[documents[number] for number in row] for row in part]
            batch, places = pack_rows(content, vocabulary=self.model.vocabulary, seq_length=length)
            log_p = self.model.logits(batch, self.routing).log_softmax(dim=-1).numpy()
            for row, row_places in zip(part, places, strict=True):
                for number, place in zip(row, row_places, strict=True):
                    found.append(log_p[place.row, place.start : place.start + len(documents[number])].copy())
        return found


def _against_batch(
    model: RunModel, config: Config, batches: int | None, losses: dict[str, float], routing: Routing, at: Place
) -> dict[str, Any]:
    """How much larger causal losses are, and how well auxiliary routers predict on the first of the sets."""
    learning = RouterLearning(gradients=False) if routing is Routing.CAUSAL else None
    watching = learning
    leaking: dict[str, float] = {}
    for prefix, data in passes_of(config).items():
        own = _losses(model, data, batches, Routing.BATCH, watching, at=at)
        own |= bits_per_byte(own, data, text=model.vocabulary.names[0])
        leaking |= {f"{prefix}{name}": value for name, value in own.items()}
        watching = None
    found: dict[str, Any] = {
        "batch": leaking,
        "gap": {name: losses[name] - value for name, value in leaking.items() if not name.endswith("z_loss")},
    }
    if learning is not None:
        found["routers"] = table(figures(learning, model.groups))
    return found


def _losses(
    model: RunModel,
    data: Mixture,
    batches: int | None,
    routing: Routing,
    learning: RouterLearning | None = None,
    *,
    at: Place = silent,
) -> dict[str, float]:
    total = extent_of(model.config, data, batches=batches).batches
    return evaluate(
        model.config,
        stepper=stepper_of(model),
        mixture=data,
        groups=model.groups,
        batches=batches,
        routing=routing,
        learning=learning,
        on_batch=counted(at, f"{routing} routing, batch", total),
    )

"""Evaluates an exported folder (`mmscale eval`) with transformers, on a run's evaluation data.

A row is one document here, whereas a run packs several into a sequence. Causal routing decides for a token from its
own document alone, so both give the same values except for rounding. generator.py loads the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from checkpoints_tools.huggingface.export_settings import (
    CONFIG,
    REPORT,
    read_config,
    tokenizers_of_export,
)
from checkpoints_tools.huggingface.generator import Generator, open_generator
from mmscale.config.derived import global_micro_batches
from mmscale.data.prepared.leaks import leaks_of_settings
from mmscale.data.stream.answer_requests import AnswerRequest, Answers
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.unpacked import unpacked
from mmscale.data.vocab import PAD, Vocabulary
from mmscale.errors import CheckpointError
from mmscale.inference.batch_count import Place, counted, silent
from mmscale.inference.built_in_tasks import built_in
from mmscale.inference.chosen_data import check_evaluated_tokenizers, with_data, with_neighbours
from mmscale.inference.document_losses import cut_documents
from mmscale.inference.scores import measured
from mmscale.runs.recorded_leaks import FIELD
from mmscale.tables.plugins import Use
from mmscale.train.steps.step import mean_losses

# Logits of a batch, fp32: 128 MiB at most, or one row.
_LOGITS = 2**25


def evaluate_export(
    folder: Path,
    *,
    step: int | None,
    data: Path | None,
    batches: int | None,
    routing: str | None,
    tasks: Sequence[Use] = (),
    questions: Mapping[str, Path] = MappingProxyType({}),
    neighbours: int | Literal["random"] | None = None,
    own_tasks: Sequence[str] = (),
    at: Place = silent,
) -> dict[str, Any]:
    """Evaluate an exported folder in this process.

    Args:
        folder: made by `mmscale convert to-hf`.
        step: must be None: an export has no steps.
        data: a prepared data set; None: the one that the model was trained on, at its path during training.
        batches: global batches of the run's configuration; None: the whole held-out split.
        routing: causal, top1 or threshold; None: as in config.json.
        tasks: plug-ins with other tasks.
        questions: files of questions by name.
        neighbours: of each held-out document, as data.retrieval.evaluation; None: as the run says.
        own_tasks: built-in tasks, keys of `EVAL_TASKS`.
        at: shows the batch that is evaluated.

    Returns:
        `run` (the folder), `step` (None), `routing`, the result of `mmscale.inference.scores.measured`, and `leaks` as
        of a run, if the training data are still at their path.

    Raises:
        CheckpointError: the folder is damaged, not an export of mmscale, or does not support that routing.
        DataError: the data set is missing, damaged, or made with another vocabulary or other tokenizers.
        UsageError: a step was given.
    """
    generator = open_generator(folder, step, routing=routing)
    config = with_neighbours(generator.config, neighbours)
    config = config if data is None else with_data(config, data)
    vocabulary, trained = Vocabulary.from_config(config.vocab), trained_tokenizers(folder)
    check_evaluated_tokenizers(config, trained, where=str(folder))
    result: dict[str, Any] = {"run": str(folder), "step": generator.step, "routing": generator.routing}
    if lines := leaks_of_settings(generator.config, config, before=generator.history.before, missing=False):
        result[FIELD] = lines
    scorer = _ExportScorer(generator, vocabulary, batches, at)
    result |= measured(scorer, config, tasks=tasks, questions=questions)
    return result | built_in(own_tasks, scorer, config, step=None)


def trained_tokenizers(folder: Path) -> dict[str, str]:
    """Fingerprints of the tokenizers that the export was made with."""
    found = tokenizers_of_export(folder, read_config(folder))
    if not found:
        raise CheckpointError(
            f"neither {folder / CONFIG} nor {REPORT} says which tokenizers the model was trained with",
            remedy="export it again: `mmscale convert to-hf`",
        )
    return found


@dataclass(frozen=True)
class _ExportScorer:
    """A transformers model, evaluated on a number of global batches."""

    generator: Generator
    vocabulary: Vocabulary
    batches: int | None
    at: Place = silent

    def losses(self, data: Mixture) -> dict[str, float]:
        """Losses over the labels of the documents that the run's evaluation reads."""
        number = data.len_epoch()
        if self.batches is not None:
            number = min(number, self.batches * global_micro_batches(self.generator.config))
        modalities = len(self.vocabulary.names)
        total = torch.zeros(modalities**2 + 1, 2, dtype=torch.float64)  # as in mmscale.train.steps.loss
        next_batch = counted(self.at, "micro-batch", number)
        for index in range(number):
            next_batch()
            batch = data.micro_batch(index)
            documents = list(unpacked(batch, self.vocabulary))
            for rows, logits in self._logits([one.tokens for one in documents]):
                for row, logits_SV in zip(rows, logits, strict=True):
                    labels, trained = documents[row].labels, torch.from_numpy(documents[row].trained)
                    of_label = torch.from_numpy(self.vocabulary.modality_of(labels)).long()
                    log_z = logits_SV[: len(labels)].logsumexp(dim=-1)
                    ce = log_z - logits_SV[: len(labels)].gather(1, torch.from_numpy(labels)[:, None])[:, 0]
                    for modality in range(modalities):
                        counts = trained & (of_label == modality)
                        total[modality] += _sum(ce[counts])
                        for number, one in enumerate(torch.from_numpy(documents[row].given)):
                            total[modalities + 1 + number * modalities + modality] += _sum(ce[counts & one])
                    total[modalities] += _sum(log_z[trained].double().square())
        return mean_losses(total, self.vocabulary.names)

    def answers(self, asked: Sequence[AnswerRequest]) -> Answers:
        """The answers, with one row for all documents that have the same input."""
        askers: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(asked):
            askers.setdefault(one.read, []).append(number)
        numbers = list(askers.values())
        log_p, likeliest = np.zeros(len(asked)), np.zeros(len(asked), np.int64)
        next_batch = counted(self.at, "questions, batch")
        for rows, logits in self._logits([np.array(read, dtype=np.int64) for read in askers]):
            next_batch()
            for place, row in enumerate(rows):
                for number in numbers[row]:
                    one = asked[number]
                    scores = logits[place, one.start - 1 : len(one.ids) - 1].log_softmax(dim=-1)
                    own = scores.gather(1, torch.tensor(one.ids[one.start :])[:, None])[:, 0]
                    log_p[number] = float(own.double().sum())
                    likeliest[number] = int((own >= scores.amax(dim=-1)).sum())
        return Answers(log_p, likeliest)

    def document_sums(self, documents: Sequence[NDArray[np.int64]], trained: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Sums over the labels of each document, [n, K, 3]; long documents are cut as for a run."""
        cut = cut_documents(documents, self.generator.config.model.seq_length)
        sums = np.zeros((*trained.shape, 3))
        for rows, logits in self._logits([piece for _, piece in cut]):
            for row, logits_SV in zip(rows, logits, strict=True):
                number, piece = cut[row]
                labels = torch.from_numpy(piece[1:].astype(np.int64))
                log_p = logits_SV[: len(labels)].log_softmax(dim=-1)
                own = log_p.gather(1, labels[:, None])[:, 0]
                likeliest = own >= log_p.amax(dim=-1)
                values = torch.stack((-own.double(), likeliest.double(), torch.ones(len(labels)).double()), dim=1)
                modality = self.vocabulary.modality_of(piece[1:]).astype(np.int64)
                used = trained[number, modality]
                np.add.at(sums[number], modality[used], values.numpy()[used])
        return sums

    def log_probabilities(self, documents: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """For each document [tokens, vocabulary]."""
        found: dict[int, NDArray[np.float32]] = {}
        for rows, logits in self._logits(documents):
            log_p = logits.log_softmax(dim=-1).numpy()
            found |= {row: log_p[place, : len(documents[row])].copy() for place, row in enumerate(rows)}
        return [found[row] for row in range(len(documents))]

    @torch.no_grad()
    def _logits(self, documents: Sequence[NDArray[np.int64]]) -> Iterator[tuple[list[int], Tensor]]:
        """Documents of similar lengths in batches: their numbers, and logits fp32 [rows, longest, vocabulary].

        Padding comes last, where no token of a causal model attends to it.
        """
        model = self.generator.model
        by_length = sorted(range(len(documents)), key=lambda number: len(documents[number]), reverse=True)
        while by_length:
            longest = len(documents[by_length[0]])
            count = max(1, _LOGITS // (longest * self.generator.config.vocab.padded_size))
            rows, by_length = by_length[:count], by_length[count:]
            ids = torch.full((len(rows), longest), PAD)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, : len(documents[row])] = torch.from_numpy(documents[row])
                mask[place, : len(documents[row])] = 1
            out = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
            yield rows, out.logits.float().cpu()


def _sum(values: Tensor) -> Tensor:
    """Sum and number, float64 [2]."""
    return torch.tensor([values.double().sum(), len(values)], dtype=torch.float64)

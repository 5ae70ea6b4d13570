"""The measurements of `mmscale eval` for any model: losses, perplexities, each source's own, and tasks.

A model's scorer computes its losses and log-probabilities: evaluate.py has the one for a run's checkpoint,
checkpoints_tools/huggingface/evaluate_export.py that for an exported folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.config.derived import CONDITIONAL
from mmscale.data.modalities.table import open_codecs
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.manifest import HELD_OUT, read_manifest
from mmscale.data.prepared.named_tasks import having, names, question_file
from mmscale.data.prepared.prepared_with import other_settings
from mmscale.data.prepared.questions import encoder_of, read_questions, tokenizers_folder
from mmscale.data.prepared.tasks import TaskItem, read_task
from mmscale.data.stream.answer_requests import AnswerRequest, Answers
from mmscale.data.stream.bits import bits_per_byte
from mmscale.data.stream.mixture import Mixture, open_mixture
from mmscale.data.stream.passes import open_passes
from mmscale.data.vocab import BOS, IMAGE, Vocabulary
from mmscale.errors import DataError
from mmscale.runs.held_out import ACCURACY, prefix_of
from mmscale.tables import plugins
from mmscale.tables.plugins import Use
from mmscale.train.steps.evaluation import extent_of
from mmscale.train.steps.task_scores import score


class Scorer(Protocol):
    """A model under one routing.

    Attributes:
        batches: global batches that are read of each set; None: all.
    """

    @property
    def batches(self) -> int | None:
        """Global batches that are read of each set; None: all."""
        ...

    def losses(self, data: Mixture) -> dict[str, float]:
        """`loss`, `loss/<modality>`, `z_loss`, `conditional_loss/<pair>` on one pass over held-out data."""
        ...

    def answers(self, asked: Sequence[AnswerRequest]) -> Answers:
        """Log-probabilities of the ends of documents."""
        ...

    def log_probabilities(self, documents: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """For each document [tokens, vocabulary]: log-probabilities of the next token. All of them are in memory."""
        ...

    def document_sums(self, documents: Sequence[NDArray[np.int64]], trained: NDArray[np.bool_]) -> NDArray[np.float64]:
        """As `document_losses.document_sums`."""
        ...


@dataclass(frozen=True)
class TaskRun:
    """The information that a plug-in's task receives when it is made, on every rank.

    Attributes:
        config: the settings of the model and of the evaluation data.
        vocabulary: ids and ranges of the modalities.
        folder: the prepared data set, whose tokenizers are the model's.
    """

    config: Config
    vocabulary: Vocabulary
    folder: Path

    def encode(self, text: str) -> NDArray[np.int64]:
        """A text as the beginning of a document: ids [tokens], including the token that begins documents."""
        return np.array([BOS, *open_text_tokenizer(self.folder).encode(text)], dtype=np.int64)

    def draw(
        self,
        scorer: Scorer,
        prompts: Sequence[str],
        *,
        modality: str = IMAGE,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[NDArray[Any]]:
        """Items that the model generates after prompts, one for each: of images pixels uint8 [H, W, C].

        Every token needs a pass over the whole prompt, so this is suitable for a few dozen small items.

        Args:
            scorer: the model.
            prompts: texts as in training documents before such an item.
            modality: of the items.
            temperature: divides log-probabilities; 0: always the most likely code.
            seed: of the sampling; the same on every rank.

        Raises:
            DataError: the data set has no such items, or a prompt leaves no room for them in a sequence.
        """
        codec, marks = open_codecs(self.folder).get(modality), self.vocabulary.marks(modality)
        if codec is None or marks is None:
            raise DataError(
                f"data: {self.folder} has no {modality} tokenizer", remedy=f"prepare it from documents with {modality}s"
            )
        low, _ = self.vocabulary.range_of(modality)
        documents = [np.append(self.encode(prompt), marks[0]) for prompt in prompts]
        longest = max(map(len, documents)) + codec.tokens_per_item
        if longest > self.config.model.seq_length:
            raise DataError(
                f"a prompt and its {modality} take {longest} tokens, a sequence has {self.config.model.seq_length}",
                remedy="shorten the prompts",
            )
        random = np.random.default_rng(seed)
        for _ in range(codec.tokens_per_item):
            scores = scorer.log_probabilities(documents)
            last = np.stack([one[-1, low : low + codec.vocab_size] for one in scores]).astype(np.float64)
            if temperature > 0:  # the largest log-probability plus Gumbel noise is a sample
                last = last / temperature + random.gumbel(size=last.shape)
            documents = [np.append(one, low + code) for one, code in zip(documents, last.argmax(axis=-1), strict=True)]
        codes = np.stack([one[-codec.tokens_per_item :] for one in documents]) - low
        return list(codec.decode(codes))


def measured(
    scorer: Scorer, config: Config, *, tasks: Sequence[Use] = (), questions: Mapping[str, Path] = MappingProxyType({})
) -> dict[str, Any]:
    """Losses on held-out data, perplexities, each source's own, and accuracies of tasks.

    Args:
        scorer: the model.
        config: names the data.
        tasks: plug-ins with other tasks; each gets the model.
        questions: files of questions by name, in addition to the tasks of the data sets; they replace one of the same
            name.

    Returns:
        `loss`, `loss/<modality>`, `z_loss`, `perplexity/<modality>`, `conditional_loss/<pair>` and
        `conditional_perplexity/<pair>` (e.g. text_given_image), `bits_per_byte/<text>` (if bytes were counted),
        `accuracy/<task>`; `tasks` (for each the numbers of correct and all answers, the 95 % interval of the accuracy,
        the accuracy of guessing, the file or data set of its questions, and data sets whose task of that name is not
        used); `task/<key>` of each plug-in; for a blend `source/<name>/...`; for each set of `data.validation`
        `validation/<name>/...`; `batches`, `batches_available` and `batches_in_training` of the first of these sets;
        `extents`, the same for each of them by its name in words; `eval_batches`, the setting; `not_asked`, files in
        `train.tasks` that are not among `questions` under any name; `notes`, if the data was prepared with other
        settings than the configuration's.

    Raises:
        DataError: the data is missing or damaged, or there is none to evaluate on.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    result: dict[str, Any] = {}
    if notes := other_settings(config):
        result["notes"] = notes
    passes = passes_of(config)  # the blend first
    extents = {_set_in_words(prefix): _extent(config, data, batches=scorer.batches) for prefix, data in passes.items()}
    result |= next(iter(extents.values())) | {"eval_batches": config.train.eval_batches, "extents": extents}
    for prefix, data in passes.items():
        losses = scorer.losses(data)
        losses |= bits_per_byte(losses, data, text=vocabulary.names[0])
        result |= {f"{prefix}{key}": value for key, value in (losses | _perplexities(losses)).items()}
    sets = [("", {Path(source.path): read_manifest(Path(source.path)) for source in config.data.sources})]
    for name, path in config.data.validation.items():
        sets.append((prefix_of(name), {Path(path): read_manifest(Path(path))}))
    files = {text: question_file(text) for text in config.train.tasks}
    asked = {file.resolve() for file in questions.values()}
    result["not_asked"] = [
        text
        for text, (name, file) in files.items()
        if file is not None and name not in questions and file.resolve() not in asked
    ]
    scores: dict[str, dict[str, Any]] = {}
    for prefix, blend in sets:
        for name in names(blend):
            first, *others = having(name, blend)
            if prefix or name not in questions:
                items = read_task(first, blend[first], name)
                scores[f"{prefix}{ACCURACY}{name}"] = _asked(scorer, items, place=first, others=others)
    for name, file in questions.items():
        items = read_questions(file, encoder_of(config))
        scores[f"{ACCURACY}{name}"] = _asked(scorer, items, place=file, others=having(name, sets[0][1]))
    result |= {key: found["right"] / found["asked"] for key, found in scores.items()}
    if scores:
        result["tasks"] = {key.replace(ACCURACY, "", 1): found for key, found in scores.items()}
    for use in tasks:
        made = plugins.make(use, TaskRun(config, vocabulary, tokenizers_folder(config)))
        result |= {f"task/{key}": float(value) for key, value in made(scorer).items()}
    return result


def _asked(scorer: Scorer, items: Sequence[TaskItem], *, place: Path, others: Sequence[Path]) -> dict[str, Any]:
    """A task's entry in `tasks`."""
    return score(items, answers=scorer.answers).as_dict() | {"from": str(place), "not_asked": [*map(str, others)]}


def _set_in_words(prefix: str) -> str:
    """`held-out`, `source web`, `validation web`, as in the lines of training."""
    return prefix.rstrip("/").replace("/", " ", 1) or "held-out"


def _extent(config: Config, data: Mixture, *, batches: int | None) -> dict[str, int]:
    """Global batches that are read, that exist, and that training's evaluations read."""
    here, there = (extent_of(config, data, batches=number) for number in (batches, config.train.eval_batches))
    return {"batches": here.batches, "batches_available": here.available, "batches_in_training": there.batches}


def passes_of(config: Config) -> dict[str, Mixture]:
    """The evaluated data, by the prefix of its keys: "" for the blend, `source/<name>/`, `validation/<name>/`.

    Raises:
        DataError: the data is missing or damaged, or there is none to evaluate on.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    found = open_passes(config, vocabulary=vocabulary, each=True)
    if not found:
        open_mixture(config, HELD_OUT, vocabulary=vocabulary)  # raises an error that names the missing data
    return {prefix_of(name): data for name, data in found.items()}


def _perplexities(losses: dict[str, float]) -> dict[str, float]:
    """`perplexity/<modality>` of every `loss/<modality>`, and conditional ones of conditional losses."""
    return {
        name.replace("loss/", "perplexity/", 1): math.exp(min(loss, 700.0))
        for name, loss in losses.items()
        if name.startswith(("loss/", CONDITIONAL))
    }

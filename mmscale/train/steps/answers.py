"""Log-probabilities of the tokens that tasks ask for, computed with the layout that trains, without storing logits.

mmscale.data.stream.answer_requests packs the questions; task_scores.py scores the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.config import Config
from mmscale.config.derived import global_micro_batches
from mmscale.data.stream.answer_requests import AnswerRequest, Answers, PackedQuestions
from mmscale.data.vocab import Vocabulary
from mmscale.runtime import device
from mmscale.tables.routings import Routing
from mmscale.train.steps.batch import part_of, to_device
from mmscale.train.steps.step import Steps, reduce_sums


def answers(
    asked: Sequence[AnswerRequest],
    *,
    config: Config,
    stepper: Steps,
    groups: ProcessGroupCollection,
    routing: Routing,
    on_batch: Callable[[], None] = lambda: None,
) -> Answers:
    """The model's answers at the ends of documents; every rank calls it, and gets the same result.

    Documents share sequences, as in training.

    Args:
        asked: the documents, the same on every rank.
        config: batch sizes.
        stepper: runs the model forward.
        groups: process groups.
        routing: mode by which experts are assigned to tokens.
        on_batch: as in `evaluation.evaluate`.
    """
    vocabulary, per_step = Vocabulary.from_config(config.vocab), global_micro_batches(config)
    length, rows = config.model.seq_length, config.train.micro_batch_size
    multiple = config.data.document_multiple
    packed = PackedQuestions(asked, vocabulary=vocabulary, seq_length=length, rows=rows, multiple=multiple)
    own, last = part_of(groups), len(packed) - 1
    total = torch.zeros(len(asked), 2, device=device.taken(), dtype=torch.float64)
    for first in range(0, len(packed), per_step):
        on_batch()
        numbers = list(own.numbers(first, per_step))
        read = [own.read(packed, number, last=last) for number in numbers]  # those beyond `last` repeat the last one
        batches = [to_device(one, vocabulary, routing=routing) for one in read]
        wanted = [
            packed.wanted(min(number, last)).of_rank(one.context) for number, one in zip(numbers, read, strict=True)
        ]
        for number, one, found in zip(numbers, wanted, stepper.pick(batches, wanted), strict=False):
            if number <= last:
                total.index_add_(0, torch.from_numpy(one.asked).to(total.device), found.double())
    on_batch()
    log_p, likeliest = reduce_sums(total, groups).numpy().T
    return Answers(log_p, np.rint(likeliest).astype(np.int64))

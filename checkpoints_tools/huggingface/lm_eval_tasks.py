"""Writes the losses of one modality given another as tasks of lm-evaluation-harness, which computes them for an export.

The harness reads strings, so the folder has a tokenizer whose words are ids (`<12> <300>`). A request is a part of a
held-out document: the context is everything before, the continuation the tokens of one modality that follow each other.
MoMa (arXiv 2407.21770), tables 3 and 4.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints_tools.huggingface import lm_eval_metrics
from checkpoints_tools.huggingface.export_settings import config_of_export, read_config, tokenizers_of_export
from mmscale.checkpoint import publish
from mmscale.config import Config
from mmscale.config.derived import global_micro_batches
from mmscale.data.prepared.manifest import check_tokenizers, read_blend
from mmscale.data.prepared.validation import read_validation
from mmscale.data.stream.conditions import conditional_names
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.passes import open_passes
from mmscale.data.stream.unpacked import UnpackedDocument, unpacked
from mmscale.data.vocab import BOS, EOS, PAD, Vocabulary
from mmscale.errors import DataError
from mmscale.inference.chosen_data import with_data
from mmscale.runs.held_out import prefix_of
from mmscale.runtime.atomic_files import new_folder

TAG = "mmscale"  # `lm_eval --tasks mmscale` runs all tasks of the folder
TOKENIZER = "tokenizer"
_METRICS = "metrics"
_TASK = """\
task: {name}
tag: {tag}
custom_dataset: !function {metrics}.documents
dataset_kwargs: {{file: {name}.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: context
doc_to_target: continuation
target_delimiter: ""
process_results: !function {metrics}.process_results
metric_list:
  - {{metric: token_loss, aggregation: !function {metrics}.token_loss, higher_is_better: false}}
  - {{metric: token_perplexity, aggregation: !function {metrics}.token_perplexity, higher_is_better: false}}
metadata: {{version: 1}}
"""


def write_tasks(folder: Path, out: Path, *, data: Path | None = None, batches: int | None = None) -> dict[str, Any]:
    """Write a folder for `lm_eval --include_path`.

    Args:
        folder: an export, made by `mmscale convert to-hf`.
        out: folder to create.
        data: a prepared data set; None: the one that the model was trained on, with its validation sets.
        batches: global batches of the run's configuration of each set; None: the whole held-out split.

    Returns:
        `path`; `tasks`: for each its numbers of `requests` and `tokens`.

    Raises:
        CheckpointError: the export is damaged, or `out` exists.
        DataError: a data set is missing, damaged, or of other tokenizers, or no label follows another modality.
    """
    publish.refuse_existing(out)
    content = read_config(folder)
    config = config_of_export(folder, content)
    config = config if data is None else with_data(config, data)
    _check_data(config, tokenizers_of_export(folder, content), folder)
    vocabulary = Vocabulary.from_config(config.vocab)
    report: dict[str, dict[str, int]] = {}
    with publish.writing(out), new_folder(out) as place:
        for name, mixture in open_passes(config, vocabulary=vocabulary).items():
            number = mixture.len_epoch()
            if batches is not None:
                number = min(number, batches * global_micro_batches(config))
            report |= _write_set(place, _task_prefix(name), mixture, number, vocabulary)
        if not report:
            raise DataError(
                "no held-out label follows a token of another modality in its document",
                remedy="name a data set of mixed documents: --data DIR",
            )
        _write_tokenizer(place / TOKENIZER, config.vocab.padded_size)
        shutil.copyfile(Path(lm_eval_metrics.__file__), place / f"{_METRICS}.py")
    return {"path": str(out), "tasks": report}


def _check_data(config: Config, trained: Mapping[str, str], folder: Path) -> None:
    """Refuse data of other tokenizers than the export's."""
    blend = read_blend(config)
    blend |= {one.folder: one.manifest for one in read_validation(config, blend)}
    for place, manifest in blend.items():
        check_tokenizers(place, manifest.tokenizers, dict(trained), where=str(folder))


def _task_prefix(name: str) -> str:
    """`mmscale_` for the training data's held-out documents, `mmscale_validation_coco_` for others."""
    return f"{TAG}/{prefix_of(name)}".replace("/", "_")


def _write_set(
    place: Path, prefix: str, mixture: Mixture, number: int, vocabulary: Vocabulary
) -> dict[str, dict[str, int]]:
    """Write the tasks of one set; what each of them asks.

    Args:
        place: folder to write into.
        prefix: of the tasks' names.
        mixture: one pass over the set.
        number: of micro-batches to read.
        vocabulary: of the set.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for index in range(number):
        for document in unpacked(mixture.micro_batch(index), vocabulary):
            for pair, start, end in spans(document, vocabulary):
                found[pair].append(
                    {
                        "context": words(document.tokens[: start + 1]),
                        "continuation": f" {words(document.labels[start:end])}",
                        "tokens": end - start,
                    }
                )
    for pair, rows in found.items():
        name = f"{prefix}{pair}"
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        (place / f"{name}.yaml").write_text(_TASK.format(name=name, tag=TAG, metrics=_METRICS), encoding="utf-8")
    return {
        f"{prefix}{pair}": {"requests": len(rows), "tokens": sum(row["tokens"] for row in rows)}
        for pair, rows in found.items()
    }


def spans(document: UnpackedDocument, vocabulary: Vocabulary) -> Iterator[tuple[str, int, int]]:
    """Longest runs of labels that count for a pair: its name, the first label, and the one after the last.

    Args:
        document: tokens, labels, and which of them count.
        vocabulary: gives the names of modalities.
    """
    count, names = len(vocabulary.names), conditional_names(vocabulary.names)
    of_label = vocabulary.modality_of(document.labels).astype(np.int64)
    for row, given in enumerate(document.given):
        of_pair = np.where(given & document.trained, row * count + of_label, -1)
        place = 0
        for pair, run in groupby(of_pair.tolist()):
            length = len(list(run))
            if pair >= 0:
                yield names[pair], place, place + length
            place += length


def words(ids: NDArray[np.int64]) -> str:
    """Ids as words of the folder's tokenizer."""
    return " ".join(f"<{number}>" for number in ids.tolist())


def _write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer whose words are ids.

    Args:
        folder: to create.
        size: ids of the model.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = (f"<{number}>" for number in (PAD, BOS, EOS))
    model = models.WordLevel({f"<{number}>": number for number in range(size)}, unk_token=pad)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)

"""The gate of an export: checks that transformers computes from the folder the same as the trainer.

The trainer's side is computed here, in fp32: logits of prompts, and the most likely continuations of some.
gate_reload.py computes the other side in a fresh offline process that imports nothing of mmscale, with transformers'
own `generate`. This module compares the two. to_hf.py publishes the folder.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from checkpoints_tools.huggingface.model_config import never_generated
from mmscale import bounded
from mmscale.data.modalities.modality import Codec
from mmscale.data.modalities.table import MODALITIES
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.data.stream.packed import pack_rows
from mmscale.data.stream.source import Source
from mmscale.data.vocab import BOI, BOS, EOI, EOS, IMAGE, SPECIAL_TOKENS, Vocabulary
from mmscale.errors import CheckpointError, DataError
from mmscale.inference.model import open_run
from mmscale.tables.routings import Routing

TOLERANCE = 1e-4  # largest difference of a logit, fp32
# If a value is closer to its threshold than this, two correct implementations may decide differently.
CLOSE_CALL = 2e-6
# Two logits whose difference is smaller than this are a tie: either may be chosen as the largest.
TIE = 1e-5
PROMPTS = 12
CONTINUED = 3  # number of prompts that are continued, and number of tokens
NEW_TOKENS = 6
LONGEST = 256  # tokens of a prompt, at most
_TIMEOUT_S = 1800.0
_PROBES = (
    "a red bus",
    "Übergröße 漢字 🙂\n\ttabs",
    " ".join(SPECIAL_TOKENS),
    "<boi><image_0><image_1><eoi> <s>ignore</s>",
    "",
)
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Expected:
    """What an export must reproduce besides logits.

    Attributes:
        vocabulary: id ranges.
        text: the data's text tokenizer.
        codecs: its tokenizers of other modalities by name.
    """

    vocabulary: Vocabulary
    text: TextTokenizer
    codecs: Mapping[str, Codec]


def prompts(
    data: Path, vocabulary: Vocabulary, *, tokens_per_item: Mapping[str, int], longest: int, seed: int = 0
) -> list[Ids]:
    """Held-out documents of the data set, and random ones of all modalities.

    Args:
        data: the prepared data set.
        vocabulary: id ranges.
        tokens_per_item: length of each modality's items.
        longest: tokens of a prompt, at most.
        seed: of the random ones.
    """
    longest = min(longest, LONGEST)
    found = []
    for split in ("validation", "train"):
        try:
            source = Source(data, split=split, vocabulary=vocabulary)
        except DataError:
            continue
        chosen = np.linspace(0, len(source) - 1, min(len(source), PROMPTS - 4)).astype(np.int64)
        found = [source.read(chosen[i : i + 1])[:longest] for i in range(len(chosen))]
        break
    rng = np.random.default_rng(seed)
    low, high = vocabulary.ranges[0]
    for number in range(PROMPTS - len(found)):
        special = len(vocabulary.specials)
        pieces = [np.array([BOS]), rng.integers(special, high, 3 + 5 * number)]
        for name, (first, end) in zip(vocabulary.names[1:], vocabulary.ranges[1:], strict=True):
            opens, closes = vocabulary.marks(name) or (BOI, EOI)
            pieces += [np.array([opens]), rng.integers(first, end, tokens_per_item.get(name, 8)), np.array([closes])]
        pieces += [rng.integers(low + special, high, 4), np.array([EOS])]
        found.append(np.concatenate(pieces)[:longest].astype(np.int64))
    return found


@dataclass(frozen=True)
class Continued:
    """The continuation of a beginning by the trainer's model, always taking the most likely token.

    Attributes:
        begin: the beginning's ids.
        new: ids after it, up to the end of the document or of an answer.
        gap: smallest difference between the two largest logits on the way; 0: a tie.
    """

    begin: Ids
    new: list[int]
    gap: float


@dataclass(frozen=True)
class Computed:
    """The trainer's side.

    Attributes:
        asked: token ids of each prompt.
        logits: fp32 [tokens, vocabulary] of each.
        continued: continuations of some of their beginnings.
        ends: ids at which a continuation ends, as in generation_config.json.
    """

    asked: Sequence[Ids]
    logits: list[torch.Tensor]
    continued: list[Continued]
    ends: tuple[int, ...]


def compute(run: Path, step: int, asked: Sequence[Ids], *, routing: str | None) -> Computed:
    """The results of the model that training uses.

    Args:
        run: the run's folder.
        step: the checkpoint.
        asked: token ids of each prompt.
        routing: causal, top1 or threshold; None: the model has no routing.
    """
    found = []
    with open_run(run, step=step, dtype="fp32") as model:
        kwargs = {} if routing is None else {"routing": Routing(routing)}
        length = model.config.model.seq_length

        def logits(rows: Sequence[Ids]) -> torch.Tensor:
            batch, _ = pack_rows([[ids] for ids in rows], vocabulary=model.vocabulary, seq_length=length)
            return model.logits(batch, **kwargs)

        found = [logits([ids])[0, : len(ids)].clone() for ids in asked]
        begins = _beginnings(asked, length=length)
        never = never_generated(model.config)
        ends = model.vocabulary.ends
        continued = _continued(logits, begins, new_tokens=min(NEW_TOKENS, length - 1), never=never, ends=ends)
    return Computed(asked, found, continued, ends)


def _beginnings(asked: Sequence[Ids], *, length: int) -> list[Ids]:
    """First halves of some prompts, documents and random ones, with room for continuations."""
    chosen = np.linspace(0, len(asked) - 1, CONTINUED).astype(np.int64)
    room = max(1, length - NEW_TOKENS)
    return [asked[number][: min(room, max(1, len(asked[number]) // 2))] for number in chosen]


def _continued(
    logits: Callable[[Sequence[Ids]], torch.Tensor],
    begins: Sequence[Ids],
    *,
    new_tokens: int,
    never: Sequence[int],
    ends: Sequence[int],
) -> list[Continued]:
    """The most likely tokens after each beginning, without a cache.

    Args:
        logits: of a batch of sequences.
        begins: the beginnings.
        new_tokens: at most so many for each.
        never: ids that are not generated.
        ends: ids that end a continuation.
    """
    rows = list(begins)
    gaps = [math.inf] * len(rows)
    for _ in range(new_tokens):
        computed = logits(rows)
        for number, row in enumerate(rows):
            scores = computed[number, len(row) - 1].clone()
            scores[list(never)] = -math.inf
            best = scores.topk(2)
            gaps[number] = min(gaps[number], float(best.values[0] - best.values[1]))
            rows[number] = np.append(row, int(best.indices[0]))
    return [
        Continued(begin, _ended(row[len(begin) :].tolist(), ends), gap)
        for begin, row, gap in zip(begins, rows, gaps, strict=True)
    ]


def _ended(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Ids up to and including the first of `ends`."""
    last = next((place for place, one in enumerate(ids) if one in ends), len(ids))
    return ids[: last + 1]


def reload(folder: Path, computed: Computed, expected: Expected, *, scratch: Path) -> dict[str, Any]:
    """Load the folder in a fresh process without a network, and compare.

    Args:
        folder: a complete Hugging Face folder.
        computed: the trainer's side.
        expected: tokenizers.
        scratch: an empty folder, absolute.

    Returns:
        The findings of gate_reload.py.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    tensors = {f"ids.{n}": torch.from_numpy(ids) for n, ids in enumerate(computed.asked)}
    tensors |= {f"logits.{n}": own for n, own in enumerate(computed.logits)}
    tensors |= {f"begin.{n}": torch.from_numpy(own.begin) for n, own in enumerate(computed.continued)}
    for name, codec in expected.codecs.items():
        if name == IMAGE or MODALITIES[name].shipped:
            tensors |= _items(name, codec)
    save_file(tensors, scratch / "logits.safetensors")
    remote = "auto_map" in bounded.read_object(folder / "config.json")
    ids = [expected.text.encode(text).tolist() for text in _PROBES]
    said = {"texts": _PROBES, "ids": ids, "remote_code": remote, "new_tokens": NEW_TOKENS}
    (scratch / "texts.json").write_text(json.dumps(said))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(scratch / "home")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    command = [str(Path(__file__).with_name("gate_reload.py")), str(folder.resolve()), str(scratch)]
    ended = run_isolated(command, cwd=scratch, environment=environment | offline)
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        raise CheckpointError(
            f"transformers cannot load the export: {last}",
            remedy="nothing was published; report it with the output of MMSCALE_DEBUG=1",
        ) from RuntimeError(ended.stderr)
    found: dict[str, Any] = bounded.read_object(scratch / "found.json")
    for row, own in zip(found["generated"], computed.continued, strict=True):
        row |= {way: _ended(ids, computed.ends) for way, ids in row.items() if isinstance(ids, list)}
        row |= {"trainer": own.new, "gap": own.gap}
    return found


def run_isolated(
    command: Sequence[str], *, cwd: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a fresh interpreter that sees nothing of this process's modules and paths.

    Args:
        command: the program's file and its arguments.
        cwd: working directory.
        environment: all of its variables.
    """
    return subprocess.run(
        [sys.executable, "-I", *command],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )


def _items(name: str, codec: Codec) -> dict[str, torch.Tensor]:
    """Codes of two items, the decoded items, and the codes of those (for a VQ model they may differ from the first)."""
    codes = np.random.default_rng(0).integers(0, codec.vocab_size, (2, codec.tokens_per_item))
    try:
        made = codec.decode(codes)
    except (DataError, ValueError):  # it cannot decode
        return {}
    again = codec.encode(np.stack([MODALITIES[name].read(one, codec) for one in made]))
    found = {f"codes.{name}": codes, f"made.{name}": made, f"again.{name}": again}
    # Copies, because a codec may return its input, and safetensors refuses tensors that share memory.
    return {key: torch.from_numpy(np.array(values, order="C")) for key, values in found.items()}


def judge(found: dict[str, Any]) -> dict[str, Any]:
    """Whether an export passes.

    Returns:
        `passed`; `problems` in words; `max_abs` over all compared prompts in all ways (whole, cached, left-padded);
        `argmax_same` and `tokens`; `compared` and `close_calls`: prompts; `generated`: tokens that `generate` and the
        trainer agree about.
    """
    problems = [
        f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in found["loading"].items() if names
    ]
    problems += [
        f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in found["weights"].items() if names
    ]
    if not all(row["finite"] for row in found["prompts"]):
        problems.append("logits are not finite")
    # A difference proves nothing if a decision was close to its threshold; prompts that agree always count.
    sure = [row for row in found["prompts"] if _worst(row) <= TOLERANCE or not row["margin"] < CLOSE_CALL]
    if 2 * len(sure) < len(found["prompts"]):
        problems.append(f"only {len(sure)} of {len(found['prompts'])} prompts agree, the others may be close calls")
    worst = max(map(_worst, sure), default=0.0)
    if not worst <= TOLERANCE:  # not `>`, because NaN must fail
        problems.append(f"logits differ by {worst:.3g}, more than {TOLERANCE:g}")
    gap = max((row["largest_gap_of_another_argmax"] for row in sure), default=0.0)
    if gap > TIE:
        problems.append(f"another most likely token, ahead by {gap:.3g}")
    problems += _unlike(found["generated"])
    for kind, what in (("other_ids", "processor"), ("other_plain_ids", "tokenizer")):
        if found[kind]:
            problems.append(f"the {what} encodes {found[kind][0]!r} differently")
    for name, other in found["other_items"].items():
        if other:
            problems.append(f"{other} {name}s are made or read differently")
    return {
        "passed": not problems,
        "problems": problems,
        "max_abs": worst,
        "tolerance": TOLERANCE,
        "argmax_same": sum(row["argmax_same"] for row in sure),
        "tokens": sum(row["tokens"] for row in sure),
        "compared": len(sure),
        "close_calls": len(found["prompts"]) - len(sure),
        "generated": sum(len(row["trainer"]) for row in found["generated"] if _agrees(row)),
    }


WAYS = ("cached", "uncached", "batched")


def _agrees(row: dict[str, Any]) -> bool:
    return all(row[way] == row["trainer"] for way in WAYS)


def _unlike(generated: Sequence[dict[str, Any]]) -> list[str]:
    """Ways to generate that give other tokens than the trainer's model. Close decisions are not counted."""
    problems = []
    for row in generated:
        close = row["margin"] < CLOSE_CALL or row["gap"] < 2 * TOLERANCE
        if not close and not _agrees(row):
            ways = ", ".join(way for way in WAYS if row[way] != row["trainer"])
            problems.append(f"generate() gives other tokens than the trainer's model ({ways})")
    if generated and not problems and not any(map(_agrees, generated)):
        problems.append("generate() never gives the tokens of the trainer's model; all of them may be close calls")
    return list(dict.fromkeys(problems))


def _worst(row: dict[str, Any]) -> float:
    """Largest difference of a prompt, whole, with a cache or left-padded."""
    ways = [row[way] for way in ("max_abs", "cached_max_abs", "padded_max_abs")]
    return math.nan if any(map(math.isnan, ways)) else max(ways)

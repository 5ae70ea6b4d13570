"""The gate of an export: what transformers computes from the folder must be what the trainer computes.

The trainer's side is computed here, in fp32; the other side by gate_reload.py in a fresh offline process that imports
nothing of mmscale. This file judges. Nothing is published here.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from mmscale.data.image_tokens import ImageTokenizer
from mmscale.data.packed import pack_rows
from mmscale.data.source import Source
from mmscale.data.text_tokens import TextTokenizer
from mmscale.data.vocab import BOI, BOS, EOI, EOS, SPECIAL_TOKENS, Vocabulary
from mmscale.errors import CheckpointError, DataError
from mmscale.inference.model import open_run
from mmscale.model.mixed_modal import Routing

TOLERANCE = 1e-4  # largest difference of a logit, fp32
# A decision closer to its threshold than this may fall differently in two right implementations.
CLOSE_CALL = 2e-6
# Two logits that are closer than this are a tie: either may be called the larger one.
TIE = 1e-5
PROMPTS = 12
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
        image: its image tokenizer; None: it has none.
    """

    vocabulary: Vocabulary
    text: TextTokenizer
    image: ImageTokenizer | None


def prompts(data: Path, vocabulary: Vocabulary, *, tokens_per_image: int, longest: int, seed: int = 0) -> list[Ids]:
    """Held-out documents of the data set, and random ones of all modalities.

    Args:
        data: the prepared data set.
        vocabulary: id ranges.
        tokens_per_image: tokens of an image; 0: there are none.
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
        pieces = [np.array([BOS]), rng.integers(len(SPECIAL_TOKENS), high, 3 + 5 * number)]
        for first, end in vocabulary.ranges[1:]:
            pieces += [np.array([BOI]), rng.integers(first, end, tokens_per_image or 8), np.array([EOI])]
        pieces += [rng.integers(low + len(SPECIAL_TOKENS), high, 4), np.array([EOS])]
        found.append(np.concatenate(pieces)[:longest].astype(np.int64))
    return found


def trainers_logits(run: Path, step: int, asked: Sequence[Ids], *, routing: str | None) -> list[torch.Tensor]:
    """Logits fp32 [tokens, vocabulary] of each prompt, by the model that training runs.

    Args:
        run: the run's folder.
        step: the checkpoint.
        asked: token ids of each prompt.
        routing: causal, top1 or threshold; None: the model routes nothing.
    """
    found = []
    with open_run(run, step=step, dtype="fp32") as model:
        kwargs = {} if routing is None else {"routing": Routing(routing)}
        for ids in asked:
            length = model.config.model.seq_length
            batch, _ = pack_rows([[ids]], vocabulary=model.vocabulary, seq_length=length)
            found.append(model.logits(batch, **kwargs)[0, : len(ids)].clone())
    return found


def reload(
    folder: Path, asked: Sequence[Ids], logits: Sequence[torch.Tensor], expected: Expected, *, scratch: Path
) -> dict[str, Any]:
    """Load the folder in a fresh process without a network, and compare.

    Args:
        folder: a whole Hugging Face folder.
        asked: token ids of each prompt.
        logits: the trainer's.
        expected: tokenizers.
        scratch: an empty folder, absolute.

    Returns:
        What gate_reload.py found.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    tensors = {f"ids.{n}": torch.from_numpy(ids) for n, ids in enumerate(asked)}
    tensors |= {f"logits.{n}": own for n, own in enumerate(logits)}
    if expected.image is not None:
        tensors |= _images(expected.image)
    save_file(tensors, scratch / "logits.safetensors")
    remote = "auto_map" in json.loads((folder / "config.json").read_text())
    ids = [expected.text.encode(text).tolist() for text in _PROBES]
    said = {"texts": _PROBES, "ids": ids, "remote_code": remote}
    (scratch / "texts.json").write_text(json.dumps(said))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(scratch / "home")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    command = [
        sys.executable,
        "-I",
        str(Path(__file__).with_name("gate_reload.py")),
        str(folder.resolve()),
        str(scratch),
    ]
    ended = subprocess.run(
        command, env=environment | offline, cwd=scratch, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        raise CheckpointError(
            f"transformers cannot load the export: {last}",
            remedy="nothing was published; report it with the output of MMSCALE_DEBUG=1",
        ) from RuntimeError(ended.stderr)
    found: dict[str, Any] = json.loads((scratch / "found.json").read_text())
    return found


def _images(image: ImageTokenizer) -> dict[str, torch.Tensor]:
    """Codes of two images, what they look like, and the codes that the picture gets: a VQ model's may differ."""
    codes = np.random.default_rng(0).integers(0, image.vocab_size, (2, image.tokens_per_image))
    try:
        pixels = image.decode(codes)
    except DataError:  # it cannot draw
        return {}
    again = image.encode(pixels)
    return {
        "codes": torch.from_numpy(codes),
        "pixels": torch.from_numpy(np.ascontiguousarray(pixels)),
        "codes_again": torch.from_numpy(again),
    }


def judge(found: dict[str, Any]) -> dict[str, Any]:
    """Whether an export is as it must be.

    Returns:
        `passed`; `problems` in words; `max_abs` over all compared prompts in all ways (whole, cached, left-padded);
        `argmax_same` and `tokens`; `compared` and `close_calls`: prompts.
    """
    problems = [
        f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in found["loading"].items() if names
    ]
    problems += [
        f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in found["weights"].items() if names
    ]
    if not all(row["finite"] for row in found["prompts"]):
        problems.append("logits are not finite")
    # A prompt that differs is no proof where a decision was a close call; one that agrees counts either way.
    sure = [row for row in found["prompts"] if _worst(row) <= TOLERANCE or not row["margin"] < CLOSE_CALL]
    if 2 * len(sure) < len(found["prompts"]):
        problems.append(f"only {len(sure)} of {len(found['prompts'])} prompts agree, the others may be close calls")
    worst = max(map(_worst, sure), default=0.0)
    if not worst <= TOLERANCE:  # not >: a NaN must fail
        problems.append(f"logits differ by {worst:.3g}, more than {TOLERANCE:g}")
    gap = max((row["largest_gap_of_another_argmax"] for row in sure), default=0.0)
    if gap > TIE:
        problems.append(f"another most likely token, ahead by {gap:.3g}")
    for kind, what in (("other_ids", "processor"), ("other_plain_ids", "tokenizer")):
        if found[kind]:
            problems.append(f"the {what} encodes {found[kind][0]!r} differently")
    if found["other_images"]:
        problems.append(f"{found['other_images']} images are drawn or read differently")
    return {
        "passed": not problems,
        "problems": problems,
        "max_abs": worst,
        "tolerance": TOLERANCE,
        "argmax_same": sum(row["argmax_same"] for row in sure),
        "tokens": sum(row["tokens"] for row in sure),
        "compared": len(sure),
        "close_calls": len(found["prompts"]) - len(sure),
    }


def _worst(row: dict[str, Any]) -> float:
    """Largest difference of a prompt, whole, with a cache or left-padded."""
    ways = [row[way] for way in ("max_abs", "cached_max_abs", "padded_max_abs")]
    return math.nan if any(map(math.isnan, ways)) else max(ways)

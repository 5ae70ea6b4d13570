# python docs/measurements/prepare_rate.py MEGATRON_LM [MEGABYTES]      (a checkout of core_v0.16.1)
"""Processor time of `mmscale data prepare` and Megatron-LM's tools/preprocess_data.py for one text and tokenizer.

Both run with one worker, on the text and on a hundredth of it: the difference leaves out imports and starts. The lower
bound is the tokenizer alone, with the ids written to a file.
"""

from __future__ import annotations

import io
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import PIL.Image
from tokenizers import Tokenizer

from mmscale.data.modalities.image_files import read_pixels
from mmscale.data.modalities.image_tokens import KMeansTokenizer, LevelsTokenizer
from mmscale.data.modalities.text_tokens import TextTokenizer

ENVIRONMENT = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
IDS = 8192
MEGATRON = """
import importlib.util, runpy, sys
from unittest.mock import MagicMock
if importlib.util.find_spec('triton') is None:  # imported by way of the arguments, and not used
    sys.modules['megatron.core.transformer.custom_layers.batch_invariant_kernels'] = MagicMock()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def corpus(file: Path, size: int, *, megatron: bool) -> int:
    """Python's help texts over and over, numbered so that no two documents are one; returns bytes of text."""
    paragraphs = [re.sub(r"\s+", " ", part) for text in topics.values() for part in text.split("\n\n")]
    written = number = 0
    with file.open("w") as stream:
        while written < size:
            start = number * 7 % len(paragraphs)
            text = f"{number} " + " ".join(paragraphs[start : start + 12])
            record = {"text": text} if megatron else {"content": [{"type": "text", "text": text}]}
            stream.write(json.dumps(record) + "\n")
            written, number = written + len(text.encode()), number + 1
    return written


def seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Processor time of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(ended.stderr[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(megatron: Path, size: int) -> None:
    """Print a row for each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {}
        for label, own in (("whole", size), ("little", size // 100)):
            sizes[label] = corpus(folder / f"{label}.jsonl", own, megatron=False)
            corpus(folder / f"{label}-megatron.jsonl", own, megatron=True)
        texts = [json.loads(line)["text"] for line in (folder / "whole-megatron.jsonl").open()]
        trained = TextTokenizer.train(texts[:500], size=IDS)
        (folder / "tokenizer").mkdir()
        trained.tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
        (folder / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        rows = {"tokenizer alone, ids written": bound(folder, texts)}
        commands = {
            "mmscale data prepare": lambda label: [
                *(sys.executable, "-m", "mmscale", "data", "prepare", "--documents", f"{label}.jsonl"),
                *("--out", f"out-{label}", "--workers", "1", "--json", "data.prepare.held_out=0"),
                *("data.prepare.text.load=tokenizer/tokenizer.json", f"vocab.modalities=[{{name: text, size: {IDS}}}]"),
            ],
            "Megatron-LM tools/preprocess_data.py": lambda label: [
                *(sys.executable, "-c", MEGATRON, str(megatron / "tools/preprocess_data.py")),
                *("--input", f"{label}-megatron.jsonl", "--output-prefix", f"megatron-{label}", "--workers", "1"),
                *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")),
            ],
        }
        for what, command in commands.items():
            environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(megatron)])}
            took = {label: seconds(command(label), folder, environment) for label in sizes}
            rows[what] = (took["whole"] - took["little"]) / (sizes["whole"] - sizes["little"]) * 1e6
        for what, each in rows.items():
            sys.stdout.write(f"{what:40} {each:6.3f} s of processor time per MB, {1 / each:6.2f} MB/s a core\n")
    for what, rate in pictures().items():
        sys.stdout.write(f"{what:40} {rate:6.0f} pictures/s a core\n")


def pictures(count: int = 200) -> dict[str, float]:
    """Pictures per processor second: JPEGs of 256 x 256 pixels are read as 64 x 64 and become codes."""
    random, files = np.random.default_rng(0), []
    for _ in range(count):
        stream = io.BytesIO()
        small = PIL.Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8))
        small.resize((256, 256)).save(stream, format="JPEG")
        files.append(stream.getvalue())
    book = random.integers(0, 256, (1024, 8 * 8 * 3)).astype(np.uint8)
    tokenizers = {"levels": LevelsTokenizer(64, 3, 256), "kmeans, 1024 codes of 8 x 8": KMeansTokenizer(64, 3, 8, book)}
    began = time.process_time()
    pixels = np.stack([read_pixels(file, size=64, channels=3) for file in files])
    reading = time.process_time() - began
    found = {"read only": count / reading}
    for name, tokenizer in tokenizers.items():
        began = time.process_time()
        for first in range(0, count, 64):
            tokenizer.encode(pixels[first : first + 64])
        found[name] = count / (reading + time.process_time() - began)
    return found


def bound(folder: Path, texts: list[str]) -> float:
    """Processor seconds per MB of the tokenizer alone."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    began = time.process_time()
    with (folder / "ids.bin").open("wb") as stream:
        for first in range(0, len(texts), 64):
            for encoding in tokenizer.encode_batch(texts[first : first + 64], add_special_tokens=False):
                stream.write(np.asarray(encoding.ids, np.uint16).tobytes())
    return (time.process_time() - began) / sum(len(text.encode()) for text in texts) * 1e6


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main(Path(sys.argv[1]), int(float(sys.argv[2]) * 1e6) if len(sys.argv) > 2 else 20_000_000)

"""Writes documents about digits in three modalities: a spoken name, a handwritten picture, and words.

    apt-get install espeak-ng
    python examples/speech/documents.py data/speech-documents

Recordings are made by espeak-ng, in several voices, speeds and pitches; pictures are scikit-learn's handwritten digits.
A fifth of the recordings, and with them all of their documents, is held out; pictures of both splits differ, too.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from sklearn.datasets import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("en-us", "en-us+m3", "en-us+f2", "en-us+f4", "en-gb", "en-gb-scotland")
SPEEDS = (120, 140, 160, 185)  # words per minute
PITCHES = (25, 45, 65, 85)
SAY = ("say {}", "how does {} sound", "read {} aloud")
WRITE = ("this is {}", "somebody says {}", "you hear {}")
HELD_OUT = 5  # one recording in five


def number_of(text: str) -> int:
    """A number that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def record(file: Path, *, word: str, voice: str, speed: int, pitch: int) -> None:
    """One WAV file of espeak-ng, unless it is there."""
    if file.is_file():
        return
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(file), word]
    subprocess.run(command, check=True, capture_output=True)


def pictures(folder: Path) -> dict[tuple[int, bool], list[str]]:
    """PNG files of the handwritten digits, by digit and whether they are held out."""
    digits = load_digits()
    found: dict[tuple[int, bool], list[str]] = {}
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"images/{index:04d}.png"
        PIL.Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(folder / name)
        found.setdefault((int(label), number_of(f"picture {index}") % HELD_OUT == 0), []).append(name)
    return found


def documents(name: str, audio: str, image: str, word: str, split: str) -> list[dict[str, Any]]:
    """Four documents of one recording: said for words, understood, drawn for sounds, and said for a picture."""
    sound, drawing = {"type": "audio", "path": audio}, {"type": "image", "path": image}
    choice = number_of(name)

    def text(templates: tuple[str, ...]) -> dict[str, str]:
        return {"type": "text", "text": templates[choice % len(templates)].format(word)}

    contents = {
        "say": [text(SAY), sound],
        "hear": [sound, text(WRITE)],
        "draw": [sound, drawing],
        "read": [drawing, sound],
    }
    return [
        {"id": f"{name}-{kind}", "group": name, "split": split, "content": content}
        for kind, content in contents.items()
    ]


def main() -> None:
    """Write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--voices", type=int, default=len(VOICES), help="how many of the voices")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    for kind in ("audio", "images"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    drawn = pictures(folder)
    lines = []
    for digit, voice, speed, pitch in itertools.product(range(10), VOICES[: arguments.voices], SPEEDS, PITCHES):
        name = f"{digit}-{voice}-{speed}-{pitch}"
        held_out = number_of(name) % HELD_OUT == 0
        record(folder / f"audio/{name}.wav", word=WORDS[digit], voice=voice, speed=speed, pitch=pitch)
        images = drawn[digit, held_out]
        image = images[number_of(f"image of {name}") % len(images)]
        split = "validation" if held_out else "train"
        lines += documents(name, f"audio/{name}.wav", image, WORDS[digit], split)
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sys.stdout.write(f"{len(lines)} documents in {folder / 'documents.jsonl'}\n")


if __name__ == "__main__":
    main()

"""Writes long documents in which questions are about what was said earlier.

    python examples/long_documents/write_documents.py data/documents-8k --length 8192 --pictures

A document names each of many keys once, with a number, and asks for it later, `--times` times:

    badoseven kifutwo ? bado seven nolunine ? nolu nine ? kifu two

Nothing but earlier places of a key tells its number. The order is random, so questions are near and far. A key is named
together with its number in one word, which is a token of its own; with `--pictures` by the key and a handwritten digit.
The tokenizer that is written beside the documents has a token for each word, so `--length` is exact. The same arguments
write the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ASK, REST, UNKNOWN = "?", ".", "<unk>"
ITEM = 1  # tokens of a key and its number in one word
PICTURE = 7  # tokens of a key and a picture: four, and two marks
QUESTION = 3  # tokens of `?`, a key and its number
FIRST_IMAGES = 1500  # of the 1797 handwritten digits; training documents show these, held-out ones the others
Piece = tuple[str, int, bool]  # a key, its number, and whether it is asked for


def keys(number: int) -> list[str]:
    """Words of two syllables."""
    syllables = ["".join(pair) for pair in itertools.product("bdfghjklmnprstvz", "aeiou")]
    found = [first + second for first, second in itertools.product(syllables, syllables)]
    return random.Random(0).sample(found, number)


def pieces(generator: random.Random, *, names: list[str], length: int, item: int, times: int) -> list[Piece]:
    """What a document of `length` tokens consists of.

    Args:
        generator: draws keys, numbers and their order.
        names: keys to choose from; each stands in a document at most once as named.
        length: of the document [tokens].
        item: of a key that is named [tokens].
        times: how often each key is asked for.

    Rests, with the key "", fill a document that has more room than there are keys.
    """
    number = min(len(names), (length - 2) // (item + times * QUESTION))
    chosen = generator.sample(names, number)
    room = length - 2 - number * (item + times * QUESTION)
    places = [*chosen * (1 + times), *[""] * room]
    generator.shuffle(places)
    digits: dict[str, int] = {}
    found = []
    for key in places:
        if not key:
            found.append(("", 0, False))
        elif key in digits:
            found.append((key, digits[key], True))
        else:
            digits[key] = generator.randrange(10)
            found.append((key, digits[key], False))
    return found


def content(parts: list[Piece], images: dict[int, list[str]], generator: random.Random) -> list[Any]:
    """The pieces as documents have them; a picture for each number that is named, if there are pictures."""
    found: list[dict[str, str]] = []
    words: list[str] = []
    for key, digit, asked in parts:
        if not key:
            words.append(REST)
        elif asked or not images:
            words.extend([ASK, key, WORDS[digit]] if asked else [key + WORDS[digit]])
        else:
            found.append({"type": "text", "text": " ".join([*words, key])})
            found.append({"type": "image", "path": generator.choice(images[digit])})
            words = []
    return [*found, {"type": "text", "text": " ".join(words)}] if words else found


def write_pictures(folder: Path) -> dict[bool, dict[int, list[str]]]:
    """PNG files of the handwritten digits: by whether they are held out, and by digit."""
    import numpy as np
    import PIL.Image
    from sklearn.datasets import load_digits

    (folder / "images").mkdir(exist_ok=True)
    found: dict[bool, dict[int, list[str]]] = {side: {digit: [] for digit in range(10)} for side in (False, True)}
    data = load_digits()
    for index, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        name = f"images/{index:04d}.png"
        PIL.Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(folder / name)
        found[index >= FIRST_IMAGES][int(label)].append(name)
    return found


def write_tokenizer(file: Path, names: list[str]) -> None:
    """A token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [UNKNOWN, ASK, REST, *WORDS, *names, *(name + word for name in names for word in WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(file))


def main() -> None:
    """Write documents.jsonl, tokenizer.json and, if wanted, images/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a document")
    parser.add_argument(
        "--shortest", type=int, help="tokens of the shortest document to train on; default: all have --length"
    )
    parser.add_argument("--documents", type=int, default=2000, help="documents to train on")
    parser.add_argument("--held-out", type=int, default=40, help="documents to measure on")
    parser.add_argument("--keys", type=int, default=1024, help="different keys, at most 6400")
    parser.add_argument("--times", type=int, default=1, help="how often each key is asked for")
    parser.add_argument("--pictures", action="store_true", help="show numbers as handwritten digits")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    names = keys(given.keys)
    write_tokenizer(given.out / "tokenizer.json", names)
    images: dict[bool, dict[int, list[str]]] = write_pictures(given.out) if given.pictures else {False: {}, True: {}}
    generator, item = random.Random(f"{given.seed} {given.length}"), PICTURE if given.pictures else ITEM
    with (given.out / "documents.jsonl").open("w") as file:
        for number in range(given.documents + given.held_out):
            held_out = number >= given.documents
            shortest = given.length if held_out else given.shortest or given.length
            length = round(math.exp(generator.uniform(math.log(shortest), math.log(given.length))))
            parts = pieces(generator, names=names, length=length, item=item, times=given.times)
            document = {
                "id": f"{given.length}-{given.seed}-{number}",
                "split": "validation" if held_out else "train",
                "content": content(parts, images[held_out], generator),
            }
            file.write(json.dumps(document) + "\n")
    sys.stdout.write(f"{given.documents} + {given.held_out} documents of {given.length} tokens in {given.out}\n")


if __name__ == "__main__":
    main()

"""Ways to draw digits, and filling of holes, with the quickstart's model trained with causal masking.

    python docs/measurements/decoding.py FOLDER

Prepares the digits, trains the model of configs/quickstart.yaml and its causal routers in one process, draws 1,600
digits in each way, and fills holes of held-out documents: the tables of docs/decoding.md and
docs/infilling.md. They go to the terminal and to FOLDER/decoding.json. A second start finds the trained model.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
from decoding_ways import MASKED, PLAIN, scores, shares

from checkpoints_tools.huggingface.generator import Generator, open_generator
from checkpoints_tools.huggingface.prompts import Prompt
from checkpoints_tools.huggingface.shipped.infilling_moma import Holes
from mmscale.inference.generate import Sampling, generate

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
sys.path.append(str(EXAMPLE))
from recognise import labelled, recognise  # noqa: E402
from write_documents import DRAW, WORDS  # noqa: E402

log = logging.getLogger(__name__)
EACH, BEST_OF = 160, (1, 2, 4, 8)  # drawings of each digit; numbers of samples of which the best is kept
RANKED = ("no guidance", "guidance 2", "guidance 2 from <mask>", "CD-K, k 4, alpha 0.3")
MIDDLE, HIDDEN = (0, 1, 4, 2), slice(4, 12)  # of a picture of 4 x 4 tokens: its second and third row, in one hole


def trained(folder: Path) -> Path:
    """The run with its causal routers."""
    settings = ["vocab.reserved=true", "objective.cm3_rate=0.5", "objective.image_spans=partial", "parallel.ep=1"]
    place = ["run.name=drawings", f"run.dir={folder / 'runs'}", f"data.path={folder / 'data'}", "log.tensorboard=false"]
    config, documents = "configs/quickstart.yaml", folder / "documents"
    subprocess.run([sys.executable, EXAMPLE / "write_documents.py", "--out", documents], check=True)
    named = [
        f"data.prepare.documents=[{documents / 'documents.jsonl'}]",
        f"data.prepare.tasks.digit={documents / 'digit.jsonl'}",
    ]
    for command in (
        ["data", "prepare", config, "--out", str(folder / "data"), "vocab.reserved=true", *named],
        ["train", config, *settings, *place],
        ["train", config, "--stage", "auxiliary", *settings, *place],
    ):
        subprocess.run([sys.executable, "-m", "mmscale", *command], check=True)
    return folder / "runs" / "drawings"


def drawn(model: Generator, documents: Path, way: dict, *, ranked: bool) -> dict:
    """Shares of digits that are read as asked, by what ranks samples and of how many the best is kept."""
    prompts = [Prompt(f"draw a {word}", draw=True) for word in WORDS]
    samples = model.sample(prompts, count=EACH, sampling=Sampling(max_tokens=17, batch=EACH * len(WORDS), **way))
    right = np.array([recognise(documents, [(one.prompt.text, np.asarray(one.pieces[0]))])["right"] for one in samples])
    if not ranked:
        return {"one": float(right.mean())}
    found = {"any of them": shares(right, right.astype(float), best_of=BEST_OF)}
    for name, masked, caption in (
        ("prompt in the hole", True, None),
        ("prompt behind", False, None),
        ("caption behind", False, "this is a {}"),
    ):
        captions = caption and [caption.format(one.prompt.text.split()[-1]) for one in samples]
        found[name] = shares(right, scores(model, samples, masked=masked, captions=captions), best_of=BEST_OF)
    return found


def filled(model: Generator, documents: Path) -> dict:
    """Shares of words and of image tokens that are restored exactly, on held-out pictures."""
    images, labels = labelled(documents, "validation")
    processor, words = model.processor, [WORDS[label] for label in labels]
    result = {}
    for name, pieces in {
        "word before the picture": lambda picture: ["draw a", processor.HOLE, picture],
        "word before the picture, hole behind a space": lambda picture: ["draw a ", processor.HOLE, picture],
        "word behind the picture": lambda picture: [picture, "this is a", processor.HOLE],
    }.items():
        found = fillings(model, [pieces(picture[..., None]) for picture in images])
        written = [processor.tokenizer.decode(ids).strip() for ids in found]
        result[name] = float(np.mean([one == word for one, word in zip(written, words, strict=True)]))
    prompts = [processor.encode([picture[..., None], "this is a"]) for picture in images]
    read = [processor.tokenizer.decode(one.ids[:1]).strip() for one in generated(model, prompts, max_tokens=2)]
    result["word behind the picture, continued"] = float(
        np.mean([one == word for one, word in zip(read, words, strict=True)])
    )
    truth = codes_of(model, images)
    captions = [DRAW[number % len(DRAW)].format(word) for number, word in enumerate(words)]
    masked = [{"type": "image", "image": picture[..., None], "mask": MIDDLE} for picture in images]
    prompts = [
        [*model.encode(Prompt(caption, draw=True)), *own[: HIDDEN.start].tolist()]
        for caption, own in zip(captions, truth, strict=True)
    ]
    text = range(processor.image_range[0])
    before = [one.ids for one in generated(model, prompts, never=text, max_tokens=HIDDEN.stop - HIDDEN.start)]
    common = codes_of(model, labelled(documents, "train")[0])[:, HIDDEN]
    for name, tokens in {
        "image tokens from both sides": fillings(model, [list(pair) for pair in zip(captions, masked, strict=True)]),
        "image tokens from those before": before,
        "image tokens, the most frequent of each place": [np.bincount(column).argmax() for column in common.T],
    }.items():
        result[name] = float((np.array(tokens) == truth[:, HIDDEN]).mean())
    return result


def codes_of(model: Generator, images: np.ndarray) -> np.ndarray:
    """Ids of the tokens of pictures, [n, 16]."""
    codes: np.ndarray = model.processor.codes.encode(images[..., None]) + model.processor.image_range[0]
    return codes


def fillings(model: Generator, documents: list) -> list:
    """What the model writes into the only hole of each document, always the most likely token."""
    holes = [Holes(model.processor, document) for document in documents]
    prompts = [one.prompt([]) for one in holes]
    grammars, ends = [holes[0].grammar(0)], (holes[0].end,)
    return [one.ids for one in generated(model, prompts, grammars=grammars, ends=ends, max_tokens=12)]


def generated(model: Generator, prompts: list, *, max_tokens: int, **options: object) -> list:
    """Continuations, always the most likely token."""
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, batch=len(prompts))
    return generate(model.model, prompts, sampling=sampling, items=[], context=256, **options)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    opened = open_generator(trained(place))
    result = {"filled": filled(opened, place / "documents")}
    log.info("%s", json.dumps(result["filled"], indent=1))
    for title, settings in {**PLAIN, **MASKED}.items():
        result[title] = drawn(opened, place / "documents", settings, ranked=title in RANKED)
        log.info("%s | %s", title, json.dumps(result[title]))
        (place / "decoding.json").write_text(json.dumps(result, indent=1))

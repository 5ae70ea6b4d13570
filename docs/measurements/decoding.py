"""Ways to draw digits, and filling of holes, with the quickstart's model trained with causal masking.

    python docs/measurements/decoding.py FOLDER

Prepares the digits, trains the model of configs/quickstart.yaml and its causal routers in one process, draws 1,600
digits in each way, and fills holes of held-out documents: the tables of docs/infilling.md. They go to the terminal
and to FOLDER/decoding.json. A second start finds the trained model.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np

from checkpoints_tools.huggingface.generator import Generator, open_generator
from checkpoints_tools.huggingface.infill import infill
from checkpoints_tools.huggingface.prompts import Prompt
from checkpoints_tools.huggingface.shipped.likelihood_moma import document_behind, log_likelihoods
from mmscale.data.built_in.digits import DRAW, WORDS, labelled
from mmscale.data.modalities.image_files import save_png
from mmscale.inference.generate import Sampling, generate
from mmscale.inference.recognise import recognise

log = logging.getLogger(__name__)
EACH, BEST_OF = 160, (1, 2, 4, 8)  # drawings of each digit; numbers of samples of which the best is kept
MASK = {"unconditional": "mask"}
WAYS = {
    "no guidance": {},
    "guidance 1.5": {"guidance": 1.5},
    "guidance 2": {"guidance": 2.0},
    "guidance 3": {"guidance": 3.0},
    "guidance 1.5 from <mask>": {"guidance": 1.5, **MASK},
    "guidance 2 from <mask>": {"guidance": 2.0, **MASK},
    "guidance 3 from <mask>": {"guidance": 3.0, **MASK},
    "CD-K, k 1, alpha 0.1": {"cd_k": 1, "cd_alpha": 0.1},
    "CD-K, k 4, alpha 0.3": {"cd_k": 4, "cd_alpha": 0.3},
    "CD-K, k 4, alpha 1": {"cd_k": 4, "cd_alpha": 1.0},
    "CD-K, k 4, alpha 0.3 from <mask>": {"cd_k": 4, "cd_alpha": 0.3, **MASK},
    "CD-K, k 4, alpha 1 from <mask>": {"cd_k": 4, "cd_alpha": 1.0, **MASK},
}
MIDDLE = (0, 1, 4, 2)  # of a picture of 4 x 4 tokens: its second and third row, 8 tokens in one hole


def trained(folder: Path) -> Path:
    """The run with its causal routers."""
    settings = ["vocab.reserved=true", "objective.cm3_rate=0.5", "objective.image_spans=partial", "parallel.ep=1"]
    place = ["run.name=drawings", f"run.dir={folder / 'runs'}", f"data.path={folder / 'data'}", "log.tensorboard=false"]
    config = "configs/quickstart.yaml"
    for command in (
        ["data", "prepare", config, "--out", str(folder / "data"), "vocab.reserved=true"],
        ["train", config, *settings, *place],
        ["train", config, "--stage", "auxiliary", *settings, *place],
    ):
        subprocess.run([sys.executable, "-m", "mmscale", *command], check=True)
    return folder / "runs" / "drawings"


def drawn(model: Generator, way: dict) -> dict:
    """Shares of digits that are read as asked, by what ranks samples and of how many the best is kept."""
    prompts = [Prompt(f"draw a {word}", draw=True) for word in WORDS]
    samples = model.sample(prompts, count=EACH, sampling=Sampling(max_tokens=17, **way))
    pictures = [np.asarray(one.pieces[0]) for one in samples]
    right = np.array(
        [recognise([(one.prompt.text, picture)]).right for one, picture in zip(samples, pictures, strict=True)]
    )
    found = {"any of them": shares(right, right.astype(float))}
    for name, masked, caption in (
        ("prompt in the hole", True, None),
        ("prompt behind", False, None),
        ("caption behind", False, "this is a {}"),
    ):
        documents = [
            document_behind(
                model.processor,
                model.encode(one.prompt),
                one.ids,
                masked=masked,
                text=caption and caption.format(one.prompt.text.split()[-1]),
            )
            for one in samples
        ]
        found[name] = shares(right, np.array(log_likelihoods(model.model, documents, pad=0)))
    return found


def shares(right: np.ndarray, scores: np.ndarray) -> dict:
    """Share of kept drawings that are read as asked, by the number of samples of which the best is kept."""
    found = {}
    for number in BEST_OF:
        best = scores.reshape(-1, number).argmax(axis=1)
        found[number] = float(right.reshape(-1, number)[np.arange(len(best)), best].mean())
    return found


def filled(model: Generator, folder: Path) -> dict:
    """Shares of words and of image tokens that are restored exactly, on held-out pictures."""
    images, labels = labelled(held_out=True)
    codes = model.processor.codes
    greedy = Sampling(temperature=0.0, max_tokens=12)
    words = {"word before the picture": 0, "word behind the picture": 0}
    both, prompts = [], []
    folder.mkdir(exist_ok=True)
    truth = codes.encode(images[..., None]) + model.processor.image_range[0]
    for number, (picture, label) in enumerate(zip(images, labels, strict=True)):
        file = folder / f"{number}.png"
        save_png(picture[..., None], file)
        word = WORDS[label]
        for name, text in zip(words, ("draw a <hole><image>", "<image>this is a <hole>"), strict=True):
            (one,) = infill(model, [Prompt(text, (file,))], mask=None, count=1, sampling=greedy)
            text_of = "".join(piece for piece in one.pieces if isinstance(piece, str))
            words[name] += text_of.split()[-1:] == [word] and one.ended
        caption = DRAW[number % len(DRAW)].format(word)
        (one,) = infill(model, [Prompt(f"{caption}<image>", (file,))], mask=MIDDLE, count=1, sampling=greedy)
        first = one.ids.index(model.processor.boi) + 1
        both.append(one.ids[first + 4 : first + 12])
        prompts.append([*model.encode(Prompt(caption, draw=True)), *truth[number, :4].tolist()])
    plain = generate(
        model.model,
        prompts,
        sampling=Sampling(temperature=0.0, max_tokens=8),
        items=[],
        context=256,
        never=range(model.processor.image_range[0]),
    )
    restored = {"from both sides": np.array(both), "from the tokens before": np.array([one.ids for one in plain])}
    common = codes.encode(labelled(held_out=False)[0][..., None])[:, 4:12] + model.processor.image_range[0]
    most = np.array([np.bincount(column).argmax() for column in common.T])
    result = {name: count / len(labels) for name, count in words.items()}
    result |= {f"image tokens {name}": float((rows == truth[:, 4:12]).mean()) for name, rows in restored.items()}
    return result | {"image tokens, the most frequent of each place": float((truth[:, 4:12] == most).mean())}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    opened = open_generator(trained(place))
    result = {"filled": filled(opened, place / "pictures")}
    log.info("%s", json.dumps(result["filled"], indent=1))
    for title, settings in WAYS.items():
        result[title] = drawn(opened, settings)
        log.info("%s | %s", title, json.dumps(result[title]))
        (place / "decoding.json").write_text(json.dumps(result, indent=1))

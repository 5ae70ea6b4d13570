"""`mmscale data dedup` on planted duplicates, captions that repeat, and held-out documents in training."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.data.dedup import apply, clusters, compared, contamination, pairs, picture_hashes, words
from mmscale.data.dedup.clusters import DuplicateForest
from mmscale.data.dedup.contamination import HeldOutContent
from mmscale.data.dedup.pairs import RUN, DuplicateRule
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.inspect_set import summary
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.selection import FILE, DocumentWeights, read_selection
from mmscale.data.progress import Reporter
from mmscale.errors import DataError
from tests.unit.data.samples import config, image, save_picture, text, write_jsonl

SILENT = Reporter(enabled=False)
RNG = np.random.default_rng(0)
WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in ("n", "r", "st", "ll", "mp", "x")]


def sentence(length: int, rng: np.random.Generator = RNG) -> list[str]:
    return [WORDS[number] for number in rng.integers(0, len(WORDS), length)]


def jaccard(one: Sequence[str], other: Sequence[str]) -> float:
    """Of the sets of runs of 5 words, by definition."""
    a, b = ({" ".join(own[i : i + 5]) for i in range(max(1, len(own) - 4))} for own in (one, other))
    return len(a & b) / len(a | b)


def changed(own: Sequence[str], wanted: float) -> list[str]:
    """A text whose Jaccard index with another is this, or a little more: its first words are others."""
    count = int((1 - wanted) / (1 + wanted) * (len(own) - 4))
    return [*(f"other{number}" for number in RNG.integers(1 << 60, size=count)), *own[count:]]


def made(folder: Path, documents: Sequence[dict[str, Any]], **prepare_settings: Any) -> Path:
    write_jsonl(folder / "docs.jsonl", documents)
    settings = {"held_out": 0.0, "source": "documents", "part_documents": 50} | prepare_settings
    settings["documents"] = [str(folder / "docs.jsonl")]
    prepare(config(vocab={"text": 600, "image": 16}, **settings), folder / "set", progress=False)
    return folder / "set"


def document(number: int, *content: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": f"d{number}", "content": list(content)} | more


def kept(folder: Path, **options: Any) -> list[int]:
    """Numbers of the documents that stay; `mmscale data prepare` keeps their order."""
    rule = DuplicateRule(
        **{key: options.pop(key) for key in list(options) if key in {f.name for f in dataclasses.fields(DuplicateRule)}}
    )
    apply.dedup(folder, rule=rule, reporter=SILENT, **options)
    return kept_of(folder)


def kept_of(folder: Path) -> list[int]:
    found = read_selection(folder)
    assert found is not None
    weights = DocumentWeights(folder, found.identity, documents=found.documents).weights(np.arange(found.documents))
    return np.flatnonzero(weights).tolist()


# ------------------------------------------------------------------------------------------------- numbers


def slow_minhash(own: Sequence[str]) -> list[int]:
    """The signature by definition, in Python's integers: the oracle of the notebook's form of MinHash."""
    hashes = words.hashes_of(own)
    shingles = {int(one) for one in words.shingles(hashes, 5)}
    return [
        min((one * int(a) + int(b)) % 2**64 for one in shingles) >> 32
        for a, b in zip(words._FACTORS, words._SUMMANDS, strict=True)
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=60))
def test_a_signature_is_that_of_the_definition(own: list[str]) -> None:
    assert words.signature(words.shingles(words.hashes_of(own), 5)).tolist() == slow_minhash(own)


def test_signatures_estimate_the_jaccard_index() -> None:
    errors, rng = [], np.random.default_rng(7)
    for wanted in (0.3, 0.5, 0.8, 0.9) * 10:
        own = sentence(300, rng)
        other = changed(own, wanted)
        j = jaccard(own, other)
        a, b = (words.signature(words.shingles(words.hashes_of(one), 5)) for one in (own, other))
        errors.append(((a == b).mean() - j) / np.sqrt(j * (1 - j) / words.MINIMA))
    assert abs(np.mean(errors)) < 3 / np.sqrt(len(errors))
    assert 0.5 < np.std(errors) < 1.5  # the standard error of a binomial


def test_words_of_scripts_without_spaces_and_of_signs() -> None:
    assert words.words_of("A red  Bus, 赤いbus :)") == ["a", "red", "bus", ",", "赤", "い", "bus", ":", ")"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 63), max_size=6, unique=True), st.integers(0, 6))
def test_hashes_within_the_distance_share_a_table(bits: int, flipped: list[int], distance: int) -> None:
    other = bits
    for bit in flipped[:distance]:
        other ^= 1 << bit
    one, two = picture_hashes.table_keys(np.array([bits, other], np.uint64), distance=distance)
    assert (one == two).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40), st.integers(1, 5))
def test_clusters_are_the_connected_components(
    tmp_path_factory: pytest.TempPathFactory, links: Any, batch: int
) -> None:
    forest = DuplicateForest(tmp_path_factory.mktemp("forest") / "f", 30)
    component = list(range(30))  # by definition: relabel until nothing changes
    for start in range(0, len(links), batch):
        forest.join(np.array(links[start : start + batch], np.int64).reshape(-1, 2))
        for a, b in links[start : start + batch]:
            low, high = sorted((component[a], component[b]))
            component = [low if one == high else one for one in component]
    assert forest.roots(np.arange(30)).tolist() == component


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50)), max_size=60, unique=True))
def test_candidates_have_a_key_in_common_and_small_groups_are_compared_whole(entries: list[tuple[int, int]]) -> None:
    run = np.array(sorted(entries), RUN)
    found = {tuple(pair) for chunk in pairs.candidates(run) for pair in chunk.tolist()}
    wanted = set()
    for key in range(5):
        own = sorted(document for k, document in entries if k == key)
        everything = {(a, b) for i, a in enumerate(own) for b in own[i + 1 :]}
        wanted |= everything if len(own) <= 9 else {pair for pair in everything if pair[0] == own[0]}
        assert {pair for pair in found if pair in everything} >= wanted & everything
    assert wanted <= found
    assert len(found) <= 9 * len(entries)


# ------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("small", [False, True])
def test_planted_duplicates_are_found_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """Recall at Jaccard 0.8 and above is at least 0.95; below 0.5 nothing is merged."""
    if small:  # several slices and ranges of keys: the same result
        monkeypatch.setattr(compared.slices, "__kwdefaults__", {"size": 37})
        monkeypatch.setattr("mmscale.data.dedup.work.RANGE", 500)
        monkeypatch.setattr(clusters, "_CHUNK", 64)
        monkeypatch.setattr(pairs, "_PAIRS", 10)
    rng = np.random.default_rng(3)
    originals = [sentence(120, rng) for _ in range(120)]
    near = [changed(own, 0.8) for own in originals[:60]]
    far = [changed(own, 0.4) for own in originals[60:80]]
    assert all(0.8 <= jaccard(a, b) < 0.85 for a, b in zip(originals, near, strict=False))
    everything = [*originals, *near, *far, *originals[:5]]
    folder = made(tmp_path, [document(n, text(" ".join(own))) for n, own in enumerate(everything)])
    stays = set(kept(folder))
    assert stays >= set(range(120)) | set(range(180, 200)), "an original, or a text of another, was merged"
    assert np.mean([n not in stays for n in range(120, 180)]) >= 0.95
    assert not stays & set(range(200, 205)), "an equal text"


def pixels(folder: Path, seed: int) -> str:
    save_picture(folder / f"img/{seed}.png", seed)
    return f"img/{seed}.png"


def test_captions_repeat_and_are_kept(tmp_path: Path) -> None:
    """The same words under other pictures, the same picture under other words, and the other direction, are others."""
    captions = ["a red bus", "the icon is a small house with a garden and two trees behind it in the evening sun"]
    documents = [
        document(10 * n + k, *[image(pixels(tmp_path, n)), text(caption)][:: 1 if k < 2 else -1])
        for n in range(12)
        for k, caption in enumerate([*captions, *captions])
    ]
    again = [document(900 + n, *documents[n]["content"]) for n in range(8)]
    folder = made(tmp_path, [*documents, *again])
    assert kept(folder) == list(range(len(documents)))
    assert kept(folder, match="image") == [n for n in range(len(documents)) if n % 2 == 0]  # of each direction
    assert kept(folder, exact=True) == list(range(len(documents)))
    assert len(kept(folder, match="text")) == 4  # two captions in two directions


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_two_documents_with_other_captions_are_ever_merged(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Short captions differ in one word; pictures in one patch or not at all."""
    tmp_path, rng = tmp_path_factory.mktemp("captions"), np.random.default_rng(seed)
    short = sorted({" ".join(sentence(int(rng.integers(1, 8)), rng)) for _ in range(20)})
    documents = [document(n, image(pixels(tmp_path, int(rng.integers(3)))), text(own)) for n, own in enumerate(short)]
    documents += [document(100 + n, text(own)) for n, own in enumerate(short)]
    assert kept(made(tmp_path, documents)) == list(range(len(documents)))


def drawn(folder: Path, name: str, array: np.ndarray) -> str:
    (folder / "img").mkdir(exist_ok=True)
    PIL.Image.fromarray(array).save(folder / f"img/{name}.png")
    return f"img/{name}.png"


def test_pictures_that_look_alike_are_found_and_parts_that_differ_are_not(tmp_path: Path) -> None:
    """Noise of a lossy code, against a mark that only one of two pictures has."""
    rng = np.random.default_rng(5)
    base = np.asarray(PIL.Image.fromarray(rng.integers(0, 200, (4, 4), np.uint8)).resize((32, 32)))
    noisy = np.clip(base.astype(int) + rng.integers(-12, 13, base.shape), 0, 255).astype(np.uint8)
    marked = base.copy()
    marked[12:16, 12:16] = 255
    files = [drawn(tmp_path, name, one) for name, one in (("a", base), ("b", noisy), ("c", marked))]
    documents = [document(n, image(file), text("a red bus")) for n, file in enumerate(files)]
    folder = made(tmp_path, documents, image={"kind": "levels", "size": 32, "channels": 1})
    assert kept(folder) == [0, 2]
    assert kept(folder, distance=-1) == [0, 1, 2]


def test_training_documents_that_hold_held_out_ones_are_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    held, phrase, long = sentence(40, rng), sentence(13, rng), sentence(60, rng)
    other, short = {"split": "train"}, "three short words"
    documents = [
        document(0, text(" ".join(held)), split="validation"),
        document(1, text(" ".join([*phrase, *long])), split="validation"),
        document(2, image(pixels(tmp_path, 1)), text("a caption of many words " * 4), split="validation"),
        document(3, text(short), split="validation"),
        document(
            4, text(" ".join([*sentence(30, rng), *held[5:20], *sentence(30, rng)])), **other
        ),  # 13 words and more
        document(5, text(" ".join([*sentence(30, rng), *held[5:17], *sentence(30, rng)])), **other),  # 12 words
        document(6, image(pixels(tmp_path, 1)), text("another caption"), **other),  # its picture
        document(7, image(pixels(tmp_path, 2)), text("a caption of many words " * 4), **other),  # its caption only
        document(8, text(short), **other),  # all of a short text
        document(9, image(pixels(tmp_path, 3)), text(short), **other),
    ]
    documents += [document(20 + n, text(" ".join([*phrase, *sentence(30, rng)])), **other) for n in range(11)]
    folder = made(tmp_path, documents)
    order = [one["id"] for one in documents if one["split"] == "train"]
    gone = {"d4", "d6", "d8"}  # and no document with the phrase, which eleven have
    assert [order[n] for n in kept(folder)] == [name for name in order if name not in gone]
    assert [order[n] for n in kept(folder, held_out=False)] == order
    elsewhere = made(tmp_path / "other", [document(0, text(" ".join(held)))])
    assert [order[n] for n in kept(folder, held_out=False, against=[elsewhere])] == [n for n in order if n != "d4"]
    with pytest.raises(DataError, match="is the data set itself"):
        kept(folder, against=[folder])


def test_every_held_out_picture_with_a_common_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 icons of one structure in other colours: their hashes are equal, and one of them is the one."""

    def of(pictures: Sequence[np.ndarray[Any, Any]]) -> picture_hashes.PictureHashes:
        bits, grey, colour = zip(*(picture_hashes.hash_picture(one) for one in pictures), strict=True)
        return picture_hashes.PictureHashes(np.array(bits, np.uint64), np.array(grey), np.array(colour))

    icons = []
    for number in range(200):
        icon = np.zeros((32, 32, 3), np.uint8)
        icon[:] = [number * 37 % 256, number * 91 % 256, number * 53 % 256]
        icon[12:20, 12:20] = 255 - icon[0, 0] // 2
        icons.append(icon)
    held, none = of(icons), np.zeros(0, np.uint64)
    table = picture_hashes.table_keys(held.bits, distance=2)
    order = np.argsort(table.ravel(), kind="stable")
    keys = table.ravel()[order], order // table.shape[1]
    content = HeldOutContent(none, none, np.array([1], np.uint64), held, keys, 2)
    assert np.unique(table[:, 0], return_counts=True)[1].max() > 16
    noise = np.random.default_rng(0).integers(-3, 4, (200, 32, 32, 3))
    copies = [np.clip(icon.astype(int) + own, 0, 255).astype(np.uint8) for icon, own in zip(icons, noise, strict=True)]
    known = picture_hashes.near(of(copies), held, distance=2)
    assert known.sum() > 150
    found = content.looks_like(of([*copies, np.zeros((32, 32, 3), np.uint8) + 128]))
    assert found[:-1][known].all() and not found[-1]
    alone = [content.looks_like(of([one])).item() for one in copies]
    assert alone == found[:-1].tolist()
    monkeypatch.setattr(contamination, "_PAIRS", 7)
    monkeypatch.setattr(contamination, "_NEAR", 3)
    assert content.looks_like(of(copies)).tolist() == alone


def test_the_scratch_folder_is_the_users(tmp_path: Path) -> None:
    """A call has a folder of its own in it; those of a call that lives stay, those of a killed one are removed."""
    folder, scratch = made(tmp_path, [document(n, text(f"number {n // 2}")) for n in range(8)]), tmp_path / "scratch"
    kinds = ("mmscale-dedup", "mmscale-dedup-live", "mmscale-dedup-killed", "mmscale-dedup-new")
    mine, live, killed, new = (scratch / name for name in kinds)
    for one in (mine, live, killed, new):
        one.mkdir(parents=True)
        (one / "data").write_text("mine")
    (killed / "lock").touch()
    with (live / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert kept(folder, scratch=scratch) == [0, 2, 4, 6]
    assert sorted(scratch.iterdir()) == sorted([mine, live, new])
    assert all((one / "data").read_text() == "mine" for one in (mine, live, new))


def test_a_cluster_that_is_too_large_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    common = sentence(100)
    documents = [document(n, text(" ".join([*common, f"end{n}"]))) for n in range(12)]
    documents += [document(100 + n, text("the same empty page")) for n in range(30)]
    folder = made(tmp_path, documents)
    with pytest.raises(
        DataError, match=r"12 documents with 12 different contents, more than 5; its first is document 0"
    ):
        kept(folder, max_cluster=5)
    assert read_selection(folder) is None
    assert not list((folder / ".cache/dedup").iterdir())
    assert kept(folder, max_cluster=12) == [0, 12]


def test_several_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path, [document(n, text(f"number {n // 2}")) for n in range(120)])
    assert kept(folder, workers=2) == kept(folder) == list(range(0, 120, 2))


# ------------------------------------------------------------------------------------------------- the result


def test_what_is_left_out_is_written_shown_and_taken_back(tmp_path: Path) -> None:
    folder = made(tmp_path, [document(n, text(f"number {n % 3}")) for n in range(9)])
    before = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*.bin")}
    assert summary(folder)["selection"] is None
    assert kept(folder) == [0, 1, 2]
    shown = summary(folder)["selection"]
    assert (shown["kept"], shown["documents"], shown["current"]) == (3, 9, True)
    assert sum(shown["tokens"].values()) * 3 == sum(summary(folder)["splits"]["train"]["tokens"].values())
    assert {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in before} == before
    assert apply.undo(folder)
    assert summary(folder)["selection"] is None
    assert not apply.undo(folder)


def test_weights_of_other_documents_are_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, [document(n, text(f"number {n % 3}")) for n in range(9)])
    kept(folder)
    content = (folder / FILE).read_text()
    (folder / FILE).write_text(content.replace(identity_of(folder, read_manifest(folder)), "0" * 16))
    assert summary(folder)["selection"]["current"] is False
    with pytest.raises(DataError, match="was made for other documents than"):
        read_selection(folder, of=identity_of(folder, read_manifest(folder)))
    assert kept(folder) == [0, 1, 2]  # the command replaces it
    (folder / FILE).write_text("{")
    with pytest.raises(DataError, match=r"selection\.json is damaged"):
        read_selection(folder)

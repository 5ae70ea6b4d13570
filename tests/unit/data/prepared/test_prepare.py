# mmscale/data/prepared/{prepare,build,parts,encode}.py, modalities/fit.py: right ids on disk, whole or not at all.
"""Tests of preparing a data set."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from mmscale.data.documents.schema import Document
from mmscale.data.modalities.image_kinds import load_image_tokenizer
from mmscale.data.modalities.text_tokens import TextTokenizer, open_text_tokenizer
from mmscale.data.prepared.encode import Encoded
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import Manifest, Part, check_vocabulary, read_manifest, read_table
from mmscale.data.prepared.parts import PartWriter, read_document
from mmscale.data.prepared.prepare import prepare
from mmscale.data.vocab import BOI, BOS, EOI, EOS, Vocabulary
from mmscale.errors import ConfigError, DataError
from tests.unit.data.samples import config, corpus, files_of, image, picture, save_picture, text, write_jsonl

SPEECH = {"text": 300, "image": 16, "speech": 10}


def quiet(settings: Any, out: Path, **kwargs: Any) -> Manifest:
    return prepare(settings, out, progress=False, **kwargs)


def documents_of(folder: Path, manifest: Manifest, split: str) -> list[list[int]]:
    """Ids as megatron reads them."""
    found = []
    for part in manifest.splits[split].parts:
        dataset = IndexedDataset(str(folder / part.prefix))
        assert len(dataset) == part.documents == len(dataset.document_indices) - 1
        found += [dataset[index].tolist() for index in range(len(dataset))]
        del dataset  # its arrays die with it
    return found


def rejections(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {record["id"]: record["reason"] for record in map(json.loads, lines)}


# --------------------------------------------------------------------------------------------------------- content


def test_ids_on_disk(tmp_path: Path) -> None:
    save_picture(tmp_path / "1.png", 1)
    speech = {"type": "tokens", "modality": "speech", "ids": [0, 9]}
    codes = {"type": "tokens", "modality": "image", "ids": list(range(16))}
    file = write_jsonl(
        tmp_path / "d.jsonl",
        [
            {"id": "a", "content": [text("see "), image("1.png"), text("<boi>"), speech], "loss": "text"},
            {"id": "b", "content": [codes], "loss": ["image", "speech"]},
            {"id": "c", "content": [text("x")]},
        ],
    )
    out = tmp_path / "out"
    manifest = quiet(config(vocab=SPEECH, documents=[str(file)], held_out=0), out)
    assert read_manifest(out) == manifest
    tokenizer = open_text_tokenizer(out)
    see, boi, x = (tokenizer.encode(word).tolist() for word in ("see ", "<boi>", "x"))
    levels = (picture(1).ravel() // 17 + np.int64(300)).tolist()
    expected = [
        [BOS, *see, BOI, *levels, EOI, *boi, 316, 325, EOS],
        [BOS, BOI, *range(300, 316), EOI, EOS],
        [BOS, *x, EOS],
    ]
    assert documents_of(out, manifest, "train") == expected
    assert min(boi) > EOI
    (part,) = manifest.splits["train"].parts
    assert [read_document(out, part, index).tolist() for index in range(3)] == expected
    first = len(see) + len(boi) + 4
    table = [[first, 16, 2, 0b001], [4, 16, 0, 0b110], [3, 0, 0, 0b111]]
    np.testing.assert_array_equal(read_table(out, part), table)
    assert part.tokens == {"text": first + 7, "image": 32, "speech": 2}
    assert manifest.splits["validation"].parts == () and manifest.tokens_per_image == 16


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"content": [text("word " * 60)]}, "the document is too long: "),
        ({"content": [image("1.png")] * 3}, "too long: 56 tokens, max_document_tokens is 50"),
        ({"content": [{"type": "tokens", "modality": "video", "ids": [1]}]}, "no modality 'video', only text, image"),
        ({"content": [{"type": "tokens", "modality": "image", "ids": [16]}]}, "id 16 is outside the 16 ids"),
        ({"content": [{"type": "tokens", "modality": "image", "ids": [1, 2]}]}, "2 tokens instead of 16"),
        ({"content": [{"type": "tokens", "modality": "text", "ids": [7, 3]}]}, "id 3 of modality text is a special"),
        ({"content": [text("x")], "loss": "video"}, "loss names 'video'"),
        ({"content": [image("bad.png")]}, "image bad.png is unreadable"),
        ({"content": [image("1.png"), image("bad.png")]}, "image bad.png is unreadable"),
        ({"content": [image("none.png")]}, "image none.png is missing"),
        ({"content": [image("../d.png")]}, "leaves the folder"),
        ({"content": []}, "the document is empty"),
        ('{"id": "bad", ', "broken JSON"),
    ],
)
def test_bad_document_is_listed_and_strict_makes_it_an_error(tmp_path: Path, record: Any, expected: str) -> None:
    save_picture(tmp_path / "1.png", 1)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    good = [{"id": f"good{n}", "content": [image("1.png"), text("fine")]} for n in range(2)]
    bad = record if isinstance(record, str) else {"id": "bad", **record}
    file = write_jsonl(tmp_path / "d.jsonl", [good[0], bad, good[1]])
    settings = config(documents=[str(file)], held_out=0, max_document_tokens=50)
    with pytest.raises(DataError, match=r"d\.jsonl:2: document ") as caught:
        quiet(settings, tmp_path / "out", strict=True)
    assert expected in caught.value.cause and "--strict" in caught.value.remedy
    assert not (tmp_path / "out/manifest.json").exists()
    manifest = quiet(settings, tmp_path / "out")
    assert manifest.rejected == 1 and manifest.splits["train"].documents == 2
    ((name, reason),) = rejections(tmp_path / "out").items()
    assert expected in reason and name in ("bad", "d.jsonl:2")
    first, second = documents_of(tmp_path / "out", manifest, "train")
    assert first == second  # the pictures of the rejected document went to nobody else
    with pytest.raises(DataError, match=r"d\.jsonl:2"):  # also of a finished set
        quiet(settings, tmp_path / "out", strict=True)


def test_nothing_usable(tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = write_jsonl(tmp_path / "d.jsonl", ["{"])
    with pytest.raises(DataError, match=r"no document is usable \(the first: d\.jsonl:1: broken JSON"):
        quiet(config(documents=[str(file)]), out)
    assert len(rejections(out)) == 1 and not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="the document files are empty"):
        quiet(config(documents=[str(write_jsonl(tmp_path / "e.jsonl", []))]), tmp_path / "other")
    with pytest.raises(DataError, match="there is no document file"):
        quiet(config(documents=[str(tmp_path / "none.jsonl")]), tmp_path / "other")
    bare = config()
    bare = bare.model_copy(update={"data": bare.data.model_copy(update={"prepare": None})})
    with pytest.raises(ConfigError, match=r"data\.prepare is not set"):
        quiet(bare, tmp_path / "other")


def test_text_only_set_needs_no_images(tmp_path: Path) -> None:
    save_picture(tmp_path / "1.png", 1)
    file = write_jsonl(
        tmp_path / "d.jsonl", [{"id": "t", "content": [text("x")]}, {"id": "i", "content": [image("1.png")]}]
    )
    manifest = quiet(config(vocab={"text": 300}, documents=[str(file)], held_out=0), tmp_path / "out")
    assert manifest.image_tokenizer == "none" and manifest.tokens_per_image == 0
    assert rejections(tmp_path / "out") == {"i": "the document has an image, but the vocabulary has no modality image"}


def test_split_by_hash_of_the_id(tmp_path: Path) -> None:
    file = corpus(tmp_path / "in", 80)
    manifest = quiet(config(documents=[str(file)], held_out=0.25), tmp_path / "out")
    counts = {name: split.documents for name, split in manifest.splits.items()}
    assert sum(counts.values()) == 80 and 10 < counts["validation"] < 30


def test_small_files_share_a_part(tmp_path: Path) -> None:
    for number in range(5):
        write_jsonl(tmp_path / f"{number}.jsonl", [{"content": [text(f"file {number}")]}] * 2)
    settings = config(documents=[str(tmp_path / "*.jsonl")], held_out=0, part_documents=5)
    manifest = quiet(settings, tmp_path / "out")
    assert [part.documents for part in manifest.splits["train"].parts] == [4, 4, 2]


@pytest.mark.parametrize(("size", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_largest_id_survives_in_megatron(tmp_path: Path, size: int, dtype: type) -> None:
    vocabulary = Vocabulary(("text",), ((0, size),))

    def encoded(*ids: int) -> Encoded:
        return Encoded(np.array(ids), np.array([len(ids)]), 1, Document("a", (), "a:1"))

    writer = PartWriter(tmp_path, "train/0", vocabulary)
    writer.add(encoded(1, size - 1, 2))
    with pytest.raises(DataError, match=f"an id of 'a' is outside 0..{size - 1}"):
        writer.add(encoded(size))
    part = writer.finish()
    assert isinstance(part, Part)
    dataset = IndexedDataset(str(tmp_path / "train/0"))
    assert dataset.index.dtype == dtype and dataset[0].tolist() == [1, size - 1, 2]
    with pytest.raises(DataError, match="has no document 1"):
        read_document(tmp_path, part, 1)


# ------------------------------------------------------------------------------------------------------ tokenizers


def test_kmeans_is_fitted_on_training_images_and_can_be_reused(tmp_path: Path) -> None:
    file = corpus(tmp_path / "in", 40)
    kmeans = {"kind": "kmeans", "size": 4, "channels": 1, "patch": 2}
    first = quiet(config(documents=[str(file)], image=kmeans), tmp_path / "one")
    assert first.tokens_per_image == 4
    again = kmeans | {"path": str(tmp_path / "one/image_tokenizer")}
    second = quiet(config(documents=[str(file)], image=again), tmp_path / "two")
    assert second.image_tokenizer == first.image_tokenizer
    with pytest.raises(ConfigError, match="holds a kmeans tokenizer of size 4, channels 1, patch 2"):
        quiet(config(documents=[str(file)], image=again | {"patch": 1}), tmp_path / "three")
    with pytest.raises(ConfigError, match="patches of 3 pixels do not tile"):
        quiet(config(documents=[str(file)], image=kmeans | {"patch": 3}), tmp_path / "four")
    with pytest.raises(DataError, match="has 16 codes, the image range 8 ids"):
        quiet(config(documents=[str(file)], image=again, vocab={"text": 300, "image": 8}), tmp_path / "five")


def test_text_tokenizer_of_another_set(tmp_path: Path) -> None:
    file = corpus(tmp_path / "in", 10)
    first = quiet(config(documents=[str(file)]), tmp_path / "one")
    load = {"load": str(tmp_path / "one/text_tokenizer/tokenizer.json")}
    assert quiet(config(documents=[str(file)], text=load), tmp_path / "two").text_tokenizer == first.text_tokenizer
    with pytest.raises(DataError, match="the text range has 262"):
        quiet(config(documents=[str(file)], text=load, vocab={"text": 262, "image": 16}), tmp_path / "three")
    with pytest.raises(DataError, match=r"data\.prepare\.text\.load: there is no"):
        quiet(config(documents=[str(file)], text={"load": str(tmp_path / "none")}), tmp_path / "four")


def test_wrong_vocabulary(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = quiet(config(documents=[str(corpus(tmp_path / "in", 10))]), out)
    other = Vocabulary(("text", "image"), ((0, 299), (299, 316)))
    with pytest.raises(DataError, match=r"another vocabulary \(text 0\.\.299, image 300\.\.315\)"):
        check_vocabulary(out, manifest, other)
    with pytest.raises(DataError, match=r"\(vocab.reserved false\) than the configuration's \(vocab.reserved true\)"):
        check_vocabulary(out, manifest, Vocabulary(manifest.modalities, manifest.ranges, reserved=True))


# ------------------------------------------------------------------------------------------------ again and elsewhere


def test_workers_and_folders_do_not_matter(tmp_path: Path) -> None:
    corpus(tmp_path / "in", 60)
    shutil.copytree(tmp_path / "in", tmp_path / "moved")
    quiet(config(documents=[str(tmp_path / "in/docs.jsonl")], part_documents=7), tmp_path / "one")
    quiet(config(documents=[str(tmp_path / "moved/docs.jsonl")], part_documents=7, workers=3), tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_finished_set_is_left_alone_and_a_damaged_part_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = config(documents=[str(corpus(tmp_path / "in", 40))], part_documents=10)
    prepare(settings, out)
    before, times = files_of(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}
    capsys.readouterr()
    prepare(settings, out)
    captured = capsys.readouterr()
    assert "is already prepared: 36 train, 4 validation documents" in captured.err and captured.out == ""
    damaged = out / "train/00002.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"00002\.bin has \d+ bytes instead of \d+"):
        read_manifest(out)
    quiet(settings, out)
    assert files_of(out) == before
    changed = {path.name for path in out.rglob("*.bin") if path.stat().st_mtime_ns != times[path]}
    assert changed == {"00002.bin"}
    (out / "text_tokenizer/tokenizer.json").write_text("{")
    (out / "manifest.json").unlink()
    quiet(settings, out)
    assert files_of(out) == before


def test_something_else_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = corpus(tmp_path / "in", 20)
    quiet(config(documents=[str(file)]), out)
    before = files_of(out)
    with pytest.raises(DataError, match=r"was prepared from something else \(settings\.held_out\)") as caught:
        quiet(config(documents=[str(file)], held_out=0.5), out)
    assert "choose another --out, or give --overwrite" in caught.value.remedy
    with pytest.raises(DataError, match=r"something else \(vocabulary\.image, vocabulary\.text\)"):
        quiet(config(documents=[str(file)], vocab={"text": 310, "image": 16}), out)
    file.write_text(file.read_text().replace("picture", "drawing"))
    with pytest.raises(DataError, match=r"something else \(documents\)"):
        quiet(config(documents=[str(file)]), out)
    assert files_of(out) == before
    quiet(config(documents=[str(file)]), out, overwrite=True)
    assert files_of(out) != before
    quiet(config(documents=[str(file)]), tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    settings = config(documents=[str(corpus(tmp_path / "in", 4))])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"holds something else than a data set \(chapter\.tex\)"):
        quiet(settings, tmp_path / "thesis", overwrite=True)
    assert files_of(tmp_path / "thesis") == {"chapter.tex": b"years of work"}
    with pytest.raises(DataError, match="is not a folder"):
        quiet(settings, tmp_path / "thesis/chapter.tex")


def test_two_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing"):
            quiet(config(documents=[str(corpus(tmp_path / "in", 4))]), out)


def test_images_reach_the_right_documents(tmp_path: Path) -> None:
    """More documents than a chunk, several images each, some bad ones between: decoding gives every picture back."""
    records, expected = [], []
    for number in range(150):
        seeds = [number, number + 1000][: number % 3]
        for seed in seeds:
            save_picture(tmp_path / f"{seed}.png", seed)
        names = [f"{seed}.png" for seed in seeds] + (["none.png"] if number % 10 == 5 else [])
        records.append({"id": str(number), "content": [text(f"{number}"), *map(image, names)]})
        if number % 10 != 5:
            expected.append(seeds)
    out = tmp_path / "out"
    manifest = quiet(config(documents=[str(write_jsonl(tmp_path / "d.jsonl", records))], held_out=0), out)
    assert manifest.rejected == 15
    tokenizer = load_image_tokenizer(out / "image_tokenizer")
    for ids, seeds in zip(documents_of(out, manifest, "train"), expected, strict=True):
        codes: NDArray[np.int64] = np.array([number - 300 for number in ids if number >= 300]).reshape(-1, 16)
        assert len(codes) == len(seeds)
        for row, seed in zip(codes, seeds, strict=True):
            np.testing.assert_array_equal(tokenizer.decode(row[None])[0], picture(seed))


# ------------------------------------------------------------------------------------------- files that documents name


def test_changed_pictures_are_read_again(tmp_path: Path) -> None:
    """Only their parts are made again; the training data has another identity."""
    out, file = tmp_path / "out", corpus(tmp_path / "in", 40)
    settings = config(documents=[str(file)], part_documents=10, held_out=0, text={"kind": "bytes"})
    picture_file = tmp_path / "in/img/3.png"
    pixels = picture_file.read_bytes()
    picture_file.unlink()
    first = quiet(settings, out)
    assert first.rejected and first.content
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}
    quiet(settings, out)
    assert made == {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}
    picture_file.write_bytes(pixels)  # it came back
    second = quiet(settings, out)
    assert not second.rejected and identity_of(out, second) != identity_of(out, first)
    save_picture(picture_file, 99)  # it is another one
    third = quiet(settings, out)
    assert identity_of(out, third) not in (identity_of(out, first), identity_of(out, second))
    quiet(settings, tmp_path / "fresh")
    made_again, fresh = (
        {name: data for name, data in files_of(folder).items() if name.startswith(("train", "done", "rejected"))}
        for folder in (out, tmp_path / "fresh")
    )
    assert made_again == fresh and made_again  # tokenizers remember what they were measured on


@pytest.mark.parametrize("again", [False, True])
def test_overwrite_makes_everything_anew(tmp_path: Path, again: bool) -> None:
    out, file = tmp_path / "out", corpus(tmp_path / "in", 10)
    quiet(config(documents=[str(file)]), out)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".bin", ".json")}
    quiet(config(documents=[str(file)]), out, overwrite=again)
    changed = [path for path, time in made.items() if path.stat().st_mtime_ns != time]
    assert len(changed) == (len(made) if again else 0)


def test_a_text_of_megabytes_is_refused_before_it_is_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[int]()
    encode = TextTokenizer.encode_batch

    def watched(self: TextTokenizer, texts: Any) -> Any:
        given.extend(map(len, texts))
        return encode(self, texts)

    monkeypatch.setattr(TextTokenizer, "encode_batch", watched)
    records = [{"id": "word", "content": [text("a" * 3_000_000)]}, {"id": "good", "content": [text("fine")]}]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    load = tmp_path / "tokenizer.json"
    TextTokenizer.train(["fine words"] * 9, size=300).tokenizer.save(str(load))
    manifest = quiet(config(documents=[str(file)], text={"load": str(load)}, held_out=0), tmp_path / "out")
    assert manifest.splits["train"].documents == 1 and max(given) < 1000
    assert "3,000,000 characters are more than 4,096 tokens" in rejections(tmp_path / "out")["word"]
    (part,) = manifest.splits["train"].parts
    assert (part.text_bytes, part.text_labels) == (4, part.tokens["text"] - 1)

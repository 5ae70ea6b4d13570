# mmscale/data/prepared/megatron.py: corpora that Megatron's own builder wrote are read where they are.
"""Tests of Megatron corpora as data sets."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from mmscale.cli import main
from mmscale.config import Config, DataSource
from mmscale.data import digests
from mmscale.data.dedup import apply
from mmscale.data.dedup.pairs import DuplicateRule
from mmscale.data.modalities.text_tokens import TextTokenizer, open_text_tokenizer
from mmscale.data.prepared import megatron
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.inspect_set import summary
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.parts import read_document
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.selection import DocumentWeights, read_selection
from mmscale.data.progress import Reporter
from mmscale.data.scoring import score, weigh
from mmscale.data.stream.mixture import open_mixture
from mmscale.data.stream.passes import open_passes
from mmscale.data.stream.source import Source
from mmscale.data.stream.token_check import checked_modality
from mmscale.data.vocab import BOI, BOS, EOI, EOS, SPECIAL_TOKENS, Vocabulary
from mmscale.errors import ConfigError, DataError
from tests.unit.data.modalities.test_text_tokens import foreign
from tests.unit.data.samples import config, text, write_jsonl

VOCAB = {"text": 320, "image": 16}
TYPES = (np.uint8, np.int16, np.int32, np.int64, np.uint16)


def texts(count: int) -> list[str]:
    return [f"draw a seven and {'an eight ' * (n % 9)}{n}." for n in range(count)]


def corpus(folder: Path, *, dtype: Any = np.uint16, count: int = 60, sentences: int = 1) -> Path:
    """As tools/preprocess_data.py writes it: documents of one or several sentences; uint8 holds the first ids only."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = foreign(folder / "tokenizer.json")
    builder = IndexedDatasetBuilder(str(folder / "c.bin"), dtype=dtype)
    for own in texts(count):
        ids = np.array(tokenizer.encode(own, add_special_tokens=False).ids)
        ids = ids[ids < 128] if dtype is np.uint8 else ids
        pieces = [len(one) for one in np.array_split(ids, sentences)]
        builder.add_document(ids.astype(dtype), pieces)
    builder.finalize(str(folder / "c.idx"))
    return folder / "c.idx"


def settings(idx: Path, **others: Any) -> Config:
    load = {"load": str(idx.parent / "tokenizer.json")}
    return config(vocab=VOCAB, source="megatron", documents=[str(idx)], text=load, **others)


def read_all(folder: Path, made: Config, split: str = "train") -> list[list[int]]:
    source = Source(folder, split=split, vocabulary=Vocabulary.from_config(made.vocab))
    everything = np.arange(len(source))
    ids = source.read(everything)
    checked_modality(ids, source, everything, source.rows(everything), vocabulary=Vocabulary.from_config(made.vocab))
    return [one.tolist() for one in np.split(ids, np.cumsum(source.lengths)[:-1])]


@pytest.mark.parametrize("sentences", [1, 3])
@pytest.mark.parametrize("dtype", TYPES)
def test_documents_are_what_the_corpus_holds(tmp_path: Path, dtype: Any, sentences: int) -> None:
    idx = corpus(tmp_path / "corpus", dtype=dtype, sentences=sentences)
    before = idx.with_suffix(".bin").read_bytes()
    made, out = settings(idx, held_out=0), tmp_path / "out"
    manifest = prepare(made, out, progress=False)
    assert read_manifest(out) == manifest and manifest.splits["train"].documents == 60
    found, tokenizer = read_all(out, made), open_text_tokenizer(out)
    if dtype is not np.uint8:
        assert found == [tokenizer.encode(own).tolist() for own in texts(60)]
    (part,) = manifest.splits["train"].parts
    assert [read_document(out, part, n).tolist() for n in range(60)] == found
    assert (out / "train/000-00000.bin").is_symlink() and idx.with_suffix(".bin").read_bytes() == before
    assert dict(digests.verify(out, digests.read(out) or {})) == {}
    assert summary(out)["splits"]["train"]["tokens"]["text"] == sum(map(len, found))
    times = {file: file.lstat().st_mtime_ns for file in out.rglob("*.*") if file.name != ".lock"}
    assert prepare(made, out, progress=False) == manifest
    assert times == {file: file.lstat().st_mtime_ns for file in times}


def test_long_documents_become_several_and_a_part_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "DOCUMENTS", 16)
    idx = corpus(tmp_path / "corpus")
    made = settings(idx, held_out=0.3, max_document_tokens=10)
    manifest = prepare(made, tmp_path / "out", progress=False)
    tokenizer = open_text_tokenizer(tmp_path / "out")
    train = [number for ids in read_all(tmp_path / "out", made) for number in ids]
    held_out = [number for ids in read_all(tmp_path / "out", made, "validation") for number in ids]
    whole = 0
    for ids in (tokenizer.encode(own).tolist() for own in texts(60)):  # in order, and every one in one split
        left = train if train[: len(ids)] == ids else held_out
        assert left[: len(ids)] == ids
        del left[: len(ids)]
        whole += left is train
    assert train == held_out == [] and 25 < whole < 55
    assert max(len(ids) for ids in read_all(tmp_path / "out", made)) == 10
    assert len(manifest.splits["train"].parts) == 4
    data = made.data.model_copy(update={"path": str(tmp_path / "out")})
    (one,) = open_passes(made.model_copy(update={"data": data}), vocabulary=Vocabulary.from_config(made.vocab)).values()
    assert one.micro_batch(0).loss_mask.sum() > 0


def header(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def changed(idx: Path) -> None:
        content = bytearray(idx.read_bytes())
        change(content)
        idx.write_bytes(content)

    return changed


def _set(at: int, form: str, value: int) -> Callable[[Path], None]:
    return header(lambda content: struct.pack_into(form, content, at, value))


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda idx: idx.write_bytes(b"PAR1" * 20), "is no index of a Megatron corpus"),
    "cut in its head": (lambda idx: idx.write_bytes(idx.read_bytes()[:20]), "is no index"),
    "another version": (_set(9, "<Q", 2), "has version 2 of the format, 1 is read"),
    "floats": (_set(17, "<B", 7), "floating-point numbers"),
    "an unknown type": (_set(17, "<B", 9), r"unknown type \(9\)"),
    "another type": (_set(17, "<B", 5), "points behind the end|is of int64"),
    "cut": (lambda idx: idx.write_bytes(idx.read_bytes()[:-8]), "bytes, and its header says"),
    "modes": (lambda idx: idx.write_bytes(idx.read_bytes() + bytes(60)), "is multimodal"),
    "no tokens": (lambda idx: idx.with_suffix(".bin").unlink(), "c.bin cannot be read"),
    "fewer tokens": (
        lambda idx: idx.with_suffix(".bin").write_bytes(idx.with_suffix(".bin").read_bytes()[:-20]),
        "points behind the end",
    ),
    "gaps": (header(lambda content: struct.pack_into("<q", content, 34 + 4 * 60 + 8 * 7, 2)), "do not follow"),
    "documents without sequences": (
        header(lambda content: struct.pack_into("<q", content, len(content) - 8, 9)),
        "do not cover its sequences",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    idx = corpus(tmp_path / "corpus")
    damage, said = REFUSED[name]
    damage(idx)
    with pytest.raises(DataError, match=said):
        prepare(settings(idx), tmp_path / "out", progress=False)
    assert not (tmp_path / "out/manifest.json").exists()


def test_ids_are_checked_and_moved_as_asked(tmp_path: Path) -> None:
    idx = corpus(tmp_path / "corpus")
    with pytest.raises(DataError, match=r"has id \d+, which is \d+ in a text range of 1 to 319"):
        prepare(settings(idx, id_offset=200), tmp_path / "out", progress=False)
    zero = IndexedDatasetBuilder(str(tmp_path / "corpus/zero.bin"), dtype=np.uint16)
    zero.add_document(np.zeros(3, np.uint16), [3])
    zero.finalize(str(tmp_path / "corpus/zero.idx"))
    with pytest.raises(DataError, match="has id 0, which is 0 in a text range"):
        prepare(settings(tmp_path / "corpus/zero.idx", id_offset=0), tmp_path / "zero", progress=False)
    alone = config(vocab=VOCAB, source="megatron", documents=[str(idx)])
    with pytest.raises(ConfigError, match=r"data\.prepare\.text\.load is not set"):
        prepare(alone, tmp_path / "other", progress=False)
    with pytest.raises(DataError, match=r"is no \.idx file"):
        prepare(settings(idx.with_suffix(".bin")), tmp_path / "other", progress=False)


def test_another_corpus_is_something_else(tmp_path: Path) -> None:
    idx = corpus(tmp_path / "corpus")
    prepare(settings(idx), tmp_path / "out", progress=False)
    shutil.rmtree(tmp_path / "corpus")
    corpus(tmp_path / "corpus", count=61)
    with pytest.raises(DataError, match=r"prepared from something else \(documents\)"):
        prepare(settings(idx), tmp_path / "out", progress=False)


def test_other_tokens_of_the_same_size_are_something_else(tmp_path: Path) -> None:
    idx = corpus(tmp_path / "corpus")
    tokens, out = idx.with_suffix(".bin"), tmp_path / "out"
    manifest = prepare(settings(idx), out, progress=False)
    before = tokens.read_bytes()
    tokens.write_bytes(before)  # touched only
    assert prepare(settings(idx), out, progress=False) == manifest
    tokens.write_bytes(np.frombuffer(before, np.uint16)[::-1].tobytes())
    with pytest.raises(DataError, match=r"was prepared from other tokens than .*c\.bin has now"):
        prepare(settings(idx), out, progress=False)
    other = prepare(settings(idx), out, overwrite=True, progress=False)
    assert identity_of(out, other) != identity_of(out, manifest)
    assert prepare(settings(idx), out, progress=False) == other


@pytest.mark.parametrize("special", [BOS, EOS, BOI, EOI])
def test_begin_and_end_tokens_of_items_are_no_text(tmp_path: Path, special: int) -> None:
    idx = corpus(tmp_path / "corpus")
    builder = IndexedDatasetBuilder(str(tmp_path / "corpus/special.bin"), dtype=np.uint16)
    builder.add_document(np.array([special, 40, 41], np.uint16), [3])
    builder.finalize(str(tmp_path / "corpus/special.idx"))
    made = settings(idx.with_name("special.idx"), id_offset=0, held_out=0)
    if special in (BOS, EOS):
        prepare(made, tmp_path / "out", progress=False)
        return
    with pytest.raises(DataError, match=rf"has id {special}, .*special token {SPECIAL_TOKENS[special]} of items"):
        prepare(made, tmp_path / "out", progress=False)


def test_one_file_of_several_parts_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "DOCUMENTS", 16)
    idx, out, read = corpus(tmp_path / "corpus"), tmp_path / "out", list[Path]()
    prepare(settings(idx, held_out=0.3), out, progress=False)
    right = digests.digest_of
    monkeypatch.setattr(
        digests, "digest_of", lambda file, **given: (read.append(file.resolve()), right(file, **given))[1]
    )
    wanted = digests.read(out) or {}
    names = [name for name in wanted if name.endswith(".bin")]
    assert dict(digests.verify(out, wanted)) == {} and len(names) == 8
    assert read.count(idx.with_suffix(".bin").resolve()) == 1
    content = bytearray(idx.with_suffix(".bin").read_bytes())
    content[40] ^= 1
    idx.with_suffix(".bin").write_bytes(content)
    assert sorted(dict(digests.verify(out, wanted))) == sorted(names)


def test_a_corpus_is_deduplicated_and_selected_as_the_same_documents_are(tmp_path: Path) -> None:
    idx = corpus(tmp_path / "corpus")
    repeated = [*texts(30), *texts(20)]
    builder = IndexedDatasetBuilder(str(tmp_path / "corpus/twice.bin"), dtype=np.uint16)
    for own in repeated:
        ids = np.array(foreign(tmp_path / "again.json").encode(own, add_special_tokens=False).ids, np.uint16)
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "corpus/twice.idx"))
    linked = settings(idx.with_name("twice.idx"), held_out=0)
    file = write_jsonl(tmp_path / "d.jsonl", [{"id": str(n), "content": [text(own)]} for n, own in enumerate(repeated)])
    load = {"load": str(idx.parent / "tokenizer.json")}
    plain = config(vocab=VOCAB, documents=[str(file)], text=load, held_out=0)
    found = []
    for name, made in (("linked", linked), ("plain", plain)):
        prepare(made, out := tmp_path / name, progress=False)
        apply.dedup(out, rule=DuplicateRule(), reporter=Reporter(enabled=False))
        score.score(out, "rules", reporter=Reporter(enabled=False))
        own = []
        for ways in (
            {"expression": "(rules > 0.5) + 0.5"},
            {"by": "tokens", "top": 0.3},
        ):  # documents have <s> and </s>
            weigh.select(out, **ways)
            selection = read_selection(out)
            assert selection is not None
            weights = DocumentWeights(out, selection.identity, documents=50)
            own.append((weights.weights(np.arange(50)).tolist(), selection.kept, selection.copies))
        found.append(own)
    assert found[0] == found[1] and all(0 < kept <= 30 for _, kept, _ in found[0])
    blended = made.data.model_copy(
        update={"blend": [DataSource(path=str(tmp_path / name), weight=1.0) for name in ("linked", "plain")]}
    )
    both = made.model_copy(update={"data": blended})
    mixture = open_mixture(both, "train", vocabulary=Vocabulary.from_config(made.vocab))
    sources = {source for number in range(8) for source, _ in mixture.documents(number)}
    assert sources == {0, 1} and mixture.micro_batch(0).loss_mask.sum() > 0


def test_what_splits_of_a_corpus_share_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(settings(corpus(tmp_path / "corpus"), held_out=0.3), tmp_path / "out", progress=False)
    assert summary(tmp_path / "out")["held_out_in_training"] is None
    assert main(["data", "inspect", str(tmp_path / "out")]) == 0
    assert "not compared with training documents" in capsys.readouterr().out


def test_one_tokenizer_for_a_corpus_and_documents(tmp_path: Path) -> None:
    """A text corpus beside pictures with captions: what is trained on in a blend."""
    idx = corpus(tmp_path / "corpus")
    manifest = prepare(settings(idx), tmp_path / "out", progress=False)
    loaded = TextTokenizer.load(idx.parent / "tokenizer.json", size=320)
    assert manifest.text_tokenizer == loaded.fingerprint()

# tests/unit/data/golden/format_1: documents, and the set that the version before begin and end tokens of further
# modalities made of them (config(documents=[...]) of samples.py). The manifest named its two tokenizers one by one.
"""Tests with a data set that an older version prepared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmscale.data import digests
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.inspect_set import draw_sample, summary
from mmscale.data.prepared.manifest import by_modality, check_vocabulary, read_manifest
from mmscale.data.prepared.prepare import prepare
from mmscale.data.stream.source import Source
from mmscale.data.vocab import Vocabulary
from tests.unit.data.samples import config, corpus, files_of

GOLDEN = Path(__file__).parents[1] / "golden" / "format_1"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "old"))


def test_its_tokenizers_are_known_by_modality(old: Path) -> None:
    manifest = read_manifest(old / "set")
    written = json.loads((old / "set" / "manifest.json").read_text())
    assert manifest.tokenizers == {"text": written["text_tokenizer"], "image": written["image_tokenizer"]}
    assert manifest.tokens_per_item == {"image": 16} and manifest.marked == ()
    check_vocabulary(old / "set", manifest, Vocabulary.from_config(config().vocab))
    without = by_modality({"text_tokenizer": "t", "image_tokenizer": "none"})  # of checkpoints and exports, too
    assert without == {"text": "t"}


def test_it_is_read_and_drawn(old: Path, tmp_path: Path) -> None:
    source = Source(old / "set", split="train", vocabulary=Vocabulary.from_config(config().vocab))
    assert len(source) == 9 and source.read(np.arange(9)).size == 200
    drawn = draw_sample(old / "set", 0, tmp_path / "drawn")
    assert drawn["content"][0]["type"] == "image" and len(drawn["images"]) == 1
    assert summary(old / "set")["image_tokenizer"]["kind"] == "levels"


@pytest.mark.parametrize(("part_documents", "interrupted"), [(6, False), (6, True), (100, False)])
def test_a_repair_keeps_the_identity_of_a_set_from_before_pictures_were_compared(
    tmp_path: Path, part_documents: int, interrupted: bool
) -> None:
    """Its manifest has no digest of parts, and its parts have no state of pictures; one of them is lost.

    A repair that is interrupted has removed the manifest.
    """
    settings, out = (
        config(documents=[str(corpus(tmp_path / "in", 20))], part_documents=part_documents),
        tmp_path / "set",
    )
    assert prepare(settings, out, progress=False).content
    for file, key in [(out / "manifest.json", "content"), *((file, "items") for file in out.glob("done/*.json"))]:
        content = json.loads(file.read_text())
        del content[key]
        file.write_text(json.dumps(content))
    before, tokens = identity_of(out, read_manifest(out)), {file: file.read_bytes() for file in out.rglob("*.bin")}
    sorted(out.glob("train/*.bin"))[-1].unlink()
    if interrupted:
        (out / "manifest.json").unlink()
    assert identity_of(out, prepare(settings, out, progress=False)) == before
    assert {file: file.read_bytes() for file in out.rglob("*.bin")} == tokens
    assert identity_of(out, prepare(settings, out, progress=False, overwrite=True)) != before


def test_the_same_documents_become_the_same_files(old: Path, tmp_path: Path) -> None:
    """The old set counts as prepared; a new one has the same bytes, but for the manifest and the counts of parts.

    Counts of repeated content, and its keys, are added to the old set's cache.
    """
    settings = config(documents=[str(old / "documents" / "documents.jsonl")])
    before = files_of(old / "set")
    prepare(settings, old / "set", progress=False)
    after = files_of(old / "set")
    added = [after.pop(f".cache/{name}", None) for name in ("content.json", "keys.npy")]
    assert all(added) and after == before
    prepare(settings, tmp_path / "new", progress=False)
    assert digests.read(tmp_path / "new") == digests.read(old / "set")
    new = files_of(tmp_path / "new")
    assert {name for name in before if new.get(name) != before[name]} == {"manifest.json", "done/00000.json"}

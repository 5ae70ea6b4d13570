# mmscale/data/prepared/label_masks.py and what reads it: conversations as ids, masks, tables, batches and questions.
"""Tests of prepared conversations: which labels are trained on, compared with a plain count over the documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.config import Config
from mmscale.data.prepared import table_facts as facts
from mmscale.data.prepared.inspect_set import draw_sample
from mmscale.data.prepared.label_masks import LABELS, MASK
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.parts import read_document
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.questions import encoder_of, read_questions
from mmscale.data.prepared.reuse import settings_like
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.source import Source
from mmscale.data.vocab import BOI, BOS, EOI, EOS, Vocabulary
from mmscale.errors import DataError
from tests.unit.data.samples import config, image, save_picture, text, write_jsonl

NUMBER = 40


def settings(**prepare_settings: Any) -> Config:
    made = config(vocab={"text": 340, "image": 16}, held_out=0.2, part_documents=15, **prepare_settings)
    return made.model_copy(update={"vocab": made.vocab.model_copy(update={"reserved": True})})


def records(folder: Path) -> list[dict[str, Any]]:
    """Conversations of one or two answers, with pictures in questions and in answers; every fifth is a document."""
    for number in range(5):
        save_picture(folder / f"{number}.png", number)
    found: list[dict[str, Any]] = []
    for number in range(NUMBER):
        picture = {"type": "image", "path": f"{number % 5}.png"}
        question = {"role": "user", "content": [text(f"what is {number}"), *([picture] if number % 2 else [])]}
        answer = {"role": "assistant", "content": [text("it is"), *([picture] if number % 3 == 0 else [])]}
        turns = [question, answer] * (1 + number % 2)
        record: dict[str, Any] = {"id": f"c{number}", "messages": turns}
        if number % 5 == 4:
            record = {"id": f"d{number}", "content": [text("plain"), image("0.png")]}
        if number % 7 == 6:
            record["loss"] = "text"
        found.append(record)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    file = write_jsonl(root / "in/chat.jsonl", records(root / "in"))
    prepare(settings(documents=[str(file)]), root / "out", progress=False)
    return root / "out"


def expected(ids: np.ndarray, vocabulary: Vocabulary, only_text: bool) -> np.ndarray:
    """Which tokens are trained on, found from the ids alone: a slow second way."""
    assistant, end = vocabulary.reserved_id("<assistant>"), vocabulary.reserved_id("<eot>")
    chat, inside, found = assistant in ids, False, []
    for place, token in enumerate(ids.tolist()):
        trained = inside if chat else place > 0
        found.append(trained and not (only_text and token >= vocabulary.range_of("image")[0]))
        inside = token == assistant or (inside and token != end)
    return np.array(found)


def documents(folder: Path, split: str = "train") -> list[np.ndarray]:
    parts = read_manifest(folder).splits[split].parts
    return [read_document(folder, part, index) for part in parts for index in range(part.documents)]


def bits(folder: Path, split: str = "train") -> list[bool]:
    parts = read_manifest(folder).splits[split].parts
    tables = [np.load(folder / f"{part.prefix}.meta.npy") for part in parts]
    return [int(row[-1]) == 1 for table in tables for row in table]


def test_a_conversation_as_ids(folder: Path) -> None:
    vocabulary = read_manifest(folder).vocab
    names = {token: vocabulary.reserved_id(token) for token in ("<user>", "<assistant>", "<eot>")}
    first = next(ids.tolist() for ids in documents(folder) if BOI in ids and names["<user>"] in ids)
    assert first[:2] == [BOS, names["<user>"]] and first[-2:] == [names["<eot>"], EOS]
    assert first.count(names["<assistant>"]) * 2 == first.count(names["<eot>"])
    place = first.index(BOI)
    assert first[place + 17] == EOI and all(token >= 340 for token in first[place + 1 : place + 17])


@pytest.mark.parametrize("large", [False, True], ids=["tables in memory", "mapped"])
def test_masks_and_tables_say_the_same_as_the_ids(folder: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(facts, "LARGE", 3)
    manifest = read_manifest(folder)
    assert all(part.masked for split in manifest.splits.values() for part in split.parts)
    source = Source(folder, split="train", vocabulary=manifest.vocab)
    order = np.random.default_rng(0).permutation(len(source))
    table = source.rows(order)
    ids = source.read(order, table)
    trained = source.trained(order, table, manifest.vocab.modality_of(ids))
    stored, only_text = documents(folder), bits(folder)
    wanted = [expected(stored[one], manifest.vocab, only_text[one]) for one in order]
    np.testing.assert_array_equal(trained, np.concatenate(wanted))
    for row, one in enumerate(order):
        modality = manifest.vocab.modality_of(stored[one])
        np.testing.assert_array_equal(table.labels[row], np.bincount(modality[wanted[row]], minlength=2))
    found = facts.table_facts(folder, manifest, "train")
    assert found.labels == tuple(table.labels.sum(axis=0).tolist())


def test_batches_train_on_answers_only(folder: Path) -> None:
    """Every label of a pass, with documents packed together; the number of labels is known without reading tokens."""
    vocabulary = read_manifest(folder).vocab
    source = Source(folder, split="train", vocabulary=vocabulary)
    mixture = Mixture([source], vocabulary, seq_length=128, micro_batch_size=2, seed=3, once=True)
    trained: list[tuple[int, ...]] = []
    for number in range(mixture.len_epoch()):
        batch = mixture.micro_batch(number)
        assert batch.label_counts == mixture.label_counts(number)
        modality = vocabulary.modality_of(batch.labels)
        assert batch.label_counts == tuple(int(batch.loss_mask[modality == m].sum()) for m in range(2))
        for row in range(2):
            for document in np.unique(batch.document_ids[row]):
                own = (batch.document_ids[row] == document) & (batch.tokens[row] > 0)
                if own.any():
                    labels = batch.labels[row][own & (batch.loss_mask[row] > 0)]
                    trained.append((*batch.tokens[row][own].tolist(), -1, *labels.tolist()))
    wanted = [
        (*ids.tolist(), -1, *ids[expected(ids, vocabulary, only)].tolist())
        for ids, only in zip(documents(folder), bits(folder), strict=True)
    ]
    assert sorted(trained) == sorted(wanted)


def test_bits_per_byte_count_answers(folder: Path) -> None:
    vocabulary = read_manifest(folder).vocab
    size, labels = Source(folder, split="train", vocabulary=vocabulary).text or (0, 0)
    ids = documents(folder)
    trained = [expected(one, vocabulary, False) & (one < 340) for one in ids]
    assert labels == sum(int(one.sum()) for one in trained)
    answers = sum(int((one == vocabulary.reserved_id("<assistant>")).sum()) for one in ids)
    plain = sum(vocabulary.reserved_id("<user>") not in one for one in ids)
    assert size == answers * len("it is") + plain * len("plain")


def test_inspect_shows_roles_and_counts_labels(folder: Path, tmp_path: Path) -> None:
    shown = [draw_sample(folder, number, tmp_path / str(number)) for number in range(4)]
    chat = next(one for one in shown if "<user>" in one["text"])
    assert chat["text"].startswith("<s><user>what is") and "<assistant>it is" in chat["text"]
    assert sum(chat["labels"].values()) < sum(chat["tokens"].values()) - 1


def test_without_reserved_ids_conversations_are_rejected(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "chat.jsonl", [records(tmp_path)[0], {"content": [text("plain")]}])
    manifest = prepare(config(documents=[str(file)]), tmp_path / "out", progress=False)
    assert manifest.rejected == 1 and not any(part.masked for part in manifest.splits["train"].parts)
    assert "set vocab.reserved=true" in (tmp_path / "out/rejected.jsonl").read_text()


def test_other_vocabularies_keep_their_fingerprint() -> None:
    ranges = ("text", "image"), ((0, 340), (340, 356))
    assert Vocabulary(*ranges).fingerprint == "78dc32f65f0691b1"
    assert Vocabulary(*ranges, reserved=True).fingerprint != Vocabulary(*ranges).fingerprint
    assert Vocabulary(*ranges, reserved=True).specials[:5] == Vocabulary(*ranges).specials


def test_a_further_set_like_this_one(folder: Path) -> None:
    assert "vocab.reserved=true" in settings_like(folder)


@pytest.mark.parametrize("suffix", [MASK, LABELS])
@pytest.mark.parametrize("damage", ["missing", "short", "other"])
def test_damaged_masks(tmp_path: Path, suffix: str, damage: str) -> None:
    file = write_jsonl(tmp_path / "in/chat.jsonl", records(tmp_path / "in"))
    prepare(settings(documents=[str(file)]), tmp_path / "out", progress=False)
    manifest = read_manifest(tmp_path / "out")
    path = tmp_path / "out" / f"{manifest.splits['train'].parts[0].prefix}{suffix}"
    content = path.read_bytes()
    match damage:
        case "missing":
            path.unlink()
        case "short":
            path.write_bytes(content[:3])
        case "other":
            path.write_bytes(
                content[:-2] + bytes([content[-2] ^ 255, content[-1]]) if suffix == MASK else content[:-8] + b"\1" * 8
            )
    with pytest.raises(DataError, match=r"cannot be read|shorter|the mask of|does not fit"):
        _read_everything(tmp_path / "out", manifest.vocab)


def _read_everything(folder: Path, vocabulary: Vocabulary) -> None:
    source = Source(folder, split="train", vocabulary=vocabulary)
    every = np.arange(len(source))
    table = source.rows(every)
    source.trained(every, table, vocabulary.modality_of(source.read(every, table)))


def test_questions_end_with_the_message(folder: Path, tmp_path: Path) -> None:
    made = settings()
    made = made.model_copy(update={"data": made.data.model_copy(update={"path": str(folder)})})
    encoder = encoder_of(made)
    asked = {"messages": [{"role": "user", "content": "what is it"}]}
    choices = write_jsonl(tmp_path / "a.jsonl", [asked | {"choices": ["one", "one more"], "answer": 1}])
    exact = write_jsonl(tmp_path / "b.jsonl", [asked | {"answer": "one"}])
    (choice,), (single,) = read_questions(choices, encoder), read_questions(exact, encoder)
    vocabulary = Vocabulary.from_config(made.vocab)
    end, assistant = vocabulary.reserved_id("<eot>"), vocabulary.reserved_id("<assistant>")
    assert {ids[-1] for ids in (*choice.choices, choice.ids, single.ids)} == {end}
    assert single.ids[single.answer[0] - 1] == assistant and single.answer[1] == len(single.ids)
    answered = write_jsonl(tmp_path / "c.jsonl", [{"messages": [{"role": "assistant", "content": "a"}], "answer": "b"}])
    with pytest.raises(DataError, match="a question ends with a message of the user"):
        read_questions(answered, encoder)

"""`mmscale convert`: exports that transformers loads and computes alike, back again bit by bit, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import ModelCard

from mmscale.errors import DataError
from tests.cards import card_rows
from tests.end_to_end.damaged_exports import damaging, forget_the_cache, forked, rewrite_weights, spoil
from tests.end_to_end.running import ROOT, assert_says, listing, mmscale, ok

MAIN = ("train.steps=12", "checkpoint.every=0", "checkpoint.asynchronous=false", "train.eval_every=0")
DENSE = (
    "run.name=dense",
    "precision.dtype=bf16",
    "model.kind=dense",
    "model.depth=null",
    "model.experts.counts={}",
    "parallel.ep=1",
)
ROUTED = ("model.experts.choice=competitive", "model.experts.capacity=actual")
STAGE = ("--stage", "auxiliary", "auxiliary.steps=12", "auxiliary.optim.lr=1e-2", "auxiliary.calibration_batches=2")
LICENCE = "apache-2.0"
PART = "held-out split, first 2 of 30 batches"  # train.eval_batches of the fixture
PROMPTS = ["draw a seven", "this is"]


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`; `tiny` with routers of their own stage; `bare` without any."""
    folder = tmp_path_factory.mktemp("convert")
    ok("train", config, f"run.dir={folder}", *MAIN, *DENSE)
    routed = (config, f"run.dir={folder}", *MAIN, *ROUTED)
    ok("train", *routed, nproc=2)
    shutil.copytree(folder / "tiny", folder / "bare")
    ok("train", *routed, "parallel.ep=1", *STAGE)
    return folder


@pytest.fixture(scope="module")
def dense(runs: Path) -> Path:
    """The dense run, exported."""
    ok("convert", "to-hf", runs / "dense", runs / "dense-hf", "--shard-size", "60e3", "--license", LICENCE)
    return runs / "dense-hf"


@pytest.fixture(scope="module")
def moma(runs: Path) -> Path:
    """The run with experts and Mixture-of-Depths, exported."""
    ok("convert", "to-hf", f"{runs / 'tiny'}@12", runs / "moma-hf")
    return runs / "moma-hf"


def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval(), processor


# --- there ------------------------------------------------------------------------------------------------------------


def test_dense_needs_no_code(dense: Path) -> None:
    report = json.loads((dense / "conversion_report.json").read_text())
    assert report["model"] == {"class": "Qwen3ForCausalLM", "native": True, "routing": None}
    assert len(report["weights"]["shards"]) > 1 and (dense / "model.safetensors.index.json").is_file()
    assert not list(dense.glob("modeling_*")) and "auto_map" not in json.loads((dense / "config.json").read_text())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(dense, trust_remote_code=False)
    tokens = AutoTokenizer.from_pretrained(dense, trust_remote_code=False)
    assert type(model).__module__ == "transformers.models.qwen3.modeling_qwen3"
    assert tokens("this").input_ids[0] == 1


@pytest.mark.parametrize("kind", ["dense", "moma"])
def test_the_gate_says_how_close_it_is(kind: str, dense: Path, moma: Path) -> None:
    folder = {"dense": dense, "moma": moma}[kind]
    gate = json.loads((folder / "conversion_report.json").read_text())["gate"]
    assert gate["passed"] and gate["problems"] == [] and gate["compared"] >= 6
    assert gate["max_abs"] < 1e-5 and gate["argmax_same"] == gate["tokens"] > 60
    assert gate["generated"] > 6
    card = (folder / "README.md").read_text()
    assert "## Data" in card and "digits" in card and "causal" in card if kind == "moma" else "Qwen3" in card


@pytest.mark.parametrize("kind", ["dense", "moma"])
def test_the_card_has_what_the_hub_reads(kind: str, dense: Path, moma: Path) -> None:
    """Licence, tags and the held-out losses as a model-index; generation_config.json sets no length."""
    folder = {"dense": dense, "moma": moma}[kind]
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation") and "mmscale" in data.tags
    assert data.license == (LICENCE if kind == "dense" else None)
    losses = {one.metric_name: one.metric_value for one in data.eval_results}
    rows = [row[:3] for row in card_rows(card.text)]
    assert losses and all([name, PART, f"{value:.4f}"] in rows for name, value in losses.items())
    types = {(one.dataset_type, one.metric_type) for one in data.eval_results}
    assert types == {("held-out", "loss"), ("held-out", "bits_per_byte")}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert "max_length" not in generation and generation["eos_token_id"] == 2


def test_generation_gives_whole_images(moma: Path, tmp_path: Path) -> None:
    model, processor = loaded(moma)
    inputs = processor(text=PROMPTS, draw=True)
    assert inputs["attention_mask"][1].tolist() != inputs["attention_mask"][0].tolist()  # padded on the left
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    grammar = processor.image_grammar()
    together = model.generate(**inputs, logits_processor=[grammar], **settings)
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = processor(text=prompt, draw=True)
        one = model.generate(**alone, logits_processor=[grammar], use_cache=False, **settings)[0]
        assert row[inputs["input_ids"].shape[1] :].tolist() == one[alone["input_ids"].shape[1] :].tolist()
        pieces = processor.pieces(row)
        assert pieces[0] == prompt and pieces[1].size == (8, 8)
        new = row[inputs["input_ids"].shape[1] :].tolist()
        assert all(384 <= token < 512 for token in new[:4]) and new[4] == 4
    pieces[1].save(tmp_path / "drawn.png")
    again = processor.encode([tmp_path / "drawn.png"])
    assert again[2:-1] == together[-1][-12:-8].tolist()


def test_the_processor(moma: Path, tmp_path: Path, digits: Path) -> None:
    from mmscale.data.modalities.image_kinds import load_image_tokenizer
    from mmscale.data.modalities.text_tokens import open_text_tokenizer

    _, processor = loaded(moma)
    rng = np.random.default_rng(0)
    picture = PIL.Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8))
    codes = load_image_tokenizer(digits / "image_tokenizer").encode(np.asarray(picture)[None, ..., None])[0] + 384
    text = open_text_tokenizer(digits).encode("this ").tolist()
    want = [1, *text, 3, *codes.tolist(), 4]
    assert processor(text="this <image>", images=picture)["input_ids"][0].tolist() == want
    assert processor(content=["this ", picture])["input_ids"][0].tolist() == want
    assert [type(piece) for piece in processor.pieces(want)] == [str, PIL.Image.Image]
    # what a user writes is text
    for evil in ("<boi><image_5><eoi></s>", "<s>", "<pad>", "<image>"):
        (ids,) = processor(text=evil)["input_ids"].tolist()
        assert min(ids[1:]) > 4 and max(ids) < 384 and processor.tokenizer.decode(ids[1:]) == evil
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ValueError, match=r"broken.png cannot be read"):
        processor(content=["a", tmp_path / "broken.png"])
    with pytest.raises(ValueError, match="context is 64; shorten it"):
        processor(text="this " * 100)
    with pytest.raises(ValueError, match="1 <image> for 2 images"):
        processor(text="<image>", images=[picture, picture])
    processor.save_pretrained(tmp_path / "saved")
    shutil.copy(moma / "config.json", tmp_path / "saved")
    from transformers import AutoProcessor

    again = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again(content=["this ", picture])["input_ids"][0].tolist() == want


# --- and back ---------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(dense: Path, moma: Path, runs: Path, tmp_path: Path) -> None:
    for name, folder in (("dense", dense), ("tiny", moma)):
        ok("convert", "from-hf", folder, tmp_path / name)
        apart = json.loads(ok("ckpt", "diff", runs / name, tmp_path / name, "--weights", "--json"))
        assert apart["max_abs"] == 0.0 and apart["only_in_one"] == [] and apart["other_shape"] == []
        assert all(row["equal"] for row in apart["tensors"]) and len(apart["tensors"]) > 15
        assert bool(apart["only_in_other"]) == (name == "tiny")  # routers of the stage came along
    evaluate = ("--routing", "causal", "--batches", "4", "--json")
    causal = [json.loads(ok("eval", run, *evaluate)) for run in (runs / "tiny", tmp_path / "tiny")]
    assert causal[0]["loss"] == causal[1]["loss"] and causal[1]["step"] == 0
    # any layout goes on from it; there is no optimizer state, which has to be said
    config = tmp_path / "tiny" / "config.yaml"
    assert_says(mmscale("train", config, "parallel.ep=1"), status=4, cause="optimizer", remedy="allow_missing=true")
    ok("train", config, "train.steps=6", "parallel.ep=1", "parallel.tp=2", "checkpoint.allow_missing=true", nproc=2)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_without_routers_nothing_is_exported(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    ended = mmscale("convert", "to-hf", runs / "bare", out)
    assert_says(ended, status=4, cause="no auxiliary routers", remedy="--stage auxiliary")
    ended = mmscale("convert", "to-hf", runs / "bare", out, "--routing", "threshold")
    assert_says(ended, status=4, cause="no averaged cut-offs", remedy="")
    ended = mmscale("convert", "to-hf", runs / "bare", out, "--routing", "batch")
    assert_says(ended, status=2, cause="not a causal routing", remedy="causal, top1, threshold")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_stays(moma: Path, dense: Path, runs: Path) -> None:
    before = listing(moma)
    assert "existed already" in ok("convert", "to-hf", runs / "tiny", moma)
    for other in ((runs / "dense", moma), (runs / "tiny", moma, "--routing", "top1")):
        assert_says(mmscale("convert", "to-hf", *other), status=4, cause="exists already", remedy="name")
    assert listing(moma) == before


def test_damaged_checkpoint(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "dense", tmp_path / "dense"))
    file = next((run / "checkpoints").glob("step_*/__0_0.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ended = mmscale("convert", "to-hf", run, tmp_path / "hf")
    assert_says(ended, status=4, cause="is damaged: __0_0.distcp", remedy="RUN@STEP")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.long
def test_other_tokenizers(runs: Path, digits: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(digits, tmp_path / "other"))
    np.save(other / "image_tokenizer" / "codebook.npy", np.zeros((128, 16), np.uint8))
    ended = mmscale("convert", "to-hf", runs / "dense", tmp_path / "hf", "--data", other)
    assert_says(ended, status=3, cause="image tokenizer of .*other.* is another", remedy="--data DIR")
    manifest = json.loads((other / "manifest.json").read_text())
    from mmscale.data.modalities.image_kinds import load_image_tokenizer

    manifest["tokenizers"]["image"] = load_image_tokenizer(
        other / "image_tokenizer"
    ).fingerprint()  # whole, but not what was trained on
    (other / "manifest.json").write_text(json.dumps(manifest))
    ended = mmscale("convert", "to-hf", runs / "dense", tmp_path / "hf", "--data", other)
    assert_says(ended, status=3, cause="image tokenizer of .*other.* is another", remedy="--data DIR")
    assert not (tmp_path / "hf").exists()


@pytest.mark.long
def test_tokenizers_of_a_blend(runs: Path, digits: Path, tmp_path: Path) -> None:
    """Those of the data set that has images, though a set of texts stands before it; sets that differ are refused."""
    from checkpoints_tools.huggingface.run_weights import RunWeights
    from checkpoints_tools.huggingface.to_hf import tokenizers_of
    from mmscale.config.data.schema import DataSource

    def changed(name: str, others: dict[str, str]) -> Path:
        folder = Path(shutil.copytree(digits, tmp_path / name))
        file = folder / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest["tokenizers"] = {"text": manifest["tokenizers"]["text"], **others}
        file.write_text(json.dumps(manifest))
        return folder

    def tokenizers(*folders: Path) -> Any:
        source = RunWeights(runs / "dense", None)
        config = source.config
        blend = tuple(DataSource(path=str(folder)) for folder in folders)
        data = config.data.model_copy(update={"path": None, "blend": blend})
        return tokenizers_of(config.model_copy(update={"data": data}), source, None)

    texts = changed("texts", {})
    shutil.rmtree(texts / "image_tokenizer")
    found = tokenizers(texts, digits)
    assert found.folder == digits and found.tokens_per_image > 0
    with pytest.raises(DataError, match=r"image tokenizer of .*other.* is another than that of the blend"):
        tokenizers(digits, changed("other", {"image": "kmeans-ffff"}))


def test_the_gate_refuses(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    status, error = forked(damaging("files", rewrite_weights(spoil), runs / "tiny", out))
    assert status == 4 and "the gate refuses" in error, error
    assert "missing keys: model.layers.1.mlp.experts.text.auxiliary.hidden" in error and "logits differ by" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_gate_generates(runs: Path, tmp_path: Path) -> None:
    """Logits agree with and without a cache, and yet generate() decodes without context: as in transformers 5.24."""
    status, error = forked(damaging("files", forget_the_cache, runs / "tiny", tmp_path / "hf"))
    assert status == 4 and "generate() gives other tokens than the trainer's model (cached, batched)" in error, error
    assert "logits differ" not in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["weights", pytest.param("files", marks=pytest.mark.long)])
def test_a_killed_export_leaves_nothing_that_loads(stage: str, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    status, _ = forked(damaging(stage, lambda folder: os.kill(os.getpid(), 9), runs / "dense", out))
    assert status == -9 and not out.exists()
    (left,) = tmp_path.iterdir()
    assert list(left.glob("*.safetensors")) and not (left / "config.json").exists()
    from transformers import AutoModelForCausalLM

    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(left)
    assert_says(mmscale("convert", "to-hf", runs / "bare", out), status=4, cause="auxiliary", remedy="stage")
    status, _ = forked(damaging("weights", lambda folder: os._exit(0), runs / "dense", out))
    assert not left.exists()  # the next export sweeps it away


def test_a_gate_that_was_killed_is_swept_away(runs: Path, tmp_path: Path) -> None:
    """What it looks at stands beside the output, under a temporary name, and not in the system's folder."""
    out = tmp_path / "hf"
    status, _ = forked(damaging("view", lambda folder: os.kill(os.getpid(), 9), runs / "dense", out))
    assert status == -9
    (view,) = tmp_path.glob("hf.gate.tmp.*")
    assert (view / "model" / "config.json").is_file() and len(list(tmp_path.iterdir())) == 2
    left = set(tmp_path.iterdir())
    forked(damaging("view", lambda folder: os.kill(os.getpid(), 9), runs / "dense", out))
    assert not left & set(tmp_path.iterdir())  # the next export sweeps both away


def test_bad_folders(dense: Path, tmp_path: Path) -> None:
    def refused(cause: str, remedy: str, change: Callable[[Path], Any]) -> None:
        folder = Path(shutil.copytree(dense, tmp_path / "hf"))
        change(folder)
        assert_says(mmscale("convert", "from-hf", folder, tmp_path / "run"), status=4, cause=cause, remedy=remedy)
        assert not (tmp_path / "run").exists()
        shutil.rmtree(folder)

    index = "model.safetensors.index.json"
    first = json.loads((dense / index).read_text())["weight_map"]["model.embed_tokens.weight"]

    def point(target: str) -> Callable[[Path], Any]:
        def change(folder: Path) -> None:
            content = json.loads((folder / index).read_text())
            content["weight_map"]["model.norm.weight"] = target
            (folder / index).write_text(json.dumps(content))

        return change

    refused("is missing", "export it again", lambda folder: (folder / first).unlink())
    refused("outside of the folder", "do not use it", point("../stolen.safetensors"))
    refused("outside of the folder", "do not use it", point("/etc/passwd"))
    refused("lacks model.norm.weight", "export it again", point(first))
    refused("is damaged", "export it again", lambda folder: (folder / first).write_bytes(b"\xff" * 64))
    refused("config.json is missing", "Hugging Face folder", lambda folder: (folder / "config.json").unlink())
    refused("cannot be read", "export it again", lambda folder: (folder / index).write_text("{"))
    settings = json.loads((dense / "config.json").read_text())
    wider = json.dumps(settings | {"hidden_size": 64})
    refused("disagree about hidden_size", "restore", lambda folder: (folder / "config.json").write_text(wider))


# --- in other hands ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_lm_eval_offline(moma: Path, tmp_path: Path) -> None:
    """lm-evaluation-harness on a local task gives the likelihoods that the model gives."""
    pytest.importorskip("lm_eval", reason="pip install -c constraints.txt -e '.[evals]'")
    questions = [{"question": "this is a", "label": number % 2} for number in range(3)]
    questions += [{"question": "draw a", "label": number % 2} for number in range(3)]
    choices = [" one", " seven"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": choices,
        "target_delimiter": "",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "words.yaml").write_text(json.dumps(task))  # JSON is YAML
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    settings = f"pretrained={moma},trust_remote_code=True,dtype=float32,add_bos_token=True"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", settings, "--device", "cpu"]
    command += ["--include_path", str(tmp_path), "--tasks", "words", "--batch_size", "4", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    model, processor = loaded(moma)
    right = 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        question = sample["doc"]["question"]
        want = []
        for choice in choices:
            ids = processor.encode([question + choice])
            start = len(processor.encode([question]))
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            want.append(sum(float(log_p[at - 1, ids[at]]) for at in range(start, len(ids))))
        got = [float(response[0]) for response in sample["filtered_resps"]]
        assert got == pytest.approx(want, abs=1e-4)
        right += int(np.argmax(want)) == sample["doc"]["label"]
    assert json.loads(results.read_text())["results"]["words"]["acc,none"] == pytest.approx(right / len(questions))
    assert ROOT not in moma.parents

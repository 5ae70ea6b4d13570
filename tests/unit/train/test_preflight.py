"""What is refused before a rank starts: changes of the objective that nobody confirmed, and nothing but damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import INFO, Store, info_text
from mmscale.checkpoint.shape import shape_of
from mmscale.config import Config
from mmscale.config.effects import EFFECTS, Effect, effect_of
from mmscale.data.prepared.identity import identities, identity_of
from mmscale.data.prepared.manifest import (
    NO_TOKENIZER,
    Manifest,
    by_modality,
    read_blend,
    read_manifest,
    write_manifest,
)
from mmscale.data.stream.checks import check_data
from mmscale.data.vocab import BOS, EOS, Vocabulary
from mmscale.errors import CheckpointError, ConfigError, DataError
from mmscale.train import preflight
from mmscale.train.stages import table
from mmscale.train.stages.table import STAGES
from tests.unit.config.test_changes import config
from tests.unit.data.corpora import corpus, prepare


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "read_blend", lambda _: {})
    monkeypatch.setattr(table, "check_data", lambda _: {})


@pytest.fixture
def real_data(no_data: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "read_blend", read_blend)
    monkeypatch.setattr(table, "check_data", check_data)


def commit(run: Path, step: int, *overrides: str, **more: Any) -> Path:
    made, store = config(*overrides), Store.of_run(run)
    folder = store.begin(step, 1)
    (store.temporary(step, 1) / INFO).write_text(
        info_text({"shape": shape_of(made), "config": made.model_dump(mode="json"), "step": step} | more)
    )
    (folder / "weights").write_bytes(b"0" * 100)
    files = integrity.digests(folder, integrity.sizes(folder))
    return store.commit(integrity.CheckpointManifest(step, 1, "", "", {}, files))


def check(run: Path, *overrides: str, **options: Any) -> None:
    made: Config = config(f"run.dir={run.parent}", f"run.name={run.name}", *overrides)
    STAGES["main"].preflight(made, world_size=1, **options)


def test_a_changed_objective_needs_a_yes(tmp_path: Path) -> None:
    commit(tmp_path / "run", 10)
    check(tmp_path / "run", "optim.lr=2e-4")
    with pytest.raises(ConfigError, match=r"run\.seed: \d+ -> 5") as raised:
        check(tmp_path / "run", "run.seed=5", "train.z_loss=0")
    assert "train.z_loss" in raised.value.cause and "--yes" in raised.value.remedy
    assert raised.value.exit_status == 2
    check(tmp_path / "run", "run.seed=5", "train.z_loss=0", yes=True)


def test_a_profile_of_ranks_that_are_not_there(tmp_path: Path) -> None:
    check(tmp_path / "run", "log.profile={ranks: [0]}")
    with pytest.raises(ConfigError, match="no rank 1 among 1"):
        check(tmp_path / "run", "log.profile={ranks: [0, 1]}")


def test_a_damaged_newest_checkpoint_does_not_judge(tmp_path: Path) -> None:
    """Its settings cannot be believed; the one before it counts, as in the resume that follows."""
    commit(tmp_path / "run", 10)
    newest = commit(tmp_path / "run", 20, "model.hidden_size=64")
    with pytest.raises(CheckpointError, match="another model"):
        check(tmp_path / "run")
    text = (newest / INFO).read_text()
    (newest / INFO).write_text(text.replace("64", "65"))
    check(tmp_path / "run")
    (newest / INFO).write_text(text)
    (newest / "weights").unlink()
    check(tmp_path / "run")
    (newest / integrity.MANIFEST).unlink()
    check(tmp_path / "run")
    assert newest.exists()  # nothing is renamed here


def test_only_damaged_checkpoints(tmp_path: Path) -> None:
    commit(tmp_path / "run", 10)
    Store.of_run(tmp_path / "run").quarantine(10)
    with pytest.raises(CheckpointError, match=r"step_00000010\.bad"):
        check(tmp_path / "run")


def test_settings_that_changed_are_lines(tmp_path: Path) -> None:
    info = {"config": config().model_dump(mode="json")}
    changed = config("optim.lr=1e-3", "run.seed=5")
    lines = preflight.check_changes(changed, info, data=(), where="here", yes=True)
    assert [line.partition(":")[0] for line in lines] == ["run.seed", "optim.lr"]
    assert preflight.check_changes(changed, {}, data=(), where="here", yes=False) == []


def data_set(folder: Path, **tokenizers: str) -> tuple[Path, Manifest]:
    names = {"text_tokenizer": "t1", "image_tokenizer": "i1"} | tokenizers
    documents = [np.array([BOS, 10 + number, EOS]) for number in range(3)]
    prepare(folder, documents, vocabulary=Vocabulary.from_config(config().vocab), parts=1)
    manifest = read_manifest(folder).model_copy(update={"tokenizers": by_modality(names)})
    write_manifest(folder, manifest)
    return folder, manifest


@pytest.mark.usefixtures("real_data")
def test_tokenizers_do_not_mix(tmp_path: Path) -> None:
    """Neither in a blend nor with a checkpoint, `--yes` or not; data without images go with any image tokenizer."""
    first, _ = data_set(tmp_path / "first")
    other, _ = data_set(tmp_path / "other", image_tokenizer="i2")
    text, _ = data_set(tmp_path / "text", image_tokenizer=NO_TOKENIZER)
    wrong, _ = data_set(tmp_path / "wrong", text_tokenizer="t2", image_tokenizer=NO_TOKENIZER)
    run = tmp_path / "run"
    check(run, "data.path=null", f"data.blend=[{{path: {text}}}, {{path: {first}}}]")
    for pair in ((first, other), (text, first, other), (text, wrong)):
        blend = ", ".join(f"{{path: {path}}}" for path in pair)
        with pytest.raises(DataError, match=r"tokenizer of .* is another than that of the blend's data before it"):
            check(run, "data.path=null", f"data.blend=[{blend}]")
    commit(run, 10, f"data.path={first}", tokenizers={"text_tokenizer": "t1", "image_tokenizer": "i1"})
    check(run, f"data.path={first}")
    check(run, f"data.path={text}", yes=True)
    wrong_image = r"image tokenizer of .*other \(i2\) is another than that of .*step_0*10 \(i1\)"
    with pytest.raises(DataError, match=wrong_image) as raised:
        check(run, f"data.path={other}", yes=True)
    assert raised.value.exit_status == 3
    with pytest.raises(DataError, match=r"is another than that of .*step_0*10 \(i1\)"):  # not the first of them either
        check(run, "data.path=null", f"data.blend=[{{path: {text}}}, {{path: {other}}}]", yes=True)


def test_a_run_that_goes_on_with_text_keeps_its_image_tokenizer(tmp_path: Path) -> None:
    text, both = {"text": "t1"}, {"text": "t1", "image": "i1"}
    run = tmp_path / "run"
    assert preflight.tokenizers_of(run, text) == text
    older = {"text_tokenizer": "t1", "image_tokenizer": "i1"}  # as checkpoints held them before there was audio
    for step, saved in ((10, older), (20, both)):
        commit(run, step, tokenizers=saved)
        assert preflight.tokenizers_of(run, text) == both == preflight.tokenizers_of(run, both)


@pytest.mark.usefixtures("real_data")
def test_routers_learn_from_ids_of_the_main_run_s_meaning(tmp_path: Path) -> None:
    """Another codebook under the same vocabulary would teach them what no token of the main run means."""
    first, _ = data_set(tmp_path / "first")
    other, _ = data_set(tmp_path / "other", image_tokenizer="i2")
    text, _ = data_set(tmp_path / "text", image_tokenizer=NO_TOKENIZER)
    run = tmp_path / "run"
    commit(run, 10, tokenizers={"text_tokenizer": "t1", "image_tokenizer": "i1"})
    commit(run, 20, tokenizers={"text_tokenizer": "t1", "image_tokenizer": "i2"})

    def stage(*overrides: str) -> None:
        made = config(f"run.dir={run.parent}", f"run.name={run.name}", *overrides)
        STAGES["auxiliary"].preflight(made, world_size=1)

    stage(f"data.path={other}")  # the newest checkpoint counts
    stage(f"data.path={text}", "precision.fp8=tensorwise", "precision.fp8_emulate=true", "precision.fp8_skip_first=1")
    with pytest.raises(
        DataError, match=r"image tokenizer of .*first \(i1\) is another than that of .*step_0*20 \(i2\)"
    ):
        stage(f"data.path={first}")
    with pytest.raises(DataError, match="is another than that of the blend's data before it"):
        stage("data.path=null", f"data.blend=[{{path: {first}}}, {{path: {other}}}]")
    commit(run, 30)  # written before fingerprints were kept
    stage(f"data.path={first}")


@pytest.mark.usefixtures("real_data")
def test_data_is_known_by_its_content(tmp_path: Path) -> None:
    """Replaced under its path it needs a yes; moved it does not; a checkpoint from before knows the path only."""
    first, manifest = data_set(tmp_path / "first")
    run = tmp_path / "run"
    kept = [{"path": str(first), "weight": 1.0, "identity": identity_of(first, manifest)}]
    commit(run, 10, f"data.path={first}", data=kept)
    moved = first.rename(tmp_path / "moved")
    check(run, f"data.path={moved}")
    made = config(f"data.path={moved}")
    lines = preflight.check_changes(
        made, Store.of_run(run).info(10), data=identities(made, read_blend(made)), where="here", yes=False
    )
    assert lines == [f"data: {first} -> {moved}, the same documents"]
    write_manifest(moved, manifest.model_copy(update={"source": "other documents"}))
    with pytest.raises(ConfigError, match=f"data: {first} is left out; data: {moved} is new"):
        check(run, f"data.path={moved}")
    moved.rename(first)
    with pytest.raises(ConfigError, match=f"data: {first} holds other documents"):
        check(run, f"data.path={first}")
    check(run, f"data.path={first}", yes=True)
    other, _ = data_set(tmp_path / "other")
    commit(run, 20, f"data.path={first}")  # written before the content was kept
    check(run, f"data.path={first}")
    with pytest.raises(ConfigError, match=r"data\.path"):
        check(run, f"data.path={other}")


@pytest.mark.usefixtures("real_data")
def test_data_of_which_nothing_is_trained_on(tmp_path: Path) -> None:
    """Its loss would look healthy. Held-out documents are needed only where they are asked for."""
    vocab = "[{name: text, size: 100}, {name: image, size: 32}]"
    base = (f"vocab.modalities={vocab}", "vocab.pad_multiple=4", "model.seq_length=128")
    run, documents = tmp_path / "run", corpus(20)

    def start(name: str, loss: int, *overrides: str) -> None:
        folder = tmp_path / name
        if not folder.exists():
            prepare(folder, documents, loss=[loss] * len(documents))
        check(run, *base, f"data.path={folder}", *overrides)

    start("all", 0b11)
    start("images", 0b10)
    with pytest.raises(DataError, match=r"no token of .*none is trained on") as raised:
        start("none", 0)
    assert raised.value.exit_status == 3 and '"loss"' in raised.value.remedy
    with pytest.raises(DataError, match=r"no token of .*images is trained on"):
        start("images", 0b10, "train.modality_weights={image: 0}")
    with pytest.raises(DataError, match="no held-out documents to evaluate on every 10 steps") as raised:
        start("all", 0b11, "train.eval_every=10")
    assert "train.eval_every=0" in raised.value.remedy
    with pytest.raises(
        DataError, match=r"all \(train\): document \d+ has \d+ tokens, model.seq_length is 16"
    ) as raised:
        start("all", 0b11, "model.seq_length=16", "model.depth.multiple=8")
    blend = f"data.blend=[{{path: {tmp_path / 'none'}}}, {{path: {tmp_path / 'all'}, weight: 0}}]"
    with pytest.raises(DataError, match=r"no token of .*none is trained on"):
        check(run, *base, "data.path=null", blend)


def test_an_imported_model_has_no_data_that_could_change(tmp_path: Path) -> None:
    commit(tmp_path / "run", 10, "data.path=null")
    check(tmp_path / "run")


def test_the_frozen_weights_of_a_stage_keep_their_function(tmp_path: Path) -> None:
    """Whatever setting decides it, from the table; the objective and the data of a stage are its own."""
    run = tmp_path / "run"
    commit(run, 10)
    other = {
        "model.seq_length": "128",
        "model.norm_eps": "1e-6",
        "model.rope_base": "5e5",
        "model.rope_scaling": "{factor: 4}",
        "model.experts.capacity": "actual",
        "model.experts.capacity_factor": "2",
        "model.experts.capacity_multiple": "8",
        "model.experts.scope": "micro_batch",
        "model.experts.choice": "softmax",
        "model.experts.share": "{text: 0.6, image: 0.4}",
        "model.depth.capacity": "0.25",
        "model.depth.multiple": "16",
        "model.depth.choice": "per_modality",
    }
    decides = {key for key in EFFECTS if effect_of(key, config()) is Effect.FUNCTION}
    tokens_choose = {key for key in decides if key.startswith("model.experts.token_choice.")}  # the test below
    decides -= tokens_choose
    assert other.keys() == decides, "try the new setting here too"

    def stage(*overrides: str) -> None:
        made = config(f"run.dir={run.parent}", f"run.name={run.name}", *overrides)
        STAGES["auxiliary"].preflight(made, world_size=1)

    for key, value in other.items():
        with pytest.raises(ConfigError, match=f"another function than that of .*{key}"):
            stage(f"{key}={value}")
        with pytest.raises(ConfigError, match=f"the objective or the data have changed since .*{key}"):
            check(run, f"{key}={value}")
        check(run, f"{key}={value}", yes=True)
    stage("train.z_loss=0", "run.seed=5", "train.global_batch_size=2", "auxiliary.micro_batch_size=2")
    commit(run, 20, "model.experts.scope=micro_batch")
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: 1 -> 2"):
        stage("model.experts.scope=micro_batch", "auxiliary.micro_batch_size=2")


@pytest.mark.parametrize(("key", "value"), [("scores", "softmax"), ("top_k", "2")])
def test_token_choice_under_frozen_weights_keeps_its_function(tmp_path: Path, key: str, value: str) -> None:
    """Auxiliary routers of its depth layers."""
    run = tmp_path / "run"
    commit(run, 10, "model.experts.token_choice={}")
    changed = f"model.experts.token_choice.{key}"
    places = (f"run.dir={run.parent}", f"run.name={run.name}", "model.experts.token_choice={}")
    with pytest.raises(ConfigError, match=f"another function than that of .*{changed}"):
        STAGES["auxiliary"].preflight(config(*places, f"{changed}={value}"), world_size=1)


@pytest.mark.parametrize(
    ("schedule", "floor", "factor"),
    [
        ("linear", "1e-6", 40),
        ("cosine", "1e-6", 50),
        ("wsd", "0", 10),
        ("power", "0", 10),
        ("constant", "0", 0),
        ("inverse_sqrt", "0", 0),
    ],
)
def test_extending_a_run_asks_where_the_learning_rate_would_jump(
    tmp_path: Path, schedule: str, floor: str, factor: float
) -> None:
    run = tmp_path / "run"
    settings = (f"optim.schedule={schedule}", f"optim.min_lr={floor}", "optim.warmup=10")
    commit(run, 1000, *settings)
    check(run, *settings)
    lines = preflight.check_changes(
        config(*settings, "train.steps=2000"), Store.of_run(run).info(1000), data=(), where="here", yes=True
    )
    rates = [line for line in lines if line.startswith("learning rate:")]
    if not factor:
        assert rates == []
        check(run, *settings, "train.steps=2000")
        return
    with pytest.raises(
        ConfigError, match=r"learning rate would jump .*learning rate: .* -> .* at step 1001 "
    ) as raised:
        check(run, *settings, "train.steps=2000")
    (line,) = rates
    assert float(line.split("(x ")[1].rstrip(")")) > factor
    check(run, *settings, "train.steps=2000", yes=True)
    # The ways out that the remedy names.
    hold = raised.value.remedy.split("(")[1].partition(")")[0].split()
    check(run, *settings, "train.steps=2000", *hold)
    check(run, *settings, "train.steps=2000", "optim.restart=1000", "optim.warmup=900")


def test_a_learning_rate_that_falls_or_hardly_rises_is_shown(tmp_path: Path) -> None:
    info = {"config": config("optim.schedule=constant").model_dump(mode="json"), "step": 10}
    for lr, shown in (("5e-5", "x 0.5"), ("2e-4", "x 2")):
        made = config("optim.schedule=constant", f"optim.lr={lr}")
        lines = preflight.check_changes(made, info, data=(), where="here", yes=False)
        assert lines[-1] == f"learning rate: 0.0001 -> {float(lr):.3g} at step 11 ({shown})"
    imported = {**info, "step": 0}
    assert preflight.check_changes(config("optim.lr=1"), imported, data=(), where="here", yes=False)[-1].startswith(
        "optim."
    )


@pytest.mark.usefixtures("real_data")
def test_a_stage_on_other_data_than_its_run_needs_a_yes(tmp_path: Path) -> None:
    """Its held-out losses stand beside the run's, in the report and on the card, and would be of other documents."""
    first, manifest = data_set(tmp_path / "first")
    second = tmp_path / "second"
    documents = [np.array([BOS, 20 + number, EOS]) for number in range(5)]
    prepare(second, documents, vocabulary=Vocabulary.from_config(config().vocab), parts=1)
    write_manifest(second, read_manifest(second).model_copy(update={"tokenizers": manifest.tokenizers}))
    run, blend = tmp_path / "run", f"data.blend=[{{path: {first}}}, {{path: {second}}}]"
    both = config("data.path=null", blend)
    kept = [one.model_dump(mode="json") for one in identities(both, read_blend(both))]
    commit(run, 10, "data.path=null", blend, data=kept)

    def stage(*overrides: str, yes: bool = False) -> None:
        made = config(f"run.dir={run.parent}", f"run.name={run.name}", *overrides)
        STAGES["auxiliary"].preflight(made, world_size=1, yes=yes)

    stage("data.path=null", blend)
    with pytest.raises(ConfigError, match=r"would read other data than .*step_0*10: .*second is left out") as asked:
        stage(f"data.path={first}")
    assert "--yes" in (asked.value.remedy or "")
    stage(f"data.path={first}", yes=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_jump_of_the_learning_rate_names_the_settings_of_its_stage(tmp_path: Path, stage: str) -> None:
    entry, settings = STAGES[stage], ("optim.schedule=linear", "sft.path=data/none")
    folder = entry.folder(tmp_path / "run")
    commit(folder, 1000)
    store = Store.of_run(folder)
    made = config(f"{entry.optim}.schedule=constant", f"{entry.optim}.lr=1e-2", f"{entry.steps}=2000", *settings)
    with pytest.raises(ConfigError, match="learning rate would jump") as raised:
        preflight.check_resume(made, store, {}, yes=False, settings=entry.settings, optim=entry.optim)
    hold = raised.value.remedy.split("(")[1].partition(")")[0].split()
    assert [text.partition("=")[0] for text in hold] == [f"{entry.optim}.schedule", f"{entry.optim}.lr"]
    assert f"({entry.optim}.restart=1000 " in raised.value.remedy and f"{entry.optim}.warmup" in raised.value.remedy

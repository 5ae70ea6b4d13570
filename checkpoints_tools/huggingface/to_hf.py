"""Exports a checkpoint as a Hugging Face folder that transformers loads; it is published only if it passes the gate.

Weights are streamed from the checkpoint. Until the gate has passed, the folder has another name and no config.json, so
that an interrupted export leaves nothing that can be loaded. gate.py has the checks.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools.huggingface import gate, shipped
from checkpoints_tools.huggingface.card import card
from checkpoints_tools.huggingface.codecs import write_codecs
from checkpoints_tools.huggingface.data_sources import blend_sources
from checkpoints_tools.huggingface.export_checks import refuse_without_routers, tokenizer_set
from checkpoints_tools.huggingface.export_settings import CONFIG, REPORT, settings
from checkpoints_tools.huggingface.fast_tokenizer import write_text_tokenizer
from checkpoints_tools.huggingface.files import WrittenWeights, unaccounted, write_weights
from checkpoints_tools.huggingface.model_config import CODE, PROCESSOR, generation_config, model_config
from checkpoints_tools.huggingface.run_weights import RunWeights
from checkpoints_tools.huggingface.shipped.versions_moma import NEWEST, OLDEST
from checkpoints_tools.huggingface.training_history import TrainingHistory
from checkpoints_tools.huggingface.weights import Move, is_native, moves
from mmscale import bounded
from mmscale.checkpoint import integrity, publish
from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.checkpoint.tensors import origin_of
from mmscale.config import Config
from mmscale.config.load import digest
from mmscale.data.modalities.image_plugin import PluginTokenizer
from mmscale.data.modalities.modality import Codec
from mmscale.data.modalities.table import folder_of, open_codecs
from mmscale.data.modalities.text_tokens import TextTokenizer, open_text_tokenizer
from mmscale.data.prepared.manifest import NO_TOKENIZER, TEXT, by_modality, read_manifest
from mmscale.data.vocab import IMAGE, Vocabulary
from mmscale.errors import CheckpointError, DataError
from mmscale.runtime.environment import code_version

SHARD_BYTES = 5_000_000_000
OnStage = Callable[[str], None]


def _nothing(stage: str) -> None:
    """The usual `on_stage`."""


@dataclass(frozen=True)
class DataTokenizers:
    """The parts of the data set that an export needs.

    Attributes:
        folder: the prepared data set.
        vocabulary: id ranges.
        text: text tokenizer.
        codecs: tokenizers of other modalities by name.
        about: fingerprints and counts, for the report and the card.
    """

    folder: Path
    vocabulary: Vocabulary
    text: TextTokenizer
    codecs: dict[str, Codec]
    about: dict[str, Any]

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image; 0 without images."""
        return self.codecs[IMAGE].tokens_per_item if IMAGE in self.codecs else 0


def export(
    run: Path,
    step: int | None,
    out: Path,
    *,
    data: Path | None = None,
    routing: str = "causal",
    shard_bytes: int = SHARD_BYTES,
    licence: str = "",
    on_stage: OnStage = _nothing,
) -> dict[str, Any]:
    """Convert a checkpoint, and publish it if transformers computes the same as the trainer.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        out: a folder that does not exist yet.
        data: the prepared data set with tokenizers and prompts; None: the run's.
        routing: mode by which experts are assigned to tokens: causal, top1 or threshold.
        shard_bytes: largest file of weights [bytes].
        licence: of the weights, for the card: an identifier of the Hugging Face Hub, e.g. apache-2.0; "": none named.
        on_stage: called after every sub-step with its name, for the display of progress.

    Returns:
        The content of conversion_report.json, and `path`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or cannot route causally; `out` exists; the gate refuses.
        DataError: the data set is missing or has other tokenizers.
    """
    publish.refuse_existing(out)
    source = RunWeights(run, step)
    config = source.config
    auxiliary, thresholds, listed = accounted(source, config, run, routing=routing)
    own = tokenizers_of(config, source, data)
    with publish.folder(out) as folder:
        written = write_weights(folder, source, listed, shard_bytes=shard_bytes)
        on_stage("weights")
        content = model_config(
            config,
            auxiliary_size=auxiliary,
            thresholds=thresholds,
            routing=routing,
            tokens_per_image=own.tokens_per_image,
        ) | settings(config, own.about, TrainingHistory.of_run(source))
        _write_companions(folder, config, own)
        on_stage("files")
        report = _judged(folder, content, run, source, config, own, written, out, routing=routing, on_stage=on_stage)
        on_stage("gate")
        readme = card(config, report, run=run, step=source.step, licence=licence)
        _finish(folder, out, content, report, readme, source=source, config=config)
    return {"path": str(out), **report}


def up_to_date(run: Path, step: int | None, out: Path, *, routing: str) -> dict[str, Any] | None:
    """The report of an existing, intact export of this checkpoint at `out`; None if there is none."""
    try:
        report = bounded.read_json(out / REPORT)
        now = origin_of("", RunWeights(run, step).parents)["parents"]
        then = report["origin"]["parents"]
        same = [parent["manifest"] for parent in then] == [parent["manifest"] for parent in now]
        same = same and report["model"]["routing"] in (None, routing)
        whole = same and not integrity.verify(out)
    except (OSError, *bounded.BAD_CONTENT, integrity.DamagedError):
        return None
    return {"path": str(out), **report} if whole else None


def causal_routers(source: RunWeights, config: Config, run: Path, *, routing: str) -> tuple[int, bool]:
    """Width of the auxiliary routers (0: none), and whether averaged cut-offs are kept.

    Raises:
        NoRoutersError: the model has routing, but no routers or thresholds for causal routing.
    """
    names = source.names()
    hidden = [name for name in names if "auxiliary" in name and name.endswith(".hidden")]
    auxiliary = source.entry(hidden[0]).shape[0] if hidden else 0
    thresholds = any(".mlp.threshold." in name or ".depth_threshold." in name for name in names)
    refuse_without_routers(
        config.model, run, source.path, auxiliary=auxiliary > 0, thresholds=thresholds, routing=routing
    )
    return auxiliary, thresholds


def accounted(source: RunWeights, config: Config, run: Path, *, routing: str) -> tuple[int, bool, list[Move]]:
    """The result of `causal_routers`, and the conversions, which cover all tensors of the checkpoint.

    Raises:
        NoRoutersError: as `causal_routers`.
        CheckpointError: the checkpoint holds another model than the configuration's.
    """
    auxiliary, thresholds = causal_routers(source, config, run, routing=routing)
    listed = moves(config, auxiliary=auxiliary > 0, thresholds=thresholds)
    if wrong := unaccounted(source.names(), [move.source for move in listed]):
        raise CheckpointError(
            f"{source.path} does not hold the model of its configuration: {integrity.describe(wrong)}",
            remedy="`mmscale ckpt verify` it, or choose another checkpoint: RUN@STEP",
        )
    return auxiliary, thresholds, listed


def tokenizers_of(config: Config, source: RunWeights, data: Path | None) -> DataTokenizers:
    """Tokenizers of the data set, after checking that they are those of training.

    Of a blend they are those of the first data set with the most modalities, because the first one may be text only.

    Raises:
        DataError: there is no such data set, it has other tokenizers, or those of a blend are not the same.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    folder, manifest = tokenizer_set(config, source.path, data)
    text = open_text_tokenizer(folder)
    codecs = open_codecs(folder)
    if isinstance(image := codecs.get(IMAGE), PluginTokenizer):
        raise DataError(
            f"the image tokenizer of {folder} is the plug-in {image.kind}, which an export cannot hold",
            remedy="use the checkpoint with mmscale's own commands, or train on images of a built-in tokenizer",
        )
    found = {TEXT: text.fingerprint()} | {name: codec.fingerprint() for name, codec in codecs.items()}
    trained = [("its manifest", manifest.tokenizers)]
    saved = source.main.info().get("tokenizers")
    if isinstance(saved, dict):
        trained.append((f"the checkpoint {source.path}", by_modality(saved)))
    elif data is not None and config.data.sources and Path(config.data.sources[0].path).is_dir():
        first = Path(config.data.sources[0].path)
        other = read_manifest(first)
        trained.append((f"the run's data {first}", other.tokenizers))
    for where, wanted in trained:
        for name, fingerprint in found.items():
            if wanted.get(name, fingerprint) != fingerprint:
                raise DataError(
                    f"data: the {name} tokenizer of {folder} ({fingerprint}) is another than that of "
                    f"{where} ({wanted[name]})",
                    remedy="name the data set that the run was trained on: --data DIR",
                )
    about: dict[str, Any] = {
        "folder": str(folder),
        "vocabulary": manifest.vocabulary,
        **{f"{name}_tokenizer": found.get(name, NO_TOKENIZER) for name in (TEXT, IMAGE, *codecs)},
        "source": manifest.source,
    }
    train = manifest.splits.get("train")
    if train is not None:
        about["documents"] = train.documents
        about["tokens"] = {name: train.tokens(name) for name in manifest.modalities}
    return DataTokenizers(folder, vocabulary, text, codecs, about)


def _write_companions(folder: Path, config: Config, own: DataTokenizers) -> None:
    """Write all files except weights, config.json, the card and the report."""
    rows, context = config.vocab.padded_size, config.model.seq_length
    write_text_tokenizer(folder, own.text, own.vocabulary, rows=rows, context=context)
    ranges = [[n, *r] for n, r in zip(own.vocabulary.names, own.vocabulary.ranges, strict=True)]
    processor = {
        "processor_class": "MomaProcessor",
        "auto_map": {"AutoProcessor": "processing_moma.MomaProcessor"},
        "modalities": ranges,
        **({"marked": list(own.vocabulary.marked)} if own.vocabulary.marked else {}),
    }
    _json(folder / "processor_config.json", processor)
    _json(folder / "generation_config.json", generation_config(config))
    for name, codec in own.codecs.items():
        codec.save(folder / folder_of(name))
    for name in PROCESSOR if is_native(config) else {*CODE, *PROCESSOR}:
        shutil.copyfile(Path(shipped.__file__).with_name(name), folder / name)
    write_codecs(folder, own.codecs)


def _judged(
    folder: Path,
    content: dict[str, Any],
    run: Path,
    source: RunWeights,
    config: Config,
    own: DataTokenizers,
    written: WrittenWeights,
    out: Path,
    *,
    routing: str,
    on_stage: OnStage,
) -> dict[str, Any]:
    """The report of an export that has passed the gate.

    Raises:
        CheckpointError: it has not passed.
    """
    tokens = {name: codec.tokens_per_item for name, codec in own.codecs.items()}
    asked = gate.prompts(own.folder, own.vocabulary, tokens_per_item=tokens, longest=config.model.seq_length)
    used = routing if config.model.routes else None
    computed = gate.compute(run, source.step, asked, routing=used)
    with _seen_with(folder, content, out) as (view, scratch):
        on_stage("view")
        expected = gate.Expected(own.vocabulary, own.text, own.codecs)
        found = gate.reload(view, computed, expected, scratch=scratch)
    verdict = gate.judge(found)
    if not verdict["passed"]:
        raise CheckpointError(
            f"the gate refuses the export of {source.path}: {integrity.describe(verdict['problems'])}",
            remedy="nothing was published; this is a bug of the conversion, or a version of transformers that it does "
            f"not know: it was tested with {OLDEST} to {NEWEST}, here is {found['transformers']}",
        )
    return {
        "gate": verdict,
        "model": {"class": found["class"], "native": is_native(config), "routing": used},
        "weights": {"tensors": written.tensors, "bytes": written.bytes, "shards": list(written.shards)},
        "prompts": found["prompts"],
        "generated": found["generated"],
        "data": own.about | ({"sources": sources} if (sources := blend_sources(config, source.step)) else {}),
        "versions": {"mmscale": code_version(), "transformers": found["transformers"], "torch": found["torch"]},
        "tested_transformers": {"oldest": OLDEST, "newest": NEWEST},
        "origin": origin_of("convert to-hf", source.parents, routing=used),
    }


@contextlib.contextmanager
def _seen_with(folder: Path, content: dict[str, Any], out: Path) -> Iterator[tuple[Path, Path]]:
    """The folder as it will be published, made of links and the missing config.json; and scratch space for the gate.

    Next to the output, not in /tmp, so that the next export to that place removes the files of a killed one.
    """
    with publish.folder(out.with_name(f"{out.name}.gate")) as place:
        view, scratch = place.resolve() / "model", place.resolve() / "gate"
        view.mkdir()
        scratch.mkdir()
        for path in folder.iterdir():
            (view / path.name).symlink_to(path.resolve())
        _json(view / CONFIG, content)
        yield view, scratch


def _finish(
    folder: Path,
    out: Path,
    content: dict[str, Any],
    report: dict[str, Any],
    readme: str,
    *,
    source: RunWeights,
    config: Config,
) -> None:
    _json(folder / REPORT, report)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    _json(folder / CONFIG, content)
    parent = source.main.manifest()
    manifest = CheckpointManifest(
        step=source.step,
        attempt=parent.attempt,
        config_digest=digest(config),
        code_version=report["versions"]["mmscale"],
        topology={},
        files=integrity.digests(folder, integrity.sizes(folder)),
        origin=report["origin"],
    )
    publish.commit(folder, out, manifest)


def _json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""A checkpoint as a Hugging Face folder that transformers loads, published only after the gate's pass.

Weights are streamed from the checkpoint. Until the gate has passed, the folder has another name and no config.json, so
that an interrupted export leaves nothing that loads. What the gate demands is gate.py's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools import gate, hf
from checkpoints_tools.hf.versions_moma import NEWEST, OLDEST
from checkpoints_tools.hf_card import card
from checkpoints_tools.hf_config import CODE, PROCESSOR, generation_config, model_config
from checkpoints_tools.hf_files import Written, unaccounted, write_weights
from checkpoints_tools.hf_settings import CONFIG, REPORT, settings
from checkpoints_tools.hf_source import RunWeights
from checkpoints_tools.hf_text import write_text_tokenizer
from checkpoints_tools.hf_weights import Move, is_native, moves
from mmscale import bounded
from mmscale.checkpoint import integrity, publish
from mmscale.checkpoint.integrity import Manifest
from mmscale.checkpoint.tensors import origin_of
from mmscale.config import Config
from mmscale.config.load import digest
from mmscale.data.image_tokens import FOLDER as IMAGE_TOKENIZER
from mmscale.data.image_tokens import ImageTokenizer, open_image_tokenizer
from mmscale.data.manifest import NO_TOKENIZER, check_vocabulary, common_tokenizers, named_sources, read_manifest
from mmscale.data.text_tokens import TextTokenizer, open_text_tokenizer
from mmscale.data.vocab import Vocabulary
from mmscale.errors import CheckpointError, DataError
from mmscale.runtime.environment import code_version

SHARD_BYTES = 5_000_000_000
OnStage = Callable[[str], None]


def _nothing(stage: str) -> None:
    """The usual `on_stage`."""


@dataclass(frozen=True)
class DataTokenizers:
    """What an export takes from the data set.

    Attributes:
        folder: the prepared data set.
        vocabulary: id ranges.
        text: text tokenizer.
        image: image tokenizer; None: there is none.
        about: fingerprints and counts, for the report and the card.
    """

    folder: Path
    vocabulary: Vocabulary
    text: TextTokenizer
    image: ImageTokenizer | None
    about: dict[str, Any]


def export(
    run: Path,
    step: int | None,
    out: Path,
    *,
    data: Path | None = None,
    routing: str = "causal",
    shard_bytes: int = SHARD_BYTES,
    on_stage: OnStage = _nothing,
) -> dict[str, Any]:
    """Convert a checkpoint and publish it if transformers computes what the trainer computes.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        out: a folder that does not exist yet.
        data: the prepared data set that gives tokenizers and prompts; None: the run's.
        routing: who decides which experts take a token: causal, top1 or threshold.
        shard_bytes: largest file of weights [bytes].
        on_stage: told the name of every sub-step after it; tests end the process there.

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
            tokens_per_image=own.image.tokens_per_image if own.image else 0,
        ) | settings(config, own.about)
        _write_beside(folder, config, own)
        on_stage("files")
        report = _judged(folder, content, run, source, config, own, written, out, routing=routing, on_stage=on_stage)
        on_stage("gate")
        _finish(folder, out, content, report, source=source, config=config, run=run, on_stage=on_stage)
    return {"path": str(out), **report}


def up_to_date(run: Path, step: int | None, out: Path, *, routing: str) -> dict[str, Any] | None:
    """The report of an export that stands at `out` already, is whole and of this very checkpoint; None otherwise."""
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


class NoRoutersError(CheckpointError):
    """A model routes tokens, and has nothing to do it causally."""


def causal_routers(source: RunWeights, config: Config, run: Path, *, routing: str) -> tuple[int, bool]:
    """Width of the auxiliary routers (0: none), and whether averaged cut-offs are kept.

    Raises:
        NoRoutersError: the model routes tokens, and has nothing to do it causally.
    """
    names = source.names()
    hidden = [name for name in names if "auxiliary" in name and name.endswith(".hidden")]
    auxiliary = source.entry(hidden[0]).shape[0] if hidden else 0
    thresholds = any(".mlp.threshold." in name or ".depth_threshold." in name for name in names)
    if config.model.routes and not (thresholds if routing == "threshold" else auxiliary):
        alternative = ", or export with --routing threshold" if thresholds else ""
        what = "averaged cut-offs" if routing == "threshold" else "auxiliary routers"
        raise NoRoutersError(
            f"{source.path} has no {what}: its experts choose among all tokens of a sequence, later ones too, so that "
            "it cannot generate",
            remedy=f"train them: `mmscale train {run / 'config.yaml'} --stage auxiliary`{alternative}",
        )
    return auxiliary, thresholds


def accounted(source: RunWeights, config: Config, run: Path, *, routing: str) -> tuple[int, bool, list[Move]]:
    """What `causal_routers` gives, and the moves that take every tensor of the checkpoint and miss none.

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
    """Tokenizers of the data set, after a look whether they are those of training.

    Of a blend they are those of the first data set that has images, for the first of all may be text only.

    Raises:
        DataError: there is no such data set, it has other tokenizers, or those of a blend are not the same.
    """
    vocabulary = Vocabulary.from_config(config.vocab)
    if data is None and not config.data.sources:  # a run that `convert from-hf` made
        raise DataError(
            f"the run of {source.path} has no data set, and with it no tokenizers",
            remedy="name one: `mmscale convert to-hf RUN OUT --data DIR`, or data.path in the run's config.yaml",
        )
    folders = [data] if data is not None else [Path(source.path) for source in named_sources(config)]
    blend = {folder: read_manifest(folder) for folder in folders}
    common_tokenizers({folder: manifest.tokenizers for folder, manifest in blend.items()})
    with_images = [one for one, known in blend.items() if known.image_tokenizer != NO_TOKENIZER]
    folder = (with_images or folders)[0]
    manifest = blend[folder]
    check_vocabulary(folder, manifest, vocabulary)
    text = open_text_tokenizer(folder)
    image = open_image_tokenizer(folder) if (folder / IMAGE_TOKENIZER).is_dir() else None
    found = {"text_tokenizer": text.fingerprint(), "image_tokenizer": image.fingerprint() if image else NO_TOKENIZER}
    trained = [("its manifest", {name: getattr(manifest, name) for name in found})]
    saved = source.main.info().get("tokenizers")
    if isinstance(saved, dict):
        trained.append((f"the checkpoint {source.path}", saved))
    elif data is not None and config.data.sources and Path(config.data.sources[0].path).is_dir():
        first = Path(config.data.sources[0].path)
        other = read_manifest(first)
        trained.append((f"the run's data {first}", {name: getattr(other, name) for name in found}))
    for where, wanted in trained:
        for name, fingerprint in found.items():
            if wanted.get(name, fingerprint) != fingerprint:
                raise DataError(
                    f"data: the {name.replace('_', ' ')} of {folder} ({fingerprint}) is another than that of "
                    f"{where} ({wanted[name]})",
                    remedy="name the data set that the run was trained on: --data DIR",
                )
    about: dict[str, Any] = {
        "folder": str(folder),
        "vocabulary": manifest.vocabulary,
        **found,
        "source": manifest.source,
    }
    train = manifest.splits.get("train")
    if train is not None:
        about["documents"] = train.documents
        about["tokens"] = {name: train.tokens(name) for name in manifest.modalities}
    return DataTokenizers(folder, vocabulary, text, image, about)


def _write_beside(folder: Path, config: Config, own: DataTokenizers) -> None:
    """Everything but weights, config.json, the card and the report."""
    rows, context = config.vocab.padded_size, config.model.seq_length
    write_text_tokenizer(folder, own.text, own.vocabulary, rows=rows, context=context)
    ranges = [[n, *r] for n, r in zip(own.vocabulary.names, own.vocabulary.ranges, strict=True)]
    processor = {
        "processor_class": "MomaProcessor",
        "auto_map": {"AutoProcessor": "processing_moma.MomaProcessor"},
        "modalities": ranges,
    }
    _json(folder / "processor_config.json", processor)
    _json(folder / "generation_config.json", generation_config(config))
    if own.image is not None:
        own.image.save(folder / IMAGE_TOKENIZER)
    for name in PROCESSOR if is_native(config) else {*CODE, *PROCESSOR}:
        shutil.copyfile(Path(hf.__file__).with_name(name), folder / name)


def _judged(
    folder: Path,
    content: dict[str, Any],
    run: Path,
    source: RunWeights,
    config: Config,
    own: DataTokenizers,
    written: Written,
    out: Path,
    *,
    routing: str,
    on_stage: OnStage,
) -> dict[str, Any]:
    """The report of an export that has passed the gate.

    Raises:
        CheckpointError: it has not.
    """
    tokens = own.image.tokens_per_image if own.image else 0
    asked = gate.prompts(own.folder, own.vocabulary, tokens_per_image=tokens, longest=config.model.seq_length)
    used = routing if config.model.routes else None
    computed = gate.compute(run, source.step, asked, routing=used)
    with _seen_with(folder, content, out) as (view, scratch):
        on_stage("view")
        expected = gate.Expected(own.vocabulary, own.text, own.image)
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
        "data": own.about,
        "versions": {"mmscale": code_version(), "transformers": found["transformers"], "torch": found["torch"]},
        "tested_transformers": {"oldest": OLDEST, "newest": NEWEST},
        "origin": origin_of("convert to-hf", source.parents, routing=used),
    }


@contextlib.contextmanager
def _seen_with(folder: Path, content: dict[str, Any], out: Path) -> Iterator[tuple[Path, Path]]:
    """The folder as it will be published, links and the config.json that it does not have yet; room for the gate.

    Beside the output, not in /tmp: what a killed export leaves is swept away by the next one to that place.
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
    *,
    source: RunWeights,
    config: Config,
    run: Path,
    on_stage: OnStage,
) -> None:
    _json(folder / REPORT, report)
    (folder / "README.md").write_text(card(config, report, run=run, step=source.step), encoding="utf-8")
    _json(folder / CONFIG, content)
    parent = source.main.manifest()
    manifest = Manifest(
        step=source.step,
        attempt=parent.attempt,
        config_digest=digest(config),
        code_version=report["versions"]["mmscale"],
        topology={},
        files=integrity.digests(folder, integrity.sizes(folder)),
        origin=report["origin"],
    )
    publish.commit(folder, out, manifest, on_stage=on_stage)


def _json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""Prepares a data set from documents (`mmscale data prepare`): atomic, resumable and bit-identical.

Order on disk: source.json (the input), tokenizers, parts, rejected.jsonl, tasks, digests.json, manifest. Without a
manifest the data set cannot be loaded; finished files are kept if the run is interrupted at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmscale.config import Config, PrepareConfig
from mmscale.config.plugins import uses
from mmscale.data import digests
from mmscale.data.documents.readers import list_local
from mmscale.data.documents.schema import DocumentSlice
from mmscale.data.modalities.fit import check_settings, item_tokenizers, text_tokenizer
from mmscale.data.modalities.modality import Codec
from mmscale.data.prepared import canaries, tasks
from mmscale.data.prepared.build import WorkSetup, build_parts
from mmscale.data.prepared.folder import REJECTED, claimed
from mmscale.data.prepared.folder_lock import write_error
from mmscale.data.prepared.gpu_check import check_gpus
from mmscale.data.prepared.inputs import listing, slices_of, source_of
from mmscale.data.prepared.manifest import (
    FORMAT,
    MANIFEST,
    NO_TOKENIZER,
    TEXT,
    Manifest,
    Split,
    Task,
    read_manifest,
    write_manifest,
)
from mmscale.data.prepared.megatron import (
    MegatronCorpus,
    check_tokenizer_named,
    check_tokens,
    content_of,
    corpora_of,
    identities,
    link,
    offset_of,
)
from mmscale.data.prepared.parts import (
    SPLITS,
    FinishedPart,
    PartJob,
    read_finished,
    strict_error,
)
from mmscale.data.prepared.questions import check_questions, read_questions
from mmscale.data.prepared.rejected_reasons import rejected_words
from mmscale.data.prepared.remarks import remarks_on
from mmscale.data.prepared.reuse import check_companions
from mmscale.data.prepared.set_digests import content_of_parts, digests_of_set, without_content
from mmscale.data.prepared.shares import Share, SharedPlan, require_whole, shares_of
from mmscale.data.prepared.table_facts import keep_facts
from mmscale.data.progress import Reporter
from mmscale.data.vocab import IMAGE, Vocabulary
from mmscale.errors import ConfigError, DataError
from mmscale.runtime.atomic_files import write_atomic
from mmscale.tables import plugins
from mmscale.wording import numbered

# Values of data.prepare.source that older versions prepared: the program that writes the documents now, and a
# configuration that names them.
_FORMER = {
    "digits": (
        "examples/digits/write_documents.py of the repository (`mmscale init` writes a copy)",
        "configs/quickstart.yaml",
    ),
    "emoji": ("examples/emoji/write_documents.py of the repository", "configs/emoji.yaml"),
}


def prepare(
    config: Config,
    out: Path,
    *,
    overwrite: bool = False,
    strict: bool | None = None,
    workers: int | None = None,
    gpus: int = 0,
    progress: bool = True,
) -> Manifest:
    """Make a data set, or finish one that was begun. A finished one is not changed.

    Args:
        config: `vocab` and `data.prepare` are used.
        out: the data set's folder.
        overwrite: make everything again.
        strict: raise an error for the first bad document; default: data.prepare.strict.
        workers: processes; default: data.prepare.workers.
        gpus: of this machine, that compute the image tokenizer; the default of `workers` is at least this number.
        progress: report on stderr.

    Raises:
        ConfigError: settings are missing or contradict each other, or there are fewer GPUs.
        DataError: an input is missing or bad, `out` holds something else, the disk is full, a worker died.
    """
    check_gpus(config, gpus, here=True)
    settings, vocabulary, reporter = _begun(config, out, overwrite=overwrite, progress=progress)
    strict = settings.strict if strict is None else strict
    workers = workers or max(settings.workers, gpus)
    try:
        if settings.source == "megatron":
            check_tokenizer_named(settings)
            corpora = list(corpora_of(list_local(settings.documents)))
            source = source_of(settings, vocabulary, identities(corpora))
            with claimed(out, source, overwrite=overwrite):
                return _link(out, settings, vocabulary, corpora, source, reporter)
        jobs, source = _listed(settings, vocabulary, reporter)
        with claimed(out, source, overwrite=overwrite):
            plan = _planned(out, settings, vocabulary, jobs, reporter, strict=strict, gpus=gpus)
            return _prepare(out, settings, vocabulary, plan, source, strict, workers, reporter)
    except OSError as error:
        raise write_error(error, Path(error.filename or out)) from error


def plan_shares(
    config: Config,
    out: Path,
    *,
    number: int,
    overwrite: bool = False,
    strict: bool | None = None,
    workers: int | None = None,
    gpus: int = 0,
    progress: bool = True,
) -> list[Share]:
    """List the documents and make the tokenizers, so that several processes can make the parts. `prepare` finishes.

    Args:
        config: as for `prepare`.
        out: likewise.
        number: shares at most.
        overwrite: likewise.
        strict: likewise.
        workers: processes of each share.
        gpus: of each machine that makes shares.
        progress: likewise.

    Returns:
        Shares of the missing parts; empty if every part exists.

    Raises:
        ConfigError, DataError: as for `prepare`.
    """
    check_gpus(config, gpus, here=False)
    settings, vocabulary, reporter = _begun(config, out, overwrite=overwrite, progress=progress)
    if settings.source == "megatron":
        raise ConfigError("data.prepare: a Megatron corpus has no parts to share", remedy="leave --tasks out")
    strict = settings.strict if strict is None else strict
    try:
        slices, source = _listed(settings, vocabulary, reporter)
        with claimed(out, source, overwrite=overwrite):
            plan = _planned(out, settings, vocabulary, slices, reporter, strict=strict, gpus=gpus)
            missing = [job for job in plan.jobs if read_finished(out, job) is None]
            if missing:
                (out / MANIFEST).unlink(missing_ok=True)  # a data set with missing parts must not load
            SharedPlan(len(plan.jobs)).write(out)
    except OSError as error:
        raise write_error(error, Path(error.filename or out)) from error
    workers = workers or max(settings.workers, gpus)
    return shares_of(plan.setup, missing, source=source["digest"], number=number, workers=workers)


def finish(config: Config, out: Path, *, strict: bool | None, workers: int | None, whole: bool = False) -> None:
    """`prepare` on CPUs, as it is called in the job that runs after all shares; `whole`: no part may be missing."""
    if whole:
        require_whole(out)
    prepare(config, out, strict=strict, workers=workers)


def _begun(config: Config, out: Path, *, overwrite: bool, progress: bool) -> tuple[PrepareConfig, Vocabulary, Reporter]:
    """Checked settings, the vocabulary, and the reporter of progress."""
    settings = config.data.prepare
    if settings is None:
        raise ConfigError("data.prepare is not set", remedy="name what to prepare: --documents FILE.jsonl")
    if settings.source in _FORMER:
        program, example = _FORMER[settings.source]
        raise ConfigError(
            f"data.prepare.source = {settings.source}: this data set is not part of the package any more",
            remedy=f"run {program}, and name the files that it writes in data.prepare.documents and "
            f"data.prepare.tasks, as {example} does",
        )
    reporter = Reporter(enabled=progress)
    vocabulary = Vocabulary.from_config(config.vocab)
    check_settings(settings, vocabulary, out=None if overwrite else out)
    for file in settings.tasks.values():
        check_questions(Path(file))
    for use in uses(settings, "data.prepare."):
        plugins.check(use)
    for note in check_companions(config, settings, out, overwrite=overwrite):
        reporter.say(note)
    return settings, vocabulary, reporter


def _listed(
    settings: PrepareConfig, vocabulary: Vocabulary, reporter: Reporter
) -> tuple[list[list[DocumentSlice]], dict[str, Any]]:
    """The input cut into parts, and the record of it."""
    with reporter.part("listing documents"):
        slices = slices_of(settings)
        found = slices, source_of(settings, vocabulary, listing(slices))
    for note in dict.fromkeys(note for part in slices for piece in part for note in getattr(piece, "notes", ())):
        reporter.say(note)
    return found


@dataclass(frozen=True)
class _Plan:
    """The parts to make, with the tokenizers in the folder."""

    jobs: list[PartJob]
    setup: WorkSetup
    codecs: dict[str, Codec]
    fingerprints: dict[str, str]


def _planned(
    out: Path,
    settings: PrepareConfig,
    vocabulary: Vocabulary,
    slices: Sequence[Sequence[DocumentSlice]],
    reporter: Reporter,
    *,
    strict: bool,
    gpus: int,
) -> _Plan:
    # Canaries are no part of what tokenizers are fitted to.
    flat = [piece for part in slices for piece in part if not isinstance(piece, canaries.CanarySlice)]
    text = text_tokenizer(out, settings, vocabulary, flat, reporter)
    codecs = item_tokenizers(out, settings, vocabulary, flat, reporter)
    fingerprints = {TEXT: text.fingerprint()} | {name: codec.fingerprint() for name, codec in codecs.items()}
    others = [f"{name}:{value}" for name, value in fingerprints.items() if name not in (TEXT, IMAGE)]
    # The digests of parts depend on this order and form. Any change would make every finished part invalid.
    ours = (fingerprints[TEXT], fingerprints.get(IMAGE, NO_TOKENIZER), *others)
    identity = (*ours, vocabulary.fingerprint, str(settings.max_document_tokens), str(settings.held_out))
    jobs = [PartJob(index, tuple(part), identity) for index, part in enumerate(slices)]
    salvage = _salvaged(settings)
    setup = WorkSetup(out, vocabulary, settings.max_document_tokens, settings.held_out, strict, salvage, gpus)
    return _Plan(jobs, setup, codecs, fingerprints)


def _prepare(
    out: Path,
    settings: PrepareConfig,
    vocabulary: Vocabulary,
    plan: _Plan,
    source: dict[str, Any],
    strict: bool,
    workers: int,
    reporter: Reporter,
) -> Manifest:
    jobs, setup, codecs, fingerprints = plan.jobs, plan.setup, plan.codecs, plan.fingerprints

    finished = {job.index: part for job in jobs if (part := read_finished(out, job)) is not None}
    missing = [job for job in jobs if job.index not in finished]
    if not missing and (manifest := _existing_manifest(out, source)) is not None:
        _check_strict(strict, finished.values())
        _report(reporter, out, manifest, "is already prepared")
        for note in remarks_on(out, manifest, codecs, settings):
            reporter.say(note)
        return manifest
    if finished:
        reporter.say(f"{len(finished)} of {len(jobs)} parts are there already")
    _check_strict(strict, finished.values())
    named_before = not without_content(out, source)
    (out / MANIFEST).unlink(missing_ok=True)  # a data set with missing parts must not load
    with reporter.bar("documents", sum(job.count for job in missing)) as advance:
        made = build_parts(setup, missing, workers=workers, advance=advance)
    finished |= {job.index: part for job, part in zip(missing, made, strict=True)}
    parts = [finished[job.index] for job in jobs]

    rejected = [item for part in parts for item in part.rejected]
    write_atomic(out / REJECTED, "".join(json.dumps(asdict(item)) + "\n" for item in rejected).encode())
    if not any(part.splits for part in parts):
        first = f" (the first: {rejected[0].where}: {rejected[0].reason})" if rejected else ""
        raise DataError(f"data: no document is usable{first}", remedy=f"see {out / REJECTED}")
    found_tasks = _write_tasks(out, settings, setup, reporter)
    canaries.write_canaries(out, settings.canaries)
    by_split = {name: tuple(part.splits[name] for part in parts if name in part.splits) for name in SPLITS}
    manifest = Manifest(
        format=FORMAT,
        **_fields_of(vocabulary),
        tokenizers=fingerprints,
        tokens_per_item={name: codec.tokens_per_item for name, codec in codecs.items()},
        splits={name: Split(parts=own) for name, own in by_split.items()},
        tasks=found_tasks,
        rejected=len(rejected),
        source=source["digest"],
        content=content_of_parts(jobs, parts) if named_before else "",
    )
    known = {name: digest for part in parts for name, digest in part.digests.items()}
    sizes = [name for part in parts for name in part.sizes]
    with reporter.part("digests"):
        write_atomic(out / digests.DIGESTS, digests.text(digests_of_set(out, known, sizes, manifest)))
    write_manifest(out, manifest)
    keep_facts(out, manifest)
    _report(reporter, out, manifest, "is prepared")
    for note in remarks_on(out, manifest, codecs, settings):
        reporter.say(note)
    return manifest


def _link(
    out: Path,
    settings: PrepareConfig,
    vocabulary: Vocabulary,
    corpora: Sequence[MegatronCorpus],
    source: dict[str, Any],
    reporter: Reporter,
) -> Manifest:
    """Make a data set of Megatron corpora."""
    if (manifest := _existing_manifest(out, source)) is not None:
        check_tokens(out, corpora, reporter)
        _report(reporter, out, manifest, "is already prepared")
        return manifest
    text = text_tokenizer(out, settings, vocabulary, (), reporter)
    splits, known = link(out, corpora, settings, vocabulary, offset_of(settings, text), reporter)
    if not any(splits.values()):
        raise DataError("data: the corpora have no documents", remedy="name corpora with documents")
    setup = WorkSetup(out, vocabulary, settings.max_document_tokens, settings.held_out, settings.strict)
    manifest = Manifest(
        format=FORMAT,
        **_fields_of(vocabulary),
        tokenizers={TEXT: text.fingerprint()},
        tokens_per_item={},
        splits={name: Split(parts=tuple(parts)) for name, parts in splits.items()},
        tasks=_write_tasks(out, settings, setup, reporter),
        source=source["digest"],
        content="" if without_content(out, source) else content_of(known),
    )
    write_atomic(out / digests.DIGESTS, digests.text(digests_of_set(out, known, (), manifest)))
    write_manifest(out, manifest)
    keep_facts(out, manifest)
    _report(reporter, out, manifest, "is prepared")
    return manifest


def _write_tasks(out: Path, settings: PrepareConfig, setup: WorkSetup, reporter: Reporter) -> tuple[Task, ...]:
    found = []
    with reporter.part("tasks"):
        for name, items in _questions(settings, setup):
            file = f"{tasks.FOLDER}/{name}.jsonl"
            tasks.write_task(out / file, items)
            if again := tasks.said_twice(items):
                reporter.say(f"note: task {name}: {numbered(len(items), 'question')}{again}")
            found.append(Task(name=name, file=file, kind="choice" if items[0].choices else "exact"))
    return tuple(found)


def _fields_of(vocabulary: Vocabulary) -> dict[str, Any]:
    """The fields of a manifest that define the ids."""
    own = {"modalities": vocabulary.names, "ranges": vocabulary.ranges, "vocabulary": vocabulary.fingerprint}
    return own | {"marked": vocabulary.marked, "reserved": vocabulary.reserved}


def _questions(settings: PrepareConfig, setup: WorkSetup) -> Iterator[tuple[str, list[tasks.TaskItem]]]:
    """Tasks of the files that the settings name."""
    for name, file in settings.tasks.items():
        yield name, read_questions(Path(file), setup.encoder())


def _salvaged(settings: PrepareConfig) -> tuple[str, ...]:
    return (IMAGE,) if settings.image.damaged == "salvage" else ()


def _existing_manifest(out: Path, source: dict[str, Any]) -> Manifest | None:
    """The manifest, if the data set is finished and complete."""
    try:
        manifest = read_manifest(out)
    except DataError:
        return None
    whole = manifest.source == source["digest"] and all((out / task.file).is_file() for task in manifest.tasks)
    return manifest if whole else None


def _check_strict(strict: bool, parts: Iterable[FinishedPart]) -> None:
    for part in parts:
        if strict and part.rejected:
            raise strict_error(part.rejected[0])


def _report(reporter: Reporter, out: Path, manifest: Manifest, state: str) -> None:
    counts = ", ".join(f"{split.documents} {name}" for name, split in manifest.splits.items())
    reporter.say(f"{out} {state}: {counts} documents{rejected_words(out / REJECTED, manifest.rejected)}")

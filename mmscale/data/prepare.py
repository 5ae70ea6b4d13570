"""`mmscale data prepare`: documents to a data set that is there whole or not at all, resumable and bit-identical.

Order on disk: source.json (what it is made from), tokenizers, parts, rejected.jsonl, tasks, digests.json, manifest.
Until the manifest stands there nothing loads; what is finished before is kept when the run is broken off at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.config import Config, PrepareConfig
from mmscale.data import digests, image_tokens, tasks, text_tokens
from mmscale.data.build import WorkSetup, build_parts
from mmscale.data.digits import TASK as DIGIT_TASK
from mmscale.data.digits import digit_slices, digit_task
from mmscale.data.document_files import list_files, scan_files
from mmscale.data.documents import DocumentSlice
from mmscale.data.emoji import TASK as EMOJI_TASK
from mmscale.data.emoji import emoji_slices, emoji_task
from mmscale.data.fit_tokenizers import image_tokenizer, text_tokenizer
from mmscale.data.manifest import (
    FORMAT,
    MANIFEST,
    MOST_BYTES,
    NO_TOKENIZER,
    Manifest,
    Split,
    Task,
    read_manifest,
    write_manifest,
)
from mmscale.data.parts import (
    DONE,
    SPLITS,
    FinishedPart,
    PartJob,
    read_finished,
    strict_error,
    write_error,
    write_whole,
)
from mmscale.data.progress import Reporter
from mmscale.data.shared_content import shared_content
from mmscale.data.vocab import Vocabulary
from mmscale.errors import ConfigError, DataError

SOURCE = "source.json"
REJECTED = "rejected.jsonl"
_LOCK = ".lock"
_ENCODING = 1  # raised when the same documents would become other ids
_TOKENIZERS = (text_tokens.FOLDER, image_tokens.FOLDER)
# What a data set's folder may hold, in the order in which --overwrite removes it: first what makes it one.
_OWN = (MANIFEST, digests.DIGESTS, REJECTED, *SPLITS, DONE, tasks.FOLDER, *_TOKENIZERS, ".cache", SOURCE)


def prepare(
    config: Config,
    out: Path,
    *,
    overwrite: bool = False,
    strict: bool | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Make a data set, or finish one that was begun; a finished one is left as it is.

    Args:
        config: `vocab` and `data.prepare` are used.
        out: the data set's folder.
        overwrite: remove what was prepared from something else.
        strict: the first bad document is an error; default: data.prepare.strict.
        workers: processes; default: data.prepare.workers.
        progress: report on stderr.

    Raises:
        ConfigError: settings are missing or contradict each other.
        DataError: an input is missing or bad, `out` holds something else, the disk is full, a worker died.
    """
    settings = config.data.prepare
    if settings is None:
        raise ConfigError("data.prepare is not set", remedy="say what to prepare: data.prepare.source=digits")
    strict = settings.strict if strict is None else strict
    reporter = Reporter(enabled=progress)
    vocabulary = Vocabulary.from_config(config.vocab)
    try:
        with reporter.part("listing documents"):
            jobs = _slices(settings)
            source = _source(settings, vocabulary, jobs)
        with _claimed(out, source, overwrite=overwrite):
            return _prepare(out, settings, vocabulary, jobs, source, strict, workers or settings.workers, reporter)
    except OSError as error:
        raise write_error(error, Path(error.filename or out)) from error


def _prepare(
    out: Path,
    settings: PrepareConfig,
    vocabulary: Vocabulary,
    slices: Sequence[Sequence[DocumentSlice]],
    source: dict[str, Any],
    strict: bool,
    workers: int,
    reporter: Reporter,
) -> Manifest:
    flat = [piece for part in slices for piece in part]
    text = text_tokenizer(out, settings, vocabulary, flat, reporter)
    image = image_tokenizer(out, settings, vocabulary, flat, reporter)
    fingerprints = (text.fingerprint(), image.fingerprint() if image else NO_TOKENIZER)
    identity = (*fingerprints, vocabulary.fingerprint, str(settings.max_document_tokens), str(settings.held_out))
    jobs = [PartJob(index, tuple(part), identity) for index, part in enumerate(slices)]

    finished = {job.index: part for job in jobs if (part := read_finished(out, job)) is not None}
    missing = [job for job in jobs if job.index not in finished]
    if not missing and (manifest := _standing(out, source)) is not None:
        _check_strict(strict, finished.values())
        _report(reporter, out, manifest, "is already prepared")
        return manifest
    if finished:
        reporter.say(f"{len(finished)} of {len(jobs)} parts are there already")
    _check_strict(strict, finished.values())
    setup = WorkSetup(out, vocabulary, settings.max_document_tokens, settings.held_out, strict)
    with reporter.bar("documents", sum(job.count for job in missing)) as advance:
        made = build_parts(setup, missing, workers=workers, advance=advance)
    finished |= {job.index: part for job, part in zip(missing, made, strict=True)}
    parts = [finished[job.index] for job in jobs]

    rejected = [item for part in parts for item in part.rejected]
    write_whole(out / REJECTED, "".join(json.dumps(asdict(item)) + "\n" for item in rejected).encode())
    if not any(part.splits for part in parts):
        first = f" (the first: {rejected[0].where}: {rejected[0].reason})" if rejected else ""
        raise DataError(f"data: no document is usable{first}", remedy=f"see {out / REJECTED}")
    found_tasks = []
    with reporter.part("tasks"):
        for name, items in _questions(settings, setup):
            file = f"{tasks.FOLDER}/{name}.jsonl"
            tasks.write_task(out / file, items)
            found_tasks.append(Task(name=name, file=file))
    by_split = {name: tuple(part.splits[name] for part in parts if name in part.splits) for name in SPLITS}
    manifest = Manifest(
        format=FORMAT,
        modalities=vocabulary.names,
        ranges=vocabulary.ranges,
        vocabulary=vocabulary.fingerprint,
        text_tokenizer=fingerprints[0],
        image_tokenizer=fingerprints[1],
        tokens_per_image=image.tokens_per_image if image else 0,
        splits={name: Split(parts=own) for name, own in by_split.items()},
        tasks=tuple(found_tasks),
        rejected=len(rejected),
        source=source["digest"],
    )
    with reporter.part("digests"):
        write_whole(out / digests.DIGESTS, digests.text(_digests(out, parts, manifest)))
    write_manifest(out, manifest)
    _report(reporter, out, manifest, "is prepared")
    for note in shared_content(out, manifest).notes():
        reporter.say(note)
    return manifest


def _digests(out: Path, parts: Sequence[FinishedPart], manifest: Manifest) -> dict[str, str]:
    """Of every file that training, evaluation and drawing read, but the manifest."""
    known = {name: digest for part in parts for name, digest in part.digests.items()}
    others = [out / name for part in parts for name in part.sizes if name not in known]
    others += [out / task.file for task in manifest.tasks]
    for folder in _TOKENIZERS:
        others += sorted(file for file in (out / folder).rglob("*") if file.is_file())
    return digests.collect(out, known, others)


def _questions(settings: PrepareConfig, setup: WorkSetup) -> Iterator[tuple[str, list[tasks.TaskItem]]]:
    """Tasks of the built-in data sets."""
    if settings.source == "digits":
        yield DIGIT_TASK, digit_task(setup.encoder())
    if settings.source == "emoji" and setup.has_images:
        items = emoji_task(settings.emoji, settings.held_out, setup.encoder())
        if items:
            yield EMOJI_TASK, items


def _slices(settings: PrepareConfig) -> list[list[DocumentSlice]]:
    """The input, cut into parts; small files share a part."""
    slices: Sequence[DocumentSlice]
    if settings.source == "digits":
        slices = digit_slices(augment=settings.augment, slice_records=settings.part_documents)
    elif settings.source == "emoji":
        slices = emoji_slices(settings.emoji, held_out=settings.held_out, slice_records=settings.part_documents)
    else:
        files = list_files(settings.documents)
        slices = scan_files(
            files, slice_records=settings.part_documents, threads=settings.workers, ignore=settings.ignore
        )
    parts: list[list[DocumentSlice]] = []
    room = 0
    for piece in slices:
        if piece.count > room:
            parts.append([])
            room = settings.part_documents
        parts[-1].append(piece)
        room -= piece.count
    if not parts:
        raise DataError("data: the document files are empty", remedy="name files with documents")
    return parts


def _source(
    settings: PrepareConfig, vocabulary: Vocabulary, slices: Sequence[Sequence[DocumentSlice]]
) -> dict[str, Any]:
    """What the data set is made from: everything that decides its bytes, and a digest of it."""
    fixed = settings.model_dump(mode="json", exclude={"workers", "strict", "documents"})
    # what a path holds counts, not where it is
    fixed["text"]["load"] = _digest_path(settings.text.load, "data.prepare.text.load")
    fixed["image"]["path"] = _digest_path(settings.image.path, "data.prepare.image.path")
    del fixed["emoji"]  # the slices say what they are made of
    if not fixed["image"]["residual"]:  # data sets from before there was such a setting stay what they are
        del fixed["image"]["residual"]
    if not fixed["ignore"]:
        del fixed["ignore"]
    listing = [[piece.identity for piece in part] for part in slices]
    content = {
        "encoding": _ENCODING,
        "vocabulary": dict(zip(vocabulary.names, map(list, vocabulary.ranges), strict=True)),
        "settings": fixed,
        "documents": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }
    return content | {"digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _digest_path(path: str | None, what: str) -> str | None:
    if path is None:
        return None
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    if not files:
        raise DataError(f"{what}: there is no {path}", remedy="correct the path")
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(root).as_posix() if file != root else ""
        try:
            with file.open("rb") as stream:
                digest.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise DataError(f"{what}: {file} cannot be read: {error.strerror}", remedy="correct the path") from error
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- the folder


@contextlib.contextmanager
def _claimed(out: Path, source: dict[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Hold the folder for this run, after making sure that it is ours to write into."""
    if out.exists() and not out.is_dir():
        raise DataError(f"data: {out} is not a folder", remedy="choose another --out")
    foreign = _foreign(out)
    if foreign:
        raise DataError(f"data: {out} holds something else than a data set ({foreign})", remedy="choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as lock:  # the lock ends with the process, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"data: another process is preparing {out}", remedy="wait for it or stop it") from error
        except OSError:  # a file system without locks
            pass
        _begin(out, source, overwrite=overwrite)
        try:
            yield
        finally:
            _remove_temporary(out)


def _foreign(out: Path) -> str:
    """A file that no data set has, if the folder is not the beginning of one."""
    if not out.is_dir() or (out / SOURCE).exists():
        return ""
    names = {_LOCK, *(f"{name}.tmp" for name in _OWN), *_OWN}
    return next((entry.name for entry in sorted(out.iterdir()) if entry.name not in names), "")


def _begin(out: Path, source: dict[str, Any], *, overwrite: bool) -> None:
    file = out / SOURCE
    before = _read_source(file)
    if before == source:
        _remove_temporary(out)
        return
    leftovers = [name for name in _OWN if (out / name).exists()]
    if leftovers and not overwrite:
        what = ", ".join(_differences(before, source)) if before else "it does not say from what"
        raise DataError(
            f"data: {out} was prepared from something else ({what})",
            remedy="remove it, choose another --out, or give --overwrite",
        )
    for name in leftovers:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    _remove_temporary(out)
    write_whole(file, (json.dumps(source, indent=1) + "\n").encode())


def _read_source(file: Path) -> dict[str, Any] | None:
    try:
        return bounded.read_object(file, most=MOST_BYTES)
    except (OSError, ValueError):
        return None


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what changed."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new and key != "digest":
            found.append(prefix + key)
    return found


def _remove_temporary(out: Path) -> None:
    """Remove what a broken-off run left half-written; only in the data set's own folders."""
    for pattern in ("*.tmp", *(f"{name}/*.tmp" for name in (*SPLITS, DONE, tasks.FOLDER, text_tokens.FOLDER))):
        for path in out.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _standing(out: Path, source: dict[str, Any]) -> Manifest | None:
    """The manifest, if the data set is finished and whole."""
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
    rejected = f"; {manifest.rejected} rejected, see {out / REJECTED}" if manifest.rejected else ""
    reporter.say(f"{out} {state}: {counts} documents{rejected}")

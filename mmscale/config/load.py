"""Reading a configuration: YAML file plus overrides -> Config, with the origin of every value; and writing it back.

Every problem of a file is reported at once. Rules between settings are in rules.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mmscale.config import document as documents
from mmscale.config import keys, rules
from mmscale.config.document import Document
from mmscale.config.schema import Config

_SHOWN = 60


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and check a configuration file.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` strings; values are YAML; the last one of a key wins.

    Raises:
        ConfigError: the file, a value or a rule is wrong; its first line is the first problem, more lines the others.
    """
    return _build(_read(path, overrides))


def resolve(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The same for settings that are in memory already.

    Raises:
        ConfigError: a value or a rule is wrong.
    """
    document = Document(data=_plain(mapping))
    return _build(_override(document, overrides))


def origins(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Where each value comes from: dotted key -> "default", "file:line" or "override".

    Raises:
        ConfigError: as for `load`.
    """
    document = _read(path, overrides)
    return {key: document.marks.get(key, "default") for key in flatten(_build(document))}


def flatten(config: Config) -> dict[str, Any]:
    """Every single value by dotted key; entries of lists are numbered from 0."""
    return dict(documents.leaves(config.model_dump(mode="json")))


def dump(config: Config) -> str:
    """YAML that loads back to an equal Config, defaults included."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    return text


def digest(config: Config) -> str:
    """Hash of all settings: equal for equal configurations, however they were written."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _read(path: str | Path, overrides: Sequence[str]) -> Document:
    return _override(documents.read_file(Path(path)), overrides)


def _override(document: Document, overrides: Sequence[str]) -> Document:
    defaults = _list_defaults() if overrides else {}
    for text in overrides:
        documents.apply_override(document, text, defaults=defaults)
    return document


def _list_defaults() -> dict[str, Any]:
    """Default entries of settings that hold lists, e.g. vocab.modalities."""
    lists = {}
    for key in keys.all_keys().values():
        default = key.field.default
        if isinstance(default, tuple) and default:
            lists[key.name] = [
                entry.model_dump(mode="json") if isinstance(entry, BaseModel) else entry for entry in default
            ]
    return lists


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _build(document: Document) -> Config:
    config, problems = _validate(document)
    problems = {**problems, **_booleans_for_numbers(document)}
    if config is None or problems:
        raise rules.as_error(list(problems.values()))
    rules.check(config)
    return config


def _booleans_for_numbers(document: Document) -> dict[str, rules.Problem]:
    """`steps: true` would pass as 1: Python's bool is an int."""
    problems = {}
    for name, value in documents.leaves(document.data):
        key = keys.find(name)
        if not isinstance(value, bool) or key is None or keys.accepts(key.field.annotation, bool):
            continue
        if keys.accepts(key.field.annotation, int) or keys.accepts(key.field.annotation, float):
            problems[name] = _wrong(document, name, value, keys.wants(name))
    return problems


def _validate(document: Document) -> tuple[Config | None, dict[str, rules.Problem]]:
    try:
        return Config.model_validate(document.data), {}
    except ValidationError as error:
        if not _repair(document, error.errors()):
            return None, _problems(document, error.errors())
    return _validate(document)


def _repair(document: Document, errors: Sequence[ErrorDetails]) -> bool:
    """Read two things as a person means them: an empty `section:` is all defaults, and a name may look like a number.

    `run.name=$JOB_ID` must not fail because the id has only digits. Returns whether something was changed.
    """
    changed = False
    for error in errors:
        name = _dotted(document, error)
        if error["type"] == "model_type" and error["input"] is None:
            _set(document.data, name, {})
            changed = True
        elif error["type"] == "string_type" and name in document.written:
            _set(document.data, name, document.written.pop(name))
            changed = True
    return changed


def _set(data: Any, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for part in parents:
        data = data[int(part)] if isinstance(data, list) else data[part]
    if isinstance(data, list):
        data[int(last)] = value
    else:
        data[last] = value


def _problems(document: Document, errors: Sequence[ErrorDetails]) -> dict[str, rules.Problem]:
    """One problem per dotted key; unknown keys first, since they often explain the others."""
    unknown, wrong, missing = {}, {}, []
    suggested = set()
    names = [_dotted(document, error) for error in errors]
    for name, error in zip(names, errors, strict=True):
        if error["type"] == "extra_forbidden":
            meant = keys.did_you_mean(name)
            suggested.add(meant)
            unknown[name] = _unknown(document, name, meant)
        elif error["type"] == "missing":
            missing.append(name)
        elif not any(other.startswith(f"{name}.") for other in names):  # a union reports every member; keep the deepest
            wrong[name] = _wrong(document, name, error["input"], _wants(name, error))
    # A mistyped required key is one mistake, not two.
    absent = {name: _missing(document, name) for name in missing if name not in suggested}
    return {**unknown, **wrong, **absent}


def _dotted(document: Document, error: ErrorDetails) -> str:
    """The dotted key of an error: pydantic mixes tags of union members and "[key]" into its path."""
    here: Any = document.data
    parts: list[str] = []
    for part in error["loc"]:
        known = part in here if isinstance(here, dict) else isinstance(here, list)
        if known:
            here = here[part]
            parts.append(str(part))
        elif error["type"] == "missing":
            parts.append(str(part))
    return ".".join(parts)


def _wants(name: str, error: ErrorDetails) -> str:
    if error["loc"][-1] == "[key]":
        return "a name of letters, digits, '.', '_' and '-' as a key"
    return keys.wants(name) or error["msg"]


def _where(document: Document, name: str) -> str:
    """The place of a key, of something inside it or of the nearest section around it: "file:line: ", "override: "."""
    inside = [mark for key, mark in document.marks.items() if key.startswith(f"{name}.")]
    if name not in document.marks and inside:
        return f"{inside[0]}: "
    while name:
        if name in document.marks:
            return f"{document.marks[name]}: "
        name = name.rpartition(".")[0]
    return ""


def _unknown(document: Document, name: str, meant: str | None) -> rules.Problem:
    remedy = f"did you mean `{meant}`?" if meant else "`mmscale config explain` lists all settings"
    return rules.Problem(f"{_where(document, name)}{name} is not a setting", remedy)


def _wrong(document: Document, name: str, value: Any, wants: str) -> rules.Problem:
    shown = "null" if value is None else json.dumps(value, default=str)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    key = keys.find(name)
    remedy = f"see `mmscale config explain {key.name if key else name}`"
    return rules.Problem(f"{_where(document, name)}{name} is {shown}, wants {wants}", remedy)


def _missing(document: Document, name: str) -> rules.Problem:
    key = keys.find(name)
    wants = f" ({key.wants})" if key is not None and key.section is None else ""
    return rules.Problem(
        f"{_where(document, name)}{name} is missing{wants}", f"add it, see `mmscale config explain {name}`"
    )

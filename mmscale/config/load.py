"""Loads a configuration from a YAML file plus overrides, with the origin of every value, and writes it back.

All problems of a file are reported at once. Rules between settings are in rules.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from mmscale.config import document as documents
from mmscale.config import keys, plugins, rules, yaml_text
from mmscale.config.document import ConfigDocument
from mmscale.config.schema import Config
from mmscale.config.section import LARGEST
from mmscale.config.validate import dotted, validate

_SHOWN = 60  # characters of a wrong value shown in a message
_MOST_PROBLEMS = 50  # in one message


def load(path: str | Path, overrides: Sequence[str] = (), *, recorded: bool = False) -> Config:
    """Read a configuration file, apply overrides and check it.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` strings; values are YAML; the last one of a key applies.
        recorded: a run wrote the file, and nothing is trained: plug-ins that it names need not be installed here.

    Raises:
        ConfigError: the file, a value or a rule is wrong. The first line is the first problem, further lines the
            others.
    """
    return _build(_read(path, overrides), recorded=recorded)


def resolve(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The same as `load` for settings in memory.

    Raises:
        ConfigError: a value or a rule is wrong.
    """
    document = ConfigDocument(data=_plain(mapping))
    return _build(_override(document, overrides))


def origins(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """The origin of each value: dotted key -> "default", "file:line" or "override".

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
    return yaml_text.dump(config.model_dump(mode="json"))


def digest(config: Config) -> str:
    """Hash of all settings: equal for equal configurations, independent of how they were written."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _read(path: str | Path, overrides: Sequence[str]) -> ConfigDocument:
    return _override(documents.read_file(Path(path)), overrides)


def _override(document: ConfigDocument, overrides: Sequence[str]) -> ConfigDocument:
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


def _build(document: ConfigDocument, *, recorded: bool = False) -> Config:
    config, errors = validate(Config, document)
    problems = {**_problems(document, errors[:_MOST_PROBLEMS]), **_booleans_for_numbers(document)}
    if config is None or problems:
        raise rules.as_error(list(problems.values())[:_MOST_PROBLEMS])
    rules.check(config)
    if not recorded:
        plugins.check_names(config)
    return config


def _booleans_for_numbers(document: ConfigDocument) -> dict[str, rules.Problem]:
    """Refuses `steps: true`, which would pass as 1 because Python's bool is an int."""
    problems = {}
    for name, value in documents.leaves(document.data):
        key = keys.find(name)
        if not isinstance(value, bool) or key is None or keys.accepts(key.field.annotation, bool):
            continue
        if keys.accepts(key.field.annotation, int) or keys.accepts(key.field.annotation, float):
            problems[name] = _wrong(document, name, value, keys.wants(name))
    return problems


def _problems(document: ConfigDocument, errors: Sequence[ErrorDetails]) -> dict[str, rules.Problem]:
    """One problem per dotted key; unknown keys first, since they often explain the others."""
    unknown, wrong, missing = {}, {}, []
    suggested = set()
    names = [dotted(document, error) for error in errors]
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


def _wants(name: str, error: ErrorDetails) -> str:
    limit = error.get("ctx", {}).get("le")
    if error["type"] == "less_than_equal" and limit == LARGEST:  # the general upper bound is not part of a description
        return f"{keys.wants(name)}, and at most {limit:g}"
    if error["loc"][-1] == "[key]":
        return "a name of letters, digits, '.', '_' and '-' as a key"
    return keys.wants(name) or error["msg"]


def _unknown(document: ConfigDocument, name: str, meant: str | None) -> rules.Problem:
    where = document.where(name)
    name = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    remedy = f"did you mean `{meant}`?" if meant else "`mmscale config explain` lists all settings"
    return rules.Problem(f"{where}{name} is not a setting", remedy)


def _wrong(document: ConfigDocument, name: str, value: Any, wants: str) -> rules.Problem:
    shown = "null" if value is None else json.dumps(value, default=str)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    key = keys.find(name)
    remedy = f"see `mmscale config explain {key.name if key else name}`"
    return rules.Problem(f"{document.where(name)}{name} is {shown}, wants {wants}", remedy)


def _missing(document: ConfigDocument, name: str) -> rules.Problem:
    key = keys.find(name)
    wants = f" ({key.wants})" if key is not None and key.section is None else ""
    return rules.Problem(
        f"{document.where(name)}{name} is missing{wants}", f"add it, see `mmscale config explain {name}`"
    )

"""The schema as dotted keys: the existing keys, the values each accepts in words, and suggestions for typos.

Reading files is in load.py; `config explain` is in explain.py.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from mmscale.config.schema import Config
from mmscale.config.section import LARGEST, OneOf, PlugIns, Section

# Placeholder for a list index or a name chosen by the user, as in vocab.modalities.*.size.
ANY = "*"
_CLOSE = 0.6
_LONGEST = 100  # characters; comparing takes time that grows with the square
# Names of some settings in other training stacks, which are too different for a string distance.
_ELSEWHERE = {
    "batch_size": "train.global_batch_size",
    "d_model": "model.hidden_size",
    "dim": "model.hidden_size",
    "grad_clip": "optim.clip_grad",
    "heads": "model.num_attention_heads",
    "layers": "model.num_layers",
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
    "num_heads": "model.num_attention_heads",
    "pipeline_model_parallel_size": "parallel.pp",
    "tensor_model_parallel_size": "parallel.tp",
    "train_iters": "train.steps",
}


@dataclass(frozen=True)
class Key:
    """One setting or section of the schema.

    Attributes:
        name: dotted key; `*` stands for a list index.
        field: pydantic's description of it.
        section: its class, if it is a section of settings.
    """

    name: str
    field: FieldInfo
    section: type[Section] | None

    @property
    def unit(self) -> str:
        """The unit of the number, or ""."""
        return str(self._extra.get("unit", ""))

    @property
    def source(self) -> str:
        """Paper section or source file of the setting, or ""."""
        return str(self._extra.get("source", ""))

    @property
    def _extra(self) -> dict[str, Any]:
        extra = self.field.json_schema_extra
        return extra if isinstance(extra, dict) else {}

    @property
    def annotation(self) -> Any:
        """The type with its constraints: pydantic moves those of a plain Annotated field into the field's metadata."""
        metadata = tuple(self.field.metadata)
        return Annotated[self.field.annotation, *metadata] if metadata else self.field.annotation

    @property
    def wants(self) -> str:
        """The accepted values in words, with the unit."""
        words = describe(self.annotation)
        return f"{words} [{self.unit}]" if self.unit else words


@cache
def all_keys() -> dict[str, Key]:
    """Every section and setting by dotted key, in the order of the schema."""
    return {key.name: key for key in _walk(Config, "")}


def _walk(section: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{name}"
        inner, is_list = _section_of(field.annotation)
        yield Key(dotted, field, None if is_list else inner)
        if inner is not None:
            yield from _walk(inner, f"{dotted}.{ANY}." if is_list else f"{dotted}.")


def _section_of(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section class inside a type, and whether it is the item of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    for argument in get_args(annotation):
        found, _ = _section_of(argument)
        if found is not None:
            return found, get_origin(annotation) is tuple
    return None, False


def find(key: str) -> Key | None:
    """The schema entry of a dotted key as written in a file; None if there is none.

    List indices match `*`; a name inside a mapping (model.experts.counts.text) has its mapping's entry, and an index
    alone (model.untie.0) its list's.
    """
    keys = all_keys()
    pattern = ".".join(ANY if part.isdigit() else part for part in key.split("."))
    if pattern in keys:
        return keys[pattern]
    parent, _, last = pattern.rpartition(".")
    if parent in keys and (last == ANY or holds_names(keys[parent].field.annotation)):
        return keys[parent]
    return None


def wants(name: str) -> str:
    """The values that a dotted key accepts, in words; of an entry of a mapping or list, its own. "": an unknown key."""
    key = find(name)
    if key is None:
        return ""
    entry = _entry_of(key.field.annotation) if name.count(".") > key.name.count(".") else None
    if entry is None:
        return key.wants
    return f"{describe(entry)} [{key.unit}]" if key.unit else describe(entry)


def _entry_of(annotation: Any) -> Any:
    """The type of a mapping's values, or of a list's entries; None: it is neither."""
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    return next((entry for entry in map(_entry_of, get_args(annotation)) if entry is not None), None)


def holds_names(annotation: Any) -> bool:
    """Whether the type is, or may be, a mapping whose keys the user chooses."""
    return get_origin(annotation) is dict or any(holds_names(argument) for argument in get_args(annotation))


def accepts(annotation: Any, kind: type) -> bool:
    """Whether an annotation accepts a value of exactly this Python type (here bool does not count as int)."""
    if get_origin(annotation) is Literal:
        return any(type(value) is kind for value in get_args(annotation))
    if annotation is kind:
        return True
    return any(accepts(argument, kind) for argument in get_args(annotation) if argument is not annotation)


def allowed_values(annotation: Any) -> list[Any] | None:
    """The values of a choice; None if any value of the type is allowed."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is bool:
        return [True, False]
    if origin is Literal:
        return list(arguments)
    if origin is Annotated:
        tables = [list(map(str, item.table)) for item in _flat(arguments[1:]) if _closed(item)]
        return tables[0] if tables else None
    return None


def _closed(item: Any) -> bool:
    return isinstance(item, OneOf) and not item.plugin


def describe(annotation: Any) -> str:
    """A type in words, e.g. "a whole number of at least 1, or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for item in _flat(arguments[1:]):
            if isinstance(item, OneOf):
                return f"one of {', '.join(item.table)}" + (", or a plug-in (module:attribute)" if item.plugin else "")
            if isinstance(item, PlugIns):
                return "a mapping of plug-ins (module:attribute), each to a mapping of its arguments"
        return _constrained(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        ordered = [argument for argument in arguments if argument is not type(None)]
        words = [describe(argument) for argument in ordered] + ["null"] * (len(ordered) < len(arguments))
        return ", or ".join(words)
    if origin is Literal:
        values = [str(value) for value in arguments]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is dict:
        return f"a mapping of names, each to {describe(arguments[1])}"
    if origin is tuple:
        return f"a list, each entry {describe(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a mapping with {', '.join(annotation.model_fields)}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", Any: "a value"}.get(
        annotation, str(annotation)
    )


def _constrained(base: Any, metadata: tuple[Any, ...]) -> str:
    lower, upper, pattern = "", "", False
    highest: list[Any] = [item.le for item in _flat(metadata) if isinstance(item, annotated_types.Le)]
    limits = [limit for limit in highest if limit != LARGEST]
    if limits:
        upper = f"at most {min(limits):g}"
    for item in _flat(metadata):
        if isinstance(item, annotated_types.Gt):
            lower = "of at least 1" if base is int else f"above {item.gt:g}"
        elif isinstance(item, annotated_types.Ge):
            lower = f"of at least {item.ge:g}"
        pattern = pattern or getattr(item, "pattern", None) is not None
    if base is str and pattern:
        return "a name of letters, digits, '.', '_' and '-'"
    words = " and ".join(part for part in (lower, upper) if part)
    return f"{describe(base)} {words}" if words else describe(base)


def _flat(metadata: tuple[Any, ...]) -> Iterator[Any]:
    for item in metadata:
        yield from _flat(tuple(item.metadata)) if isinstance(item, FieldInfo) else (item,)


def did_you_mean(key: str) -> str | None:
    """The existing key that a mistyped key most likely means, also in another section; None if none is similar."""
    if len(key) > _LONGEST:
        return None
    keys = [name for name in all_keys() if ANY not in name]
    section, _, leaf = key.rpartition(".")
    leaves: dict[str, list[str]] = {}
    for name in keys:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    # First the right name in the wrong section, then a near name in the same section, then anything near.
    if leaf in leaves:
        return _nearest(key, leaves[leaf])
    if leaf in _ELSEWHERE:
        return _ELSEWHERE[leaf]
    siblings = [name for name in keys if name.rpartition(".")[0] == section]
    by_leaf = {name.rpartition(".")[2]: name for name in siblings}
    close = difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=_CLOSE)
    if close:
        return by_leaf[close[0]]
    close = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    if close:
        return _nearest(key, leaves[close[0]])
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    return close[0] if close else None


def _nearest(key: str, names: list[str]) -> str:
    return max(names, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio())

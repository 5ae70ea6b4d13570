"""A YAML file or an override as plain data that remembers where each value stands.

Knows YAML and dotted keys, not the schema: load.py judges the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmscale.errors import ConfigError

# No sane configuration nests deeper; a YAML anchor that contains itself does.
_MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's surprises: `off` and `no` stay words, dates stay text, no merge keys."""


_DROPPED = {
    "tag:yaml.org,2002:bool",
    "tag:yaml.org,2002:timestamp",
    "tag:yaml.org,2002:merge",
    "tag:yaml.org,2002:value",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DROPPED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


@dataclass
class Document:
    """Plain data with marks.

    Attributes:
        data: mappings, lists and scalars.
        marks: where each dotted key was given: "file:line" or "override".
        written: the characters of each scalar as written, for values that YAML took for numbers.
    """

    data: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    def forget(self, key: str) -> None:
        """Drop the marks of a key and of everything below it."""
        for table in (self.marks, self.written):
            for name in [name for name in table if name == key or name.startswith(f"{key}.")]:
                del table[name]


def read_file(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: missing or unreadable file, broken YAML, a key given twice, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file", remedy="give the path of a YAML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", remedy="give a readable YAML file in UTF-8") from None
    node = _compose(text, str(path))
    if node is None:
        return Document()
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: holds no mapping at its top level", remedy="write `section:` lines, e.g. `model:`")
    document = Document()
    document.data = _Reader(document, str(path)).value(node, "", 0)
    return document


def apply_override(document: Document, text: str, *, defaults: dict[str, Any]) -> str:
    """Set one `dotted.key=value` in the document and return the key.

    Args:
        document: changed in place.
        text: the override; its value is read as YAML.
        defaults: default values of settings that hold lists, for overrides of one entry of a list that was not given.

    Raises:
        ConfigError: no `=`, an empty key, broken YAML, or an index that the list does not have.
    """
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")):
        raise ConfigError(
            f"override {text!r} is not of the form key=value", remedy="write for instance train.steps=100"
        )
    node = _compose(value, f"override {key}")
    document.forget(key)
    reader = _Reader(document, "override")
    parsed = None if node is None else reader.value(node, key, 0)
    _place(document.data, key, parsed, defaults=defaults)
    document.marks[key] = "override"
    return key


def _place(data: dict[str, Any], key: str, value: Any, *, defaults: dict[str, Any]) -> None:
    *parents, last = key.split(".")
    here: Any = data
    for depth, part in enumerate(parents):
        if isinstance(here, dict) and not isinstance(here.get(part), dict | list):
            default = defaults.get(".".join(parents[: depth + 1]))
            here[part] = default if isinstance(default, list) else {}
        here = _inside(here, key)[_slot(here, part, key)]
    _inside(here, key)[_slot(here, last, key)] = value


def _inside(container: Any, key: str) -> Any:
    if not isinstance(container, dict | list):
        raise ConfigError(
            f"override {key}: there is no setting inside a single value", remedy="override the whole entry"
        )
    return container


def _slot(container: Any, part: str, key: str) -> Any:
    return _index(container, part, key) if isinstance(container, list) else part


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(
            f"override {key}: {part!r} is no index of a list of {len(items)}",
            remedy=f"count from 0 to {len(items) - 1}",
        )
    return int(part)


def leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every scalar, empty mapping and empty list below `data`."""
    items: list[tuple[str, Any]]
    if isinstance(data, dict) and data:
        items = [(str(name), value) for name, value in data.items()]
    elif isinstance(data, list | tuple) and data:
        items = [(str(index), value) for index, value in enumerate(data)]
    else:
        yield prefix, data
        return
    for name, value in items:
        yield from leaves(value, f"{prefix}.{name}" if prefix else name)


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"{where}: not YAML: {problem}", remedy="check indentation, quotes and brackets there"
        ) from None


class _Reader:
    """Turns nodes into data; PyYAML's own constructor would drop lines and let a later duplicate key win silently."""

    def __init__(self, document: Document, name: str) -> None:
        self.document = document
        self.name = name
        self.scalars = _Loader("")

    def value(self, node: yaml.Node, key: str, depth: int) -> Any:
        where = self._where(node)
        if depth > _MAX_DEPTH:
            raise ConfigError(
                f"{where}: nested more than {_MAX_DEPTH} deep", remedy="remove the anchor that contains itself"
            )
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{key}.{index}", depth + 1) for index, item in self._marked(node, key)]
        return self._scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, key: str, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            where = self._where(name_node)
            if not isinstance(name_node, yaml.ScalarNode):
                raise ConfigError(f"{where}: a key is not a single word", remedy="write `key: value`")
            name = name_node.value
            line = name_node.start_mark.line + 1
            if name in result:
                first = f" (first in line {lines[name]})" if lines[name] != line else ""
                dotted = f"{key}.{name}" if key else name
                raise ConfigError(f"{where}: {dotted} is given twice{first}", remedy="keep one of the two")
            child = f"{key}.{name}" if key else name
            self.document.marks[child] = where
            lines[name] = line
            result[name] = self.value(value_node, child, depth + 1)
        return result

    def _marked(self, node: yaml.SequenceNode, key: str) -> Iterator[tuple[int, yaml.Node]]:
        for index, item in enumerate(node.value):
            self.document.marks[f"{key}.{index}"] = self._where(item)
            yield index, item

    def _scalar(self, node: yaml.Node, key: str) -> Any:
        assert isinstance(node, yaml.ScalarNode)
        if node.style is None and node.value in _BOOLEANS:
            self.document.written[key] = node.value
            return _BOOLEANS[node.value]
        try:
            value = self.scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            problem = getattr(error, "problem", None) or str(error)
            raise ConfigError(
                f"{self._where(node)}: {key}: {problem}", remedy="write a plain value without a tag"
            ) from None
        if node.style is None and value is not None:
            self.document.written[key] = node.value
        return value

    def _where(self, node: yaml.Node) -> str:
        return self.name if self.name == "override" else f"{self.name}:{node.start_mark.line + 1}"

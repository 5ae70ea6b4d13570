"""Reads a YAML file or an override into plain data and records the source line of each value.

It handles YAML and dotted keys only; load.py checks the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mmscale.config import yaml_text
from mmscale.errors import ConfigError

_MAX_SHOWN = 60  # characters of a wrong override shown in a message
_MAX_KEY = 1000  # characters


@dataclass
class ConfigDocument:
    """Plain data with the source of each value.

    Attributes:
        data: mappings, lists and scalars.
        marks: source of each dotted key: "file:line" or "override".
        written: the original characters of each scalar, in case YAML read text as a number.
    """

    data: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    def forget(self, key: str) -> None:
        """Drop the marks of a key and of everything below it."""
        for table in (self.marks, self.written):
            for name in [name for name in table if name == key or name.startswith(f"{key}.")]:
                del table[name]

    def where(self, key: str) -> str:
        """The source of a key, of a key below it or of the nearest enclosing section: "file:line: ", or ""."""
        inside = [mark for name, mark in self.marks.items() if name.startswith(f"{key}.")]
        if key not in self.marks and inside:
            return f"{inside[0]}: "
        while key:
            if key in self.marks:
                return f"{self.marks[key]}: "
            key = key.rpartition(".")[0]
        return ""


def read_file(path: Path) -> ConfigDocument:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: missing or unreadable file, broken YAML, a key given twice, or no mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(yaml_text.MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file", remedy="give the path of a YAML configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", remedy="give a readable YAML file in UTF-8") from None
    node = yaml_text.compose(text, str(path))
    if node is None:
        return ConfigDocument()
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: holds no mapping at its top level", remedy="write `section:` lines, e.g. `model:`")
    document = ConfigDocument()
    document.data = _Reader(document, str(path)).value(node, "", 0)
    return document


def apply_override(document: ConfigDocument, text: str, *, defaults: dict[str, Any]) -> str:
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
        shown = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
        raise ConfigError(
            f"override {shown!r} is not of the form key=value", remedy="write for instance train.steps=100"
        )
    if key.count(".") > yaml_text.MAX_DEPTH or len(key) > _MAX_KEY:
        raise ConfigError(f"override {key[:_MAX_SHOWN]}...: no setting has such a long name", remedy="shorten the key")
    node = yaml_text.compose(value, f"override {key}")
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


class _Reader:
    """Converts YAML nodes into data; PyYAML's own constructor drops line numbers and accepts duplicate keys."""

    def __init__(self, document: ConfigDocument, name: str) -> None:
        self.document = document
        self.name = name
        self.values = 0

    def value(self, node: yaml.Node, key: str, depth: int) -> Any:
        self.values += 1
        if depth > yaml_text.MAX_DEPTH:  # an anchor that contains itself
            self._refuse(node, f"nested more than {yaml_text.MAX_DEPTH} deep")
        if self.values > yaml_text.MAX_VALUES:  # anchors that are used over and over
            self._refuse(node, f"more than {yaml_text.MAX_VALUES:,} values")
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
        try:
            value = yaml_text.value_of(node)
        except ValueError as error:
            raise ConfigError(
                f"{self._where(node)}: {key}: {error}", remedy="write a plain value without a tag"
            ) from None
        if node.style is None and value is not None:
            self.document.written[key] = node.value
        return value

    def _refuse(self, node: yaml.Node, problem: str) -> NoReturn:
        raise ConfigError(f"{self._where(node)}: {problem}", remedy="write less, or use fewer anchors")

    def _where(self, node: yaml.Node) -> str:
        return self.name if self.name == "override" else f"{self.name}:{node.start_mark.line + 1}"

"""Reads and writes YAML text. Every YAML file and override passes through here; no other module imports `yaml`.

Scalars follow YAML 1.2: `1e-4` is a number; `010`, `1:30`, `no`, `on` and dates are text. Size, depth and number of
values are bounded. document.py handles keys and their places.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from mmscale.errors import ConfigError

# A configuration has about 200 lines. With these bounds reading the slowest possible text takes about a second.
MAX_CHARACTERS = 256 * 1024
MAX_DEPTH = 20
MAX_VALUES = 5_000

_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = {"", "~", "null", "Null", "NULL"}
_SPECIAL = {".nan": float("nan"), ".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf")}
# The core schema of YAML 1.2.2, section 10.3.2, except that a number with a leading zero stays text: 007 may be a name.
# Numeric settings read such a text as a decimal number. int() refuses more than 4,300 digits.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_BASED = re.compile(r"0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,99}|(0|[1-9][0-9]{0,99})(\.[0-9]{0,99})?)([eE][-+]?[0-9]{1,9})?")
_TEXT = "tag:yaml.org,2002:str"
_PLAIN = "plain"  # the tag of a scalar that has neither quotes nor a tag


def number_or_word(text: str) -> Any:
    """The value of a scalar without quotes: null, a boolean, a number, or the text itself."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text.lower() in _SPECIAL:
        return _SPECIAL[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    return float(text) if _FLOAT.fullmatch(text) else text


class _Loader(yaml.SafeLoader):
    """Composes nodes whose plain scalars are not interpreted, and stops at the bounds."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self._name = name
        self._depth = 0
        self._values = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _TEXT
        return super().resolve(kind, value, implicit)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._depth > MAX_DEPTH:
            line = self.peek_event().start_mark.line + 1
            raise ConfigError(f"{self._name}:{line}: nested more than {MAX_DEPTH} deep", remedy="nest less deeply")
        self._values += 1
        if self._values > 2 * MAX_VALUES:  # keys are nodes too
            line = self.peek_event().start_mark.line + 1
            raise ConfigError(f"{self._name}:{line}: more than {MAX_VALUES:,} values", remedy="give less")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def compose(text: str, name: str) -> yaml.Node | None:
    """The nodes of a text; None for an empty one.

    Args:
        text: YAML.
        name: the file or override that the text is from, for messages.

    Raises:
        ConfigError: the text is too long or not YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{name}: more than {MAX_CHARACTERS:,} characters of YAML", remedy="give a configuration, not data"
        )
    try:
        node: yaml.Node | None = _Loader(text, name).get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"{where}: not YAML: {problem}", remedy="check indentation, quotes and brackets there"
        ) from None
    return node


def value_of(node: yaml.ScalarNode) -> Any:
    """The value of a scalar node.

    Raises:
        ValueError: it has a tag other than !!str.
    """
    if node.tag == _PLAIN:
        return number_or_word(node.value)
    if node.tag == _TEXT:
        return node.value
    raise ValueError(f"the tag {node.tag} is not read")


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this reader or a YAML 1.1 reader would read as another type."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if isinstance(number_or_word(text), str) else "'"
    return dumper.represent_scalar(_TEXT, text, style=style)


_Dumper.add_representer(str, _represent_text)


def dump(data: Any, *, width: int = 120) -> str:
    """YAML that reads back to equal data, in this order of keys."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)
    return text

"""A table of choices: names with their meanings, in the order in which they are listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

C = TypeVar("C", bound="Choice")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One value of a setting.

    Attributes:
        meaning: what it does, in a clause that can follow "name: ".
    """

    meaning: str


class Table(dict[str, C], Generic[C]):
    """The values of one kind of setting, by name.

    Args:
        title: plural, for the reference pages.
        settings: dotted keys of the settings that take these values.
        choices: the values, in the order in which they are listed.
    """

    def __init__(self, title: str, settings: tuple[str, ...], choices: Mapping[str, C]) -> None:
        super().__init__(choices)
        self.title, self.settings = title, settings

    @property
    def help(self) -> str:
        """All names with their meanings, as one sentence."""
        return "; ".join(f"{name}: {choice.meaning}" for name, choice in self.items()) + "."

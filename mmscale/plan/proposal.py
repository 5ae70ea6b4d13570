"""A proposed configuration: its settings, the rule behind each, and its file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmscale.config import yaml_text


@dataclass(frozen=True)
class Rule:
    """The reason for the value of a setting."""

    setting: str
    value: str
    reason: str
    source: str


@dataclass
class Proposal:
    """A configuration as plain data, and the rules behind it."""

    settings: dict[str, Any] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    passes: float = 0.0

    def put(self, setting: str, value: Any, reason: str, source: str, shown: str = "") -> None:
        """Set a setting and keep the rule behind it.

        Args:
            setting: dotted key.
            value: of it.
            reason: the rule, for the comment in the file.
            source: where the rule is from.
            shown: the value for people; default: `value`.
        """
        *sections, name = setting.split(".")
        place = self.settings
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
        self.rules.append(Rule(setting, shown or str(value), reason, source))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "settings": self.settings,
            "rules": [vars(rule) for rule in self.rules],
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "passes": self.passes,
        }


def yaml_lines(proposal: Proposal, *, command: Sequence[str]) -> list[str]:
    """The configuration as YAML, with the rule above each setting that a rule determined.

    Args:
        proposal: result of `propose`.
        command: the words of the command that made it.
    """
    why = {rule.setting: rule for rule in proposal.rules}
    lines = [f"# Proposed by: {shlex.join(command)}"]
    lines.append("# Rules of thumb; half and twice the learning rate are worth a short run each.")
    for section, values in proposal.settings.items():
        if whole := why.get(section):
            lines.append(f"# {whole.setting}: {whole.reason} ({whole.source})")
        lines.append(f"{section}:")
        for key, value in values.items():
            rule = why.get(f"{section}.{key}")
            nested = [one for name, one in why.items() if name.startswith(f"{section}.{key}.")]
            lines += [f"  # {one.setting}: {one.reason} ({one.source})" for one in ([rule] if rule else nested)]
            text = yaml_text.dump({key: value})
            lines += [f"  {line}" for line in text.rstrip().splitlines()]
    return lines

"""Which plug-ins a configuration names, and whether they can be used. mmscale.tables.plugins loads them."""

from __future__ import annotations

from collections.abc import Iterator

from mmscale.config.schema import Config
from mmscale.config.section import OneOf, PlugIns, Section
from mmscale.tables import plugins
from mmscale.tables.plugins import PluginError, Use

_PREPARING = "data.prepare."


def uses(config: Section, prefix: str = "") -> Iterator[Use]:
    """Every plug-in that a configuration names, in the order of the schema.

    The arguments of a setting that takes one plug-in are in the setting of the same name with the suffix `_args`.
    """
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        for item in field.metadata:
            if isinstance(item, PlugIns):
                yield from (Use(item.kind, key, plugin, args) for plugin, args in value.items())
            elif isinstance(item, OneOf) and item.plugin and value not in item.table:
                yield Use(item.plugin, key, value, getattr(config, f"{name}_args"))
        if isinstance(value, Section):
            yield from uses(value, f"{key}.")


def use_of(config: Section, name: str, *, key: str) -> Use | None:
    """The plug-in that one setting of a section names; None: its value is built in.

    Args:
        config: the section.
        name: of the setting in it.
        key: dotted key of the setting, for messages.
    """
    found = [use for use in uses(config) if use.key == name]
    return Use(found[0].kind, key, found[0].name, found[0].args) if found else None


def check_names(config: Config) -> None:
    """Refuse names that are neither built in nor installed, without importing anything.

    Raises:
        PluginError: there is one.
    """
    for use in uses(config):
        plugins.check_name(use, _built_in(config, use.key))


def missing(config: Config) -> list[str]:
    """The problems that `check_names` would report, in words; for commands that read settings and train nothing."""
    found = []
    for use in uses(config):
        try:
            plugins.check_name(use, _built_in(config, use.key))
        except PluginError as error:
            found.append(error.cause)
    return found


def check(config: Config) -> None:
    """Load every plug-in of training and compare its signature with its arguments, before ranks start.

    Plug-ins that prepare data (`data.prepare`) are not loaded, because training reads prepared data.

    Raises:
        PluginError: one cannot be used as the configuration requires.
    """
    for use in uses(config):
        if not use.key.startswith(_PREPARING):
            plugins.check(use)


def _built_in(config: Config, key: str) -> list[str]:
    *sections, name = key.split(".")
    section: Section = config
    for part in sections:
        section = getattr(section, part)
    tables = [item.table for item in type(section).model_fields[name].metadata if isinstance(item, OneOf)]
    return list(map(str, tables[0])) if tables else []

"""Building blocks of settings: the base class of sections, documented fields, and types of single values.

The settings themselves are in schema*.py. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic_core import CoreSchema, core_schema

from mmscale.config.values import parse_integer, parse_number, parse_seconds
from mmscale.tables.plugins import is_plugin_name
from mmscale.tables.table import Table

# Upper bound of every setting in any unit; float64 represents every integer up to here.
LARGEST = 10**15
_YEAR = 366 * 86_400.0
_WHOLE = BeforeValidator(parse_integer)
_NUMBER = BeforeValidator(parse_number)

Count = Annotated[PositiveInt, _WHOLE, Field(le=LARGEST)]
Index = Annotated[NonNegativeInt, _WHOLE, Field(le=LARGEST)]
Byte = Annotated[NonNegativeInt, _WHOLE, Field(le=255)]
# torch and NumPy accept 64-bit seeds; megatron-core adds small numbers to the seed.
Seed = Annotated[NonNegativeInt, _WHOLE, Field(le=2**63 - 1)]
Port = Annotated[int, _WHOLE, Field(ge=1, le=65535)]
Rate = Annotated[NonNegativeFloat, _NUMBER, Field(le=LARGEST, allow_inf_nan=False)]
Positive = Annotated[PositiveFloat, _NUMBER, Field(le=LARGEST, allow_inf_nan=False)]
Seconds = Annotated[PositiveFloat, BeforeValidator(parse_seconds), Field(le=_YEAR, allow_inf_nan=False)]
Fraction = Annotated[float, _NUMBER, Field(gt=0.0, le=1.0)]
Share = Annotated[float, _NUMBER, Field(ge=0.0, le=1.0)]
AtLeastOne = Annotated[float, _NUMBER, Field(ge=1.0, le=LARGEST, allow_inf_nan=False)]
# Exponent of a decay over tokens.
Exponent = Annotated[float, _NUMBER, Field(ge=-10.0, le=0.0)]
Coefficient = Annotated[float, _NUMBER, Field(ge=-100.0, le=100.0)]
# In fp32 anything smaller has no effect on a sum of squares.
Epsilon = Annotated[float, _NUMBER, Field(ge=1e-30, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


def setting(meaning: str, default: Any = ..., *, unit: str = "", source: str = "") -> Any:
    """A documented field. Without `default` the setting must be given.

    Args:
        meaning: one sentence for `mmscale config explain`.
        default: the value used when the setting is left out.
        unit: what the number counts, e.g. "tokens".
        source: paper section or mcore file the setting comes from.
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "source": source})


class OneOf:
    """Restricts a text setting to the names of a table: `Annotated[str, OneOf(KINDS)]`.

    Args:
        table: the names with their meanings.
        plugin: a name in `PLUGINS`: the setting also takes plug-ins of that kind, whose arguments are in the setting
            `<name>_args` of the same section. "": it takes none.
    """

    def __init__(self, table: Table[Any], *, plugin: str = "") -> None:
        self.table, self.plugin = table, plugin

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A literal; with plug-ins, any text that can name one.

        Whether the plug-in exists is checked when a file is loaded.
        """
        if self.plugin:
            return _PLUGIN_NAME
        return core_schema.literal_schema(list(map(str, self.table)))


class PlugIns:
    """Marks a mapping from plug-ins to their keyword arguments: `Annotated[Arguments, PlugIns("sink")]`.

    Args:
        kind: a name in `PLUGINS`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """A mapping of names to mappings of arguments; `name:` without arguments is read as an empty mapping."""
        arguments = core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema())
        empty = core_schema.no_info_before_validator_function(lambda given: {} if given is None else given, arguments)
        return core_schema.dict_schema(_PLUGIN_NAME, empty)


def _plugin_name(text: str) -> str:
    if not is_plugin_name(text):
        raise ValueError("not a name")
    return text


_PLUGIN_NAME = core_schema.no_info_after_validator_function(_plugin_name, core_schema.str_schema())


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

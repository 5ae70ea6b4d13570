"""Plug-ins: code of other packages that a setting names by import path or by entry point.

A setting that takes plug-ins holds a built-in name, `module:attribute`, or the name of an entry point of the group
`mmscale.plugins`. The name refers to a factory: a class or a function that mmscale calls once on every rank, with the
arguments of its kind and the keyword arguments of the configuration. Nothing is imported before `load` or `check` is
called.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from mmscale.errors import ConfigError
from mmscale.tables.table import Choice, Table

GROUP = "mmscale.plugins"
_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class PluginKind(Choice):
    """A kind of plug-in.

    Attributes:
        settings: dotted keys that name plug-ins of the kind.
        given: positional arguments of the factory, in words, in this order.
        methods: methods that its result must have; "__call__": it must be callable.
        subclass_of: "module:class" that the factory must be a subclass of; "": any callable is allowed.
        set_by_mmscale: keyword arguments that mmscale sets from other settings.
        page: of the documentation, below docs/.
    """

    settings: tuple[str, ...]
    given: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("__call__",)
    subclass_of: str = ""
    set_by_mmscale: tuple[str, ...] = ()
    page: str = ""


PLUGINS: Table[PluginKind] = Table(
    "Plug-ins",
    (),
    {
        "schedule": PluginKind(
            meaning="learning rate of a step after the warm-up",
            settings=("optim.schedule", "auxiliary.optim.schedule", "sft.optim.schedule"),
            page="extending/schedule.md",
        ),
        "optimizer": PluginKind(
            meaning="update of parameters from gradients and two moments",
            settings=("optim.optimizer", "auxiliary.optim.optimizer", "sft.optim.optimizer"),
            given=("parameter groups",),
            methods=("step",),
            subclass_of="mmscale.extend:HostFusedAdam",
            set_by_mmscale=("lr", "betas", "eps", "weight_decay", "adam_w_mode", "bias_correction"),
            page="extending/optimizer.md",
        ),
        "loss": PluginKind(
            meaning="what a micro-batch's logits and labels are trained to minimise",
            settings=("train.loss",),
            given=("mmscale.extend.Objective",),
            page="extending/optimizer.md",
        ),
        "sink": PluginKind(
            meaning="where figures of logged steps go",
            settings=("log.sinks",),
            given=("mmscale.extend.SinkRun",),
            methods=("write", "rolled_back", "close"),
            page="extending/sink.md",
        ),
        "hook": PluginKind(
            meaning="what happens at points of a run's life",
            settings=("train.hooks",),
            given=("mmscale.extend.HookRun",),
            methods=("on_start", "on_step", "on_evaluation", "on_save", "on_end", "figures"),
            page="extending/hook.md",
        ),
        "reader": PluginKind(
            meaning="documents from files of another format",
            settings=("data.prepare.reader",),
            methods=("count", "read"),
            page="extending/reader.md",
        ),
        "image_tokenizer": PluginKind(
            meaning="images to discrete codes and back",
            settings=("data.prepare.image.kind",),
            given=("edge of the images [pixels]", "channels"),
            methods=("fit", "encode", "decode", "save", "load"),
            subclass_of="mmscale.extend:ImageCodes",
            page="extending/image_tokenizer.md",
        ),
        "text_tokenizer": PluginKind(
            meaning="training of a text tokenizer on the documents",
            settings=("data.prepare.text.kind",),
            given=("largest number of ids",),
            methods=("train",),
            page="extending/text_tokenizer.md",
        ),
        "task": PluginKind(
            meaning="figures of a trained model besides its losses",
            settings=("mmscale eval --task",),
            given=("mmscale.extend.TaskRun",),
            page="extending/task.md",
        ),
    },
)


class PluginError(ConfigError):
    """A plug-in cannot be used."""


class MissingPluginError(PluginError):
    """A plug-in, or a package that it imports, is not installed on this machine."""


@dataclass(frozen=True)
class Use:
    """A plug-in that a configuration names.

    Attributes:
        kind: a name in `PLUGINS`.
        key: the setting that names it.
        name: import path or name of an entry point.
        args: keyword arguments of the configuration.
    """

    kind: str
    key: str
    name: str
    args: Mapping[str, Any]


def is_plugin_name(text: str) -> bool:
    """Whether a text can name a plug-in: `module:attribute`, or a valid name of an entry point."""
    return bool(_PATH.fullmatch(text) or _NAME.fullmatch(text))


def check_name(use: Use, built_in: Sequence[str]) -> None:
    """Refuse a name that is neither an import path nor an installed entry point. Imports nothing.

    Args:
        use: of a plug-in.
        built_in: the setting's built-in names, for the message.

    Raises:
        PluginError: it is neither.
    """
    if not _PATH.fullmatch(use.name):
        _entry_point(use, built_in)


def load(use: Use) -> Callable[..., Any]:
    """Import a plug-in's factory.

    Raises:
        MissingPluginError: its package, or one that it imports, is not installed.
        PluginError: it has no such attribute, or its import fails.
    """
    path = use.name if _PATH.fullmatch(use.name) else _entry_point(use, ()).value
    module_name, _, attribute = path.partition(":")
    module = _imported(use, module_name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = ", ".join(name for name in vars(found) if not name.startswith("_"))[:200]
            raise PluginError(
                f"{use.key}: {module_name} has no {attribute}", remedy=f"it has: {near or 'nothing'}; correct the path"
            )
        found = getattr(found, part)
    if not callable(found):
        raise PluginError(
            f"{use.key}: {path} is {type(found).__name__}, which cannot be called",
            remedy="name a class, or a function that returns the object",
        )
    return typing.cast("Callable[..., Any]", found)


def make(use: Use, *given: Any) -> Any:
    """Call a plug-in's factory on this rank.

    Args:
        use: of a plug-in.
        given: the positional arguments of its kind.

    Raises:
        PluginError: it cannot be loaded, its arguments are wrong, or its result lacks a required method.
    """
    factory = load(use)
    return require_methods(use, factory(*given, **arguments(use, factory)))


def check(use: Use) -> None:
    """Load a plug-in and compare its signature with the configuration's arguments; the factory is not called.

    Raises:
        PluginError: `make` would fail.
    """
    kind, factory = PLUGINS[use.kind], load(use)
    if kind.subclass_of:
        module, _, name = kind.subclass_of.partition(":")
        base = getattr(importlib.import_module(module), name)
        if not (isinstance(factory, type) and issubclass(factory, base)):
            raise PluginError(
                f"{use.key}: {use.name} is not a subclass of {module}.{name}",
                remedy=f"derive it from that class, see docs/{kind.page}",
            )
    arguments(use, factory)
    if isinstance(factory, type):
        _require(use, factory)


def require_methods(use: Use, made: Any) -> Any:
    """The object, after checking that it has the methods of its kind.

    Raises:
        PluginError: a method is missing.
    """
    _require(use, made)
    return made


def arguments(use: Use, factory: Callable[..., Any]) -> dict[str, Any]:
    """The configuration's arguments, converted to the types of the factory's annotations: "3e-4" becomes a float.

    Raises:
        PluginError: one is unknown, missing or of a wrong type.
    """
    kind = PLUGINS[use.kind]
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some classes of extension modules have no signature
        return dict(use.args)
    named, any_other = _names(factory, signature)
    own = [name for name in named[len(kind.given) :] if name not in kind.set_by_mmscale]
    taken = {*named, *kind.set_by_mmscale}
    try:
        signature.bind(*kind.given, **use.args)
        if unknown := [name for name in use.args if name not in own and (name in taken or not any_other)]:
            raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}")
    except TypeError as error:
        raise PluginError(
            f"{use.key}: {use.name} does not take the arguments given: {error}",
            remedy=f"it takes {', '.join(own) or 'none'} besides {_words(kind.given)}",
        ) from None
    return {name: _typed(use, factory, name, value) for name, value in use.args.items()}


def _names(factory: Callable[..., Any], signature: inspect.Signature) -> tuple[list[str], bool]:
    """Names of all parameters, and whether any other name is accepted.

    `**options` of a class with a base class are passed on to the base class, so its names are added. `**options` of a
    function, or of a class without a base class, accept any name.
    """
    named = [name for name, one in signature.parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(named) == len(signature.parameters):
        return named, False
    base = factory.__mro__[1] if isinstance(factory, type) else object
    if base is object:
        return named, True
    further, any_other = _names(base, inspect.signature(base))
    return [*named, *(name for name in further if name not in named)], any_other


def _words(given: tuple[str, ...]) -> str:
    return ", ".join(given) or "nothing"


def _called(factory: Callable[..., Any]) -> Any:
    """The function whose annotations describe the arguments."""
    return inspect.getattr_static(factory, "__init__") if isinstance(factory, type) else factory


def _typed(use: Use, factory: Callable[..., Any], name: str, value: Any) -> Any:
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    try:
        hints = typing.get_type_hints(_called(factory))
        adapter: TypeAdapter[Any] = TypeAdapter(hints[name])
    except (NameError, KeyError, TypeError, PydanticSchemaGenerationError):
        return value  # there is no annotation, or its type cannot be checked
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise PluginError(
            f"{use.key}: argument {name} of {use.name} is {value!r}: {error.errors()[0]['msg']}",
            remedy=f"give it a value of type {inspect.formatannotation(hints[name])}",
        ) from None


def _require(use: Use, made: Any) -> None:
    kind = PLUGINS[use.kind]
    for method in kind.methods:
        if not callable(getattr(made, method, None)) or (method == "__call__" and _inherits_call(made)):
            raise PluginError(
                f"{use.key}: {use.name} makes an object without {method}, which a {use.kind} needs",
                remedy=f"see docs/{kind.page}",
            )


def _inherits_call(made: Any) -> bool:
    """Whether `__call__` is the one of `type`: every class can be called, even one whose instances cannot."""
    return isinstance(made, type) and not any("__call__" in vars(base) for base in made.__mro__)


def _entry_point(use: Use, built_in: Sequence[str]) -> metadata.EntryPoint:
    installed = metadata.entry_points(group=GROUP)
    found = [entry for entry in installed if entry.name == use.name]
    if found:
        return found[0]
    own = f"one of {', '.join(built_in)}, " if built_in else ""
    names = ", ".join(sorted({entry.name for entry in installed})) or "none"
    raise MissingPluginError(
        f"{use.key} is {use.name!r}, wants {own}a path module:attribute, or an installed plug-in (here: {names})",
        remedy=f"correct the name, or install the package that has it as an entry point of the group {GROUP}",
    )


def _imported(use: Use, module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise MissingPluginError(
                f"{use.key}: there is no module {error.name} here, which {use.name} names",
                remedy="install its package in this environment, or put its folder on PYTHONPATH",
            ) from None
        raise MissingPluginError(
            f"{use.key}: {use.name} imports {error.name}, which is not installed here",
            remedy=f"install {error.name} in this environment",
        ) from None
    except Exception as error:  # the import of another package may raise anything
        raise PluginError(
            f"{use.key}: {module_name} cannot be imported: {type(error).__name__}: {error}",
            remedy=f"`python -c 'import {module_name}'` shows where",
        ) from error

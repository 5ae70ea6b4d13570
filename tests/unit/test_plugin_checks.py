"""Plug-ins: every way in which one can be wrong has one line of cause and one of remedy, before a rank starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmscale.config import Config
from mmscale.config import plugins as of_config
from mmscale.config.load import dump, load, resolve
from mmscale.errors import ConfigError
from mmscale.tables import plugins
from mmscale.tables.plugins import PLUGINS, MissingPluginError, PluginError, Use
from tests.plugins import KINDS, NAMED, PACKAGE, install, setting

SMALL: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "kind": "dense"}
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(install(tmp_path)))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]  # other tests ask what happens without it


def check_all(config: Config) -> None:
    """What commands check that use them: training, or `data prepare`."""
    for use in of_config.uses(config):
        plugins.check(use)


def test_every_kind_has_an_example() -> None:
    assert set(NAMED) == set(PLUGINS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["path", "entry point"])
def test_the_example_is_accepted_and_written_back(kind: str, by: str, installed: Path, tmp_path: Path) -> None:
    path, name = NAMED[kind]
    config = resolve(SMALL, setting(kind, path if by == "path" else name))
    check_all(config)
    assert [use.kind for use in of_config.uses(config)] == [kind]
    file = tmp_path / "written.yaml"
    file.write_text(dump(config))
    assert load(file) == config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "args", "cause", "remedy"),
    [
        ("no_such_package.x:Y", "{{}}", "there is no module no_such_package here", "PYTHONPATH"),
        ("{module}:Nothing", "{{}}", "has no Nothing", "it has: "),
        ("{module}:annotations", "{{}}", "cannot be called", "name a class"),
        ("{path}", "{{nonsense: 1}}", "unexpected keyword argument 'nonsense'", "it takes "),
        ("broken_one:Y", "{{}}", "broken_one cannot be imported: ZeroDivisionError", "python -c"),
        ("needy:Y", "{{}}", "imports no_such_thing, which is not installed", "install no_such_thing"),
    ],
)
def test_a_wrong_plugin(
    kind: str, name: str, args: str, cause: str, remedy: str, installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken_one.py").write_text("1 / 0\n")
    (tmp_path / "needy.py").write_text("import no_such_thing\n")
    path = NAMED[kind][0]
    text = name.format(module=path.partition(":")[0], path=path)
    config = resolve(SMALL, setting(kind, text, args.format()))
    with pytest.raises(PluginError) as caught:
        check_all(config)
    assert cause in caught.value.cause and PLUGINS[kind].settings[0] in caught.value.cause
    assert remedy in caught.value.remedy
    assert "\n" not in caught.value.cause and caught.value.exit_status == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_nothing_has_is_refused_when_the_file_is_read(kind: str) -> None:
    with pytest.raises(MissingPluginError) as caught:
        resolve(SMALL, setting(kind, "nonsense"))
    assert "nonsense" in caught.value.cause and plugins.GROUP in caught.value.remedy


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_names_nothing(kind: str) -> None:
    with pytest.raises(ConfigError, match=PLUGINS[kind].settings[0]):
        resolve(SMALL, setting(kind, "two words"))


@pytest.mark.parametrize(
    ("kind", "args", "cause"),
    [
        ("schedule", "{peak_at: early}", "argument peak_at of .* is 'early'"),
        ("sink", "{file: [a]}", "argument file"),
        ("hook", "{factor: high}", "argument factor"),
        ("optimizer", "{cautious: 17}", "argument cautious"),
        ("loss", "{gamma: x}", "argument gamma"),
        ("image_tokenizer", "{patch: wide}", "argument patch"),
        ("text_tokenizer", "{min_frequency: often}", "argument min_frequency"),
    ],
)
def test_an_argument_of_a_wrong_type(kind: str, args: str, cause: str, installed: Path) -> None:
    config = resolve(SMALL, setting(kind, NAMED[kind][0], args))
    with pytest.raises(PluginError, match=cause):
        check_all(config)


def test_arguments_become_what_the_signature_wants(installed: Path) -> None:
    use = Use("schedule", "optim.schedule", NAMED["schedule"][0], {"peak_at": "2e-1"})
    assert plugins.make(use).peak_at == 0.2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not PLUGINS[kind].subclass_of])
def test_a_class_without_the_methods_of_its_kind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"empty_{kind}.py").write_text("class Empty:\n    def __init__(self, *given): pass\n")
    config = resolve(SMALL, setting(kind, f"empty_{kind}:Empty"))
    with pytest.raises(PluginError) as caught:
        check_all(config)
    assert PLUGINS[kind].methods[0] in caught.value.cause and PLUGINS[kind].page in caught.value.remedy


def test_an_optimizer_must_share_the_state_that_checkpoints_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(SMALL, setting("optimizer", "torch.optim:SGD"))
    with pytest.raises(PluginError, match="not a subclass of mmscale"):
        check_all(config)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not PLUGINS[kind].subclass_of])
@pytest.mark.parametrize(
    "code",
    [
        "def Made(*given, size=1, **options): pass",
        "class Made:\n    def __init__(self, *given, size=1, **options): pass\n    {methods}",
        "class Base:\n    {methods}\nclass Made(Base):\n    def __init__(self, *given, size=1, **options): pass",
    ],
    ids=["function", "class", "class with a base class"],
)
def test_options_of_any_name(kind: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factory with `**options` takes every name, unless a base class says which there are."""
    module = f"open_{kind}_{abs(hash(code))}"
    methods = "\n    ".join(f"def {name}(self, *a, **b): pass" for name in PLUGINS[kind].methods)
    (tmp_path / f"{module}.py").write_text(code.format(methods=methods))
    monkeypatch.syspath_prepend(str(tmp_path))
    check_all(resolve(SMALL, setting(kind, f"{module}:Made", "{size: 2}")))
    other = resolve(SMALL, setting(kind, f"{module}:Made", "{other: 2}"))
    if "Base" in code:
        with pytest.raises(PluginError, match="unexpected keyword argument 'other'"):
            check_all(other)
    else:
        check_all(other)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_recorded_is_read_without_its_packages(kind: str, tmp_path: Path) -> None:
    """Training asks for them; reading does not."""
    file = tmp_path / "config.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(install(tmp_path / "site")))
        config = resolve(SMALL, setting(kind, NAMED[kind][1]))
    file.write_text(dump(config))
    with pytest.raises(MissingPluginError):
        load(file)
    assert load(file, recorded=True) == config
    (cause,) = of_config.missing(config)
    assert NAMED[kind][1] in cause


def test_reading_a_configuration_imports_no_plugin(installed: Path) -> None:
    program = (
        "import sys\nfrom mmscale.config.load import resolve\n"
        f"resolve({SMALL!r}, {setting('schedule', NAMED['schedule'][0])!r})\n"
        "assert 'moma_plugins' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_a_schedule_is_called_after_the_warm_up(installed: Path) -> None:
    from mmscale.train.optim.schedule import learning_rate

    optim = resolve(SMALL, [*setting("schedule", "one_cycle", "{peak_at: 0.5}"), "optim.lr=1", "optim.warmup=2"]).optim
    rates = [learning_rate(optim, step=step, steps=11, tokens=0) for step in range(1, 12)]
    assert rates[:2] == [0.5, 1.0]
    assert max(rates[2:]) == pytest.approx(1.0) == pytest.approx(rates[5])
    assert rates[2] < rates[5] > rates[-1]


def test_a_phase_without_a_schedule_is_the_plug_ins(installed: Path) -> None:
    """With its own steps and peak; a phase itself names built-in schedules only, and the refusal lists them."""
    from mmscale.train.optim.schedule import learning_rate

    given = [*setting("schedule", "one_cycle", "{peak_at: 0.5}"), "optim.lr=1", "optim.warmup=0", "optim.min_lr=0"]
    steps = resolve(SMALL, given).train.steps
    optim = resolve(SMALL, [*given, "optim.phases=[{start: 10, lr: 4}]"]).optim
    alone = resolve(SMALL, given).optim
    for step in (1, 4, 10):
        assert learning_rate(optim, step=step, steps=30, tokens=0) == learning_rate(
            alone, step=step, steps=10, tokens=0
        )
    for step in (11, 20, 30):
        expected = 4 * learning_rate(alone, step=step - 10, steps=20, tokens=0)
        assert learning_rate(optim, step=step, steps=30, tokens=0) == pytest.approx(expected)
    assert steps > 10
    for section in ("optim", "auxiliary.optim", "sft.optim"):
        for name in ("one_cycle", "moma_plugins.schedule:OneCycle"):
            with pytest.raises(ConfigError, match=rf"{section}.phases.0.schedule is .*{name}.*, wants one of constant"):
                resolve(SMALL, [*given, f'{section}.phases=[{{start: 10, schedule: "{name}"}}]'])


def test_a_schedule_that_gives_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmscale.train.optim.schedule import learning_rate

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "negative.py").write_text("def make():\n    return lambda at: -1.0\n")
    optim = resolve(SMALL, ["optim.schedule=negative:make"]).optim
    with pytest.raises(PluginError, match=r"gives the learning rate -1\.0 for step 3"):
        learning_rate(optim, step=3, steps=10, tokens=0)


def test_a_hook_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmscale.errors import TrainingError
    from mmscale.train.plugin_hooks import PluginHooks

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "raising.py").write_text(
        "from mmscale.train.plugin_hooks import TrainingHook\n"
        "class Raises(TrainingHook):\n    def __init__(self, run): pass\n    def on_save(self, step): 1 / 0\n"
    )
    hooks = PluginHooks(resolve(SMALL, ["train.hooks={raising:Raises: }"]), None)  # type: ignore[arg-type]
    hooks.on_start(0)
    with pytest.raises(TrainingError, match="raising:Raises failed in on_save, step 4: ZeroDivisionError"):
        hooks.on_save(4)


def test_a_hook_can_add_events_by_the_former_name() -> None:
    from mmscale.train.plugin_hooks import HookRun

    added: list[tuple[str, int]] = []
    run = HookRun(SMALL, "main", Path(), 0, 1, (), print, lambda name, step: added.append((name, step)))  # type: ignore[arg-type]
    with pytest.warns(DeprecationWarning, match=r"use HookRun\.add_event"):
        run.tell("loss_spike", step=3)
    assert added == [("loss_spike", 3)]

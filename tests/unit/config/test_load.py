"""Reading configurations: files, overrides, origins, writing back, and every message a wrong file can get."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.config import Config
from mmscale.config.load import digest, dump, flatten, load, origins, resolve
from mmscale.errors import ConfigError

SMALL = """\
run: {name: small}
model:
  kind: moma
  num_layers: 4
  hidden_size: 64
  ffn_hidden_size: 96
  num_attention_heads: 4
  seq_length: 64
  experts:
    counts: {text: 4, image: 4}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return written(tmp_path, SMALL)


def written(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def refused(path: Path | str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value


class TestGoodFiles:
    def test_defaults_stay_where_nothing_is_given(self, small: Path) -> None:
        config = load(small)
        assert config.model.hidden_size == 64
        assert config.train.steps == 1000
        assert config.model.experts.counts == {"text": 4, "image": 4}

    def test_hf_and_a_folder_is_short_for_a_vq_model(self, small: Path) -> None:
        long = ["data.prepare.image.kind=vq", "data.prepare.image.path=models/janus"]
        source = "data.prepare.documents=[a]"
        assert load(small, ["data.prepare.image.kind=hf:models/janus", source]) == load(small, [*long, source])
        twice = refused(small, "data.prepare.image.kind=hf:models/janus", "data.prepare.image.path=other", source)
        assert "data.prepare.image.kind is hf:models/janus" in twice.cause.replace('"', "")

    def test_resolve_takes_a_mapping(self, small: Path) -> None:
        values = {"run": {"name": "small"}, "model": load(small).model.model_dump()}
        assert resolve(values, ["optim.lr=3e-4"]) == load(small, ["optim.lr=3e-4"])

    @pytest.mark.parametrize(
        ("override", "key", "value"),
        [
            ("parallel.tp=2", "parallel.tp", 2),
            ("optim.lr=3e-4", "optim.lr", 3e-4),
            ("optim.power_tokens=2e9", "optim.power_tokens", 2e9),
            ("train.steps=4_096", "train.steps", 4096),
            ("train.steps=64k", "train.steps", 64_000),
            ("model.experts.counts.text=8", "model.experts.counts.text", 8),
            ("model.experts.counts={text: 2, image: 2}", "model.experts.counts.image", 2),
            ("model.depth.every=3", "model.depth.every", 3),
            ("model.depth=null", "model.depth", None),
            ("vocab.modalities.0.size=1000", "vocab.modalities.0.size", 1000),
            ("precision.fp8=off", "precision.fp8", "off"),  # YAML 1.1 would read false
            ("train.dry_run=no", "train.dry_run", False),
            ("run.name=007", "run.name", "007"),  # a name, whatever YAML takes it for
            ("run.name=2024-01-01", "run.name", "2024-01-01"),
            ("run.name=true", "run.name", "true"),
            ("log.wandb=", "log.wandb", None),
            ("data.blend=[{path: a}, {path: b, weight: 2}]", "data.blend.1.weight", 2.0),
        ],
    )
    def test_overrides(self, small: Path, override: str, key: str, value: object) -> None:
        assert flatten(load(small, [override]))[key] == value

    def test_the_last_override_of_a_key_wins(self, small: Path) -> None:
        assert load(small, ["train.steps=5", "train.steps=6"]).train.steps == 6

    def test_an_empty_section_is_all_defaults(self, tmp_path: Path) -> None:
        assert load(written(tmp_path, SMALL + "train:\n  # steps: 5\n")).train.steps == 1000

    def test_numbers_in_files_are_read_as_a_person_means_them(self, tmp_path: Path) -> None:
        config = load(
            written(tmp_path, SMALL + "optim: {lr: 1e-3}\nprecision: {fp8: off}\nparallel: {recompute: none}\n")
        )
        assert config.optim.lr == 1e-3


class TestWritingBack:
    def test_dump_loads_back_to_the_same(self, small: Path, tmp_path: Path) -> None:
        config = load(
            small, ["optim.lr=3e-5", "model.depth.capacity=0.125", "run.name=1e3", "data.blend=[{path: 'off'}]"]
        )
        assert load(written(tmp_path, dump(config))) == config

    def test_digest_follows_the_values_not_the_writing(self, small: Path, tmp_path: Path) -> None:
        config = load(small)
        assert digest(config) == digest(load(written(tmp_path, dump(config))))
        assert digest(config) != digest(load(small, ["optim.lr=2e-4"]))

    def test_every_value_is_in_the_dump(self, small: Path) -> None:
        assert set(Config.model_fields) <= {line.partition(":")[0] for line in dump(load(small)).splitlines()}


class TestOrigins:
    def test_file_line_override_and_default(self, small: Path) -> None:
        found = origins(small, ["model.depth.every=2", "vocab.modalities.1.size=100", "model.num_layers=8"])
        assert found["model.hidden_size"] == f"{small}:5"
        assert found["model.experts.counts.image"] == f"{small}:10"
        assert found["model.num_layers"] == "override"
        assert found["model.depth.every"] == "override"
        assert found["model.depth.capacity"] == "default"
        assert found["vocab.modalities.1.size"] == "override"
        assert found["vocab.modalities.0.size"] == "default"
        assert found["train.steps"] == "default"

    def test_an_override_of_a_mapping_covers_its_entries(self, small: Path) -> None:
        found = origins(small, ["model.experts.counts={text: 2, image: 2}"])
        assert found["model.experts.counts.text"] == "override"

    def test_every_value_has_one(self, small: Path) -> None:
        assert set(origins(small)) == set(flatten(load(small)))


class TestBrokenFiles:
    def test_missing(self, tmp_path: Path) -> None:
        error = refused(tmp_path / "none.yaml")
        assert error.cause == f"{tmp_path / 'none.yaml'}: there is no such file"
        assert "YAML" in error.remedy

    def test_a_folder(self, tmp_path: Path) -> None:
        assert "cannot be read" in refused(tmp_path).cause

    @pytest.mark.parametrize(
        ("text", "cause"),
        [
            ("- a\n- b\n", ": holds no mapping at its top level"),
            ("just text\n", ": holds no mapping at its top level"),
            ("model: [1\n", ":2: not YAML: expected ',' or ']', but got '<stream end>'"),
            ("a: 1\n\tb: 2\n", ":2: not YAML: found character '\\t' that cannot start any token"),
            ("a: *b\n", ":1: not YAML: found undefined alias 'b'"),
            ("run: {name: a}\nrun: {name: b}\n", ":2: run is given twice (first in line 1)"),
            ("model:\n  depth: {every: 1, every: 2}\n", ":2: model.depth.every is given twice"),
            (
                "run:\n  name: !!python/name:os.system x\n",
                ":2: run.name: the tag tag:yaml.org,2002:python/name:os.system is not read",
            ),
            ("run: {? [a] : 1}\n", ":1: a key is not a single word"),
            ("run: &a\n  more: *a\n", "nested more than 20 deep"),
        ],
    )
    def test_not_a_configuration(self, tmp_path: Path, text: str, cause: str) -> None:
        error = refused(written(tmp_path, text))
        assert cause in error.cause
        assert error.remedy
        assert "\n" not in error.cause

    def test_an_empty_file_lacks_a_model(self, tmp_path: Path) -> None:
        assert refused(written(tmp_path, "")).cause == ("model is missing")


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("override", "meant"),
        [
            ("train.stps=3", "train.steps"),
            ("trian.steps=3", "train.steps"),
            ("train.lr=3", "optim.lr"),
            ("lr=3", "optim.lr"),
            ("optim.learning_rate=3", "optim.lr"),
            ("optim.seed=3", "data.seed"),
            ("model.experts.every=3", "model.depth.every"),
            ("model.experts.capacity_facto=3", "model.experts.capacity_factor"),
            ("parallel.tensor_model_parallel_size=2", "parallel.tp"),
            ("models.depth=2", "model.depth"),
        ],
    )
    def test_did_you_mean(self, small: Path, override: str, meant: str) -> None:
        error = refused(small, override)
        key = override.partition("=")[0]
        assert error.cause.startswith("override: ")
        assert "is not a setting" in error.cause
        assert key.startswith(error.cause.split()[1])
        assert error.remedy in (f"did you mean `{meant}`?", f"did you mean `{meant.partition('.')[0]}`?")

    def test_nothing_near(self, small: Path) -> None:
        error = refused(small, "zzz.qqq=1")
        assert error.cause == "override: zzz is not a setting"
        assert error.remedy == "`mmscale config explain` lists all settings"

    def test_the_file_and_line_are_named(self, tmp_path: Path) -> None:
        path = written(tmp_path, SMALL.replace("  seq_length", "  seq_len"))
        assert refused(path).cause == f"{path}:8: model.seq_len is not a setting"

    def test_a_mistyped_required_key_is_one_mistake(self, tmp_path: Path) -> None:
        error = refused(written(tmp_path, SMALL.replace("num_layers", "num_layer")))
        assert "model.num_layer is not a setting" in error.cause
        assert "missing" not in error.cause
        assert error.remedy == "did you mean `model.num_layers`?"


class TestWrongValues:
    @pytest.mark.parametrize(
        ("override", "cause"),
        [
            ("train.steps=0", "train.steps is 0, wants a whole number of at least 1 [steps]"),
            ("train.steps=1.5", "train.steps is 1.5, wants a whole number of at least 1 [steps]"),
            ("train.steps=true", "train.steps is true, wants a whole number of at least 1 [steps]"),
            ("train.steps=null", "train.steps is null, wants a whole number of at least 1 [steps]"),
            ("train.steps=many", 'train.steps is "many", wants a whole number of at least 1 [steps]'),
            ("optim.lr=-1", "optim.lr is -1, wants a number above 0"),
            ("optim.min_lr=.nan", "optim.min_lr is NaN, wants a number of at least 0"),
            ("model.depth.capacity=1.5", "model.depth.capacity is 1.5, wants a number above 0 and at most 1"),
            ("model.kind=mixed", 'model.kind is "mixed", wants one of dense, moe, moma'),
            (
                "precision.fp8=on",
                'precision.fp8 is "on", wants one of off, delayed, tensorwise, blockwise, mxfp8, nvfp4',
            ),
            ("train.dry_run=maybe", 'train.dry_run is "maybe", wants true or false'),
            ("run.name=../x", "run.name is \"../x\", wants a name of letters, digits, '.', '_' and '-'"),
            ("run.dir=[a]", 'run.dir is ["a"], wants text'),
            ("optim=3", "optim is 3, wants a mapping with lr, min_lr"),
            ("data.blend=a", 'data.blend is "a", wants a list, each entry a mapping with path, weight'),
            ("model.experts.counts.text=x", 'counts.text is "x", wants a whole number of at least 1 [experts]'),
            ("model.experts.counts={a b: 1}", "wants a name of letters, digits, '.', '_' and '-' as a key"),
            ("model.experts.share.text=2", "model.experts.share.text is 2, wants a number of at least 0 and at most 1"),
            ("model.experts.share=equal", 'model.experts.share is "equal", wants auto, or a mapping of names'),
            ("data.prepare.image.channels=true", "data.prepare.image.channels is true, wants one of 1, 3"),
        ],
    )
    def test_cause(self, small: Path, override: str, cause: str) -> None:
        error = refused(small, override)
        assert cause in error.cause
        assert "mmscale config explain" in error.remedy
        assert "\n" not in error.cause

    def test_missing_required(self, tmp_path: Path) -> None:
        error = refused(written(tmp_path, "model: {num_layers: 2}\n"))
        assert "model.hidden_size is missing (a whole number of at least 1)" in error.cause

    def test_all_problems_at_once_one_line_each(self, small: Path) -> None:
        lines = refused(small, "train.stps=1", "optim.lr=x", "model.kind=y").cause.splitlines()
        assert len(lines) == 3
        assert "train.stps" in lines[0]
        assert all(line.startswith("also: override: ") for line in lines[1:])

    def test_long_values_are_cut(self, small: Path) -> None:
        assert len(refused(small, f"train.steps={'x' * 500}").cause) < 200


class TestWrongOverrides:
    @pytest.mark.parametrize(
        ("override", "cause"),
        [
            ("train.steps", "override 'train.steps' is not of the form key=value"),
            ("=3", "override '=3' is not of the form key=value"),
            ("train..steps=3", "override 'train..steps=3' is not of the form key=value"),
            ("train.steps=[1", "not YAML"),
            ("vocab.modalities.7.size=3", "override vocab.modalities.7.size: '7' is no index of a list of 2"),
            ("vocab.modalities.text.size=3", "'text' is no index of a list of 2"),
        ],
    )
    def test_cause(self, small: Path, override: str, cause: str) -> None:
        error = refused(small, override)
        assert cause in error.cause
        assert error.remedy

    def test_nothing_inside_a_single_value(self, tmp_path: Path) -> None:
        path = written(tmp_path, SMALL + "data: {prepare: {documents: [a.jsonl]}}\n")
        assert "no setting inside a single value" in refused(path, "data.prepare.documents.0.x=1").cause


def test_no_torch_for_configurations_and_plans() -> None:
    code = (
        "import sys; import mmscale.config.load, mmscale.config.rules, mmscale.config.explain, mmscale.plan; "
        "bad = {'torch', 'megatron', 'transformers'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_part_of_a_stage_s_optimizer_keeps_the_stage_s_other_defaults(small: Path) -> None:
    """One setting must not raise the learning rate of fine-tuning tenfold, or decay the weights of routers."""
    plain = load(small, [])
    one = load(small, ["sft.optim.schedule=constant", "auxiliary.optim.lr=1e-3"])
    assert (one.sft.optim.lr, one.auxiliary.optim.weight_decay) == (1e-5, 0.0)
    assert one.sft.optim == plain.sft.optim.model_copy(update={"schedule": "constant"})
    assert one.auxiliary.optim == plain.auxiliary.optim.model_copy(update={"lr": 1e-3})
    assert (one.optim.lr, one.optim.weight_decay) == (1e-4, 0.1)

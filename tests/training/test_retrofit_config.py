"""Configuration is strict: each wrong key or value gives one line that names it."""

import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest

from dms_jax.config import DMSConfig
from dms_jax.config_reader import keys_help, meaning_of
from dms_jax.errors import ConfigError
from dms_jax.files import parse_yaml
from dms_jax.training.data.token_store import DataConfig
from dms_jax.training.retrofit_config import LossConfig, OptimizerConfig, RetrofitConfig, differences, read_config

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    "assignment, fragment",
    [
        ("dms.windowsize=3", "window_size"),
        ("stepss=3", "did you mean steps"),
        ("optimizer.lr=1", "learning_rate"),
        ("steps", "key=value"),
        ("steps=-1", ">= 0, got -1"),
        ("label_rows=0", ">= 1, got 0"),
        ("init=random", "auto, fisher, zero"),
        ("ratio_control=hinge", "auto, threshold, loss"),
        ("steps=true", "True"),
        ("steps=4.5", "4.5"),
        ("steps.x=4", "{'x': 4}"),
        ("length=1", ">= 2, got 1"),
        ("batch_size=-1", ">= 0, got -1"),
        ("batch_size=3000000000", "2**31"),
        ("dms.window_size=-1", "-1"),
        ("dms.target_cr=0.5", "0.5"),
        ("dms.tau=0", "> 0"),
        ("dms.decision_shift=2", "0, 1"),
        ("dms.granularity=all", "head, layer"),
        ("mode=lora", "adapter, full, borrowed"),
        ("initial_cr=4", "dms.target_cr"),
        ("cr_steps=1000", "got 4"),
        ("ramp_steps=10", "borrowed"),
        ("dms.variant=borrowed", "mode=borrowed"),
        ("optimizer.learning_rate=0", "> 0"),
        ("optimizer.learning_rate=fast", "fast"),
        ("optimizer.weight_decay=-1", ">= 0"),
        ("optimizer.b1=1", "[0, 1)"),
        ("optimizer.decay_fraction=1.5", "[0, 1]"),
        ("loss.compression_weight=-1", ">= 0"),
        ("loss.scope=token", "global, layer, head"),
        ("data.held_out_fraction=1.5", "[0, 1)"),
        ("data.row=packed", "did you mean rows"),
        ("output=''", "folder"),
        ("steps={", "'{'"),
        ("optimizer=3", "3"),
    ],
)
def test_wrong_value_names_its_key_and_what_it_may_be(assignment, fragment):
    with pytest.raises(ConfigError) as refusal:
        read_config(None, [assignment], None)
    key = assignment.partition("=")[0].partition(".x")[0]
    assert key in str(refusal.value) and fragment in str(refusal.value) and "\n" not in str(refusal.value)


def test_file_assignments_and_mesh_are_laid_over_each_other(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: a.jsonl\ndms: {window_size: 32}\noptimizer: {learning_rate: 1e-4}\n")
    config = read_config(str(file), ["steps=7", "data.rows=packed", "dms.target_cr=3"], "4x2")
    assert config.data.paths == ("a.jsonl",) and config.data.rows == "packed" and config.mesh == "4x2"
    assert config.dms == dataclasses.replace(RetrofitConfig().dms, window_size=32, target_cr=3.0, decision_shift=0)
    assert config.optimizer.learning_rate == 1e-4
    assert read_config(None, ["data=[a.txt, b.txt]"], None).data.paths == ("a.txt", "b.txt")
    either_order = [["data.rows=packed", "data=a.txt"], ["data=a.txt", "data.rows=packed"]]
    assert {read_config(None, given, None).data.rows for given in either_order} == {"packed"}
    assert read_config(None, ["mode=borrowed"], None).trained_dms.variant == "borrowed"


@pytest.mark.parametrize(
    "content",
    ["steps: [", "- 1", b"\xff\xfe"],
    ids=["cut", "list", "binary"],
)
def test_unreadable_file_is_named(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="bad.yaml"):
        read_config(str(file), [], None)
    with pytest.raises(ConfigError, match="absent.yaml"):
        read_config(str(tmp_path / "absent.yaml"), [], None)


@pytest.mark.parametrize("mode, shift", [("adapter", 0), ("full", 1), ("borrowed", 1)])
@pytest.mark.parametrize("model", [[], ["model=x"]])
def test_decision_shift_follows_the_mode_unless_it_is_given(mode, shift, model):
    assert read_config(None, [*model, f"mode={mode}"], None).dms.decision_shift == shift
    assert read_config(None, [*model, f"mode={mode}", "dms.decision_shift=1"], None).dms.decision_shift == 1
    assert read_config(None, [*model, f"mode={mode}", "dms.decision_shift=0"], None).dms.decision_shift == 0


@pytest.mark.parametrize(
    "given, has_policy, fragments",
    [
        (["init=zero", "steps=0"], False, ["steps must be at least 1", "init=zero"]),
        (["mode=borrowed", "steps=0"], False, ["steps must be at least 1", "init=zero"]),
        (["steps=0"], True, ["steps must be at least 1", "init=zero"]),
        (["mode=borrowed", "init=fisher"], False, ["init must be", "borrowed"]),
        (["init=fisher"], True, ["init must be", "already has a policy"]),
        (["mode=borrowed", "ratio_control=threshold"], False, ["ratio_control must be", "borrowed"]),
        (["initial_cr=1"], False, ["initial_cr", "ratio_control=loss"]),
        (["cr_steps=3"], False, ["cr_steps", "ratio_control=loss"]),
        (["loss.compression_weight=2"], False, ["loss.compression_weight", "ratio_control=loss"]),
        (["loss.scope=head", "loss.decidable_only=true"], False, ["loss.scope and loss.decidable_only"]),
        (["ratio_control=loss", "cr_steps=3"], False, ["cr_steps must be 0", "initial_cr", "init=fisher"]),
        (["ratio_control=loss", "cr_steps=3", "initial_cr=2.8"], False, ["cr_steps must be 0", "got 3"]),
        (["init=zero", "ratio_control=threshold", "cr_steps=3"], False, ["cr_steps", "ratio_control=loss"]),
    ],
)
def test_keys_that_contradict_init_or_ratio_control_are_refused(given, has_policy, fragments):
    with pytest.raises(ConfigError) as refusal:
        read_config(None, given, None).resolved(has_policy)
    assert all(fragment in str(refusal.value) for fragment in fragments) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "given, has_policy, init, control, rate",
    [
        ([], False, "fisher", "threshold", 1.5e-5),
        ([], True, "zero", "loss", 1e-4),
        (["mode=full"], False, "fisher", "threshold", 1.5e-5),
        (["mode=borrowed"], False, "zero", "loss", 1e-4),
        (["init=zero"], False, "zero", "loss", 1e-4),
        (["ratio_control=loss"], False, "fisher", "loss", 1.5e-5),
        (["ratio_control=threshold", "optimizer.learning_rate=1e-3"], True, "zero", "threshold", 1e-3),
    ],
)
def test_auto_and_null_get_their_values(given, has_policy, init, control, rate):
    config = read_config(None, given, None).resolved(has_policy)
    assert (config.init, config.ratio_control, config.optimizer.learning_rate) == (init, control, rate)
    assert config.optimizer.warmup_steps == (2 if init == "fisher" else 0)
    assert config.initial_cr == (config.dms.target_cr if "fisher" in init or control == "threshold" else 1)
    assert config.loss.compression_weight == (0 if control == "threshold" else 1)
    assert config.resolved(has_policy and init == "zero") == config


def test_differences_leave_out_keys_that_may_change():
    old = dataclasses.asdict(read_config(None, ["dms.window_size=9"], "4x2"))
    new = dataclasses.asdict(read_config(None, ["dms.window_size=3", "seed=4", "eval_every=7"], "8x1"))
    assert differences(old, new) == ["dms.window_size: 9 -> 3", "seed: 0 -> 4"]
    assert differences(old, old) == []


def test_help_gives_default_range_and_meaning_of_every_key():
    text = keys_help(RetrofitConfig())
    flat = {}
    for key, value in dataclasses.asdict(RetrofitConfig()).items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    printed = dict(line[2:].split(" = ", 1) for line in text.splitlines() if not line.startswith("   "))
    assert printed.keys() == flat.keys()
    for key, value in flat.items():
        default = parse_yaml(printed[key].split("  (")[0], key)
        assert default == (list(value) if isinstance(value, tuple) else value), key
    assert "(adapter | full | borrowed)" in printed["mode"] and "(>= 0)" in printed["steps"]
    for hint in typing.get_type_hints(RetrofitConfig, include_extras=True).values():
        assert " ".join(meaning_of(hint).split()) in " ".join(text.split())


@pytest.mark.parametrize("kind", [RetrofitConfig, LossConfig, OptimizerConfig, DataConfig])
def test_every_key_has_a_meaning(kind):
    hints = typing.get_type_hints(kind, include_extras=True)
    assert [name for name, hint in hints.items() if not dataclasses.is_dataclass(hint) and not meaning_of(hint)] == []


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_begin_with_their_command(file):
    config = read_config(str(file), [], None)
    first = file.read_text().splitlines()[0]
    assert first.startswith(f"# python -m train.retrofit --config {file.relative_to(ROOT)}")
    assert isinstance(config.dms, DMSConfig)


def test_number_that_is_not_finite_is_refused_as_such():
    with pytest.raises(ConfigError, match="initial_cr.*finite"):
        RetrofitConfig(initial_cr=float("inf"))


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), np.float32("inf"), np.array(2.0), "2", True])
def test_number_of_a_config_made_directly_is_refused_by_its_name(value):
    with pytest.raises(ConfigError, match="^initial_cr must be a "):
        RetrofitConfig(initial_cr=value)
    with pytest.raises(ConfigError, match="^steps must be "):
        RetrofitConfig(steps=value)


def test_numpy_scalars_in_a_config_are_plain_numbers():
    ours = RetrofitConfig(steps=np.int32(60), initial_cr=np.float32(1.5), dms=DMSConfig(window_size=np.uint8(9)))
    assert ours == RetrofitConfig(steps=60, initial_cr=1.5, dms=DMSConfig(window_size=9)) and hash(ours)
    assert json.loads(json.dumps(dataclasses.asdict(ours)))["initial_cr"] == 1.5


@pytest.mark.parametrize("assignments", [["loss=5", "loss.scope=layer"], ["loss.scope=layer", "loss=5"]])
def test_key_with_a_value_and_with_keys_below_it_is_refused(assignments):
    """The later one would drop the earlier one."""
    with pytest.raises(ConfigError, match="`loss` is given both as 5 and by keys below it"):
        read_config(None, assignments, None)
    assert read_config(None, ["data=a.txt", "data.rows=packed"], None).data.rows == "packed"


def test_ramp_of_a_fitted_head_is_accepted_from_a_lower_ratio():
    config = read_config(None, ["ratio_control=loss", "initial_cr=1", "cr_steps=3"], None).resolved()
    assert (config.init, config.initial_cr, config.rising_steps) == ("fisher", 1.0, 3)

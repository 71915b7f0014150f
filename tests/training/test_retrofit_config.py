"""Configuration is strict: each wrong key or value is one line with the way out."""

import dataclasses
from pathlib import Path

import pytest

from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.training.retrofit_config import RetrofitConfig, differences, keys_help, read_config

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("dms.windowsize=3", "`dms.windowsize`; did you mean window_size"),
        ("stepss=3", "`stepss`; did you mean steps"),
        ("optimizer.lr=1", "optimizer.lr"),
        ("steps", "key=value"),
        ("steps=0", "steps must be >= 1"),
        ("steps=true", "`steps` wants int"),
        ("steps=4.5", "`steps` wants int"),
        ("steps.x=4", "`steps` wants int"),
        ("length=1", "length must be >= 2"),
        ("batch_size=-1", "batch_size"),
        ("dms.window_size=-1", "dms.window_size must be >= 0"),
        ("dms.target_cr=0.5", "dms.target_cr must be >= 1"),
        ("dms.tau=0", "dms.tau must be > 0"),
        ("dms.decision_shift=2", "must be one of 0, 1"),
        ("dms.granularity=all", "head, layer"),
        ("mode=lora", "adapter, full, borrowed"),
        ("initial_cr=4", "below initial_cr"),
        ("cr_steps=1000", "do not fit into steps"),
        ("ramp_steps=10", "mode borrowed"),
        ("dms.variant=borrowed", "use mode=borrowed"),
        ("optimizer.learning_rate=0", "must be > 0"),
        ("optimizer.learning_rate=fast", "wants float"),
        ("optimizer.weight_decay=-1", ">= 0"),
        ("loss.compression_weight=-1", ">= 0"),
        ("loss.scope=token", "global, layer, head"),
        ("data.held_out_fraction=1.5", "data.held_out_fraction"),
        ("data.row=packed", "did you mean rows"),
        ("output=''", "output is empty"),
        ("steps={", "not a YAML value"),
        ("optimizer=3", "`optimizer` wants a mapping"),
    ],
)
def test_wrong_values(assignment, message):
    with pytest.raises(ConfigError) as refusal:
        read_config(None, [assignment], None)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_values_and_short_forms(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: a.jsonl\ndms: {window_size: 32}\noptimizer: {learning_rate: 1e-4}\n")
    config = read_config(str(file), ["steps=7", "data.rows=packed", "dms.target_cr=3"], "4x2")
    assert config.data.paths == ("a.jsonl",) and config.data.rows == "packed" and config.mesh == "4x2"
    assert config.dms == dataclasses.replace(RetrofitConfig().dms, window_size=32, target_cr=3.0, decision_shift=0)
    assert config.optimizer.learning_rate == 1e-4
    assert (
        read_config(None, ["model=x"], None).dms.decision_shift == 1
        and read_config(None, ["dms.decision_shift=1"], None).dms.decision_shift == 1
    )
    assert read_config(None, ["data=[a.txt, b.txt]"], None).data.paths == ("a.txt", "b.txt")
    assert read_config(None, ["mode=borrowed"], None).trained_dms.variant == "borrowed"


@pytest.mark.parametrize(
    "content, message",
    [("steps: [", "not valid YAML"), ("- 1", "must hold `key: value`"), (b"\xff\xfe", "cannot read config")],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        read_config(str(file), [], None)
    with pytest.raises(ConfigError, match="cannot read config"):
        read_config(str(tmp_path / "absent.yaml"), [], None)


def test_differences_of_a_resumed_run():
    old = dataclasses.asdict(read_config(None, ["dms.window_size=9"], "4x2"))
    new = dataclasses.asdict(read_config(None, ["dms.window_size=3", "seed=4", "eval_every=7"], "8x1"))
    assert differences(old, new) == ["dms.window_size: 9 -> 3", "seed: 0 -> 4"]
    assert differences(old, old) == []


def test_help_names_every_key():
    text = keys_help()
    assert (
        "dms.window_size" in text
        and "data.paths" in text
        and "optimizer.learning_rate" in text
        and "adapter | full | borrowed" in text
    )


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_begin_with_their_command(file):
    config = read_config(str(file), [], None)
    first = file.read_text().splitlines()[0]
    assert first.startswith(f"# python -m train.retrofit --config {file.relative_to(ROOT)}")
    assert isinstance(config.dms, DMSConfig)

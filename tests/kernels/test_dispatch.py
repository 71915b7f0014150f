"""Who runs where: order, reasons, refusals, and measured block sizes as data."""

import json

import jax
import jax.numpy as jnp
import pytest

from dms_jax.errors import ConfigError
from dms_jax.kernels import block_sizes, dispatch
from dms_jax.kernels.block_sizes import SlotBlocks, TunedEntry, read_tuned, write_tuned
from dms_jax.kernels.dispatch import Facts, choose, reasons, runs, why_not

H100 = "NVIDIA H100 80GB HBM3"
FACTS = Facts(128, jnp.bfloat16)


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Pretend to be another device, with a table of measurements of its own."""
    monkeypatch.setattr(block_sizes, "TUNED", tmp_path / "tuned.json")

    def pretend(platform, kind):
        monkeypatch.setattr(dispatch, "target_device", lambda: (platform, kind))
        return tmp_path / "tuned.json"

    return pretend


def entry(**fields):
    base = TunedEntry(
        "decode_attention",
        "mosaic_gpu",
        H100,
        128,
        "bfloat16",
        SlotBlocks(64, 128, 4, 3),
        2.5,
        1e-3,
        "2026-11-26",
        "0.11.2",
    )
    return base._replace(**fields)


def test_a_kernel_is_the_default_once_it_was_measured_to_be_faster(on):
    path = on("gpu", H100)
    assert choose("decode_attention", FACTS).name == "xla"
    assert "not measured" in reasons("decode_attention", FACTS)["mosaic_gpu"]
    write_tuned(path, (entry(),))
    assert choose("decode_attention", FACTS) == ("mosaic_gpu", SlotBlocks(64, 128, 4, 3))
    assert choose("train_attention", FACTS).name == "xla"
    assert choose("decode_attention", Facts(64, jnp.bfloat16)).name == "xla"
    assert choose("decode_attention", FACTS._replace(cache_dtype=jnp.float8_e4m3fn)).name == "xla"
    write_tuned(path, (entry(speed_to_xla=0.8),))
    assert choose("decode_attention", FACTS).name == "xla"
    assert "0.80x, measured 2026-11-26" in reasons("decode_attention", FACTS)["mosaic_gpu"]


def test_a_named_implementation_runs_with_its_blocks_or_says_why_not(on, monkeypatch):
    on("gpu", H100)
    chosen = choose("decode_attention", FACTS, "mosaic_gpu")
    assert chosen.name == "mosaic_gpu" and isinstance(chosen.blocks, SlotBlocks)
    assert choose("decode_attention", FACTS, "mosaic_gpu", blocks=SlotBlocks(64, 64)).blocks == SlotBlocks(64, 64)
    with pytest.raises(ConfigError, match="runs on a TPU, this is a GPU"):
        choose("decode_attention", FACTS, "pallas_tpu")
    with pytest.raises(ConfigError, match="head sizes 64 and 128, this model has 80"):
        choose("decode_attention", Facts(80, jnp.bfloat16), "mosaic_gpu")
    with pytest.raises(ConfigError, match="bfloat16, not in float32"):
        choose("decode_attention", Facts(128, jnp.float32), "mosaic_gpu")
    with pytest.raises(ConfigError, match="fp8, not of float16"):
        choose("decode_attention", FACTS._replace(cache_dtype=jnp.float16), "mosaic_gpu")
    with pytest.raises(ConfigError, match="multiple of 64, this cache has 100"):
        choose("decode_attention", FACTS._replace(capacity=100), "mosaic_gpu")
    monkeypatch.setattr(dispatch, "_cuda_version", lambda: 12090)
    with pytest.raises(ConfigError, match="miscompilation of causal masks in CUDA 12.8 and 12.9.0"):
        choose("decode_attention", FACTS, "mosaic_gpu")
    monkeypatch.setattr(dispatch, "_cuda_version", lambda: 13000)
    with pytest.raises(ConfigError, match="reads a part"):
        choose("decode_attention", FACTS._replace(only_xla="reads a part"), "mosaic_gpu")
    with pytest.raises(ConfigError, match="did you mean pallas_tpu"):
        choose("decode_attention", FACTS, "palas_tpu")
    on("gpu", "NVIDIA A100")
    with pytest.raises(ConfigError, match="needs a Hopper GPU"):
        choose("decode_attention", FACTS, "mosaic_gpu")
    on("tpu", "TPU v5 lite")
    with pytest.raises(ConfigError, match="multiple of 128, this cache has 192"):
        choose("decode_attention", FACTS._replace(capacity=192), "pallas_tpu")
    on("cpu", "cpu")
    assert (
        why_not("decode_attention", "mosaic_gpu", FACTS) is not None
        and why_not("decode_attention", "mosaic_gpu", FACTS, interpret=True) is None
    )


def test_the_fused_update_is_left_out_where_it_cannot_run(on):
    on("tpu", "TPU v5 lite")
    assert (
        runs("decode_update", FACTS, "pallas_tpu")
        and not runs("decode_update", FACTS, "xla")
        and not runs("decode_update", FACTS)
    )
    assert not runs("decode_update", FACTS._replace(capacity=1 << 17), "pallas_tpu")
    assert choose("decode_attention", FACTS._replace(capacity=1 << 17), "pallas_tpu").name == "pallas_tpu"
    with pytest.raises(ConfigError, match="at most 65536 slots"):
        choose("decode_update", FACTS._replace(capacity=1 << 17), "pallas_tpu")


def test_what_was_measured_survives_the_file(tmp_path):
    path = tmp_path / "tuned.json"
    entries = entry(), entry(kernel="decode_update", blocks=None)
    write_tuned(path, entries)
    assert read_tuned(path) == entries
    for damaged in (
        "[{]",
        '[{"kernel": "decode_attention"}]',
        "{}x",
        '[{"blocks": {"keys": 3}, "kernel": "decode_attention"}]',
    ):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match="holds no tuned block sizes"):
            read_tuned(path)


def test_the_table_of_the_package_is_readable_and_names_kernels_that_exist():
    if not block_sizes.TUNED.exists():
        pytest.skip("nothing has been measured on an accelerator yet")
    for line in json.loads(block_sizes.TUNED.read_text()):
        assert line["kernel"] in block_sizes.KERNELS and line["implementation"] in dispatch.IMPLEMENTATIONS
    assert read_tuned(block_sizes.TUNED)


def test_the_device_is_that_of_the_mesh():
    assert dispatch.target_device() == ("cpu", jax.devices()[0].device_kind)

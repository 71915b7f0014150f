"""Dispatch: order, reasons and refusals; the records of kernels; and the file of measured block sizes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dms_jax.errors import ConfigError
from dms_jax.kernels import dispatch, tuned
from dms_jax.kernels.block_sizes import SlotBlocks
from dms_jax.kernels.dispatch import (
    KernelQuery,
    is_available,
    reasons,
    select_implementation,
    unavailable_because,
)
from dms_jax.kernels.kernel_table import GPU, KERNELS, TPU, load
from dms_jax.kernels.tuned import TunedEntry, read_tuned, write_tuned

H100 = "NVIDIA H100 80GB HBM3"
QUERY = KernelQuery(128, jnp.bfloat16)


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Pretend to be another device, with a separate table of measurements."""
    monkeypatch.setattr(tuned, "TUNED", tmp_path / "tuned.json")

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


def refusal(implementation, query, kernel="decode_attention"):
    with pytest.raises(ConfigError) as caught:
        select_implementation(kernel, query, implementation)
    return str(caught.value)


def test_kernel_is_the_default_only_where_it_was_measured_to_be_faster(on):
    path = on("gpu", H100)
    assert select_implementation("decode_attention", QUERY).name == "xla"
    assert "benchmarks.autotune" in reasons("decode_attention", QUERY)["mosaic_gpu"]
    write_tuned(path, (entry(),))
    assert select_implementation("decode_attention", QUERY) == ("mosaic_gpu", SlotBlocks(64, 128, 4, 3))
    assert select_implementation("train_attention", QUERY).name == "xla"
    assert select_implementation("decode_attention", KernelQuery(64, jnp.bfloat16)).name == "xla"
    assert select_implementation("decode_attention", QUERY._replace(cache_dtype=jnp.float8_e4m3fn)).name == "xla"
    write_tuned(path, (entry(speed_to_xla=0.8),))
    assert select_implementation("decode_attention", QUERY).name == "xla"
    assert "0.80x, measured 2026-11-26" in reasons("decode_attention", QUERY)["mosaic_gpu"]


def test_named_implementation_runs_with_its_block_sizes(on):
    on("gpu", H100)
    selected = select_implementation("decode_attention", QUERY, "mosaic_gpu")
    assert selected.name == "mosaic_gpu" and isinstance(selected.blocks, SlotBlocks)
    given = SlotBlocks(64, 64)
    assert select_implementation("decode_attention", QUERY, "mosaic_gpu", blocks=given).blocks == given


@pytest.mark.parametrize(
    ("device", "implementation", "changes", "named"),
    [
        (("gpu", H100), "pallas_tpu", {}, ["TPU", "GPU"]),
        (("gpu", H100), "mosaic_gpu", {"head_dim": 80}, ["64 and 128", "80"]),
        (("gpu", H100), "mosaic_gpu", {"dtype": jnp.float32}, ["bfloat16", "float32"]),
        (("gpu", H100), "mosaic_gpu", {"cache_dtype": jnp.float16}, ["fp8", "float16"]),
        (("gpu", H100), "mosaic_gpu", {"capacity": 100}, ["64", "100"]),
        (("gpu", H100), "mosaic_gpu", {"page_size": 32}, ["page size", "64", "32"]),
        (("gpu", H100), "mosaic_gpu", {"xla_only_because": "reads a part"}, ["reads a part"]),
        (("gpu", H100), "palas_tpu", {}, ["palas_tpu", "pallas_tpu"]),
        (("gpu", "NVIDIA A100"), "mosaic_gpu", {}, ["Hopper", "A100"]),
        (("tpu", "TPU v5 lite"), "pallas_tpu", {"capacity": 192}, ["128", "192"]),
    ],
)
def test_named_implementation_that_cannot_run_is_refused(on, device, implementation, changes, named):
    on(*device)
    message = refusal(implementation, QUERY._replace(**changes))
    assert all(part in message for part in named), message


def test_cuda_version_that_miscompiles_masks_is_refused(on, monkeypatch):
    on("gpu", H100)
    monkeypatch.setattr(dispatch, "_cuda_version", lambda: 12090)
    assert "12.9.0" in refusal("mosaic_gpu", QUERY)
    monkeypatch.setattr(dispatch, "_cuda_version", lambda: 13000)
    assert select_implementation("decode_attention", QUERY, "mosaic_gpu").name == "mosaic_gpu"


def test_kernels_run_on_a_cpu_in_interpret_mode_only(on):
    on("cpu", "cpu")
    assert unavailable_because("decode_attention", "mosaic_gpu", QUERY) is not None
    assert unavailable_because("decode_attention", "mosaic_gpu", QUERY, interpret=True) is None


def test_optional_kernel_is_unavailable_where_it_cannot_run(on):
    on("tpu", "TPU v5 lite")
    assert is_available("decode_update", QUERY, "pallas_tpu")
    assert not is_available("decode_update", QUERY, "xla")
    assert not is_available("decode_update", QUERY)
    large = QUERY._replace(capacity=1 << 17)
    assert not is_available("decode_update", large, "pallas_tpu")
    assert select_implementation("decode_attention", large, "pallas_tpu").name == "pallas_tpu"
    message = refusal("pallas_tpu", large, "decode_update")
    assert "65536" in message and str(1 << 17) in message


@pytest.mark.parametrize("kernel", KERNELS)
def test_record_names_functions_that_exist_and_candidates_of_its_block_type(kernel):
    record = KERNELS[kernel]
    versions = [record.written_for(implementation) for implementation in record.implementations[:-1]]
    for function in (record.xla, *(version.function for version in versions)):
        assert callable(load(function)), function
    for version in versions:
        for head_dim in (64, 128):
            for dtype in ("bfloat16", "float8_e4m3fn", "float32"):
                default, *others = version.candidates(head_dim, dtype)
                assert default == version.default_blocks(head_dim, dtype)
                if record.blocks is None:
                    assert default is None and not others
                else:
                    assert {type(blocks) for blocks in (default, *others)} == {record.blocks}
                    assert len({default, *others}) == 1 + len(others) > 1


def test_kernel_without_a_gpu_version_runs_on_xla_there(on, monkeypatch):
    on("gpu", H100)
    record = KERNELS["decode_attention"]
    monkeypatch.setitem(KERNELS, "decode_attention", record._replace(gpu=None))
    assert KERNELS["decode_attention"].implementations == (TPU, "xla")
    assert select_implementation("decode_attention", QUERY).name == "xla"
    message = refusal(GPU, QUERY)
    assert GPU in message and f"{TPU}, xla" in message
    assert unavailable_because("decode_attention", GPU, QUERY, interpret=True) is not None


def test_documented_kernels_are_those_of_the_table():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert list(rows) == list(KERNELS)
    for kernel, record in KERNELS.items():
        versions = [record.written_for(implementation) for implementation in record.implementations[:-1]]
        for function in (record.xla, *(version.function for version in versions)):
            path = function.partition(":")[0].replace(".", "/") + ".py"
            assert f"`{path}`" in rows[kernel], (kernel, path)


def test_measurements_survive_a_round_trip_through_a_file(tmp_path):
    path = tmp_path / "tuned.json"
    entries = entry(), entry(kernel="decode_update", blocks=None)
    write_tuned(path, entries)
    assert read_tuned(path) == entries


@pytest.mark.parametrize(
    "damaged",
    [
        "[{]",
        '[{"kernel": "decode_attention"}]',
        "{}x",
        '[{"blocks": {"keys": 3}, "kernel": "decode_attention"}]',
        '[{"blocks": {"keys": 3}, "kernel": "decode_update"}]',
    ],
)
def test_damaged_measurements_are_refused_with_the_file_name(tmp_path, damaged):
    path = tmp_path / "tuned.json"
    path.write_text(damaged)
    with pytest.raises(ConfigError, match="tuned.json"):
        read_tuned(path)


def test_shipped_measurements_name_existing_kernels_and_implementations():
    for line in json.loads(tuned.TUNED.read_text(encoding="utf-8")):
        assert line["kernel"] in KERNELS and line["implementation"] in dispatch.IMPLEMENTATIONS
    assert read_tuned(tuned.TUNED)


def test_target_device_is_that_of_the_process_without_a_mesh():
    assert dispatch.target_device() == ("cpu", jax.devices()[0].device_kind)

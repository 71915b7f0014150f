"""Tests of planning.hardware: names, refusals, and data sheets by the device kind that JAX reports."""

import jax
import pytest

from dms_jax.errors import ConfigError
from dms_jax.planning.hardware import CHIPS, chip_of, missing_compiler, parse_hardware, target_mesh
from dms_jax.sharding import target_device


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("h100x8", ("h100", 8, None)),
        ("H200x1", ("h200", 1, None)),
        ("v5e-8", ("v5e", 8, "2x4")),
        ("v6e-16", ("v6e", 16, "4x4")),
        ("v5p-2x2x2", ("v5p", 8, "2x2x2")),
        ("v5p-8", ("v5p", 8, "2x2x2")),
        ("v5e-1", ("v5e", 1, "2x2")),
    ],
)
def test_hardware_names_are_parsed(name, wanted):
    assert parse_hardware(name) == wanted


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100x9", "1 to 8 GPUs, got 9"),
        ("h300x8", "'h300x8'.* h100x8"),
        ("v5e-7", "v5e-7.* 1, 4, 8"),
        ("", "unknown hardware ''"),
    ],
)
def test_unknown_hardware_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        parse_hardware(name)


def test_target_mesh_needs_the_size_of_the_hardware_and_its_compiler(monkeypatch):
    with pytest.raises(ConfigError, match="mesh 4x1 .*4 devices.* h100x8 has 8"):
        target_mesh("h100x8", (4, 1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "libtpu" in missing_compiler("v5e-8") and "CUDA plugin" in missing_compiler("h100x8")
    with pytest.raises(ConfigError, match="v5e-8: needs libtpu"):
        target_mesh("v5e-8", (8, 1))


@pytest.mark.parametrize(
    ("name", "kind"), [("h100x1", "NVIDIA H100 80GB HBM3"), ("h200x1", "NVIDIA H200"), ("v5e-1", "TPU v5 lite")]
)
def test_target_devices_have_the_name_of_the_real_device(name, kind):
    """The name selects the block sizes that were measured on the device."""
    if (why := missing_compiler(name)) is not None:
        pytest.skip(why)
    with jax.set_mesh(target_mesh(name, (1, 1))):
        assert target_device()[1] == kind


def test_data_sheets_are_found_by_jax_device_kinds():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
    }
    for kind, chip in names.items():
        assert chip_of(kind) == CHIPS[chip]
    assert chip_of("cpu") is None

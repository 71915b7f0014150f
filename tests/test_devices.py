"""What is chosen for a device, and what is said about one that is not used, without the hardware."""

import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

import dms_jax
from dms_jax import device_guard
from dms_jax.device_guard import device_problem
from dms_jax.engine.machine import Environment
from dms_jax.kernels.kernel_table import KERNELS
from dms_jax.platform_defaults import default_dtype
from dms_jax.sharding import target_device

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "platform, capability, dtype",
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "7.5", "float32"),  # a T4, whose bf16 is emulated
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "10.0", "bfloat16"),
        ("gpu", "gfx942", "bfloat16"),  # as ROCm names one
    ],
)
def test_default_dtype_is_fp32_where_there_is_no_bf16(platform, capability, dtype):
    device = SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    assert default_dtype(device) == dtype


@pytest.mark.parametrize(
    "installed, platform, has_nvidia, words",
    [
        ({"jaxlib": "0.11.2"}, "cpu", False, None),
        ({"jaxlib": "0.11.2", "jax-cuda12-plugin": "0.11.2", "jax-cuda12-pjrt": "0.11.2.post1"}, "gpu", True, None),
        ({"jaxlib": "0.12.0", "jax-cuda12-plugin": "0.7.2"}, "cpu", True, '"jax[cuda12]==0.12.0"'),
        ({"jaxlib": "0.12.0", "jax-cuda13-pjrt": "0.12.1"}, "cpu", False, '"jax[cuda13]==0.12.0"'),
        ({"jaxlib": "0.12.0"}, "cpu", True, '"dms-jax[cuda12]"'),
        ({"jaxlib": "0.12.0"}, "tpu", True, None),
    ],
)
def test_gpu_that_is_not_used_is_named_with_the_line_to_type(installed, platform, has_nvidia, words):
    problem = device_problem(installed, platform, has_nvidia)
    assert problem is None if words is None else (words in problem and "pip install" in problem and "\n" not in problem)


def test_warning_comes_once_and_not_to_those_who_chose_their_platform(monkeypatch):
    monkeypatch.setattr(device_guard, "installed_versions", lambda: {"jaxlib": "0.12.0", "jax-cuda12-plugin": "0.7.2"})
    for chosen, number in (("cpu", 0), ("", 1)):
        monkeypatch.setenv("JAX_PLATFORMS", chosen)
        device_guard.warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [target_device()[0] for _ in range(2)] == ["cpu"] * 2
        assert len(caught) == number
    device_guard.warn_once.cache_clear()


def test_environment_fits_on_one_screen(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = dms_jax.environment()
    assert isinstance(found, Environment) and found.versions["jax"] == jax.__version__ and found.dtype == "float32"
    assert set(found.kernels) == set(KERNELS) and None not in found.kernels.values()
    text = repr(found)
    assert len(text.splitlines()) <= 25 and len(text) < 2000 and dms_jax.__version__ in text and str(tmp_path) in text
    assert not list(tmp_path.iterdir())  # looking makes no folder


def test_extras_name_both_versions_of_cuda():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["cuda12"] == ["jax[cuda12]"] and extras["cuda"] == extras["cuda13"] == ["jax[cuda13]"]


def test_pins_of_colab_admit_this_project():
    """JAX of the image is older than our floor and must rise; numpy is loaded before the first cell and must stay."""
    pins = dict(line.split("==") for line in (ROOT / ".ci" / "colab.txt").read_text().split() if "==" in line)
    assert pins["numpy"] == "2.1.3" and "jax" not in pins and "flax" not in pins
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert '"3.13"' in workflow and ".ci/colab.txt" in workflow

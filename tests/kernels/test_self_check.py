"""The check of a kernel at first use, with a stubbed device and stubbed times, because there is no accelerator here."""

import json

import jax
import jax.numpy as jnp
import pytest

from dms_jax.kernels import dispatch, kernel_cases, self_check, tuned
from dms_jax.kernels.dispatch import KernelQuery, is_available, reasons, select_implementation
from dms_jax.kernels.kernel_cases import Suite

QUERY = KernelQuery(128, jnp.bfloat16)
KIND = "TPU v7"


class StubDevice:
    platform, device_kind = "tpu", KIND

    class client:
        platform_version = "driver 1"


class Stub:
    """A device of a kind that nobody has measured, and a kernel that adds `off` to the result and takes `seconds`."""

    def __init__(self):
        self.off, self.seconds, self.measured, self.fails = 0.0, 1.0, 0, None

    def case(self, dtype):
        def run(implementation):
            def call(x):
                if implementation != "xla" and self.fails:
                    raise RuntimeError(self.fails)
                return (2 * x + (self.off if implementation != "xla" else 0.0),)

            return call

        inputs = (jnp.ones((4, 4)),)
        reference = lambda x: (2 * x,)
        return kernel_cases.Case("decode_attention", {}, dtype, dtype, inputs, run, reference, lambda *_: {}, 1.0, 1.0)

    def time_calls(self, calls, inputs):
        self.measured += 1
        return {name: 1.0 if name == "xla" else self.seconds for name in calls}


@pytest.fixture
def stub(monkeypatch, tmp_path):
    found = Stub()
    suite = Suite([], [], [], lambda head_dim, cached: found.case)
    monkeypatch.setitem(kernel_cases.SUITES, "decode_attention", suite)
    monkeypatch.setattr(tuned, "TUNED", tmp_path / "tuned.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(self_check, "time_calls", found.time_calls)
    monkeypatch.setattr(self_check, "_findings", {})
    monkeypatch.setattr(self_check.jax, "devices", lambda *_: [StubDevice])
    monkeypatch.setattr(dispatch, "target_device", lambda: ("tpu", KIND))
    return found


def forget(monkeypatch):
    """Do as a new process does."""
    monkeypatch.setattr(self_check, "_findings", {})


def test_right_and_faster_kernel_becomes_the_default_and_is_checked_once(stub, monkeypatch, tmp_path, capsys):
    stub.seconds = 0.5
    assert select_implementation("decode_attention", QUERY).name == "pallas_tpu"
    assert select_implementation("decode_attention", QUERY).name == "pallas_tpu"
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "2.00x" in line and "DMS_JAX_KERNEL_CHECK" in line
    (path,) = (tmp_path / "user" / "dms_jax" / "kernels").iterdir()
    kept = json.loads(path.read_text())
    assert kept["device"] == KIND and kept["platform"] == "driver 1" and kept["jax"] == jax.__version__
    forget(monkeypatch)
    assert select_implementation("decode_attention", QUERY).name == "pallas_tpu"
    assert stub.measured == 1 and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seconds": 2.0}, "0.50x"),
        ({"off": 1.0}, "wrong"),
        ({"off": jnp.nan}, "wrong"),
        ({"fails": "no wgmma"}, "wgmma"),
    ],
)
def test_slow_wrong_or_failing_kernel_is_not_the_default_but_runs_by_name(stub, change, named):
    vars(stub).update(change)
    assert select_implementation("decode_attention", QUERY).name == "xla"
    assert named in str(reasons("decode_attention", QUERY)["pallas_tpu"])
    assert select_implementation("decode_attention", QUERY, "pallas_tpu").name == "pallas_tpu"


def test_another_driver_checks_again_and_a_damaged_file_is_replaced(stub, monkeypatch, tmp_path):
    select_implementation("decode_attention", QUERY)
    monkeypatch.setattr(StubDevice.client, "platform_version", "driver 2")
    select_implementation("decode_attention", QUERY)
    assert stub.measured == 2
    for path in (tmp_path / "user" / "dms_jax" / "kernels").iterdir():
        path.write_text("{damaged")
    forget(monkeypatch)
    select_implementation("decode_attention", QUERY)
    select_implementation("decode_attention", QUERY)
    assert stub.measured == 3


def test_lack_of_memory_is_not_kept(stub, monkeypatch):
    stub.fails = "RESOURCE_EXHAUSTED: out of memory"
    assert select_implementation("decode_attention", QUERY).name == "xla"
    forget(monkeypatch)
    stub.fails, stub.seconds = None, 0.5
    assert select_implementation("decode_attention", QUERY).name == "pallas_tpu"


def test_named_implementations_and_hardware_that_is_not_here_are_not_checked(stub, monkeypatch):
    (
        select_implementation("decode_attention", QUERY, "pallas_tpu"),
        select_implementation("decode_attention", QUERY, "xla"),
    )
    assert is_available("decode_attention", QUERY, "pallas_tpu")
    monkeypatch.setattr(dispatch, "target_device", lambda: ("tpu", "TPU v6 lite"))  # compiled for, but not at hand
    assert select_implementation("decode_attention", QUERY).name == "xla"
    monkeypatch.setattr(dispatch, "target_device", lambda: ("tpu", KIND))
    monkeypatch.setenv("DMS_JAX_KERNEL_CHECK", "0")
    assert select_implementation("decode_attention", QUERY).name == "xla"
    monkeypatch.delenv("DMS_JAX_KERNEL_CHECK")
    monkeypatch.setattr(self_check.jax, "process_count", lambda: 2)
    assert select_implementation("decode_attention", QUERY).name == "xla"
    assert stub.measured == 0


def test_check_while_a_program_is_traced_leaves_nothing_in_it(stub):
    stub.seconds, names = 0.5, []

    def program(x):
        names.append(select_implementation("decode_attention", QUERY).name)
        return x + 1

    text = jax.jit(program).lower(1.0).as_text()
    assert names == ["pallas_tpu"] and text.count("stablehlo.") == 2  # a constant and the addition


@pytest.mark.parametrize("other", ["NVIDIA H100 80GB HBM3", "NVIDIA H20", "NVIDIA GH200 480GB"])
def test_measurement_on_one_hopper_gpu_counts_for_all(monkeypatch, other):
    monkeypatch.setattr(dispatch, "target_device", lambda: ("gpu", other))
    assert select_implementation("decode_attention", QUERY).name == "mosaic_gpu"  # measured on an H200
    monkeypatch.setattr(dispatch, "target_device", lambda: ("gpu", "NVIDIA B200"))
    assert select_implementation("decode_attention", QUERY).name == "xla"

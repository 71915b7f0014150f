"""Benchmarks: their arithmetic, the records that they print, and the options that they refuse."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TINY

from benchmarks import autotune, everything, kernels, models, prefill
from benchmarks import decode as decode_benchmark
from benchmarks.timing import Ceilings, Chain, time_all
from dms_jax.config import DMSConfig
from dms_jax.errors import ConfigError
from dms_jax.kernels.dispatch import IMPLEMENTATIONS
from dms_jax.kernels.filled_layer import filled_layer, held_pairs
from dms_jax.kernels.kernel_cases import SUITES, compaction_case, error, page_case, slot_case, train_case, update_case
from dms_jax.kernels.kernel_table import KERNELS
from dms_jax.planning.flops import attention_flops, matmul_parameters, step_flops

FP32 = jnp.dtype(jnp.float32)


@pytest.fixture
def tiny_shape(monkeypatch, tmp_path):
    shape = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (tmp_path / "tiny.json").write_text(json.dumps(shape))
    monkeypatch.setattr(models, "CONFIGS", tmp_path)


def cases():
    return [
        train_case(1, 24, 4, 2, 8, 5, FP32),
        slot_case(2, 1, 32, 20, 4, 2, 8, FP32, FP32),
        slot_case(1, 8, 32, 20, 4, 2, 8, FP32, FP32),
        page_case(2, 1, 700, 300, 4, 2, 8, FP32, FP32),
        page_case(1, 32, 700, 300, 4, 2, 8, FP32, FP32),
        compaction_case(2, 16, 32, 2, 8, FP32, FP32),
        update_case(2, 32, 20, 4, 2, 8, FP32, FP32),
    ]


def test_cases_run_on_xla_equal_their_references_and_can_be_chained():
    for case in cases():
        f = case.run("xla")
        out, wanted = jax.jit(f)(*case.inputs), jax.jit(case.reference)(*case.inputs)
        assert error(case, out, wanted) < 1e-5, case.kernel
        spoiled = jax.tree.map(lambda x: x + 1, wanted)
        assert error(case, out, spoiled) > 0.1, case.kernel
        chain = Chain(f, case.feed, case.inputs, 2)
        first = jax.tree.map(np.asarray, chain())
        inputs = list(case.inputs)
        for _ in range(2):  # repeat what the chain did, step by step
            for index, value in case.feed(tuple(inputs), f(*inputs)).items():
                inputs[index] = value
        for index, value in first.items():
            for ours, theirs in zip(jax.tree.leaves(value), jax.tree.leaves(inputs[index]), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_every_kernel_has_a_suite_of_its_own_cases():
    assert list(SUITES) == list(KERNELS)
    for kernel, suite in SUITES.items():
        assert suite.cpu[0](dtype=FP32).kernel == kernel
        assert suite.cpu and suite.quick and suite.full
    by_benchmark = [make().kernel for _, make in kernels.cases(True, ("compaction", "decode_attention"), FP32)]
    assert by_benchmark == ["decode_attention", "compaction"]
    makers = list(autotune.cases(["train_attention", "compaction"], [64, 128]))
    assert len(makers) == 6 and all(callable(make) for make in makers)


def test_output_to_a_closed_pipe_ends_quietly():
    code = "from dms_jax.command import run_command; run_command('a command', lambda: print('x' * 10**6))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_cases_count_their_bytes_and_flops():
    case = train_case(1, 16, 2, 1, 8, 4, FP32)
    q, k = case.inputs[:2]
    assert case.min_bytes == 4 * (5 * q.size + 6 * k.size)
    numbers = np.random.default_rng(0)
    counts, capacity = held_pairs(numbers, 2, 2, 64, 40)
    layer, seen = filled_layer(numbers, counts, capacity, 8, FP32)
    assert capacity == 64 and counts.min() >= 30 and counts.max() <= 50
    np.testing.assert_array_equal(jnp.sum(layer.expiry >= seen[:, None, None], axis=-1), counts)
    case = slot_case(2, 1, 64, 40, 4, 2, 8, FP32, FP32)
    counts = int(jnp.sum(case.inputs[1].expiry >= 64))
    assert case.flops == 4 * 8 * 2 * counts and case.min_bytes == counts * (2 * 8 * 4 + 8) + 2 * 4 * case.inputs[0].size


def test_flops_of_a_step_equal_those_of_its_products():
    config = TINY
    d, h, f = config.hidden_size, config.head_dim, config.intermediate_size
    layer = d * h * (2 * config.num_q_heads + 2 * config.num_kv_heads) + 3 * d * f
    assert matmul_parameters(config) == config.num_layers * layer + config.vocab_size * d
    length = 64  # causal: half of the T x T scores, two products of 2 H flops each
    assert (
        attention_flops(config, length) * length == config.num_layers * config.num_q_heads * length**2 / 2 * 2 * 2 * h
    )
    forward = 2 * matmul_parameters(config) + attention_flops(config, length)
    full, adapter = step_flops(config, length, "full"), step_flops(config, length, "adapter")
    assert full - adapter == 2 * matmul_parameters(config) and adapter == pytest.approx(
        2 * forward + forward + 1.5 * attention_flops(config, length)
    )


def test_timing_takes_medians_and_leaves_the_first_call_out():
    calls = []
    timing = time_all({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4 and len(timing["a"].all) == 3 and timing["a"].median == sorted(timing["a"].all)[1]


def test_kernel_lines_name_kernel_implementation_error_and_ratio(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "cases", lambda *_: ((case.kernel, lambda case=case: case) for case in cases()))
    monkeypatch.setattr(
        "dms_jax.kernels.dispatch.IMPLEMENTATIONS", {name: IMPLEMENTATIONS[name] for name in ("pallas_tpu", "xla")}
    )
    with pytest.raises(SystemExit) as stop:
        kernels.run_command(kernels.NAME, lambda: kernels.main(["--quick", "--json", "--repeats", "1"]))
    assert stop.value.code == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kernel"] for line in lines[:2]] == ["copy", "matmul"] and all(
        line["provenance"]["device"] for line in lines
    )
    xla = [line for line in lines[2:] if line["implementation"] == "xla"]
    assert [*dict.fromkeys(line["kernel"] for line in xla)] == list(KERNELS) and len(xla) == len(cases())
    assert all(line["max_error"] < 1e-5 and line["ratio_to_xla"] == 1 for line in xla)
    pallas = [line for line in lines[2:] if line["implementation"] == "pallas_tpu"]
    assert [line["kernel"] for line in pallas] == [line["kernel"] for line in xla]
    assert all(line["max_error"] < 1e-5 and line["interpreted"] and line["ratio_to_xla"] > 0 for line in pallas)
    dense = [line for line in lines if line["implementation"] == "dense_xla"]
    assert len(dense) == 2 and all(line["max_error"] < 1e-5 and line["dense"] for line in dense)
    assert "fraction_of_copy_bandwidth" not in lines[2]
    assert "no time left" in json.dumps(list(kernels.run(kernels.parse(["--quick", "--repeats", "1"]), 0.0)))


def test_failing_or_wrong_implementation_is_reported_and_the_others_are_measured(monkeypatch):
    case = update_case(2, 32, 20, 4, 2, 8, FP32, FP32)

    def run(name, interpret=False, blocks=None):
        f = case.run("xla")
        if name == "mosaic_gpu":
            raise_it = lambda *x: (_ for _ in ()).throw(RuntimeError("no such\n instruction"))
            return raise_it
        if name == "pallas_tpu":  # a slot off by one
            return lambda *x: (f(*x)[0], dataclasses.replace(f(*x)[1], position=f(*x)[1].position + 1))
        return f

    records = {
        record["implementation"]: record for record in kernels.measured(case._replace(run=run), Ceilings(1.0, 1.0), 1)
    }
    assert records["mosaic_gpu"]["failed"] == "no such instruction" and records["mosaic_gpu"]["max_error"] is None
    assert (
        records["pallas_tpu"]["wrong"]
        and records["pallas_tpu"]["max_error"] is None
        and records["xla"]["max_error"] < 1e-5
    )
    assert "WRONG" in kernels.described(records["pallas_tpu"]) and "FAILED" in kernels.described(records["mosaic_gpu"])


def test_decode_counts_bytes_and_rows_at_equal_memory(tiny_shape, capsys):
    options = "--model tiny --batch 2 --context 640 --cr 1,4 --steps 1 --repeats 1 --equal-memory --cache slots"
    decode_benchmark.main(options.split())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    arms = {row["arm"]: row for row in result["decode"]}
    assert list(arms) == ["dense", "cr 1", "cr 4", "cr 4, equal memory"]
    # Two more pairs need the next multiple of 64 slots. Each has a key, a value, position, expiry and score; each head
    # counts its forced evictions, and each row its tokens.
    heads = 2 * 2
    row_bytes = lambda slots: heads * (slots * (2 * 8 * 4 + 12) + 4) + 4
    assert arms["dense"]["allocated_bytes"] == 2 * row_bytes(704) and arms["cr 4"]["allocated_bytes"] == 2 * row_bytes(
        192
    )
    more = arms["cr 4, equal memory"]
    assert more["batch"] == 2 * row_bytes(704) // row_bytes(192) == 7 and more["rows_to_dense"] == 3.5
    assert more["allocated_bytes"] == 7 * row_bytes(192)
    for row in arms.values():
        assert row["live_bytes"] == row["batch"] * heads * row["live_at_end"] * 2 * 8 * 4
        assert row["allocated_to_live"] == row["allocated_bytes"] / row["live_bytes"] > 1
    pair = 2 * 8 * 4 + 8
    assert arms["dense"]["step_bytes"] - arms["cr 4"]["step_bytes"] == 2 * heads * (640 - 160) * pair
    assert arms["cr 4"]["fraction_of_roofline"] == pytest.approx(
        arms["cr 4"]["speed_to_dense"] / arms["cr 4"]["roofline_speed_to_dense"]
    )


def test_arm_that_does_not_fit_is_skipped_with_a_reason(tiny_shape, monkeypatch, capsys):
    monkeypatch.setattr(decode_benchmark, "free_bytes", lambda: 2**15)
    options = "--model tiny --context 128 --cr 8 --steps 1 --repeats 1 --cache slots --json"
    decode_benchmark.main(options.split())
    rows = json.loads(capsys.readouterr().out)["decode"]
    assert (
        [row["arm"] for row in rows] == ["cr 8", "dense"]
        and "are free" in rows[1]["skipped"]
        and "speed_to_dense" not in rows[0]
    )
    assert (
        rows[0]["dense"] == "counted from bytes"
        and rows[0]["fraction_of_roofline"] == rows[0]["fraction_of_copy_bandwidth"] > 0
    )


def test_prefill_reports_the_realised_ratio(tiny_shape, capsys):
    prefill.main(["--model", "tiny", "--context", "128", "--cr", "2", "--repeats", "1", "--json"])
    dense, half = json.loads(capsys.readouterr().out)["prefill"]
    assert dense["realised_cr"] == 1 and 1.2 < half["realised_cr"] < 2.2


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: autotune.main([]), "got a CPU"),
        (lambda: autotune.main(["--repeats", "0"]), "at least 1"),
        (lambda: kernels.main(["--minutes", "0"]), "above 0"),
        (lambda: everything.main(["--output", "nowhere/at/all.jsonl"]), "--output .*nowhere/at/all.jsonl"),
        (lambda: everything.main(["--output", "."]), "--output must be a file"),
        (lambda: autotune.main(["--output", "nowhere/x.json"]), "--output .*nowhere/x.json"),
        (lambda: prefill.main(["--context", "1"]), "--context must be at least 16"),
        (lambda: models.load("smollm2-135m", 1, 64, "mosaic"), "mosaic"),
    ],
)
def test_wrong_options_are_refused(run, words):
    with pytest.raises(ConfigError, match=words):
        run()


def test_everything_appends_what_its_commands_print_and_reports_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(
        everything, "commands", lambda part, on_cpu, which: [["json.tool", "--help"], ["no_such_module"]]
    )
    output = tmp_path / "out.jsonl"
    output.write_text('{"kept": true}\n')
    assert everything.main(["--part", "decode", "--output", str(output)]) == 1
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert (
        lines[0] == {"kept": True} and lines[1]["command"] == "python -m json.tool --help" and "problem" not in lines[1]
    )
    assert lines[2]["problem"] == "exit code 1"
    assert everything.main(["--part", "decode", "--output", str(output), "--minutes", "0"]) == 1
    assert "no time left" in json.loads(output.read_text().splitlines()[-1])["problem"]


def test_commands_of_everything_parse():
    from benchmarks import retrofit_step

    parsers = {module.NAME: module.parse for module in (kernels, decode_benchmark, prefill, retrofit_step)}
    for on_cpu in (True, False):
        for part in everything.PARTS:
            for name, *arguments in everything.commands(part, on_cpu, "auto"):
                assert parsers[name](arguments)


def test_benchmarks_import_without_the_shape_checkers():
    program = (
        "import sys; sys.modules['jaxtyping'] = sys.modules['beartype'] = None\n"
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('jaxtyping', 'beartype') else found(name, *a)\n"
        "import benchmarks.models, benchmarks.decode, benchmarks.prefill, dms_jax.kernels.kernel_cases, "
        "benchmarks.retrofit_step, dms_jax.training.step\n"
        "import benchmarks.autotune, benchmarks.everything, benchmarks.kernels\n"
        "print(dms_jax.kernels.kernel_cases.Case)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Case" in done.stdout, done.stderr


def test_random_model_has_a_policy_whose_window_fits_the_context():
    model, weights = models.load("smollm2-135m", 1, 64)
    assert weights == "random" and model.config.dms == DMSConfig(window_size=8) and model.config.num_layers == 1

"""`--mesh` of `infer.generate` and `infer.evaluate`: the results of one device, from a cache that is split."""

import json

import jax
import numpy as np
import pytest
from cases import tiny_model
from generate_cases import learned_model, run

import dms_jax
from dms_jax.command import explained
from dms_jax.commands import evaluate, generate
from dms_jax.config import DMSConfig
from dms_jax.engine import decoding, session
from dms_jax.errors import ConfigError
from dms_jax.models.parameters import ModelStructure, flatten
from dms_jax.sharding import INFERENCE_AXES, make_mesh

PROMPTS = "\n".join(f"the {word} of" for word in ("capital", "end", "first day", "name", "owner", "color")) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    assert jax.device_count() == 8  # before a command without --mesh asks for one
    return learned_model(tmp_path_factory)


@pytest.mark.parametrize("mesh", ["8x1", "4x2"])
def test_generate_on_a_mesh_gives_the_answers_of_one_device(folder, tmp_path, monkeypatch, mesh):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    caches = []

    def keep(*arguments, **options):
        caches.append((found := generate_(*arguments, **options)).cache)
        return found

    generate_ = session.generate
    monkeypatch.setattr(session, "generate", keep)
    answers = []
    for options in ((), ("--mesh", mesh)):
        output = tmp_path / f"answers{len(answers)}.jsonl"
        assert run(folder, "--prompts", tmp_path / "prompts.txt", "--batch", 8, "--output", output, *options) == 0
        answers.append([json.loads(line) for line in output.read_text().splitlines()])
    assert answers[0] == answers[1] and len(answers[0]) == 6
    pages, table = caches[-1].arena.k, caches[-1].heads.table
    rows, heads = (int(side) for side in mesh.split("x"))
    assert len(pages.sharding.device_set) == pages.shape[0] == 8
    assert table.sharding.shard_shape(table.shape)[1:3] == (table.shape[1] // rows, table.shape[2] // heads)


def test_evaluate_on_a_mesh_gives_the_measurements_of_one_device(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c the end of the first day " * 200)
    measured = []
    for options in ([], ["--mesh", "4x2"]):
        output = tmp_path / f"results{len(measured)}.jsonl"
        size = ["--length", "64", "--rows", "4", "--batch", "4", "--tasks", "text,greedy", "--greedy-tokens", "8"]
        command = ["--model", str(folder), "--text", str(text), "--policies", "dense,dms", *size]
        evaluate.main([*command, "--calibration-rows", "0", "--output", str(output), *options])
        measured.append([line for line in map(json.loads, output.read_text().splitlines()) if "task" in line])
    assert len(measured[0]) == len(measured[1]) > 0
    for one, split in zip(*measured, strict=True):
        assert one.keys() == split.keys()
        for name, value in one.items():
            exact = not isinstance(value, float | list)
            assert split[name] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-5)), name


@pytest.mark.parametrize(
    ("mesh", "batch", "named"),
    [
        ("2", 8, ["DATAxMODEL"]),
        ("0x8", 8, ["at least 1"]),
        ("2x2x2", 8, ["AxB"]),
        ("4x2", 6, ["--batch 6", "4 devices"]),
        ("1x4", 8, ["4 devices"]),  # there are 8
        ("1x8", 8, ["KV heads", "8 devices"]),
    ],
)
def test_mesh_that_cannot_work_is_one_line(folder, tmp_path, mesh, batch, named):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    text = tmp_path / "text.txt"
    text.write_text("a b c " * 300)
    generating = ["--model", str(folder), "--prompts", str(tmp_path / "prompts.txt")]
    measuring = ["--model", str(folder), "--text", str(text), "--output", str(tmp_path / "results.jsonl")]
    for command, arguments in ((generate, generating), (evaluate, measuring)):
        with pytest.raises(ConfigError) as caught:
            command.main([*arguments, "--batch", str(batch), "--mesh", mesh])
        line = explained(caught.value)  # so that the exit code is 2
        assert line and "\n" not in line and all(part in line for part in named), line


def test_rows_cannot_be_split_where_there_is_one(folder):
    with pytest.raises(ConfigError, match="one prompt"):
        run(folder, "--prompt", "a", "--mesh", "8x1")


def test_new_caches_are_split_before_the_first_step_and_compile_nothing_later(rng):
    model = tiny_model(DMSConfig(window_size=4), 3, num_kv_heads=4, num_q_heads=8)
    mesh = make_mesh(2, 4, axes=INFERENCE_AXES)
    template, params = ModelStructure(model), flatten(model)
    placed = template.build(jax.device_put(params, template.shardings(list(params), mesh)))
    weight = placed.layers.attention.k[...]
    assert weight.sharding.shard_shape(weight.shape)[1] == weight.shape[1]  # parameters are whole but for the heads
    ids = rng.integers(0, model.config.vocab_size, (4, 40)).astype(np.int32)
    cache = dms_jax.init_cache(placed, 4, 64)
    for array in jax.tree.leaves(cache.layers):
        assert array.sharding.shard_shape(array.shape)[:2] == (2, 1)
    counts = []
    for start in (0, 16):
        _, cache = dms_jax.prefill(placed, cache, ids[:, start : start + 16], donate=True)
        for step in range(3):
            _, cache = dms_jax.decode_step(placed, cache, ids[:, 36 + step], donate=True)
        counts.append(decoding.num_compilations())
    assert counts[0] == counts[1]

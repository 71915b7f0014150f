"""The project's central test through pages: the mask path equals any interleaving of prefill, chunks and decoding."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GOLDEN_PROMPT, decode, golden_reference, tiny_model, tokens
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interleavings import LENGTH, OPERATIONS, ROWS, check_interleaving, check_pages_counted, heads, policy
from jax.sharding import AxisType, Mesh

import dms_jax
from dms_jax.config import DMSConfig
from dms_jax.core import page_counts
from dms_jax.core.paged_cache import select_rows
from dms_jax.engine import cache_capacity, decode_loop, decoding, page_memory
from dms_jax.engine.cache_capacity import uses_pages
from dms_jax.engine.decode_layout import stacked
from dms_jax.kernels import dispatch
from dms_jax.kernels.self_check import Finding
from dms_jax.models.parameters import ModelStructure, flatten
from dms_jax.platform_defaults import platform_defaults
from dms_jax.policies import policy_of
from dms_jax.sharding import mesh_of

SIZE = 4  # pairs of a page
KEEP = 1e9  # a threshold above any logit
MODELS = {  # evict head, shape of the model; the ring has window + 1 pairs
    "w0": (policy(0), heads(2, 2, 8)),
    "ring of a page, own decision": (policy(SIZE - 1, 0, "layer"), heads(2, 2, 8)),
    "ring of a page and a pair": (policy(SIZE), heads(2, 1, 8)),
    "ring longer than a row": (policy(1000, 0), heads(1, 2, 8)),
    "no policy": (None, heads(2, 2, 8)),
}


@functools.cache
def build(name):
    """Return a model and its mask path, jitted once: (rows [3, 40], threshold) -> (logits, decisions [L 3 K 40])."""
    dms, fields = MODELS[name]
    model = tiny_model(dms, 3, num_layers=2, **fields)
    if dms is None:
        none = jnp.zeros((2, ROWS, model.config.num_kv_heads, LENGTH), bool)
        return model, jax.jit(lambda ids, threshold: (model.dense(ids), none))
    return model, jax.jit(lambda ids, threshold: model.hard(ids, None, threshold))


@pytest.mark.parametrize("cases, any_width", [(10, False), pytest.param(100, True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_every_path_equals_the_mask_path(name, cases, any_width):
    @settings(max_examples=cases, deadline=None)
    @given(seed=st.integers(0, 2**31), operations=OPERATIONS)
    def run(seed, operations):
        rng = np.random.default_rng(seed)
        model, hard = build(name)
        # At -KEEP each head keeps nothing behind its ring, and at KEEP everything.
        ids, threshold = tokens(rng, ROWS, LENGTH), float(rng.choice([0.0, 0.0, -KEEP, KEEP]))
        (want, evict), (_, other) = hard(ids, threshold - 1e-3), hard(ids, threshold + 1e-3)
        assume(np.array_equal(evict, other))  # decisions within rounding errors of the threshold may differ
        dms = model.config.dms or DMSConfig()
        after = lambda decisions: decode(decisions.astype(int), dms.window_size, dms.decision_shift)[1]
        live = np.apply_along_axis(after, -1, np.asarray(evict))
        cache = dms_jax.init_pages(model, ROWS, LENGTH, num_pages=400, page_size=SIZE)
        check_interleaving(model, cache, rng, ids, np.asarray(want), live, operations, any_width, threshold)

    run()


def test_prefill_and_decode_match_the_golden_vectors():
    model, want = golden_reference("qwen3_dms_projection_per_head")
    ids, cache = np.asarray(want["input_ids"]), dms_jax.init_pages(model, 2, 64, page_size=16)
    logits, cache = dms_jax.prefill(model, cache, ids[:, :GOLDEN_PROMPT], chunk_size=13)
    np.testing.assert_allclose(logits, want["prefill_logits"], atol=1e-4)
    for step, lengths in enumerate(want["decode_cache_lengths"]):
        logits, cache = dms_jax.decode_step(model, cache, ids[:, GOLDEN_PROMPT + step])
        np.testing.assert_allclose(logits, want["decode_logits"][:, step], atol=1e-4)
        np.testing.assert_array_equal(np.asarray(cache.live_counts).reshape(lengths.shape), lengths)


def test_empty_arena_spoils_only_the_row_that_needed_a_page(rng):
    model, ids = build("w0")[0], tokens(rng, 2, 40)
    lengths, num_pages = np.array([20, 40]), 1 + 4 * (1 + 5) + 4 * (1 + 7)  # the second row needs 4 * (1 + 10) pages
    cache = dms_jax.init_pages(model, 2, LENGTH, num_pages=num_pages, page_size=SIZE)
    with pytest.raises(dms_jax.ConfigError, match=r"57 pages .* row 1, .* use num_pages >= 71, .*overflow='grow'"):
        dms_jax.prefill(model, cache, ids, lengths, chunk_size=5, threshold=KEEP)  # every pair stays
    runner, want = decoding.unrolled(model), model.dense(ids)
    for start in range(0, 40, 5):  # what the host does not do once a page is missing
        count = np.clip(lengths - start, 0, 5).astype(np.int32)
        part = runner, cache, ids[:, start : start + 5], count, jnp.float32(KEEP), None
        logits, cache = decoding.extend_rows(*part)
        if start < 20:
            np.testing.assert_allclose(logits[0], want[0, start : start + 5], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.starved, [False, True])
    count = np.array([1, 0], np.int32)
    logits, cache = decoding.extend_rows(runner, cache, ids[:, 20:25], count, jnp.float32(KEEP), None)
    np.testing.assert_allclose(logits[0, 0], want[0, 20], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.starved, [False, True])
    with pytest.raises(dms_jax.ConfigError, match="run out of pages"):
        dms_jax.save_cache(model, cache, "unused.safetensors")


def test_scanned_layers_give_what_layers_of_their_own_do(rng):
    model, ids = build("w0")[0], tokens(rng, ROWS, 17)
    empty = dms_jax.init_pages(model, ROWS, LENGTH, num_pages=400, page_size=SIZE)
    _, ours = dms_jax.prefill(model, empty, ids[:, :16])
    logits, ours = dms_jax.decode_step(model, ours, ids[:, 16])
    extend = lambda cache, part: decoding.extend_rows(
        stacked(model), cache, part, np.full(ROWS, part.shape[1], np.int32), jnp.float32(0.0), None
    )
    last, theirs = jax.jit(extend)(jax.jit(extend)(empty, ids[:, :16])[1], ids[:, 16:])
    np.testing.assert_allclose(last[:, 0], logits, rtol=1e-5, atol=1e-5)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_arena_and_tables_grow(rng):
    model, ids = build("ring of a page and a pair")[0], tokens(rng, 2, 64)
    cache = dms_jax.init_pages(model, 2, 8, page_size=SIZE)
    logits, cache = dms_jax.prefill(model, cache, ids[:, :60], chunk_size=30)
    assert cache.max_length >= 60 and cache.overflow == "grow"
    for step in range(60, 64):
        last, cache = dms_jax.decode_step(model, cache, ids[:, step], donate=True)
    want = model.hard(ids)[0]
    np.testing.assert_allclose(logits, want[:, :60], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last, want[:, -1], rtol=1e-5, atol=1e-5)
    check_pages_counted(cache)


def test_generate_grows_unless_it_is_told_to_raise(rng):
    model = tiny_model(policy(8, target_cr=8.0), 3, num_layers=1)
    prompt = tokens(rng, 1, 120)
    fields = {"max_new_tokens": 40, "stop_ids": (), "threshold": KEEP, "chunk_size": 64}  # every pair stays
    out = dms_jax.generate(model, prompt, dms_jax.GenerationConfig(**fields))
    whole = np.concatenate([prompt[0], out.tokens[0]])[None]
    np.testing.assert_array_equal(out.tokens[0], np.asarray(model.dense(whole))[0, 119:-1].argmax(-1))
    np.testing.assert_array_equal(out.cache.live_counts, 160)
    check_pages_counted(out.cache)
    with pytest.raises(dms_jax.ConfigError, match=r"found no free page; use num_pages >= \d+, .*overflow='grow'"):
        dms_jax.generate(model, prompt, dms_jax.GenerationConfig(**fields, overflow="raise"))


def test_allocated_memory_is_little_more_than_the_live_pairs(rng, monkeypatch):
    monkeypatch.setattr(page_counts, "SMALL_ARENA", 0)
    monkeypatch.setattr(page_memory, "SMALL_ARENA", 0)
    model = tiny_model(policy(30, target_cr=1.5), 3, num_layers=1, head_dim=64, max_position_embeddings=4000)
    # At this threshold, heads keep much less than the cache was made for.
    config = dms_jax.GenerationConfig(max_new_tokens=40, stop_ids=(), threshold=-3.0)
    out = dms_jax.generate(model, tokens(rng, 1, 3000), config)
    assert 2.2 * out.live_bytes < out.dense_bytes and out.allocated_bytes <= 1.15 * out.live_bytes
    assert out.allocated_bytes == sum(x.nbytes for x in jax.tree.leaves(out.cache))


def test_exact_budgets_take_a_table_and_pages_of_their_size(rng):
    model = build("ring of a page and a pair")[0]
    cache = dms_jax.init_pages(model, 1, 400, policy="dms_budget:9", page_size=SIZE)
    heads = model.config.num_layers * model.config.num_kv_heads
    # Two pages for the ring of five pairs, and one for four survivors, however long the row becomes.
    assert cache.heads.table.shape[-1] == 3 and cache.arena.num_pages == 1 + 3 * heads
    _, after = dms_jax.prefill(model, cache, tokens(rng, 1, 300), chunk_size=60)
    assert after.arena.num_pages == cache.arena.num_pages and int(after.arena.free_count[0]) == 0


def test_forks_share_full_pages_and_stay_independent(rng):
    model, ids = build("w0")[0], tokens(rng, 1, 37)
    _, prompt = dms_jax.prefill(
        model, dms_jax.init_pages(model, 1, 60, num_pages=80, page_size=SIZE), ids, threshold=KEEP
    )
    chains, tails = dms_jax.fork(prompt, ROWS), tokens(rng, ROWS, 5)
    assert int(chains.arena.references.max()) == ROWS
    # Each copy has a page of its own for the ring, and none for the 36 survivors, which fill 9 pages.
    used = lambda cache: int((cache.arena.references > 0).sum())
    assert used(chains) == used(prompt) + 4 * (ROWS - 1)
    logits, chains = dms_jax.prefill(model, chains, tails, threshold=KEEP)
    whole = np.concatenate([np.repeat(ids, ROWS, axis=0), tails], axis=1)
    np.testing.assert_allclose(logits, model.dense(whole)[:, 37:], rtol=1e-5, atol=1e-5)
    check_pages_counted(chains)
    left = select_rows(chains, jnp.array([2]))  # the pages of the other rows are free again
    check_pages_counted(left)
    assert used(left) == 4 * (1 + 11)
    with pytest.raises(
        dms_jax.ConfigError, match=r"20 chains needs \d+ more pages than the 80 .* use num_pages >= \d+"
    ):
        dms_jax.fork(prompt, 20)


def test_saved_forks_share_pages_in_the_file(rng, tmp_path):
    model, ids = build("w0")[0], tokens(rng, 1, 37)
    cache = dms_jax.init_pages(model, 1, 60, num_pages=80, page_size=SIZE)
    cache = dms_jax.fork(dms_jax.prefill(model, cache, ids, threshold=KEEP)[1], ROWS)
    dms_jax.save_cache(model, cache, tmp_path / "cache.safetensors")
    loaded = dms_jax.load_cache(model, tmp_path / "cache.safetensors")
    check_pages_counted(loaded)
    np.testing.assert_array_equal((loaded.arena.references > 0).sum(), (cache.arena.references > 0).sum())
    assert loaded.arena.num_pages == cache.arena.num_pages and loaded.overflow == cache.overflow == "raise"


def test_loaded_cache_has_as_much_room_for_forks_as_the_saved_one(rng, tmp_path):
    model = build("w0")[0]
    cache = dms_jax.init_pages(model, 1, 40, num_pages=300, page_size=SIZE, policy="dms_budget:9")
    _, cache = dms_jax.prefill(model, cache, tokens(rng, 1, 37))
    dms_jax.save_cache(model, cache, tmp_path / "cache.safetensors")
    loaded = dms_jax.load_cache(model, tmp_path / "cache.safetensors")
    assert loaded.arena.num_pages == 300  # more than the table of one row has entries
    check_pages_counted(dms_jax.fork(loaded, 10))


@pytest.mark.parametrize("kv_heads", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_mesh_does_not_change_results(rng, kv_heads, tmp_path):
    model = tiny_model(policy(3), 3, num_layers=1, num_kv_heads=kv_heads, num_q_heads=2 * kv_heads)
    grid = np.array(jax.devices()).reshape(2, 4)
    mesh = Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    template, params = ModelStructure(model), flatten(model)
    placed = template.build(jax.device_put(params, template.shardings(list(params), mesh)))
    ids, lengths = tokens(rng, 8, 34), np.array([30, 5, 20, 21, 13, 30, 1, 27])
    cache = dms_jax.init_pages(placed, 8, 40, page_size=SIZE, num_pages=100)
    assert cache.arena.k.shape[0] == 8 and len(cache.arena.k.sharding.device_set) == 8
    _, cache = dms_jax.prefill(placed, cache, ids[:, :1], np.ones(8, int), chunk_size=15)
    with mesh_of(cache.arena.k):
        cache = select_rows(dms_jax.fork(cache, 2), jnp.arange(1, 16, 2))  # the second copy of each row
    want, evict = model.hard(ids)
    logits, cache = dms_jax.prefill(placed, cache, ids[:, 1:30], lengths - 1, chunk_size=15)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, : length - 1], want[row, 1:length], rtol=1e-5, atol=1e-5)
    dms_jax.save_cache(placed, cache, tmp_path / "cache.safetensors")
    cache = dms_jax.load_cache(placed, tmp_path / "cache.safetensors")
    for step in range(3):
        logits, cache = dms_jax.decode_step(placed, cache, ids[np.arange(8), lengths + step])
        np.testing.assert_allclose(logits, want[np.arange(8), lengths + step], rtol=1e-5, atol=1e-5)
    live = np.apply_along_axis(lambda a: decode(a.astype(int), 3, 1)[1], -1, np.asarray(evict))
    np.testing.assert_array_equal(cache.live_counts, live[:, np.arange(8), :, lengths + 2].swapaxes(0, 1))
    assert len(cache.arena.k.sharding.device_set) == 8


@pytest.mark.parametrize("length, layout", [(1, decoding.unrolled), (16, decoding.unrolled), (16, stacked)])
def test_compiled_step_does_not_copy_the_arena(length, layout):
    """A step writes pages in place: its temporary memory is less than a tenth of the arena."""
    model = tiny_model(policy(2), 3, num_layers=2, head_dim=64)
    cache = dms_jax.init_pages(model, 1, 128, num_pages=2048, page_size=64)
    args = layout(model), cache, np.zeros((1, length), np.int32), np.full(1, length, np.int32), jnp.float32(0), None
    memory = jax.jit(decoding.extend_rows, donate_argnums=1).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * cache.arena.k.nbytes / 10


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"memory": 10}, "memory must be at least"),
        ({"memory": "1 GiB"}, "memory must be a whole number"),
        ({"num_pages": 1}, "num_pages must be at least 2"),
        ({"num_pages": 9, "memory": 10**6}, "memory and num_pages"),
        ({"policy": "tova:8"}, "tova:8 .* init_cache"),
        ({"overflow": "evict"}, "overflow .* init_cache"),
        ({"page_size": 0}, "page_size"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_arenas_that_cannot_work_are_refused(fields, message):
    with pytest.raises(dms_jax.ConfigError, match=message):
        dms_jax.init_pages(build("w0")[0], **({"batch_size": 1, "max_length": 10} | fields))


def test_generate_refuses_what_pages_cannot_do():
    for fields, message in (
        ({"cache": "pages", "policy": "tova:8"}, "tova:8 .* slots"),
        ({"cache": "pages", "capacity": 64}, "capacity .* slots"),
        ({"cache": "pages", "overflow": "evict"}, "'evict' .* slots"),
    ):
        with pytest.raises(dms_jax.ConfigError, match=message):
            dms_jax.generate(build("w0")[0], [[1, 2]], dms_jax.GenerationConfig(**fields))


def test_generate_uses_pages_where_they_are_read_well(monkeypatch):
    """That is on a CPU with XLA, and on an accelerator with the kernel, if it is the default there or was asked for."""

    def chosen(implementation="auto", head_dim=128, dtype=jnp.bfloat16, **fields):
        config = dataclasses.replace(build("w0")[0].config, implementation=implementation, head_dim=head_dim)
        return uses_pages(config, dtype, dms_jax.GenerationConfig(**fields), policy_of(config, "dense"))

    assert chosen() and chosen("xla") and not chosen("pallas_tpu")
    with pytest.raises(dms_jax.ConfigError, match="pallas_tpu of page_attention"):
        chosen("pallas_tpu", cache="pages")
    finding = Finding("slower", 0.5)
    monkeypatch.setattr(cache_capacity, "platform_defaults", lambda: platform_defaults("tpu"))
    monkeypatch.setattr(dispatch, "target_device", lambda: ("tpu", "TPU v5 lite"))
    monkeypatch.setattr(dispatch, "checked", lambda *_: finding)
    assert chosen("pallas_tpu") and not chosen("pallas_tpu", head_dim=80)
    assert not chosen() and not chosen("xla") and chosen("auto", cache="pages")
    finding = Finding(None, 2.0)
    assert chosen() and not chosen("xla") and not chosen("auto", dtype=jnp.float16)
    assert not chosen(capacity=64) and not chosen(overflow="evict") and not chosen(cache="slots")
    with pytest.raises(dms_jax.ConfigError, match="supports head sizes 64 and 128, got 80"):
        chosen("pallas_tpu", head_dim=80, cache="pages")


def test_memory_in_bytes_bounds_keys_and_values():
    cache = dms_jax.init_pages(build("w0")[0], 2, 100, memory=100_000, page_size=SIZE)
    page = 2 * SIZE * 8 * 4
    assert 100_000 - page < cache.arena.k.nbytes + cache.arena.v.nbytes <= 100_000 and cache.overflow == "raise"


def test_programs_and_memory_stay_constant(rng):
    """Generate with two prompts of other lengths; live arrays, their bytes and compiled programs must not increase."""
    model, sizes = tiny_model(policy(8), 3, num_layers=1, max_position_embeddings=4000), []
    config = dms_jax.GenerationConfig(max_new_tokens=100, stop_ids=(), temperature=1.0)
    cache = dms_jax.init_pages(model, 1, 500, num_pages=100)
    for length in (5, 7, 2, 16):
        out = dms_jax.generate(model, tokens(rng, 1, length), config, cache=cache)
        cache = out.cache
        del out
        gc.collect()
        arrays = [x.nbytes for x in jax.live_arrays()]
        sizes.append((len(arrays), sum(arrays), decode_loop.num_loop_compilations(), decoding.num_compilations()))
    assert int(cache.seen[0]) == 4 * 100 + 30 and sizes[1:] == sizes[1:2] * 3

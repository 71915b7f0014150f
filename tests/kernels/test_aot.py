"""The compile gate: compile every kernel and the retrofit, decode and prefill steps for hardware that is absent.

Tests are skipped without the compiler plugins: pip install "dms-jax[tpu]" for TPUs (about 1 GB), "dms-jax[cuda]" for
GPUs (about 5 GB).
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from lowering import abstract_cache, abstract_pages, lower_extend

from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.core.compact_cache import empty_layer
from dms_jax.kernels import attention_api
from dms_jax.kernels.block_sizes import SlotBlocks
from dms_jax.kernels.dispatch import GPU, TPU
from dms_jax.kernels.kernel_table import KERNELS
from dms_jax.kernels.page_attention_gpu import attend_pages
from dms_jax.models.parameters import abstract_model
from dms_jax.planning.hardware import missing_compiler, parse_hardware, target_mesh

pytestmark = pytest.mark.aot
TARGETS = ["v5e-1", "v6e-1", "v5p-1", "h100x1", "h200x1"]
SLICES = ["v5e-8", "v6e-8", "v5p-8", "h100x8", "h200x8"]
BF16, FP8 = jnp.bfloat16, jnp.float8_e4m3fn


def kernel_of(target: str) -> str:
    return GPU if parse_hardware(target)[2] is None else TPU


def mesh_of(target: str, data: int = 1, model: int = 1):
    if (why := missing_compiler(target)) is not None:
        pytest.skip(f"{target}: {why}")
    return target_mesh(target, (data, model))


def compiled(mesh, f, *shapes, donate=()):
    with jax.set_mesh(mesh):
        return jax.jit(f, donate_argnums=donate).lower(*on(mesh, shapes)).compile()


def on(mesh, tree):
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)


def shape(*dims, dtype=BF16):
    return jax.ShapeDtypeStruct(dims, dtype)


def bytes_of(tree) -> int:
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def collectives(program) -> dict[str, int]:
    text = program.as_text()
    kinds = "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all"
    return {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}


# --- kernels ---


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("head_dim", "group", "segments"), [(128, 4, False), (64, 4, True), (128, 1, True), (64, 8, False)]
)
def test_training_attention_compiles_and_its_memory_is_linear(target, head_dim, group, segments):
    mesh, kv_heads = mesh_of(target), 2

    def step(q, k, v, log_keep, ids):
        def loss(q, k, v, log_keep):
            out = attention_api.gated_attention(
                q, k, v, log_keep, window_size=256, segment_ids=ids, implementation=kernel_of(target)
            )
            return jnp.sum(out.astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, log_keep)

    temporary = {}
    for length in (8192, 32768):
        args = (
            shape(1, length, kv_heads * group, head_dim),
            shape(1, length, kv_heads, head_dim),
            shape(1, length, kv_heads, head_dim),
            shape(1, kv_heads, length, dtype=jnp.float32),
            shape(1, length, dtype=jnp.int32) if segments else None,
        )
        temporary[length] = compiled(mesh, step, *args).memory_analysis().temp_size_in_bytes / bytes_of(args)
    # Arguments are linear in T; a quadratic program would need hundreds of times as much. (0 means that everything is
    # in VMEM.)
    assert max(temporary.values()) < 8, temporary


def layer_shapes(batch, kv_heads, capacity, head_dim, dtype):
    return jax.eval_shape(functools.partial(empty_layer, batch, kv_heads, capacity, head_dim, dtype))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 4), (1, 8), (16, 4), (1024, 4)])
@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_attention_over_slots_compiles_and_copies_no_cache(target, head_dim, queries, group, dtype):
    mesh, batch, kv_heads, temporary = mesh_of(target), 2, 8, {}
    for capacity in (1024, 32768):
        layer = layer_shapes(batch, kv_heads, capacity, head_dim, dtype)
        pair = shape(batch, kv_heads, queries, head_dim)
        chunk = None if queries == 1 else (pair, pair, shape(batch, kv_heads, queries, dtype=jnp.int32))
        attend = functools.partial(attention_api.attend_to_slots, implementation=kernel_of(target))
        program = compiled(
            mesh,
            attend,
            shape(batch, queries, kv_heads * group, head_dim),
            layer,
            shape(batch, queries, dtype=jnp.int32),
            chunk,
        )
        temporary[capacity] = program.memory_analysis().temp_size_in_bytes
    # Temporary memory may grow with the capacity by rows of numbers, but never by a copy of keys or values.
    assert temporary[32768] - temporary[1024] < bytes_of(layer.k) // 4 + 2**20, (temporary, bytes_of(layer.k))
    assert temporary[1024] < 64 * bytes_of(pair) * group + 2**22, temporary  # partial results in fp32


@pytest.mark.parametrize("target", ["h100x1", "h200x1"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rows", [1, 4, 8, 2048])
@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_attention_over_pages_compiles_and_copies_no_arena(target, head_dim, rows, dtype):
    mesh, batch, kv_heads, keys = mesh_of(target), 8, 8, 64 * 128 // head_dim
    decode = rows < 64
    attend = functools.partial(
        attend_pages,
        ring_slots=320 if decode else 0,
        blocks=SlotBlocks(64, keys, 0, 4) if decode else SlotBlocks(128, keys, 1, 3),
    )
    arena, heads = shape(2**15, 64, head_dim, dtype=dtype), shape(batch, kv_heads, dtype=jnp.int32)
    table = shape(batch, kv_heads, 517, dtype=jnp.int32)
    program = compiled(mesh, attend, shape(batch, kv_heads, rows, head_dim), arena, arena, table, heads, heads)
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < bytes_of((arena, arena)) // 10, (temporary, bytes_of((arena, arena)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_compaction_and_decode_update_compile_and_work_in_place(target, head_dim, dtype):
    mesh, batch, kv_heads, group = mesh_of(target), 4, 8, 4
    for capacity, pairs in ((1024, 256), (32768, 1024)):
        layer = layer_shapes(batch, kv_heads, capacity, head_dim, dtype)
        pair, whole = shape(batch, kv_heads, pairs, head_dim), shape(batch, kv_heads, pairs, dtype=jnp.int32)
        flags = shape(batch, kv_heads, capacity, dtype=bool), shape(batch, kv_heads, pairs, dtype=bool)
        write_pairs = functools.partial(attention_api.write_pairs, implementation=kernel_of(target))
        program = compiled(
            mesh, write_pairs, layer, pair, pair, whole, whole, shape(*whole.shape, dtype=jnp.float32), *flags, donate=0
        )
        assert_in_place(program, layer)
        heads, row = shape(batch, kv_heads, head_dim), shape(batch, dtype=jnp.int32)
        angles = shape(batch, head_dim // 2, dtype=jnp.float32)
        update = functools.partial(
            attention_api.decode_update, window_size=256, decision_shift=1, implementation=kernel_of(target)
        )
        program = compiled(
            mesh,
            update,
            shape(batch, kv_heads * group, head_dim),
            heads,
            heads,
            angles,
            angles,
            shape(batch, kv_heads, dtype=jnp.float32),
            layer,
            row,
            row,
            shape(dtype=jnp.float32),
            donate=6,
        )
        assert_in_place(program, layer)


def assert_in_place(program, layer):
    """Assert that keys and values are updated in place: returned in their own memory, and not copied in between."""
    memory, large = program.memory_analysis(), bytes_of((layer.k, layer.v))
    assert memory.alias_size_in_bytes >= large, memory
    assert memory.temp_size_in_bytes < max(large // 4, 2**23), memory


# --- whole steps ---

SMALL = ModelConfig(
    "qwen3",
    32768,
    1024,
    2048,
    2,
    16,
    8,
    128,
    qk_norm=True,
    max_position_embeddings=1 << 20,
    dms=DMSConfig(window_size=256),
)


@pytest.mark.parametrize("target", SLICES)
@pytest.mark.parametrize("kernels", [False, True], ids=["xla", "kernels"])
def test_decode_step_gathers_nothing_and_holds_the_cache_once(target, kernels):
    mesh = mesh_of(target, 1, 8)
    config = with_kernels(SMALL, target, kernels)
    cache = abstract_cache(config, 8, 4096, mesh)
    config_bytes = config.num_layers * 8 * config.num_kv_heads * 4096 * (2 * 2 * config.head_dim + 12)
    assert abs(cache.bytes - config_bytes) < 2**16
    program = lower_extend(config, cache, mesh).compile()
    # One all-reduce each for the attention and the MLP of a layer, and one for the embedding, whose vocabulary is
    # split.
    assert collectives(program) == {
        "all-gather": 0,
        "all-reduce": 2 * config.num_layers + 1,
        "reduce-scatter": 0,
        "collective-permute": 0,
        "all-to-all": 0,
    }
    memory = program.memory_analysis()
    assert 0.99 * cache.bytes / 8 <= memory.alias_size_in_bytes <= 1.02 * cache.bytes / 8, memory
    assert memory.temp_size_in_bytes < cache.bytes / 8, memory


@pytest.mark.parametrize("target", SLICES)
@pytest.mark.parametrize("kernels", [False, True], ids=["xla", "kernels"])
def test_prefill_chunk_compiles_and_reuses_the_cache(target, kernels):
    mesh = mesh_of(target, 1, 8)
    config = with_kernels(SMALL, target, kernels)
    cache = abstract_cache(config, 8, 4096, mesh)
    program = lower_extend(config, cache, mesh, length=1024).compile()
    assert collectives(program)["all-gather"] == 0
    assert program.memory_analysis().alias_size_in_bytes >= 0.99 * cache.bytes / 8


@pytest.mark.parametrize(
    ("target", "head_dim", "length"),
    [(target, head_dim, length) for target in TARGETS for head_dim in (64, 128) for length in (1, 512)]
    + [(target, 128, 1) for target in SLICES],
)
def test_pages_are_updated_in_place_and_read_by_the_kernel(target, head_dim, length):
    if kernel_of(target) not in KERNELS["page_attention"].implementations:
        pytest.skip(f"page_attention has no {kernel_of(target)} version")
    mesh = mesh_of(target, 1, parse_hardware(target)[1])
    config = dataclasses.replace(with_kernels(SMALL, target, True), head_dim=head_dim)
    cache = abstract_pages(config, 4, 8192, 65536, mesh)
    arena = bytes_of((cache.arena.k, cache.arena.v)) // mesh.size
    program = lower_extend(config, cache, mesh, length).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= arena and memory.temp_size_in_bytes < arena // 10, memory
    assert "attend_pages" in program.as_text() and collectives(program)["all-gather"] == 0


@pytest.mark.parametrize("target", SLICES)
@pytest.mark.parametrize("kernels", [False, True], ids=["xla", "kernels"])
def test_retrofit_step_compiles_and_its_memory_is_linear(target, kernels):
    from dms_jax.training.retrofit_config import RetrofitConfig
    from dms_jax.training.step import take_apart
    from dms_jax.training.step_functions import step_functions

    mesh = mesh_of(target, 4, 2)
    config = with_kernels(SMALL, target, kernels)
    length = 16384
    run = RetrofitConfig(length=length, steps=100, cr_steps=80, remat="full", init="zero").resolved()
    math, trainable, frozen = take_apart(abstract_model(config, BF16), None, run, mesh, BF16)
    program = step_functions(math, trainable).lower(frozen, 4).compile()
    # With one row per device, a step needs about 40 KiB per token at any length. The scores of a single layer, [T, T]
    # in fp32 for each of 8 local heads, would need 512 KiB per token.
    assert program.memory_analysis().temp_size_in_bytes < length * 2**16, program.memory_analysis()


def with_kernels(config, target, kernels):
    return dataclasses.replace(config, implementation=kernel_of(target) if kernels else "xla")

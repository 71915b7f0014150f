"""Lower inference steps for hardware that need not be present, so that tests can compile them and ask what they
need."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dms_jax.config import ModelConfig
from dms_jax.core.cache_base import AnyCache
from dms_jax.core.compact_cache import CompactCache
from dms_jax.core.page_arena import empty_arena
from dms_jax.core.page_counts import table_columns
from dms_jax.core.paged_cache import HeadPages, PagedCache, axes_of
from dms_jax.engine.decode_layout import stacked
from dms_jax.engine.decoding import extend_rows, init_cache
from dms_jax.models.parameters import ModelStructure, abstract_model, flatten, with_shardings
from dms_jax.platform_defaults import platform_defaults
from dms_jax.policies import policy_of
from dms_jax.sharding import named_sharding


def abstract_cache(
    config: ModelConfig, batch: int, capacity: int, mesh: Mesh, dense: bool = False, dtype: jnp.dtype = jnp.bfloat16
) -> CompactCache:
    """A cache of shapes without arrays, with rows sharded over the data axis and KV heads over the model axis."""
    model = abstract_model(config, jnp.bfloat16)
    cache = jax.eval_shape(partial(init_cache, model, batch, capacity, dense=dense, dtype=dtype))

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = ("batch", "kv_heads", None, None)[: x.ndim]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named_sharding(axes, x.shape, mesh))

    return jax.tree.map(place, cache)


def abstract_pages(
    config: ModelConfig, batch: int, max_length: int, num_pages: int, mesh: Mesh, dtype: jnp.dtype = jnp.bfloat16
) -> PagedCache:
    """A cache of shapes without arrays, in pages of the mesh's platform, with an arena of `num_pages` per device."""
    policy = policy_of(config, None)
    with jax.set_mesh(mesh):
        page_size = platform_defaults().page_size
    ring, heads = policy.ring_size, (config.num_layers, batch, config.num_kv_heads)
    arena = jax.eval_shape(lambda: empty_arena(mesh.size, num_pages, page_size, config.head_dim, dtype))
    shape = lambda *more, dtype=jnp.int32: jax.ShapeDtypeStruct((*heads, *more), dtype)
    state = HeadPages(
        table=shape(table_columns(max_length, ring, page_size)),
        survivors=shape(),
        marked=shape(ring, dtype=jnp.bool_),
        starved=shape(dtype=jnp.bool_),
    )

    def place(x: jax.ShapeDtypeStruct, axes: str) -> jax.ShapeDtypeStruct:
        names = tuple(None if axis == "." else axis for axis in axes.split())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named_sharding(names, x.shape, mesh))

    arena, state = (jax.tree.map(place, x, axes) for x, axes in zip((arena, state), axes_of(arena, state), strict=True))
    seen = place(jax.ShapeDtypeStruct((batch,), jnp.int32), "batch")
    return PagedCache(arena, state, seen, policy.in_cache())


def lower_extend(
    config: ModelConfig, cache: AnyCache, mesh: Mesh, length: int = 1, dtype: jnp.dtype = jnp.bfloat16
) -> jax.stages.Lowered:
    """Lower a decode step, or a prefill chunk of `length` tokens.

    It returns the logits and the cache, whose memory it reuses.
    """
    template = ModelStructure(model := abstract_model(config, dtype))
    names = list(template.variables)
    params = with_shardings(flatten(model), template.shardings(names, mesh))

    def shape(
        *dims: int, dtype: jnp.dtype = jnp.int32, axes: tuple[str | None, ...] = ("batch", None)
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=named_sharding(axes[: len(dims)], dims, mesh))

    def step(params, cache, tokens, count, threshold, last):
        return extend_rows(stacked(template.build(params)), cache, tokens, count, threshold, last)

    rows = cache.batch_size
    last = shape(rows, config.vocab_size, dtype=jnp.float32, axes=("batch", "vocab"))
    shardings = last.sharding, jax.tree.map(lambda x: x.sharding, cache)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=1, out_shardings=shardings)
        return compiled.lower(params, cache, shape(rows, length), shape(rows), shape(dtype=jnp.float32, axes=()), last)

"""The parts of Mosaic GPU that the Hopper kernels use, for every supported jax version and for interpret mode.

Two things differ. The signature of `plgpu.load` changed between jax versions. And the interpreter, which runs a kernel
on a CPU thread by thread with its barriers and copies, supports neither register layouts nor tensor cores: it ignores
layouts, and a product is `jnp.dot` of the operands' contents. Everything else in a kernel is the same code in both
modes.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dms_jax.axes import Array

COMPUTE = 2  # warpgroups of an attention kernel that compute; the next one copies
ROWS = plgpu.Layout.WGMMA  # [M N], the accumulators of a warpgroup
COLUMN = plgpu.Layout.WGMMA.reduce(1)  # [M], one value per row
ROW = plgpu.Layout.WGMMA.reduce(0)  # [N], one value per column

_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_NEEDS_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty  # until jax 0.11


def interpreter() -> Any:
    """Return the value of `plgpu.kernel(interpret=...)` that runs a kernel on a CPU.

    It needs several CPU devices (`jax_num_cpu_devices`), because warpgroups are threads that wait for each other, and
    one device has only as many threads as the machine has cores.
    """
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams  # pyrefly: ignore[missing-module-attribute]
    except ImportError:  # jax 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        _compile_once()
    return InterpretGPUParams()


def _compile_once() -> None:
    """Make jax 0.10 compile an interpreted kernel once, as later versions do.

    Without this, jax 0.10 compiles the kernel again for every warpgroup of every CTA, which takes minutes for a small
    kernel.
    """
    from jax._src.pallas.mosaic.interpret import thread_map

    run = jax.jit(lambda jaxpr, consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None, static_argnums=0)
    if not hasattr(thread_map, "_run"):
        thread_map._run = run  # pyrefly: ignore[missing-attribute]  # a module takes attributes
        thread_map._run_jaxpr = lambda jaxpr, consts, *args: (
            run.trace(jaxpr, consts, *args).lower().compile()(consts, *args)
        )


class Ops:
    """Operations that differ between hardware and interpret mode."""

    def __init__(self, interpret: bool):
        self.interpret = interpret

    def load(self, ref: Any, layout: Any, optimized: bool = True) -> Array:
        """Load a shared-memory buffer into registers."""
        if self.interpret:
            return ref[...]
        if _LOAD_NEEDS_INDEX:
            return plgpu.load(ref, (), layout=layout, optimized=optimized)
        return plgpu.load(ref, layout=layout, optimized=optimized)  # pyrefly: ignore[missing-argument]  # jax 0.10

    def matrix(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return shared memory for matrices [.. rows, columns], tiled and swizzled for the tensor cores."""
        if self.interpret:
            return plgpu.SMEM(shape, dtype)
        size = jnp.dtype(dtype).itemsize
        swizzle = min(128, shape[-1] * size)
        return plgpu.SMEM(
            shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
        )

    def full(self, shape: tuple[int, ...], value: float, layout: Any, dtype: Any = jnp.float32) -> Array:
        return self.cast(jnp.full(shape, value, dtype), layout)

    def cast(self, x: Array, layout: Any) -> Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def iota(self, shape: tuple[int, ...], axis: int) -> Array:
        """The int32 index along `axis`, in the layout of an accumulator."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=ROWS)

    def dot(
        self,
        a: Any,
        b: Any,
        shape: tuple[int, int],
        transpose_a: bool = False,
        transpose_b: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> Array:
        """Return a @ b in fp32 [M N], with `a` in shared memory or registers and `b` in shared memory.

        `meanwhile` runs after the product has started and before the wait for its result.
        """
        return self.dots([(a, b, transpose_a, transpose_b)], shape, meanwhile)[0]

    def dots(
        self,
        products: Sequence[tuple[Any, Any, bool, bool]],
        shape: tuple[int, int],
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Array]:
        """Return several products (a, b, transpose_a, transpose_b) of one shape, which run concurrently."""
        meanwhile = meanwhile or (lambda: None)
        if self.interpret:
            meanwhile()
            return [self._product(*product) for product in products]

        def run(*accumulators):
            for accumulator, product in zip(accumulators, products, strict=True):
                self._wgmma(accumulator, *product)
            meanwhile()
            return [accumulator[...] for accumulator in accumulators]

        return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32) for _ in products])

    def add_dot(self, total: Array, a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False) -> Array:
        """Return total + a @ b."""
        return self.add_dots([total], [(a, b, transpose_a, transpose_b)])[0]

    def add_dots(self, totals: Sequence[Array], products: Sequence[tuple[Any, Any, bool, bool]]) -> list[Array]:
        """Do several `add_dot`s, which run concurrently."""
        if self.interpret:
            return [total + self._product(*product) for total, product in zip(totals, products, strict=True)]

        def run(accumulators):
            for accumulator, product in zip(accumulators, products, strict=True):
                self._wgmma(accumulator, *product)

        accumulators: Any = [plgpu.ACC.init(total) for total in totals]
        return pl.run_state(run)(accumulators)

    @staticmethod
    def _wgmma(accumulator, a, b, transpose_a, transpose_b):
        maybe_transposed = lambda ref, transpose: ref.transpose((1, 0)) if transpose else ref
        plgpu.wgmma(accumulator, maybe_transposed(a, transpose_a), maybe_transposed(b, transpose_b))

    @staticmethod
    def _product(a, b, transpose_a, transpose_b):
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        a, b = (x.T if transpose else x for x, transpose in ((a, transpose_a), (b, transpose_b)))
        return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def bind(body: Callable[[Any, Any], None], plan: Any, refs: Any, absent: Sequence[str] = ()) -> Callable[..., None]:
    """Turn `body(plan, refs)` into the function that Pallas calls, with one reference per argument.

    `refs` is the type of the named tuple of references. Its fields are first the arrays, in the order of inputs and
    outputs, and then the scratch memory, which Pallas passes by name. The `absent` fields are None.
    """

    def kernel(*arrays, **scratch):
        names = [name for name in refs._fields if name not in scratch and name not in absent]
        body(plan, refs(**dict.fromkeys(absent), **dict(zip(names, arrays, strict=True)), **scratch))

    kernel.__name__ = body.__name__
    return kernel


def update_in_place(
    kernel: Callable[..., None],
    updated: Sequence[Array],
    inputs: Sequence[Array],
    out_type: Sequence[Any] = (),
    *,
    grid: dict[str, int],
    scratch: dict[str, Any],
    interpret: bool = False,
) -> list[Array]:
    """Run `kernel(*updated, *inputs, *outputs, **scratch)` on references, and return `updated` and the outputs.

    Inside a jitted function whose caller donates `updated`, it is not copied. The kernel has one warpgroup.
    (`plgpu.kernel` could do this, but its vmap rule rejects references in jax 0.10.)
    """
    refs = [jax.new_ref(x, memory_space=plgpu.GMEM) for x in updated]
    body = lambda *refs: pl.run_scoped(partial(kernel, *refs), collective_axes=(), **scratch)
    body.__name__ = kernel.__name__
    mesh = plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid))
    outputs: Any = pl.kernel(body, tuple(out_type), mesh=mesh, interpret=interpreter() if interpret else None)(
        *refs, *inputs
    )
    return [*(jax.freeze(ref) for ref in refs), *outputs]


def copy_blocks(
    total: Any,
    steps: int,
    parts: Sequence[tuple[Any, Callable[..., None]]],
    block_of: Callable[[Array], Any] = lambda n: n,
) -> None:
    """Run the loop of a copying warpgroup over `total` blocks, with `steps` buffers, until all buffers are free again.

    Each of `parts` is a barrier per buffer, at which the computing warpgroups arrive when they no longer need the
    buffer, and a function copy(block, buffer). Step n copies block `block_of(n)`, which is computed before the wait for
    the buffer.
    """

    def one_block(n, _):
        buffer, block = lax.rem(n, jnp.int32(steps)), block_of(n)
        for free, copy in parts:

            @pl.when(n >= steps)
            def _():
                plgpu.barrier_wait(free.at[buffer])  # noqa: B023

            copy(block, buffer)

    def drain(n, _):
        for free, _ in parts:
            plgpu.barrier_wait(free.at[lax.rem(n, jnp.int32(steps))])

    lax.fori_loop(0, total, one_block, None)
    lax.fori_loop(jnp.maximum(total - steps, 0), total, drain, None)

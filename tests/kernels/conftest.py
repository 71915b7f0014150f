"""Makes Mosaic GPU's interpreter bearable on jax 0.10, which compiles a kernel anew for every thread of every CTA.

What later versions do, taken back: one function that is compiled for all.
"""

import jax
from jax._src.pallas.mosaic.interpret import thread_map


def _run(jaxpr, consts, *args):
    jax.core.eval_jaxpr(jaxpr, consts, *args)


_jitted = jax.jit(_run, static_argnums=(0,))

if not hasattr(thread_map, "_run"):  # jax 0.10
    thread_map._run_jaxpr = lambda jaxpr, consts, *args: _jitted.trace(jaxpr, consts, *args).lower().compile()(consts, *args)

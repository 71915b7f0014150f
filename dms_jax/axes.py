"""Axis letters of the whole package, and `@typed`, which checks them.

    B batch    T queries  S keys      N query heads   K key/value heads   G = N / K
    H head_dim D model    F mlp       V vocabulary    L layers

Shapes are written in signatures (`Float[Array, "B T N H"]`) and checked while a function is traced:
a wrong shape is an error that names the argument, and costs nothing once compiled.
"""

import jax
import numpy as np
from beartype import beartype
from jaxtyping import jaxtyped

Array = jax.Array | np.ndarray  # what callers may pass; results are jax arrays
typed = jaxtyped(typechecker=beartype)
EXACT = (
    jax.lax.Precision.HIGHEST
)  # for fp32 statistics written as a product, where a backend would multiply in fewer bits

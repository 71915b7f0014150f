"""Legend of the axis letters in signatures, and `@typed`, which checks them.

    B batch rows    T queries, or tokens of a chunk    S keys    C cache slots    L layers    V vocabulary
    N query heads   K key/value heads                  G query heads that share a KV head, N / K
    D model width   F MLP width                        H head_dim, `half` = H / 2 rotary channel pairs
    U hidden units of an evict head (`DMSConfig.head_units`)
    R = G T         queries of one KV head as the rows of one matrix
    P               parts of a softmax (`core.slot_attention`), pages of a cache (`policies.quest`), or pairs of a row
                    that a fit keeps (`training.fisher_init`)
    M               new tokens, rounded up (`engine.decode_loop`), or query heads after padding (`kernels.head_split`)
    features        numbers that a policy stores for each pair (`CachePolicy.features`)
    state           numbers that a policy stores for each KV head (`CachePolicy.head_state`)

A and `*A` are any leading axes, and n is a number that the docstring explains. W is the eviction window
(`window_size`); no array has an axis of this length, so W appears in text only.

Shapes are written in signatures (`Float[Array, "B T N H"]`) and checked while a function is traced. A wrong shape is an
error that names the argument, and the check costs nothing once the function is compiled.
"""

import jax
import numpy as np
from beartype import beartype
from jaxtyping import jaxtyped

Array = jax.Array | np.ndarray  # what callers may pass; results are jax arrays
typed = jaxtyped(typechecker=beartype)
# Full precision for fp32 statistics that are written as a matrix product; accelerators would multiply in fewer bits by
# default.
EXACT = jax.lax.Precision.HIGHEST

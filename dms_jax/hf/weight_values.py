"""Find weights that are not numbers, while a model is read.

One NaN spreads to every logit, and such a model would otherwise generate token 0 for ever or train on nothing.
"""

import re

import ml_dtypes
import numpy as np

from dms_jax.errors import ConfigError

# Squares of larger numbers, which RMSNorm computes, overflow in float32. No trained weight comes near.
LIMIT = 2.0**63
_BITS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32), 8: (np.int64, np.uint64)}


def refuse_non_finite(name: str, part: np.ndarray, where: str) -> None:
    """Raise ConfigError if a tensor, or a part of it, has a NaN, an infinity or a number beyond +-LIMIT.

    The pattern of bits of an IEEE number, read as a whole number, grows with its magnitude. So the maximum over the
    signed patterns finds too large positive numbers, and that over the unsigned patterns the negative ones. NaN comes
    after infinity. Two maxima need no temporary array and run at the speed of memory in any dtype.
    """
    signed, unsigned = _BITS[part.dtype.itemsize]
    largest = float(ml_dtypes.finfo(part.dtype).max)
    first_bad = int(np.array(LIMIT if largest > LIMIT else np.inf, part.dtype).view(signed))
    sign = 1 << (8 * part.dtype.itemsize - 1)
    if part.size == 0 or (part.view(signed).max() < first_bad and part.view(unsigned).max() < sign + first_bad):
        return
    layer = re.search(r"\.layers\.(\d+)\.", name)
    kind = "NaN" if np.isnan(part).any() else "an infinity" if np.isinf(part).any() else f"a number beyond {LIMIT:.0e}"
    raise ConfigError(
        f"tensor {name}{f' (layer {layer[1]})' if layer else ''} in {where} has {kind}, so every logit would be NaN; "
        "download the weights again, or train again with a lower learning rate; to load them as they are, give "
        "allow_non_finite=True, or --allow-non-finite where a command has it"
    )

"""Benchmarks: speed, memory and correctness on the device at hand.

They also run where only jax, flax and transformers are installed. Begin with `benchmarks.everything`.
"""

import importlib.util
import sys
import types


def _stand_in_for_shape_checks() -> None:
    """Let signatures with shapes be imported, unchecked, on a host without jaxtyping and beartype."""

    class Shape:
        def __class_getitem__(cls, item):
            return item[0]

    jaxtyping, beartype = types.ModuleType("jaxtyping"), types.ModuleType("beartype")
    for name in ("Bool", "Float", "Int", "Key", "Shaped"):
        setattr(jaxtyping, name, Shape)
    # A module takes attributes.
    jaxtyping.jaxtyped = lambda typechecker: lambda f: f  # pyrefly: ignore[missing-attribute]
    beartype.beartype = lambda f: f  # pyrefly: ignore[missing-attribute]
    sys.modules |= {"jaxtyping": jaxtyping, "beartype": beartype}


if importlib.util.find_spec("jaxtyping") is None or importlib.util.find_spec("beartype") is None:
    _stand_in_for_shape_checks()

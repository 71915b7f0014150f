"""A model as plain arrays and back: names to arrays, which optimizers and checkpoints understand without Flax."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dms_jax.config import ModelConfig
from dms_jax.models.decoder import Decoder
from dms_jax.models.layers import EvictParam
from dms_jax.sharding import named_sharding

Params = dict[str, jax.Array]  # e.g. "layers.attention.evict_proj" -> [L D K]


def is_evict_head(name: str, variable: nnx.Variable) -> bool:
    return isinstance(variable, EvictParam)


def is_any(name: str, variable: nnx.Variable) -> bool:
    return True


class Template:
    """The structure of a model without its numbers: `split` takes a model apart, `merge` puts one together (also in jit)."""

    def __init__(self, model: Decoder):
        self.graph, state = nnx.split(model)
        self.variables = {_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
        self.config = model.config

    def names(self, chosen: Callable[[str, nnx.Variable], bool]) -> list[str]:
        return [name for name, (_, variable) in self.variables.items() if chosen(name, variable)]

    def merge(self, *parts: Mapping[str, jax.Array]) -> Decoder:
        """The model with the arrays of `parts`, which together must name every parameter."""
        arrays = {name: array for part in parts for name, array in part.items()}
        leaves = [(path, variable.replace(arrays[name])) for name, (path, variable) in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(leaves))

    def shardings(self, names: list[str], mesh: Mesh) -> dict[str, NamedSharding]:
        """Where each parameter lies on the mesh."""
        found = {}
        for name in names:
            variable = self.variables[name][1]
            found[name] = named_sharding(variable.axes, variable.get_value().shape, mesh)
        return found


def abstract_model(config: ModelConfig, dtype: jnp.dtype) -> Decoder:
    """A model of shapes without numbers, to compile for hardware that is not here."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))


def placed(shapes: Mapping[str, Any], shardings: Mapping[str, NamedSharding]) -> Any:
    """Shapes that also say where on a mesh they lie."""
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings[name]) for name, a in shapes.items()}


def params_of(model: Decoder) -> Params:
    """Every parameter of a model by name."""
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))

"""The border to Flax NNX: from models to plain arrays by name, for optimizers and checkpoints, and back.

Begin with `flatten` and `ModelStructure`. Names are dotted paths: "layers.attention.evict_proj" is an array [L D K].
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from dms_jax.config import ModelConfig
from dms_jax.models.decoder import Decoder
from dms_jax.sharding import named_sharding

Params = dict[str, jax.Array]


def flatten(model: Decoder, only: Any = nnx.Param) -> Params:
    """Return the parameters of a model by name: all, or those that an NNX filter selects, such as `EvictParam`."""
    return {name: variable.get_value() for name, variable in _named_variables(nnx.state(model, only)).items()}


class ModelStructure:
    """The structure of a model without its arrays, from which `build` makes models, also inside jit."""

    def __init__(self, model: Decoder):
        self.graph, state = nnx.split(model)
        self.variables = _named_variables(state)
        self._paths = dict(zip(self.variables, (path for path, _ in nnx.to_flat_state(state)), strict=True))
        self.config = model.config

    def build(self, *parts: Mapping[str, jax.Array]) -> Decoder:
        """Make the model with the arrays of `parts`, which together must name every parameter."""
        arrays = {name: array for part in parts for name, array in part.items()}
        leaves = [(self._paths[name], variable.replace(arrays[name])) for name, variable in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(leaves))

    def shardings(self, names: Iterable[str], mesh: Mesh) -> dict[str, NamedSharding]:
        """Return the sharding of each named parameter, which follows from its logical axes."""
        found = {}
        for name in names:
            variable = self.variables[name]
            found[name] = named_sharding(variable.axes, variable.get_value().shape, mesh)
        return found


def abstract_model(config: ModelConfig, dtype: jnp.dtype) -> Decoder:
    """Make a model of shapes without arrays, for example to compile for hardware that this machine lacks."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))


def with_shardings(shapes: Mapping[str, Any], shardings: Mapping[str, NamedSharding]) -> Any:
    """Attach a sharding to each named shape."""
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=shardings[name]) for name, a in shapes.items()}


def jitted(model: Decoder, method: str) -> Callable[..., Any]:
    """Return a method of the model, compiled. Models of equal structure share the compiled program."""
    return partial(_call, *nnx.split(model), method)


@partial(jax.jit, static_argnums=(0, 2))
def _call(graph: nnx.GraphDef, state: nnx.State, method: str, *args: Any) -> Any:
    return getattr(nnx.merge(graph, state), method)(*args)


def _named_variables(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}

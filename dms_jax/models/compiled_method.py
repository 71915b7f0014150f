"""The decorator of the forward methods of `decoder`, which makes each of them a program of its own in a notebook."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dms_jax.models.token_ids import checked_on_host

STATIC = ("remat", "window_size")  # arguments of forward methods that select a program; all others are arrays


def compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a forward method check its tokens, and run as one program unless it is a part of a larger one."""
    parameters = inspect.signature(method)

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        given = dict(list(parameters.bind(self, *args, **kwargs).arguments.items())[1:])
        given["tokens"] = checked_on_host(given["tokens"], self.config.vocab_size)
        graph, state = nnx.split(self)
        static = tuple((name, given.pop(name)) for name in STATIC if name in given)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, given))):
            return method(self, **given, **dict(static))
        return _run_compiled(graph, state, method, static, given)

    return run


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _run_compiled(graph: nnx.GraphDef, state: nnx.State, method: Callable[..., Any], static: tuple, given: dict) -> Any:
    return method(nnx.merge(graph, state), **given, **dict(static))

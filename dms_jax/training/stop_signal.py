"""SIGTERM and SIGINT as a request to stop at a step boundary, on which all processes agree."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class StopSignal:
    """The last signal that asked this process to stop, and the one that all processes stop for."""

    def __init__(self, mesh: Mesh):
        self.received = 0
        self._mesh, self._maximum = mesh, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._before: jax.Array | None = None

    def on_signal(self, number: int, frame) -> None:
        if self.received:  # a second signal does not wait for the step
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def agreed(self) -> int:
        """The signal to stop for, 0 for none. Call it once a step: several processes agree one step later, so that all save the same
        step and none waits for the others' answer."""
        if jax.process_count() == 1:
            return self.received
        everywhere = NamedSharding(self._mesh, P(self._mesh.axis_names))
        mine = jax.make_array_from_callback(
            (self._mesh.size,), everywhere, lambda index: np.full(1, self.received, np.int32)
        )
        before, self._before = self._before, self._maximum(mine)
        return 0 if before is None else int(before)


@contextlib.contextmanager
def stop_signals(mesh: Mesh) -> Iterator[StopSignal]:
    """Install the handlers of a StopSignal for SIGTERM and SIGINT, and restore the former ones at the end."""
    stop = StopSignal(mesh)
    former = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

"""Turn SIGTERM, SIGINT and SIGHUP into a request to stop after the same step in all processes."""

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
    """The signal that asked this process to stop (`received`), and the one that all processes agree on (`agreed`)."""

    def __init__(self, mesh: Mesh):
        self.received = 0
        self._mesh, self._maximum = mesh, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._before: jax.Array | None = None

    def on_signal(self, number: int, frame) -> None:
        if self.received:  # a second signal stops the process at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def agreed(self) -> int:
        """Return the number of the signal to stop for, or 0. Call this once per step.

        Several processes agree one step late, so that all of them stop after the same step without waiting for one
        another.
        """
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
    """Install a StopSignal as the handler of SIGTERM, SIGINT and SIGHUP, and restore the previous handlers at the end.

    A SIGHUP that is ignored, as `nohup` makes it, stays ignored.
    """
    stop = StopSignal(mesh)
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    former = {number: signal.signal(number, stop.on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

"""One of several processes that run a tiny retrofit together.

Arguments: ADDRESS COUNT INDEX DEVICES MESH MODE OUT.npz
"""

import sys

import jax


def main(address: str, count: str, index: str, devices: str, mesh: str, mode: str, out: str) -> None:
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(address, int(count), int(index))
    import numpy as np
    from retrofit_cases import config_of, outcome, retrofit

    from dms_jax.sharding import make_mesh, parse_mesh

    run = retrofit(config=config_of(mode), mesh=make_mesh(*parse_mesh(mesh)))
    found = outcome(run)
    if jax.process_index() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])

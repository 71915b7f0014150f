"""What a run would do, told without doing it."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax.models.parameters import is_evict_head
from dms_jax.planning.memory_estimate import program_bytes

if TYPE_CHECKING:
    from dms_jax.training.run import Run

GIB = 2**30


def dry_run_text(run: "Run") -> str:
    """Shapes, shardings, schedules and the memory of the compiled step."""
    c, r = run.config, run.retrofit
    shape = "x".join(map(str, run.mesh.shape.values()))
    lines = [f"{c.mode} of {run.model_path} on {run.mesh.size} x {run.mesh.devices.flat[0].device_kind} as {shape}", ""]
    lines += _arrays("trains, fp32", r.state.trainable) + _arrays("frozen", r.frozen)
    moments = sum(_local(x) for x in jax.tree.leaves(r.state.opt_state))
    lines += [f"optimizer: {moments / GIB:.3f} GiB a device", ""]
    rows = f"{c.batch_size} rows of {c.length} tokens a step, {c.batch_size // c.accumulate} at a time"
    heads = sum(is_evict_head(name, variable) for name, (_, variable) in r.student.variables.items())
    lines += [
        f"batch: {rows}; {run.train_rows.num_rows} rows to train on, {run.held_out.num_rows} held out; {heads} evict-head arrays",
        "",
    ]
    lines += [f"{'step':>8}{'target CR':>12}{'learning rate':>16}"]
    for step in sorted(
        {
            0,
            c.first_gated_step,
            c.first_gated_step + c.rising_steps // 2,
            c.first_gated_step + c.rising_steps,
            c.steps - 1,
        }
    ):
        if step < c.steps:
            gate = (
                "free the channel" if step < c.first_gated_step else f"{float(r.nominal_target(jnp.int32(step))):.2f}"
            )
            lines.append(f"{step:>8}{gate:>12}{float(jnp.asarray(r.rate(step))):>16.2e}")
    every = f"validation every {c.eval_every} steps and at the end" if c.eval_every else "validation at the end"
    lines += ["", f"{c.steps} steps; a checkpoint every {c.save_every}, {c.keep} stay; {every}; output {run.output}"]
    analysis = r.lower(c.batch_size).compile().memory_analysis()
    if analysis is not None:
        total = program_bytes(analysis)
        parts = (
            f"arguments {analysis.argument_size_in_bytes / GIB:.2f}, temporary {analysis.temp_size_in_bytes / GIB:.2f}"
        )
        lines.append(
            f"memory of the compiled step, a device: {total / GIB:.2f} GiB ({parts}); by kind: python -m train.plan"
        )
    return "\n".join(lines)


def _arrays(title: str, arrays: dict[str, jax.Array]) -> list[str]:
    total = sum(map(_local, arrays.values())) / GIB
    lines = [
        f"{title}: {len(arrays)} arrays, {sum(x.size for x in arrays.values()):,} numbers, {total:.3f} GiB a device"
    ]
    for name, x in sorted(arrays.items()):
        size = f"{_local(x) / 2**20:.2f} MiB"
        where = f"P({', '.join(map(repr, x.sharding.spec))})"  # pyrefly: ignore[missing-attribute]  # a mesh is set: all are named
        lines.append(f"  {name:<40}{'x'.join(map(str, x.shape)):>22}  {str(x.dtype):<9} {where}  {size}")
    return lines


def _local(x: jax.Array) -> int:
    return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize

"""The text of `--dry-run`, which describes a retrofit without running it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax.command import typed_as
from dms_jax.planning.figures import GIB
from dms_jax.planning.memory_estimate import program_bytes
from dms_jax.training.label_file import label_file_bytes
from dms_jax.training.prepare import PreparedRun


def dry_run_text(run: PreparedRun) -> str:
    """Describe shapes and shardings of all arrays, the schedules, and the memory of the compiled step."""
    c, state = run.config, run.steps.abstract_state
    shape = "x".join(map(str, run.mesh.shape.values()))
    lines = [f"{c.mode} of {run.model_path} on {run.mesh.size} x {run.mesh.devices.flat[0].device_kind} as {shape}", ""]
    lines += _arrays("trains, fp32", state.trainable) + _arrays("frozen", run.frozen)
    moments = sum(map(_device_bytes, jax.tree.leaves(state.opt_state)))
    lines += [f"optimizer: {moments / GIB:.3f} GiB per device", ""]

    rows = f"{c.batch_size} rows of {c.length} tokens per step, {c.rows_at_once} at a time"
    known = f"{run.train_rows.num_rows} rows to train on, {run.held_out.num_rows} held out"
    lines += [f"batch: {rows}; {known}; {len(run.steps.math.evict_head)} evict-head arrays", ""]
    if c.init == "fisher":
        math = run.steps.math
        size = label_file_bytes(math.student.config, c.label_rows, c.length) / GIB
        units = f" with {math.dms.head_units} hidden units" if math.dms.head_units else ""
        lines += [
            f"init=fisher: labels from {c.label_rows} rows, {c.rows_at_once} at a time; then the evict head{units} is "
            f"fitted to them; {size:.2f} GiB of disk in {run.output} keep their pairs until then",
            "",
        ]
    lines += _schedule(run)
    every = f"validation every {c.eval_every} steps and at the end" if c.eval_every else "validation at the end"
    lines += [
        "",
        f"{c.steps} steps; a checkpoint every {c.save_every} steps, of which the last {c.keep} are kept; {every}; "
        f"output {run.output}",
    ]
    return "\n".join(lines + _program_memory(run))


def _schedule(run: PreparedRun) -> list[str]:
    """Tabulate the target ratio and the learning rate at the steps where the schedules change."""
    c, math = run.config, run.steps.math
    lines = [f"{'step':>8}{'target CR':>12}{'learning rate':>16}"]
    first, rising = c.first_gated_step, c.rising_steps
    for step in sorted({0, first, first + rising // 2, first + rising, max(c.num_steps - 1, 0)}):
        if step < c.num_steps:
            gate = "free the channel" if step < first else f"{float(math.nominal_target(jnp.int32(step))):.2f}"
            lines.append(f"{step:>8}{gate:>12}{float(jnp.asarray(math.rate(step))):>16.2e}")
    return lines


def _program_memory(run: PreparedRun) -> list[str]:
    """Describe the memory of each compiled program in one line, or in none if the compiler does not report it."""
    c, lines = run.config, []
    programs = {"step": run.steps.lower(run.frozen, c.batch_size)}
    if c.init == "fisher":
        programs = {"label pass": run.steps.lower_labels(run.frozen, c.rows_at_once)} | programs
    for name, program in programs.items():
        analysis = program.compile().memory_analysis()
        if analysis is not None:
            arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
            parts = f"arguments {arguments / GIB:.2f}, temporary {temporary / GIB:.2f}"
            lines.append(
                f"memory of the compiled {name}, per device: {program_bytes(analysis) / GIB:.2f} GiB ({parts})"
            )
    return [*lines, f"by kind: {typed_as('plan')}"] if lines else []


def _arrays(title: str, arrays: dict[str, Any]) -> list[str]:
    total = sum(map(_device_bytes, arrays.values())) / GIB
    numbers = sum(int(np.prod(x.shape)) for x in arrays.values())
    lines = [f"{title}: {len(arrays)} arrays, {numbers:,} numbers, {total:.3f} GiB per device"]
    for name, x in sorted(arrays.items()):
        size = f"{_device_bytes(x) / 2**20:.2f} MiB"
        where = f"P({', '.join(map(repr, x.sharding.spec))})"
        lines.append(f"  {name:<40}{'x'.join(map(str, x.shape)):>22}  {str(x.dtype):<9} {where}  {size}")
    return lines


def _device_bytes(x: Any) -> int:
    """Bytes of the shard on one device of an array, or of a ShapeDtypeStruct with a sharding."""
    return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize

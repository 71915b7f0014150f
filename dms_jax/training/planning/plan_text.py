"""The plan as text, for people: each figure with where it is from."""

from typing import Any

GIB = 2**30


def step_text(plan: dict[str, Any]) -> str:
    source = plan["source"]
    lines = [
        f"{plan['model']}, mode {plan['mode']}, {plan['batch']} rows of {plan['length']} a step, {plan['hardware']} as {plan['mesh']}, "
        f"accumulate {plan['accumulate']}, remat {plan['remat']}, attention {plan['implementation']}"
    ]
    if "not_compiled" in plan:
        lines.append(f"estimated, not compiled: {plan['not_compiled']}")
    lines += ["", f"{'bytes of a device':<18}{'GiB':>8}  source"]
    lines += [
        f"{kind:<18}{size / GIB:>8.2f}  {source[f'bytes_per_device.{kind}']}"
        for kind, size in plan["bytes_per_device"].items()
    ]
    lines.append(
        f"{'estimate':<18}{plan['estimated_bytes_per_device'] / GIB:>8.2f}  {source['estimated_bytes_per_device']}"
    )
    lines.append(f"{'there are':<18}{plan['memory_per_device'] / GIB:>8.2f}  {source['memory_per_device']}")
    lines.append("it fits" if plan["fits"] else "IT DOES NOT FIT")
    if "least_devices" in plan:
        lines.append(
            f"  nothing nearby does: weights and optimizer alone want {plan['least_devices']} such devices ({source['least_devices']})"
        )
    if (near := plan["nearest"]) is not None:
        size = f"{near['total_bytes_per_device'] / GIB:.2f} GiB"
        lines.append(
            f"  what does: {near['change']} ({size}, {near['seconds_per_step']:.2f} s a step, {source['nearest']})"
        )
    lines += ["", f"{'a step':<28}{'':>14}  source"]
    add = lambda label, value, key: lines.append(f"{label:<28}{value:>14}  {source[key]}")
    add("model FLOPs", f"{plan['flops_per_step']:.3e}", "flops_per_step")
    add("FLOPs with recomputation", f"{plan['flops_executed_per_step']:.3e}", "flops_executed_per_step")
    add("bytes moved, all devices", f"{plan['bytes_per_step']:.3e}", "bytes_per_step")
    for kind, size in sorted(plan["collective_bytes_per_device"].items()):
        add(f"sent by a device, {kind}"[:28], f"{size / GIB:.2f} GiB", "collective_bytes_per_device")
    for part, seconds in plan.get("seconds", {}).items():
        if part != "total":
            add(f"seconds, {part}", f"{seconds:.3f}", f"seconds.{part}")
    add("seconds", f"{plan['seconds_per_step']:.3f}", "seconds_per_step")
    add("tokens a second", f"{plan['tokens_per_second']:.0f}", "tokens_per_second")
    if "mfu" in plan:
        add("model-FLOPs utilisation", f"{plan['mfu']:.1%}", "mfu")
    add("steps a unit of CR", f"{plan['steps_per_cr']:.0f}", "steps_per_cr")
    for key in (key for key in plan if key.startswith("hours_to_cr")):
        label, device_hours = f"hours to CR {key.removeprefix('hours_to_cr')}", plan[key] * plan["devices"]
        lines.append(f"{label:<28}{plan[key]:>14.2f}  {source[key]}; {device_hours:.1f} device-hours")
    lines += ["", "formulas"] + [f"  {name}: {formula}" for name, formula in plan["formulas"].items()]
    return "\n".join(lines)


def inference_text(plan: dict[str, Any]) -> str:
    what = f"{plan['users']} users at {plan['context']} tokens on {plan['hardware']} as {plan['mesh']}"
    lines = [f"{what}: {plan['memory_bytes'] / GIB:.1f} GiB, weights {plan['weight_bytes'] / GIB:.1f} GiB", ""]
    lines.append(
        f"{'':<8}{'realised':>9}{'capacity':>10}{'GiB a user':>12}{'users fit':>11}{'tokens/s':>10}{'when full':>11}"
    )
    number = lambda value: "-" if value is None else f"{value:.0f}"
    for arm in plan["arms"]:
        size, now, full = (
            arm["cache_bytes_per_user"] / GIB,
            number(arm["tokens_per_second"]),
            number(arm["tokens_per_second_at_most_users"]),
        )
        lines.append(
            f"{arm['arm']:<8}{arm['realised_cr']:>9.2f}{arm['capacity_per_layer'][0]:>10}{size:>12.2f}{arm['most_users']:>11}{now:>10}{full:>11}"
        )
    lines += ["", *plan["advice"], ""] + [f"{name}: {text}" for name, text in plan["source"].items()]
    return "\n".join(lines)

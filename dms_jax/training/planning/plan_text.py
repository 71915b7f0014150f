"""Print plans of retrofits and servers, as JSON for programs and as text for people."""

from typing import Any, NamedTuple

from dms_jax.planning.figures import GIB, Figure, as_json, as_text, shown
from dms_jax.planning.serving_plan import ServingPlan
from dms_jax.training.planning.step_setting import StepSetting


class RetrofitPlan(NamedTuple):
    """The plan of a retrofit, complete with hours and the nearest setting that fits."""

    model: str  # as the user named it
    setting: StepSetting
    implementation: str
    not_compiled: str  # why the step was not compiled; "" if it was
    figures: list[Figure]


def step_json(plan: RetrofitPlan) -> dict[str, Any]:
    hardware, found = plan.setting.hardware, as_json(plan.figures)
    asked = {"model": plan.model, "hardware": hardware.name, "devices": hardware.count, **plan.setting.described}
    if "seconds" in found:
        found["seconds"]["total"] = found["seconds_per_step"]
    if plan.not_compiled:
        found["not_compiled"] = plan.not_compiled
    return asked | {"implementation": plan.implementation} | found


def step_text(plan: RetrofitPlan) -> str:
    setting, figures = plan.setting, {figure.name: figure for figure in plan.figures}
    hardware, step = setting.hardware, setting.step
    lines = [
        f"{plan.model}, mode {step.mode}, {step.batch_size} rows of {step.length} tokens per step, {hardware.name} as "
        f"{setting.described['mesh']}, accumulate {step.accumulate}, remat {step.remat}, attention "
        f"{plan.implementation}"
    ]
    if plan.not_compiled:
        lines.append(f"estimated, not compiled: {plan.not_compiled}")
    alternative = figures.pop("nearest").value
    if figures["fits"].value:
        lines.append("It fits.")
    elif alternative is None:
        lines.append("IT DOES NOT FIT, and neither does any nearby setting; see least_devices.")
    else:
        size, seconds = alternative["total_bytes_per_device"] / GIB, alternative["seconds_per_step"]
        lines.append(
            f"IT DOES NOT FIT, but this does: {alternative['change']} ({size:.2f} GiB, {seconds:.2f} s per step)."
        )
    device_hours = ", ".join(
        f"{shown(figure.value * hardware.count, 'h').removesuffix(' h')} to CR {name.removeprefix('hours_to_cr')}"
        for name, figure in figures.items()
        if figure.unit == "h"
    )
    return "\n".join([*lines, f"device-hours: {device_hours}", "", *as_text(figures.values())])


def serving_json(plan: ServingPlan) -> dict[str, Any]:
    values = {figure.name: figure.value for figure in plan.figures}
    arms = [{"arm": name} | {figure.name: figure.value for figure in figures} for name, figures in plan.arms.items()]
    return plan.setting | values | {"arms": arms, "advice": plan.advice, "source": _formulas(plan)}


def _formulas(plan: ServingPlan) -> dict[str, str]:
    """Return formulas with their sources, by the name of the figure. All arms have the same formulas."""
    return {
        figure.name: f"{figure.source}: {figure.formula}"
        for figures in plan.arms.values()
        for figure in figures
        if figure.formula
    }


COLUMNS = {  # figure of an arm -> heading of its column in the text
    "realised_cr": "realised CR",
    "pages_per_device": "pages per device",
    "cache_bytes_per_user": "cache per user",
    "most_users": "users that fit",
    "tokens_per_second": "speed now",
    "tokens_per_second_at_most_users": "speed when full",
}


def serving_text(plan: ServingPlan) -> str:
    asked, sizes = plan.setting, {figure.name: shown(figure.value, figure.unit) for figure in plan.figures}
    lines = [
        f"{asked['users']} users at {asked['context']} tokens on {asked['hardware']} as {asked['mesh']}: "
        f"{sizes['memory_bytes']}, of which weights take {sizes['weight_bytes']}",
        "",
        f"{'':<12}" + "".join(f"{heading:>17}" for heading in COLUMNS.values()),
    ]
    for name, figures in plan.arms.items():
        cells = {figure.name: _cell(figure) for figure in figures}
        lines.append(f"{name:<12}" + "".join(f"{cells[column]:>17}" for column in COLUMNS))
    formulas = (f"{name}: {formula}" for name, formula in _formulas(plan).items())
    return "\n".join([*lines, "", *plan.advice, "", *formulas])


def _cell(figure: Figure) -> str:
    return f"{figure.value:.2f}" if figure.name == "realised_cr" else shown(figure.value, figure.unit)

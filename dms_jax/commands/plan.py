"""Predict whether a retrofit fits on named hardware and how long it takes, or how many users a server can hold and how
fast it decodes. Neither the weights nor the hardware are needed.

    python -m train.plan --model configs/models/qwen3-8b.json --hardware h100x8 --mesh 8x1 --length 32768 --batch 8
    python -m train.plan --model FOLDER --hardware v5e-8 --mesh 4x2 --length 4096 --batch 8 --mode full --json
    python -m train.plan --model FOLDER --hardware h200x1 --inference --users 8 --context 32768
    python -m train.plan --model FOLDER --hardware h200x1 --inference --users 8 --live counts.json

If the compiler for the hardware is installed (pip install "dms-jax[cuda]" or "dms-jax[tpu]"), the real step is
compiled, and memory and communication are those of the compiled program. Otherwise, and with --analytic, they are
estimates. Times follow from a roofline with the rates that programs achieve on such hardware; on a CPU they are
measured. Each figure states its source: compiled, analytic, measured or assumed. If the setting does not fit, the plan
names a nearby setting that does; the exit code is 0 in both cases.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any, get_args

from dms_jax.command import Parser, start_devices
from dms_jax.commands.option_values import add_mesh
from dms_jax.config import MAX_UNITS, DMSConfig, ImplementationName, ModelConfig
from dms_jax.config_reader import AtLeast, Between, check_range
from dms_jax.errors import ConfigError, naming
from dms_jax.training.retrofit_config import Mode, RetrofitConfig

if TYPE_CHECKING:
    import numpy as np

    from dms_jax.planning.hardware import Hardware
    from dms_jax.planning.serving_plan import ServingPlan
    from dms_jax.training.planning.plan_text import RetrofitPlan
    from dms_jax.training.planning.step_setting import StepSetting

NAME = "plan"
DEFAULT_LENGTH, DEFAULT_CONTEXT = 4096, 32768
RANGES = {
    "length": AtLeast(2),
    "batch": AtLeast(0),
    "accumulate": AtLeast(1),
    "window": AtLeast(0),
    "head_units": Between(0, MAX_UNITS),
    "steps_per_cr": AtLeast(0),
    "users": AtLeast(1),
    "context": AtLeast(2),
    "headroom": AtLeast(1),
    "pairs": AtLeast(0),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(NAME, __doc__, compiles=True)

    def number(
        group: Any, name: str, default: float, meaning: str, default_meaning: str = "{}", at_most: bool = False
    ) -> None:
        help = f"{meaning} ({RANGES[name]}; default: {default_meaning.format(default)})"
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=type(default), default=None if at_most else default, metavar="N", help=help)

    or_limit = "{}, or the model's limit if that is lower"
    add = parser.add_argument
    models = "model folder, config.json, .gguf file or hub id; only its configuration is read"
    add("--model", required=True, metavar="FOLDER_OR_CONFIG", help=models)
    kinds = "h100x8, h200x1, v5e-8, v6e-16, v5p-2x2x2, v5p-64, cpu, cpux8, ...; the numbers of a TPU slice count chips"
    add("--hardware", required=True, metavar="NAME", help=kinds)
    axes = "devices along the data, model and context axes, e.g. 8x1 or 2x2x2 (default: all on the data axis)"
    add_mesh(parser, "AxB[xC]", axes)
    number(parser, "length", DEFAULT_LENGTH, "tokens per row", or_limit, at_most=True)
    number(parser, "batch", 0, "rows per optimizer step", "0, which is one per data-parallel device and micro-batch")
    modes = "train only the evict head, all weights, or all weights with a borrowed channel (default: %(default)s)"
    add("--mode", choices=get_args(Mode), default="adapter", help=modes)
    number(parser, "accumulate", 1, "micro-batches per optimizer step")
    recomputed = (
        "what the backward pass recomputes; auto: matmuls on a CPU, full on accelerators (default: %(default)s)"
    )
    add("--remat", choices=("auto", "full", "matmuls", "none"), default="auto", help=recomputed)
    attention = "implementation of training attention (default: %(default)s)"
    add("--implementation", choices=get_args(ImplementationName), default="auto", help=attention)
    number(parser, "window", 512, "eviction window of a model that has no DMS policy yet")
    number(parser, "head_units", 0, "hidden units of the evict head of such a model")
    recipe = "0, which is Model-Optimizer's recipe"
    number(parser, "steps_per_cr", 0.0, "optimizer steps that raise the compression ratio by 1", recipe)
    add("--analytic", action="store_true", help="estimate instead of compiling")
    add("--json", action="store_true", help="print the plan as one JSON object")

    server = parser.add_argument_group("plan a server instead of a retrofit")
    inference = (
        "plan a server; of the options above, only --model, --hardware, --mesh, --window, --head-units and --json count"
    )
    server.add_argument("--inference", action="store_true", help=inference)
    memory = "memory for weights and caches on all devices together, e.g. 80GiB (default: that of the hardware)"
    server.add_argument("--memory", default="", metavar="SIZE", help=memory)
    number(server, "users", 1, "rows that are decoded together")
    number(server, "context", DEFAULT_CONTEXT, "tokens per row", or_limit, at_most=True)
    number(
        server,
        "headroom",
        1.1,
        "pages allocated / pages that the pairs behind the window need; above 1, because texts differ",
    )
    live = "plan with the pairs that each KV head really keeps, instead of target ratios: a file written by "
    live += "`infer.evaluate --tasks kept --live-counts FILE`"
    server.add_argument("--live", default="", metavar="FILE", help=live)
    exact = "also plan the policy dms_budget:N, whose caches hold exactly N pairs per KV head"
    number(server, "pairs", 0, exact, "0, which plans no such arm")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a plan must not occupy an accelerator that others use
    for name, allowed in RANGES.items():
        if (value := getattr(options, name)) is not None:
            check_range(f"--{name.replace('_', '-')}", value, allowed)
    from dms_jax.training.planning import plan_text

    hardware, _ = hardware_and_mesh(options)
    start_devices(hardware.count if hardware.kind == "cpu" else 1)
    if options.inference:
        server = server_plan(options)
        print(json.dumps(plan_text.serving_json(server)) if options.json else plan_text.serving_text(server))
    else:
        plan = retrofit_plan(options)
        print(json.dumps(plan_text.step_json(plan)) if options.json else plan_text.step_text(plan))
    return 0


def hardware_and_mesh(options: argparse.Namespace) -> "tuple[Hardware, tuple[int, ...]]":
    """Parse --hardware and --mesh, which must have the same number of devices."""
    from dms_jax.planning.hardware import hardware_of
    from dms_jax.sharding import parse_mesh

    hardware = hardware_of(options.hardware)
    mesh = parse_mesh(options.mesh) if options.mesh else (hardware.count, 1)
    if math.prod(mesh) != hardware.count:
        raise ConfigError(
            f"--mesh {options.mesh} needs {math.prod(mesh)} devices, but {hardware.name} has {hardware.count}; use "
            f"--mesh {hardware.count}x1"
        )
    return hardware, mesh


def read_config(path: str, window: int, mode: str, head_units: int = 0) -> ModelConfig:
    """Read the configuration of a model, and add the DMSConfig that `mode` trains.

    `path`: a folder, a config file, a .gguf file or a hub id. `window`, `head_units`: for a model without a DMSConfig.
    """
    from dms_jax.hf.folder import read_config as read

    return with_trained_policy(read(path), window, mode, head_units)


def with_trained_policy(config: ModelConfig, window: int, mode: str, head_units: int = 0) -> ModelConfig:
    """Add the DMSConfig that `mode` trains to a model's configuration; arguments as in `read_config`."""
    dms = config.dms or DMSConfig(window_size=window, head_units=head_units)
    return config.with_dms(dataclasses.replace(dms, variant="borrowed") if mode == "borrowed" else dms)


def setting_of(options: argparse.Namespace) -> "StepSetting":
    """Make the setting that the options ask for, with the defaults of a retrofit for all other keys."""
    from dms_jax.hf.folder import read_config as read
    from dms_jax.platform_defaults import platform_defaults
    from dms_jax.training.planning.step_setting import StepSetting

    hardware, mesh = hardware_and_mesh(options)
    base = read(options.model)
    model = with_trained_policy(base, options.window, options.mode, options.head_units)
    step = RetrofitConfig(
        mode=options.mode,
        length=min(DEFAULT_LENGTH, model.context_limit()[0]) if options.length is None else options.length,
        batch_size=options.batch or mesh[0] * options.accumulate,
        accumulate=options.accumulate,
        remat=options.remat if options.remat != "auto" else platform_defaults(hardware.platform).remat,
    ).resolved(has_policy=base.dms is not None)
    model = dataclasses.replace(model, implementation=options.implementation)
    setting = StepSetting(model, hardware, mesh, step)
    if (problem := setting.problem()) is not None:
        raise ConfigError(problem)
    return setting


def retrofit_plan(options: argparse.Namespace) -> "RetrofitPlan":
    from dms_jax.planning.figures import Figure
    from dms_jax.planning.hardware import missing_compiler
    from dms_jax.training.planning.nearby_settings import nearest
    from dms_jax.training.planning.plan_text import RetrofitPlan
    from dms_jax.training.planning.step_plan import planned, ramp_figures

    setting = setting_of(options)
    hardware = setting.hardware
    not_compiled = ""
    if options.analytic:
        not_compiled = f"{hardware.name}: --analytic was given"
    elif hardware.kind != "cpu" and (why := missing_compiler(options.hardware)) is not None:
        not_compiled = f"{hardware.name}: {why}"
    analytic = bool(not_compiled)
    say(f"{'estimating' if analytic else 'compiling'} a step for {hardware.name}")
    plan = planned(setting, analytic)
    seconds = next(figure for figure in plan.figures if figure.name == "seconds_per_step")
    figures = [*plan.figures, *ramp_figures(setting, seconds, options.steps_per_cr)]
    alternative = None if plan.value("fits") else nearest(setting, analytic, say)
    figures.append(Figure("nearest", alternative, "", "analytic" if analytic else "compiled"))
    if alternative is None and not plan.value("fits"):
        state = plan.value("bytes_per_device.weights") + plan.value("bytes_per_device.optimizer")
        num_devices = math.ceil(hardware.count * state / plan.value("memory_per_device"))
        note = "analytic: number of devices whose memory holds the shards of weights and optimizer state alone"
        figures.append(Figure("least_devices", num_devices, "devices", "analytic", note=note))
    return RetrofitPlan(options.model, setting, plan.implementation, not_compiled, figures)


def server_plan(options: argparse.Namespace) -> "ServingPlan":
    from dms_jax.planning.serving_plan import parse_bytes, serving_plan
    from dms_jax.training.planning.step_plan import RATIOS

    hardware, mesh = hardware_and_mesh(options)
    budget = parse_bytes(options.memory) if options.memory else None
    config = read_config(options.model, options.window, options.mode, options.head_units)
    context = min(DEFAULT_CONTEXT, config.context_limit()[0]) if options.context is None else options.context
    budgets = exact_budgets(options.model, config, options.pairs, context) if options.pairs else None
    kept = measured_fraction(options.live, config) if options.live else None
    return serving_plan(config, hardware, mesh, budget, options.users, context, options.headroom, RATIOS, budgets, kept)


def measured_fraction(path: str, config: ModelConfig) -> "np.ndarray":
    """Return the fraction [L K] of pairs behind the window that the heads of this model keep, from a file of counts."""
    from dms_jax.evaluation.live_counts import read_live_counts

    counts = read_live_counts(path)
    counts.check_heads(path, config, "measure this model with `infer.evaluate --tasks kept --live-counts FILE`")
    return counts.kept_fraction(path, config.require_dms().window_size)


def exact_budgets(path: str, config: ModelConfig, pairs: int, context: int) -> tuple[tuple[int, ...], ...]:
    """Return the budgets of the policy `dms_budget` per layer and KV head: those of the folder, or equal ones."""
    from dms_jax.hf.head_budget_file import load_head_shares
    from dms_jax.policies import BudgetedEviction

    with naming("--pairs"):
        policy = BudgetedEviction(config.require_dms(), pairs)
    shares = load_head_shares(path, config)
    if shares is not None:
        return shares.budgets(pairs, context, policy.window_size)
    return ((pairs,) * config.num_kv_heads,) * config.num_layers


def say(text: str) -> None:
    """Report progress on stderr, because stdout is for the plan."""
    print(text, file=sys.stderr, flush=True)

"""Will a retrofit fit, and how long will it take? Or a server: how many users, how fast? Needs no weights and none of the hardware.

    python -m train.plan --model configs/models/qwen3-8b.json --hardware h100x8 --mesh 8x1 --length 32768 --batch 8
    python -m train.plan --model FOLDER --hardware v5e-8 --mesh 4x2 --length 4096 --batch 8 --mode full --json
    python -m train.plan --model FOLDER --hardware h200x1 --inference --users 8 --context 32768

--model is a folder with config.json, such a file alone, a .gguf file or a hub id. With the compilers of the hardware at hand (pip install
"dms-jax[cuda]" or "[tpu]") the real step is compiled for it and its memory and collectives are the compiler's; else, and with --analytic, they
are an estimate. Each figure says which: compiled, analytic, measured, assumed. Times are a roofline over what such hardware was seen to reach; on
a `cpu` they are measured. Exit code 0 whether it fits or not; what would fit is said.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from dms_jax.command import Parser, start_devices
from dms_jax.config import DMSConfig, ImplementationName, ModelConfig
from dms_jax.errors import ConfigError

if TYPE_CHECKING:
    from dms_jax.planning.hardware import Hardware
    from dms_jax.training.planning.step_plan import Setting

NAME = "plan"
STEPS_A_UNIT, TOKENS_A_STEP = 34, 262144  # of CR: Model-Optimizer's recipe for Qwen3-8B, configs/train/qwen3_8b.yaml
RATIOS = (2, 4, 8)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from typing import get_args

    parser = Parser(NAME, __doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_CONFIG")
    parser.add_argument(
        "--hardware",
        required=True,
        metavar="NAME",
        help="h100x8, h200x1, v5e-8, v6e-16, v5p-2x2x2, v5p-64, cpu, cpux8 ...; of a TPU slice the chips",
    )
    parser.add_argument(
        "--mesh", metavar="AxB[xC]", help="data x model devices, or data x model x context; default: all data"
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row (default %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=0, help="rows of an optimizer step; default: one per data-parallel device"
    )
    parser.add_argument("--mode", choices=("adapter", "full", "borrowed"), default="adapter")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument(
        "--remat", choices=("auto", "full", "matmuls", "none"), default="auto", help="what backward computes again"
    )
    parser.add_argument("--implementation", choices=get_args(ImplementationName), default="auto", help="of attention")
    parser.add_argument(
        "--window", type=int, default=512, help="of the policy, for a model without one (default %(default)s)"
    )
    parser.add_argument(
        "--steps-per-cr",
        type=float,
        default=0.0,
        help=f"steps a unit of CR; 0: {STEPS_A_UNIT}, more where a step has fewer than {TOKENS_A_STEP} tokens",
    )
    parser.add_argument("--analytic", action="store_true", help="do not compile")
    serving = parser.add_argument_group("a server instead of a retrofit")
    serving.add_argument("--inference", action="store_true")
    serving.add_argument(
        "--memory", default="", metavar="80GiB", help="for weights and caches of all devices; default: the hardware's"
    )
    serving.add_argument("--users", type=int, default=1, help="rows that are decoded together")
    serving.add_argument("--context", type=int, default=32768, help="tokens of a row")
    serving.add_argument(
        "--headroom", type=float, default=1.5, help="capacity over mean live pairs: heads differ (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a plan takes no accelerator away from others
    for name, least in {
        "length": 2,
        "batch": 0,
        "accumulate": 1,
        "window": 0,
        "users": 1,
        "context": 2,
        "steps_per_cr": 0,
        "headroom": 1,
    }.items():
        if not least <= getattr(options, name) < float("inf"):
            raise ConfigError(
                f"--{name.replace('_', '-')} must be at least {least}, and finite; got {getattr(options, name)}"
            )
    from dms_jax.training.planning.plan_text import inference_text, step_text

    hardware, mesh = devices_named(options)
    start_devices(hardware.count if hardware.kind == "cpu" else 1)
    if options.inference:
        from dms_jax.planning.serving_plan import parse_bytes, serving_plan

        budget = parse_bytes(options.memory) if options.memory else None
        config = read_config(options.model, options.window, options.mode)
        plan = serving_plan(config, hardware, mesh, budget, options.users, options.context, options.headroom, RATIOS)
    else:
        plan = retrofit_plan(options)
    print(json.dumps(plan) if options.json else inference_text(plan) if options.inference else step_text(plan))
    return 0


def devices_named(options: argparse.Namespace) -> "tuple[Hardware, tuple[int, ...]]":
    """--hardware and --mesh. Raises ConfigError when one does not fit the other."""
    from dms_jax.planning.hardware import hardware_of
    from dms_jax.sharding import parse_mesh

    hardware = hardware_of(options.hardware)
    mesh = parse_mesh(options.mesh) if options.mesh else (hardware.count, 1)
    if math.prod(mesh) != hardware.count:
        raise ConfigError(
            f"mesh {options.mesh} needs {math.prod(mesh)} devices, {hardware.name} has {hardware.count}; use --mesh {hardware.count}x1"
        )
    return hardware, mesh


def setting_of(options: argparse.Namespace) -> "Setting":
    """What is to be planned. Raises ConfigError for what cannot be run."""
    from dms_jax.training.planning.step_plan import Setting

    hardware, mesh = devices_named(options)
    config = dataclasses.replace(
        read_config(options.model, options.window, options.mode), implementation=options.implementation
    )
    remat = options.remat if options.remat != "auto" else "matmuls" if hardware.kind == "cpu" else "full"
    setting = Setting(
        config,
        hardware,
        mesh,
        options.mode,
        options.length,
        options.batch or mesh[0] * options.accumulate,
        options.accumulate,
        remat,
    )
    if (problem := setting.problem()) is not None:
        raise ConfigError(problem)
    return setting


def read_config(path: str, window: int, mode: str) -> ModelConfig:
    """Of a folder, a config file, a .gguf file or a hub id, with the policy that `mode` trains."""
    from dms_jax.hf.folder import read_config as read

    config = read(path)
    dms = config.dms or DMSConfig(window_size=window)
    return config.with_dms(dataclasses.replace(dms, variant="borrowed") if mode == "borrowed" else dms)


def retrofit_plan(options: argparse.Namespace) -> dict:
    from dms_jax.planning.hardware import missing_compiler
    from dms_jax.training.planning.nearby_settings import nearest
    from dms_jax.training.planning.step_plan import planned

    setting = setting_of(options)
    hardware = setting.hardware
    why_analytic = (
        "--analytic was given"
        if options.analytic
        else None
        if hardware.kind == "cpu"
        else missing_compiler(options.hardware)
    )
    analytic = why_analytic is not None
    say(f"{'estimating' if analytic else 'compiling'} a step for {hardware.name}")
    found = planned(setting, analytic)
    plan: dict[str, Any] = {
        "model": options.model,
        "hardware": hardware.name,
        "devices": hardware.count,
        **setting.described,
        **found,
    }
    if why_analytic is not None:
        plan["not_compiled"] = f"{hardware.name}: {why_analytic}"
    add_hours(plan, options.steps_per_cr)
    plan["nearest"] = None if plan["fits"] else nearest(setting, analytic, say)
    plan["source"]["nearest"] = "analytic" if analytic else "compiled"
    if not plan["fits"] and plan["nearest"] is None:
        held = plan["bytes_per_device"]
        plan["least_devices"] = math.ceil(
            hardware.count * (held["weights"] + held["optimizer"]) / plan["memory_per_device"]
        )
        plan["source"]["least_devices"] = "analytic: what weights and optimizer alone need, in as many shards"
    return plan


def add_hours(plan: dict, steps_a_unit: float) -> None:
    """Steps and hours from CR 1 to each of RATIOS, validation and checkpoints left out."""
    source, formulas, ramp = plan["source"], plan["formulas"], 1.0
    plan["steps_per_cr"] = steps_a_unit or STEPS_A_UNIT * max(1.0, TOKENS_A_STEP / (plan["batch"] * plan["length"]))
    source["steps_per_cr"] = "given" if steps_a_unit else "analytic"
    formulas["steps_per_cr"] = (
        "given"
        if steps_a_unit
        else f"{STEPS_A_UNIT} x max(1, {TOKENS_A_STEP} / tokens of a step), Model-Optimizer's recipe"
    )
    formulas["hours_to_cr"] = "(CR - 1) x steps_per_cr x seconds_per_step / 3600; the ratio rises linearly from 1"
    if (
        plan["mode"] == "borrowed"
    ):  # retrofit_config: a third of all steps comes before the ratio rises, in nine tenths of the rest
        ramp += (1 / 3) / (0.9 * 2 / 3)
        formulas["hours_to_cr"] += f", x {ramp:.2f}: the channel is freed first"
    for ratio in RATIOS:
        plan[f"hours_to_cr{ratio}"] = (ratio - 1) * ramp * plan["steps_per_cr"] * plan["seconds_per_step"] / 3600
        source[f"hours_to_cr{ratio}"] = source["seconds_per_step"]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

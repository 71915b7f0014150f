"""The result of an inspection: its table, its answer and its JSON. It is plain NumPy, and loads no model."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERATED_KL = 0.02  # nats per token: on text that the model itself might write, a perplexity times exp(0.02)
LEAST = 1e-12  # nats; keeps logarithms finite
LAYERS_PER_LINE = 10


@dataclass(frozen=True)
class Curve:
    """The proxy in nats per token, by ratio, of the rules by which pairs leave."""

    ratios: tuple[float, ...]  # realised at the end of a row
    common: list[float]  # the fitted head, with one threshold for all heads
    equal: list[float]  # the fitted head, with equal budgets for all heads
    oracle: list[float]  # the costs themselves in place of a prediction, with one threshold
    other_shift: list[float]  # a head fitted for the other decision_shift, with one threshold
    kept: np.ndarray  # [R L K] fraction of all pairs that each head keeps, under `common`


@dataclass(frozen=True)
class Measured:
    """The cost of the fitted head with hard decisions on a few held-out rows."""

    cr: float  # the ratio that was asked for
    realised_cr: float
    kl: float  # KL(dense || evicted), nats per token
    kl_p99: float
    perplexity_change: float
    proxy: float  # on the same rows, of one common threshold

    @property
    def factor(self) -> float:
        return max(self.kl, LEAST) / max(self.proxy, LEAST)


@dataclass(frozen=True)
class Inspection:
    """The loss of a model by eviction on held-out rows, before it is trained to evict."""

    model: str
    length: int
    window_size: int
    decision_shift: int
    label_rows: int
    held_out_rows: int
    held_out_tokens: int
    measured_rows: int
    curve: Curve
    measured: list[Measured]

    @property
    def estimated(self) -> list[float]:
        """The KL at each ratio: the proxy times the factor that was measured, interpolated between ratios."""
        log_factor = np.interp(
            np.log(self.curve.ratios), np.log([m.cr for m in self.measured]), [np.log(m.factor) for m in self.measured]
        )
        return [float(value) for value in np.array(self.curve.common) * np.exp(log_factor)]

    @property
    def bearable_cr(self) -> float | None:
        """The ratio up to which the estimate stays within TOLERATED_KL; None if the lowest one already exceeds it."""
        estimated, ratios = self.estimated, self.curve.ratios
        over = next((i for i, kl in enumerate(estimated) if not kl <= TOLERATED_KL), None)  # also NaN
        if over is None:
            return ratios[-1]
        if over == 0:
            return None
        kls = np.log(np.maximum(estimated[over - 1 : over + 1], LEAST))
        return float(np.exp(np.interp(np.log(TOLERATED_KL), kls, np.log(ratios[over - 1 : over + 1]))))

    def nominal_cr(self, realised_cr: float) -> float:
        """Return the nominal ratio, `dms.target_cr`, at which rows realise a ratio; the inverse of `realised_cr`."""
        evicted = (1 - 1 / realised_cr) * self.length / (self.length - 1 - self.window_size)
        return 1 / max(1 - evicted, LEAST)

    def shown_ratio(self) -> int:
        """Return the index of the ratio whose shares are shown: CR 4, or the highest one below it."""
        return max(i for i, cr in enumerate(self.curve.ratios) if cr <= 4 or i == 0)

    def as_json(self) -> dict[str, Any]:
        curve = self.curve
        names = ("common", "equal", "oracle", "other_shift")
        return {
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(self)
                if field.name not in ("curve", "measured")
            },
            "ratios": list(curve.ratios),
            "proxy": {name: getattr(curve, name) for name in names},
            "kl_estimated": self.estimated,
            "measured": [dataclasses.asdict(m) | {"factor": m.factor} for m in self.measured],
            "tolerated_kl": TOLERATED_KL,
            "bearable_cr": self.bearable_cr,
            "kept_per_head": {
                f"{cr:g}": kept.round(4).tolist() for cr, kept in zip(curve.ratios, curve.kept, strict=True)
            },
        }

    def table(self) -> str:
        """Return what the command prints: the curve, the shares of layers, and the answer."""
        other = 1 - self.decision_shift
        factors = " and ".join(f"{m.factor:.1f} at CR {m.cr:g}" for m in self.measured)
        lines = [
            f"{self.model}, before training",
            f"rows of {self.length} tokens, window {self.window_size}, shift {self.decision_shift}; head fitted to "
            f"{self.label_rows} rows, tried on {self.held_out_rows} held-out rows",
            "",
            *self._curve(f"shift {other}"),
            "",
            "threshold: one for all heads. equal: the same budget for each head. oracle: a head that knew each cost.",
            f"shift {other}: a head for dms.decision_shift={other}.",
            "The proxy adds up what each pair costs alone. It ranks the columns, but lies below the KL: the KL is the",
            f"proxy times {factors}, which gives the estimates between and beyond.",
            f"Measured: on {self.measured_rows} of the held-out rows, with hard decisions.",
            "",
            *self._layers(),
            "",
            self.answer(),
        ]
        return "\n".join(lines)

    def _curve(self, other: str) -> list[str]:
        """Return the lines of the curve; `other` is the title of the column of the other shift."""
        curve, measured = self.curve, {m.cr: m for m in self.measured}
        proxies = "".join(f"{name:>11}" for name in ("threshold", "equal", "oracle", other))
        kls = f"{'estimated':>13}{'measured':>10}{'p99':>8}{'ppl':>9}"
        lines = [
            f"{'':>6}{'proxy of the KL, nats per token':>44}{'KL, nats per token':>31}",
            f"{'CR':>6}{proxies}{kls}",
        ]
        columns = curve.common, curve.equal, curve.oracle, curve.other_shift, self.estimated
        for cr, *values, estimated in zip(curve.ratios, *columns, strict=True):
            line = f"{cr:>6.2f}" + "".join(f"{value:>11.5f}" for value in values) + f"{estimated:>13.4f}"
            if (m := measured.get(cr)) is not None:
                line += f"{m.kl:>10.4f}{m.kl_p99:>8.3f}{m.perplexity_change:>+9.2%}"
            lines.append(line)
        return lines

    def _layers(self) -> list[str]:
        index = self.shown_ratio()
        shares = 1 - self.curve.kept[index].mean(axis=1)
        lines = [f"evicted share of the pairs of each layer at CR {self.curve.ratios[index]:g}"]
        for first in range(0, len(shares), LAYERS_PER_LINE):
            some = shares[first : first + LAYERS_PER_LINE]
            name = f"layers {first}-{first + len(some) - 1}"
            lines.append(f"{name:>14}" + "".join(f"{share:>6.2f}" for share in some))
        return lines

    def answer(self) -> str:
        """Return the sentence that says which ratio the model bears."""
        bearable, lowest, highest = self.bearable_cr, self.curve.ratios[0], self.curve.ratios[-1]
        ratio = f"less than CR {lowest:g}" if bearable is None else f"CR {bearable:.1f}"
        if bearable == highest:
            ratio = f"at least CR {highest:g}"
        answer = (
            f"Answer: before training, this model bears {ratio} on this text at a KL of {TOLERATED_KL:g} nats per\n"
            f"token (about {TOLERATED_KL:.0%} of perplexity). Training lowers the KL further."
        )
        if bearable is not None:
            answer += f" dms.target_cr={self.nominal_cr(bearable):.2g} realises this ratio."
        return answer

"""`StepSetting`, the object that is planned: one retrofit step on named hardware."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.core import losses
from dms_jax.planning.hardware import Hardware
from dms_jax.planning.memory_estimate import MeshSizes, MicroBatch
from dms_jax.training.retrofit_config import RetrofitConfig


@dataclass(frozen=True)
class StepSetting:
    """The model, hardware, mesh and configuration of one retrofit step."""

    model: ModelConfig  # including its DMSConfig
    hardware: Hardware
    mesh: tuple[int, ...]  # data, model[, context]
    step: RetrofitConfig  # batch_size and remat are resolved: neither 0 nor "auto"

    def with_step(self, **changes: Any) -> "StepSetting":
        """Return a copy with changed fields of `step`."""
        return dataclasses.replace(self, step=dataclasses.replace(self.step, **changes))

    @property
    def mesh_sizes(self) -> MeshSizes:
        return MeshSizes(*self.mesh)

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.step.batch_size * self.step.length

    @property
    def has_labels(self) -> bool:
        """Whether a label pass comes before the first step."""
        return self.step.init == "fisher"

    @property
    def micro_batch(self) -> MicroBatch:
        return MicroBatch(
            mesh=self.mesh_sizes,
            rows=self.step.batch_size // (self.mesh_sizes.data * self.step.accumulate),
            length=self.step.length,
            logits_chunk=losses.CHUNK,
            mode=self.step.mode,
            remat=self.step.remat,
            platform=self.hardware.platform,
            accumulates=self.step.accumulate > 1,
        )

    @property
    def described(self) -> dict[str, Any]:
        """The settings that `nearby_settings` may change, and the mode, by their keys in a plan."""
        return {
            "mesh": "x".join(map(str, self.mesh)),
            "mode": self.step.mode,
            "length": self.step.length,
            "batch": self.step.batch_size,
            "accumulate": self.step.accumulate,
            "remat": self.step.remat,
        }

    def problem(self) -> str | None:
        """Return why this step cannot be run at all, or None if it can."""
        sizes, length, batch = self.mesh_sizes, self.step.length, self.step.batch_size
        limit, name = self.model.context_limit()
        if length > limit:
            return f"length {length} exceeds the model's {name} of {limit}; use length <= {limit}"
        if length % sizes.context:
            return (
                f"length {length} must be a multiple of {sizes.context}, the number of parts into which the mesh "
                "splits a row"
            )
        multiple = sizes.data * self.step.accumulate
        if batch % multiple:
            parts = f"{sizes.data} data-parallel devices x {self.step.accumulate} micro-batches"
            return f"batch {batch} must be a multiple of {multiple}: {parts}"
        return None

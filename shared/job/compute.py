"""Settings of the machine at hand; they belong to each site and are not part of the job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.job.parsing import Section


class ComputeConfig(Section):
    """Settings of the machine at hand; they change speed, never privacy."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is bfloat16 autocast where the processor has it in hardware, else float32."""
    micro_batch_tokens: int = Field(default=2048, ge=1)
    """Padded tokens per forward pass inside a logical batch."""
    gradient_checkpointing: bool = False
    """Keep only what enters each trained layer and compute the rest once more in the backward pass (Chen et al. 2016): a third to
    a half slower, in a fraction of the memory. Gradients are the same to the last bit."""
    cache_frozen_layers: bool = True
    """Keep the activations below the first adapted layer; exact, costs 4 bytes (2 in bfloat16) x hidden size per token."""
    cache_megabytes: int = Field(default=1024, ge=0)
    """Upper bound of that cache in memory; what has no room here or in the file is computed afresh in every step."""
    cache_file_megabytes: int = Field(default=0, ge=0)
    """Upper bound of a sealed file for what has no room in memory; nothing outlives the process. 0: no file."""
    cache_file_folder: Path | None = None
    """Where that file lies, an absolute path on a disk; None is the system's temporary folder, which may be memory itself."""

    @model_validator(mode="before")
    @classmethod
    def _check_place(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "processes" in raw and "processes" not in cls.model_fields:
            raise ValueError(
                "compute.processes is for the site.toml of a real site; simulations and coordinators compute in one process. "
                "Remove it here"
            )
        return raw

    @field_validator("cache_file_folder")
    @classmethod
    def _check_folder(cls, folder: Path | None) -> Path | None:
        if folder is not None and not folder.is_absolute():
            raise ValueError("cache_file_folder is relative; give an absolute path, for example /srv/silotune")
        return folder

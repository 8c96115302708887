"""The types of single settings, each with its range."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared.limits import (
    MAX_EPSILON,
    MAX_NOISE_MULTIPLIER,
    MAX_VALUE,
    MIN_DELTA,
    MIN_EPSILON,
    MIN_NOISE_MULTIPLIER,
    MIN_SAMPLE_RATE,
)

Probability = Annotated[float, Field(gt=0, le=1)]
SampleRate = Annotated[float, Field(ge=MIN_SAMPLE_RATE, le=1)]
NoiseMultiplier = Annotated[float, Field(ge=MIN_NOISE_MULTIPLIER, le=MAX_NOISE_MULTIPLIER)]
Epsilon = Annotated[float, Field(ge=MIN_EPSILON, le=MAX_EPSILON)]
Delta = Annotated[float, Field(ge=MIN_DELTA, lt=1)]
Value = Annotated[float, Field(ge=-MAX_VALUE, le=MAX_VALUE)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Unit = Literal["record", "patient", "customer"]
PERSON_UNITS: tuple[Unit, ...] = ("patient", "customer")
"""Units that are a person with all their records: one mechanism, and the word that the statement uses."""
ImageSide = Annotated[int, Field(ge=4, le=1024)]

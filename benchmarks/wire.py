"""Bytes of one site's update for a round, against the float32 PEFT state of both factors and the head."""

from __future__ import annotations

import secrets
import tomllib
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save
from torch import Tensor

import simulations
from benchmarks import peers
from benchmarks.harness import Findings, Tell
from benchmarks.peers import Classifier, Train
from shared.job.federation import UpdateDtype
from shared.job.job import Job
from shared.job.parsing import parse
from shared.tensors import adapters
from shared.wire.updates import encode_update

_SHIPPED = "demo.toml"
_JOB_SECTIONS = {"name", "model", "lora", "task", "training", "privacy", "aggregation", "federation"}


def run(tell: Tell, *, runs: int = 5) -> Findings:
    """Encode `runs` updates of every job."""
    raw = tomllib.loads((Path(simulations.__path__[0]) / _SHIPPED).read_text(encoding="utf-8"))
    shipped = parse(Job, {key: raw[key] for key in raw.keys() & _JOB_SECTIONS}, source=_SHIPPED)
    jobs = {
        _SHIPPED: shipped,
        **{
            f"all layers, train {train}, {dtype}": peers.same_job(train=train, federation={"update_dtype": dtype})
            for train in get_args(Train)
            for dtype in get_args(UpdateDtype)
        },
    }
    findings = Findings()
    for name, job in jobs.items():
        tell(name)
        shapes = adapters.shapes_of(peers.same_runtime(job).initial)
        theirs = peft_bytes(Classifier(last_layers=job.lora.last_layers, train="both"))
        ours = []
        for seed in range(runs):
            generator = torch.Generator().manual_seed(seed)
            delta = {key: 0.01 * torch.randn(shape, generator=generator) for key, shape in sorted(shapes.items())}
            ours.append(len(encoded_update(job, delta)))
        ratios = [mine / theirs for mine in ours]
        findings.details[name] = {"ours, bytes": ours, "PEFT A, B and head, bytes": theirs, "ours / PEFT": ratios}
        if name == _SHIPPED:
            findings.headlines["uplink_bytes_ratio"] = ratios
    return findings


def encoded_update(job: Job, delta: dict[str, Tensor]) -> bytes:
    """Return what a site sends for `delta` under a job."""
    return encode_update(delta, job.federation.update_dtype, salt=secrets.token_hex(16)).data


def peft_bytes(model: Classifier) -> int:
    """Return the size of the safetensors file with all LoRA factors and the head in float32."""
    from peft import get_peft_model_state_dict

    state = {
        **get_peft_model_state_dict(model.peft_model),
        **{f"head.{k}": v for k, v in model.head.state_dict().items()},
    }
    return len(save({key: value.float().contiguous() for key, value in state.items()}))

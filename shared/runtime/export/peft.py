"""What was trained as a folder: an adapter in PEFT's own format with the head beside it; see `image_folder` for other networks.

`PeftModel.from_pretrained(backbone, folder)` loads it without Silotune; the folder's README shows the few lines that
apply the head (test: tests/integration/test_independent.py runs exactly those lines).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.errors import AdapterError, RunError
from shared.files.atomic import sync_folder
from shared.job.job import Job
from shared.models.heads import PooledClassifier
from shared.models.images import ImageModel
from shared.models.tunable import RESIDUAL, TunableModel
from shared.runtime.calibration import CALIBRATION_FILE, save_temperature
from shared.runtime.export.images import write_network
from shared.runtime.runtime import Runtime
from shared.tensors import adapters

ADAPTER_FILE, CONFIG_FILE, HEAD_FILE = "adapter_model.safetensors", "adapter_config.json", "head.safetensors"
_STATE_FILE = "silotune_state.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"

_CLASSIFIER_README = """# Tuned adapter

Load it with transformers and PEFT alone:

```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

backbone = BACKBONE  # folder or hub id of {backbone}
tokenizer = AutoTokenizer.from_pretrained(backbone, split_special_tokens=True)  # as in training
model = PeftModel.from_pretrained(AutoModel.from_pretrained(backbone), ADAPTER).eval()
head = load_file(ADAPTER + "/head.safetensors")
batch = tokenizer(TEXTS, truncation=True, max_length={max_length}, padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
pooled = {pooled}
pooled = torch.nn.functional.layer_norm(pooled, pooled.shape[-1:])
logits = pooled @ head["linear.weight"].T + head["linear.bias"]
labels = {labels}
```
"""
_GENERATOR_README = """# Tuned adapter

Load it with transformers and PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

backbone = BACKBONE  # folder or hub id of {backbone}
tokenizer = AutoTokenizer.from_pretrained(backbone, split_special_tokens=True)  # as in training
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbone), ADAPTER).eval()
```
"""


_ROUNDED = """
The run computed with the backbone's weights rounded to 8 bits (`model.backbone_bits`). On the float weights that these lines
load, outputs are a little other; `silotune export --to merged` writes the rounded ones, where the family has that form.
"""


def save_peft_folder(
    folder: Path, runtime: Runtime, job: Job, state: Mapping[str, Tensor], *, temperature: float = 1.0
) -> None:
    """Write into `folder`: PEFT's two files and the head, or a network's weights; Silotune's exact state, and a README.

    Args:
        folder: its files of these names are replaced, one after the other; whatever else lies there stays. A kill
            between two of them leaves older ones beside newer ones, and a resumed run writes all of them again.
        state: global adapter.
        temperature: by which logits are divided before they are probabilities; written if it is not 1.

    Raises:
        RunError: if the disk is full or the folder cannot be written; `folder` keeps its old content.
    """
    runtime.load(state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All files are complete on the same disk before the first one is replaced.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".silotune-") as temporary:
            _write_files(Path(temporary), runtime, job, state)
            if temperature != 1 or (folder / CALIBRATION_FILE).exists():
                save_temperature(Path(temporary), temperature)
            _replace_files(Path(temporary), folder)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"could not write {folder}: {error}. Free space or mend the permissions, then resume the run."
        ) from error


def _write_files(temporary: Path, runtime: Runtime, job: Job, state: Mapping[str, Tensor]) -> None:
    if isinstance(runtime.model, ImageModel):
        write_network(temporary, runtime.model, job)
    else:
        _write_adapter(temporary, runtime, job, state)
    save_file({n: t.contiguous() for n, t in state.items()}, temporary / _STATE_FILE)


def _write_adapter(temporary: Path, runtime: Runtime, job: Job, state: Mapping[str, Tensor]) -> None:
    factors, rank, alpha = _peft_factors(runtime, job, state)
    # PEFT names a language model's transformer one level deeper than a bare backbone.
    begin = "base_model.model.transformer." if runtime.task.causal_lm else "base_model.model."
    named = {name.replace("base_model.model.", begin, 1): tensor.contiguous() for name, tensor in factors.items()}
    save_file(named, temporary / ADAPTER_FILE, metadata={"format": "pt"})
    (temporary / CONFIG_FILE).write_text(
        json.dumps(_peft_config(runtime, job, rank, alpha), indent=2, sort_keys=True) + "\n"
    )
    head = {n.removeprefix("head."): t.contiguous() for n, t in state.items() if n.startswith("head.")}
    if isinstance(own := _tunable(runtime).head, PooledClassifier):
        head["linear.weight"], head["linear.bias"] = own.folded()
    if head:
        save_file(head, temporary / HEAD_FILE, metadata={"format": "pt"})
    (temporary / "README.md").write_text(_readme(runtime, job))


def _replace_files(temporary: Path, folder: Path) -> None:
    """Move the files in `temporary` into `folder`, in the place of older ones of the same names."""
    for new in sorted(temporary.iterdir()):
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, folder / new.name)
    sync_folder(folder)


def load_state(folder: Path, runtime: Runtime, job: Job) -> dict[str, Tensor]:
    """Return the global adapter that `save_peft_folder` wrote, checked against the job.

    Raises:
        AdapterError: if it is missing, malformed, or belongs to another job.
    """
    path = folder / _STATE_FILE
    expected = runtime.global_shapes(job.averages_products)
    try:
        adapters.check_length(path.stat().st_size, expected)
        state: dict[str, Tensor] = load_file(path)
        adapters.check(state, expected)
    except FileNotFoundError:
        raise AdapterError(
            f"{folder} holds no tuned adapter ({path.name} is missing): it is written when a run ends. Finish the run first, "
            "or give the folder of a finished one."
        ) from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read ({type(error).__name__}); give the run's adapter folder.") from None
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    return state


def _peft_factors(runtime: Runtime, job: Job, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int, float]:
    """Return (factors by PEFT's keys, rank, alpha); residuals are folded in by an exact factorisation."""
    modules = runtime.model.lora_factors()
    residuals = {name: state[name + RESIDUAL] for name in modules if name + RESIDUAL in state}
    if not any(bool(r.any()) for r in residuals.values()):
        factors = {}
        for name, pair in modules.items():
            factors[name + _A], factors[name + _B] = (factor.detach().cpu().clone() for factor in pair)
        return factors, job.lora.rank, job.lora.alpha
    parts = {}
    for name, (factor_a, factor_b) in modules.items():
        product = _tunable(runtime).scaling * (factor_b.detach().cpu().double() @ factor_a.detach().cpu().double())
        parts[name] = torch.linalg.svd(product + residuals[name].double(), full_matrices=False)
    rank = max(int((values > 1e-7 * values.max()).sum()) for _, values, _ in parts.values())
    factors = {}
    for name, (left, values, right) in parts.items():
        root = values[:rank].sqrt()
        factors[name + _A] = (root[:, None] * right[:rank]).float()
        factors[name + _B] = (left[:, :rank] * root).float()
    return factors, rank, float(rank)


def _tunable(runtime: Runtime) -> TunableModel:
    assert isinstance(runtime.model, TunableModel)  # noqa: S101 (other models have no adapter)
    return runtime.model


def _peft_config(runtime: Runtime, job: Job, rank: int, alpha: float) -> dict[str, Any]:
    config = _tunable(runtime).peft_model.peft_config["default"].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    plain |= {
        "r": rank,
        "lora_alpha": alpha,
        "base_model_name_or_path": job.model.backbone,
        "revision": job.model.revision,
        "inference_mode": True,
        "fan_in_fan_out": _tunable(runtime).architecture.transposed,
        "task_type": "CAUSAL_LM" if runtime.task.causal_lm else "FEATURE_EXTRACTION",
        "target_modules": sorted(job.lora.target_modules),
    }
    return json.loads(json.dumps(plain, default=str))  # type: ignore[no-any-return]


def _readme(runtime: Runtime, job: Job) -> str:
    return _how_to_load(runtime, job) + (_ROUNDED if job.model.backbone_bits == 8 else "")


def _how_to_load(runtime: Runtime, job: Job) -> str:
    if runtime.task.causal_lm:
        return _GENERATOR_README.format(backbone=job.model.backbone)
    pooled = "hidden[:, 0]" if job.model.pooling == "first" else "(hidden * mask).sum(1) / mask.sum(1)"
    return _CLASSIFIER_README.format(
        backbone=job.model.backbone,
        max_length=job.model.max_length,
        pooled=pooled,
        labels=list(job.task.labels),
    )

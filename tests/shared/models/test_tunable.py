"""Backbones: what is refused, what is trained, and that the split forward pass is the model's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from shared.errors import ConfigError, ModelError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.model import LoraConfig, ModelConfig
from shared.models import backbones, families
from shared.models import tunable as models
from shared.models.backbones import backbone_folder, backbone_sha256, load_backbone, refuse_batch_norm
from shared.models.batches import Batch, Example, collate
from shared.models.families import ARCHITECTURES
from shared.models.heads import init_linear
from shared.models.tunable import attach_adapters
from shared.runtime.runtime import Runtime, load_runtime

CPU = ComputeConfig(device="cpu", precision="float32")


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def padded_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return collate([Example(torch.randint(5, 150, (n,), generator=generator)) for n in (9, 4, 1, 6)])


# --- what is refused, by what it says ---


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["quary"]}, r"'quary', which matches no linear layer.*did you mean 'query'\?"),
        (
            {"target_modules": ["query", "LayerNorm"]},
            "'LayerNorm', which matches no linear layer.*attention.self.query",
        ),
        ({"target_modules": ["word_embeddings"]}, "matches no linear layer"),
        ({"last_layers": 4}, "last_layers is 4, but the backbone has 3 layers"),
    ],
)
def test_adapters_that_fit_nowhere_are_refused(
    classification_job: Callable[..., Job], lora: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_runtime(classification_job(lora=lora), CPU)


def test_a_target_must_match_inside_the_adapted_layers(tiny_bert: Path) -> None:
    backbone, architecture, _ = load_backbone(tiny_bert)
    lora = LoraConfig(target_modules=("layer.0.attention.self.query",), last_layers=1)
    with pytest.raises(ModelError, match=r"'layer\.0\.attention\.self\.query', which matches no linear layer"):
        attach_adapters(backbone, architecture, lora, seed=0)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm1d()])
def test_batch_norm_is_refused_with_its_place(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer))
    with pytest.raises(ModelError, match=r"layer '1\.0' is \w*BatchNorm\w*: it mixes the records"):
        refuse_batch_norm(model)
    refuse_batch_norm(nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4)))


def test_a_backbone_with_batch_norm_is_refused_on_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PatchTSTConfig, PatchTSTModel

    small = PatchTSTConfig(num_input_channels=1, d_model=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8)
    PatchTSTModel(small).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="model_type is 'patchtst'; supported: bert"):
        load_backbone(tmp_path)
    monkeypatch.setattr(families, "ARCHITECTURES", {**ARCHITECTURES, "patchtst": ARCHITECTURES["bert"]})
    with pytest.raises(ModelError, match="BatchNorm1d: it mixes the records"):
        load_backbone(tmp_path)


def test_pickle_weights_are_refused_unread(tiny_bert: Path, tmp_path: Path) -> None:
    folder = copied(tiny_bert, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (trap,))

    torch.save(Trap(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickle files \(pytorch_model.bin\).*safe_serialization"):
        load_backbone(folder)
    assert not trap.exists(), "the pickle was opened"


def test_pickles_beside_safetensors_are_never_opened(tiny_bert: Path, tmp_path: Path) -> None:
    folder = copied(tiny_bert, tmp_path / "both")
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (trap,))

    torch.save(Trap(), folder / "pytorch_model.bin")
    load_backbone(folder)
    assert not trap.exists()


def test_remote_code_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = copied(tiny_bert, tmp_path / "remote")
    edit_config(folder, auto_map={"AutoModel": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelError, match="auto_map"):
        load_backbone(folder)


def test_damaged_folders_are_refused(tiny_bert: Path, tmp_path: Path, classification_job: Callable[..., Job]) -> None:
    from safetensors.torch import load_file, save_file

    unknown = copied(tiny_bert, tmp_path / "unknown")
    edit_config(unknown, model_type="mamba")
    with pytest.raises(ModelError, match=r"model_type is 'mamba'.*a state passes from token to token"):
        load_backbone(unknown)
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        load_backbone(tmp_path)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"no readable config\.json \(RecursionError\)"):
        load_backbone(tmp_path / "list")
    (tmp_path / "list" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        load_backbone(tmp_path / "list")
    cut = copied(tiny_bert, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_backbone(cut)
    # transformers would fill the gap with random weights and go on.
    gap = copied(tiny_bert, tmp_path / "gap")
    weights = load_file(gap / "model.safetensors")
    del weights["encoder.layer.1.attention.self.query.weight"]
    save_file(weights, gap / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lack 1 tensors of the backbone, first 'encoder.layer.1.attention.self.query"
    ):
        load_backbone(gap)
    # transformers would take an empty vocabulary and read every word as unknown.
    mute = copied(tiny_bert, tmp_path / "mute")
    for name in ("vocab.txt", "tokenizer.json"):
        (mute / name).unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_runtime(classification_job(model={"backbone": str(mute)}), CPU)


def test_a_tokenizer_of_another_model_is_refused(
    tiny_bert: Path, tmp_path: Path, classification_job: Callable[..., Job]
) -> None:
    from transformers import BertConfig, BertModel

    folder = copied(tiny_bert, tmp_path / "small")
    config = BertConfig.from_pretrained(tiny_bert, vocab_size=50)
    BertModel(config).save_pretrained(folder)
    with pytest.raises(ModelError, match="do not belong together"):
        load_runtime(classification_job(model={"backbone": str(folder)}), CPU)


def test_texts_cannot_be_longer_than_the_backbone_sees(classification_job: Callable[..., Job]) -> None:
    with pytest.raises(ConfigError, match="max_length is 65, but the backbone has 64 positions for tokens"):
        load_runtime(classification_job(model={"max_length": 65}), CPU)


@pytest.mark.parametrize(("kind", "usable"), [("roberta", 18), ("xlm-roberta", 18), ("camembert", 18), ("bert", 20)])
def test_positions_that_number_no_token_are_not_counted(
    tiny_bert: Path, tmp_path: Path, classification_job: Callable[..., Job], kind: str, usable: int
) -> None:
    from transformers import AutoConfig, AutoModel

    folder = copied(tiny_bert, tmp_path / kind)
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model(kind, vocab_size=200, max_position_embeddings=20, pad_token_id=1, **tiny)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"tokenizer_class": "BertTokenizerFast"}))

    def runtime(max_length: int) -> Runtime:
        return load_runtime(classification_job(model={"backbone": str(folder), "max_length": max_length}), CPU)

    with pytest.raises(ConfigError, match=f"{usable + 1}, but the backbone has {usable} positions for tokens"):
        runtime(usable + 1)
    longest = runtime(usable)
    examples = longest.encode([{"text": "a dull plot " * 20, "label": "bad"}] * 2)
    assert {example.length for example in examples} == {usable}
    assert torch.isfinite(torch.tensor(longest.evaluate(examples).metrics["loss"]))


def test_a_causal_task_needs_a_causal_backbone(language_job: Callable[..., Job], tiny_bert: Path) -> None:
    job = language_job(model={"backbone": str(tiny_bert)}, lora={"target_modules": ["query"]})
    with pytest.raises(ModelError, match="left-to-right"):
        load_runtime(job, CPU)


# --- where a backbone comes from ---


def test_a_hub_id_needs_a_pinned_commit() -> None:
    for revision in (None, "main", "abc", "A" * 40):
        with pytest.raises(ModelError, match=r"needs model\.revision, the 40 hexadecimal digits"):
            backbone_folder(ModelConfig(backbone="someone/bert", revision=revision))


def test_a_hub_that_cannot_be_reached_is_an_error_for_people() -> None:
    with pytest.raises(ModelError, match=r"cannot be had from the hub \(\w+\)\. Check id, revision and network"):
        backbone_folder(ModelConfig(backbone="someone/no-such-model", revision="0" * 40))


def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_id(tmp_path: Path) -> None:
    for backbone in (str(tmp_path / "none"), "./none", "~/no-such-folder-here"):
        with pytest.raises(ModelError, match="is not a folder; check the path"):
            backbone_folder(ModelConfig(backbone=backbone))


def test_embedded_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no embedded backbone 'all-minilm'; did you mean 'all-minilm-l6-v2'"):
        backbone_folder(ModelConfig(backbone="embedded:all-minilm"))
    monkeypatch.setattr(backbones, "EMBEDDED", {"gone": ("no_such_module_here", "MODEL_DIR", "no-such-package")})
    with pytest.raises(ModelError, match="pip install no-such-package"):
        backbone_folder(ModelConfig(backbone="embedded:gone"))


# --- what is computed and trained ---


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("last_layers", [1, 2, None])
def test_frozen_part_plus_adapted_part_is_the_models_own_forward(
    kind: str, last_layers: int | None, tiny_bert: Path, tiny_gpt2: Path
) -> None:
    from transformers import AutoModel

    folder = {"bert": tiny_bert, "gpt2": tiny_gpt2}[kind]
    backbone, architecture, config = load_backbone(folder)
    lora = LoraConfig(rank=4, target_modules=("query",) if kind == "bert" else ("c_attn",), last_layers=last_layers)
    peft_model, first = attach_adapters(backbone, architecture, lora, seed=3)

    class Hidden(nn.Module):
        def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return hidden

    model = models.TunableModel(peft_model, architecture, lora, first, Hidden())
    assert first == config.num_hidden_layers - (last_layers or config.num_hidden_layers)
    reference = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    batch = padded_batch()
    with torch.no_grad():
        ours = model(batch)
        mask = batch.attention_mask.long()
        theirs = reference(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state
        cached = model.embed_frozen(batch.input_ids, batch.attention_mask)
        batch.hidden = cached[batch.attention_mask].unsqueeze(0)
        from_cache = model(batch)
    real = batch.attention_mask
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-5)
    assert torch.equal(from_cache[real], ours[real])
    # A difference must be seen: the adapter is no no-op once B is not zero.
    with torch.no_grad():
        for _, factor_b in model.lora_factors().values():
            factor_b.fill_(0.5)
        assert not torch.allclose(model(batch)[real], theirs[real], atol=1e-2)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_frozen_weights_held_in_bfloat16_give_what_autocast_gives(
    kind: str, classification_job: Callable[..., Job], language_job: Callable[..., Job]
) -> None:
    """To the last bit; adapted layers and all that is trained stay in float32."""
    job = (classification_job if kind == "bert" else language_job)(seed=31)
    plain = load_runtime(job, CPU).model
    held = load_runtime(job, CPU.model_copy(update={"precision": "bfloat16"})).model
    assert isinstance(held, models.TunableModel)
    batch = padded_batch()
    held._even_rows = False  # other shapes may be rounded otherwise
    for model in (plain, held):
        with torch.no_grad():
            for _, factor_b in model.lora_factors().values():
                factor_b.fill_(0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(held(batch), plain(batch))
    # Even rows change nothing but rounding.
    outputs = []
    for held._even_rows in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            outputs.append(held(batch).float())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2**-6, atol=2**-6)

    frozen = [
        (name, parameter)
        for name, parameter in held.layers().named_parameters()
        if parameter.ndim == 2 and "lora_" not in name and "base_layer" not in name
    ]
    # Six and four in each of three layers, less what two of them adapt.
    assert len(frozen) == {"bert": 14, "gpt2": 10}[kind]
    assert {parameter.dtype for _, parameter in frozen} == {torch.bfloat16}
    names = {name for name, parameter in held.layers().named_parameters() if parameter.dtype == torch.bfloat16}
    kept = {name: parameter for name, parameter in held.layers().named_parameters() if name not in names}
    assert {parameter.dtype for parameter in kept.values()} == {torch.float32}
    assert {name.removesuffix(".weight") for name, _ in frozen} == {name.rsplit(".", 1)[0] for name in names}


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_where_the_head_alone_is_trained_one_vector_of_each_text_is_cached(
    kind: str,
    pooling: str,
    classification_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    tiny_bert: Path,
    tiny_gpt2: Path,
) -> None:
    backbone, target = {"bert": (tiny_bert, "query"), "gpt2": (tiny_gpt2, "c_attn")}[kind]
    job = classification_job(
        model={"backbone": str(backbone), "pooling": pooling}, lora={"train": "none", "target_modules": [target]}
    )
    runtime = load_runtime(job, CPU)
    model = runtime.model
    assert isinstance(model, models.TunableModel)
    assert model.first_adapted == len(model.layers())
    examples = [Example(torch.randint(5, 150, (n,), generator=torch.Generator().manual_seed(n))) for n in (3, 12, 7)]
    assert runtime.cache.get(examples) is None
    batch = collate(examples)
    with torch.no_grad():
        ours = model(batch)
        runtime.warm_cache(examples)
        cached = runtime.cache.get(examples)
        assert cached is not None
        assert {tuple(vector.shape) for vector in cached} == {(1, model.head.linear.in_features)}
        for layer in model.layers():
            monkeypatch.setattr(layer, "forward", None)  # calling it would fail
        assert torch.equal(model(collate(examples, cached)), ours)


def test_an_example_does_not_depend_on_its_neighbours(classification_job: Callable[..., Job]) -> None:
    runtime = load_runtime(classification_job(), CPU)
    examples = [Example(torch.randint(5, 150, (n,), generator=torch.Generator().manual_seed(n))) for n in (3, 12, 7)]
    with torch.no_grad():
        together = runtime.model(collate(examples))
        alone = torch.cat([runtime.model(collate([example])) for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_a_step_looks_at_the_drawn_records_only(classification_job: Callable[..., Job]) -> None:
    """A site may have a hundred thousand."""

    class Pool(list[Example]):
        def __iter__(self) -> Iterator[Example]:
            raise AssertionError("all records are read")

    pool = Pool([Example(torch.tensor([5 + n, 6]), n % 2) for n in range(9)])
    runtime = load_runtime(classification_job(), CPU)
    found = [
        (rows, batch.input_ids[:, 0].tolist()) for rows, batch in runtime.grouped_batches(pool, [[4], [1], [7, 8]])
    ]
    assert found == [([1, 4, 7, 8], [6, 9, 12, 13])]


@pytest.mark.parametrize("train", ["b", "both", "none"])
def test_exactly_the_factors_and_the_head_are_trainable(classification_job: Callable[..., Job], train: str) -> None:
    model = load_runtime(classification_job(lora={"train": train}), CPU).model
    factors = {"b": ("lora_B.weight",), "both": ("lora_A.weight", "lora_B.weight"), "none": ()}[train]
    names = list(model.trainable())
    assert len(names) == 4 * len(factors) + 2  # two layers, query and value, and the head
    assert all(name.endswith(factors) or name.startswith("head.linear.") for name in names)
    assert {n for n in names if n.startswith("head.")} == model.head_parameters()
    assert not any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    trained = {id(p) for p in model.trainable().values()}
    for module in model.modules():
        own = [id(p) in trained for p in module.parameters(recurse=False)]
        assert module.training == any(own), "only what is trained may be in training mode"


def orthonormal_factors(runtime: Runtime) -> dict[str, torch.Tensor]:
    return {name: a.detach().clone() for name, (a, _) in runtime.model.lora_factors().items()}


def test_a_is_orthonormal_and_follows_the_public_seed(classification_job: Callable[..., Job]) -> None:
    first = orthonormal_factors(load_runtime(classification_job(seed=1), CPU))
    assert len(first) == 4
    for factor in first.values():
        torch.testing.assert_close(factor @ factor.T, torch.eye(4), rtol=0, atol=1e-5)
    shapes = {tuple(f.shape) for f in first.values()}
    assert shapes == {(4, 32)}
    assert len({f.numpy().tobytes() for f in first.values()}) == 4, "every module has its own A"
    again = orthonormal_factors(load_runtime(classification_job(seed=1, name="other"), ComputeConfig(device="cpu")))
    other = orthonormal_factors(load_runtime(classification_job(seed=2), CPU))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_b_starts_at_zero_and_the_head_follows_the_seed(classification_job: Callable[..., Job]) -> None:
    runtime = load_runtime(classification_job(seed=5), CPU)
    assert all(not tensor.any() for name, tensor in runtime.initial.items() if name.endswith("lora_B.weight"))
    expected = nn.Linear(32, 2)
    init_linear(expected, seed=5, name="head.linear")
    assert torch.equal(runtime.initial["head.linear.weight"], expected.weight)
    assert not runtime.initial["head.linear.bias"].any()


def test_the_frozen_hash_sees_frozen_weights_and_only_those(classification_job: Callable[..., Job]) -> None:
    model = load_runtime(classification_job(seed=11), CPU).model
    before = model.frozen_sha256()
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(1)
    assert model.frozen_sha256() == before
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    with torch.no_grad():
        frozen.view(-1)[0] += 1e-3
    assert model.frozen_sha256() != before


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_residuals_change_the_weight_exactly_and_can_be_taken_back(
    kind: str, classification_job: Callable[..., Job], language_job: Callable[..., Job]
) -> None:
    build = classification_job if kind == "bert" else language_job
    model = load_runtime(build(lora={"train": "both"}, seed=21), CPU).model
    batch = padded_batch()
    before = model.frozen_sha256()
    with torch.no_grad():
        plain = model(batch)
        shapes = {name: (b.shape[0], a.shape[1]) for name, (a, b) in model.lora_factors().items()}
        residuals = {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}
        model.set_residuals(residuals)
        changed = model(batch)
        # The same through the factors: residual = scaling * B @ A is impossible at full rank, so compare the weights.
        for name, module in model._adapted():
            weight = module.get_base_layer().weight
            expected = model._frozen_targets[name] + (residuals[name] if kind == "bert" else residuals[name].T)
            assert torch.equal(weight, expected)
        model.set_residuals(residuals)
        assert torch.equal(model(batch), changed), "residuals replace, they do not add up"
        model.set_residuals({})
        assert torch.equal(model(batch), plain)
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert model.frozen_sha256() == before


def test_the_backbone_hash_sees_weights_and_tokenizer(tiny_bert: Path, tmp_path: Path) -> None:
    folder = copied(tiny_bert, tmp_path / "copy")
    original = backbone_sha256(tiny_bert)
    assert backbone_sha256(folder) == original
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text() + "extra\n")
    assert backbone_sha256(folder) != original

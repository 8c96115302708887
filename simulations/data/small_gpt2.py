"""A small GPT-2 that is trained here, on public text: the backbone of the built-in scenario `gpt2.toml`.

Real GPT-2 weights need a download; this one needs a few minutes. Its public text - newspaper editorials, product
reviews and tweets - comes out of the same archive as the movie reviews that the scenario's sites keep private, and
shares no file with them. Guarantee: the folder is complete or not there, and its name holds the SHA-256 of recipe and
text, so a folder that a job names never changes its meaning.
"""

from __future__ import annotations

import hashlib
import html
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from shared.errors import ConfigError, DataError, RunError
from shared.files.atomic import disk_errors, sync_folder, write_json
from shared.files.json_files import canonical_json
from shared.job.parsing import nearest
from simulations.data.archives import cache_folder
from simulations.data.demo_data import read_recorded

CACHE_PREFIX = "cache:"
NAME = "small-gpt2"
END_OF_TEXT = "<|endoftext|>"
RECIPE_FILE = "recipe.json"

# File and whether its lines are sentences of running text, numbered "article_sentence".
PUBLIC_TEXTS = (
    ("hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt", True),
    ("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt", True),
    ("hutto_ICWSM_2014/tweets_GroundTruth.txt", False),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what the model becomes, besides the text.

    Attributes:
        version: raised when this module trains differently.
        vocab_size: tokens of the byte-level BPE vocabulary, end-of-text included.
        hidden_size, num_layers, num_heads, num_positions: the GPT-2 architecture.
        steps, batch_size: optimiser steps, and windows of `num_positions` tokens in each.
        learning_rate: highest value, of AdamW, after a warm-up over a tenth of the steps; then a cosine to 0.
        seed: of weights and windows. Equal results need an equal processor, thread count and torch release too.
    """

    version: int = 1
    vocab_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_positions: int = 96
    steps: int = 320
    batch_size: int = 10
    learning_rate: float = 4e-3
    seed: int = 0

    def folder_name(self, documents: Sequence[str]) -> str:
        """Return the folder's name: it tells recipes and texts apart."""
        digest = hashlib.sha256(canonical_json(asdict(self)).encode())
        for document in documents:
            digest.update(document.encode() + b"\0")
        return f"{NAME}-{digest.hexdigest()[:16]}"


def resolve_backbone(backbone: str) -> str:
    """Return the folder that `cache:small-gpt2` stands for; any other backbone as it is. Trains nothing.

    Raises:
        ConfigError: if it starts with `cache:` and is unknown.
        DataError: if the public text cannot be had.
    """
    if not backbone.startswith(CACHE_PREFIX):
        return backbone
    name = backbone.removeprefix(CACHE_PREFIX)
    if name != NAME:
        raise ConfigError(f"no cached backbone {name!r}; {nearest(name, [NAME])}")
    return str(_folder(Recipe(), public_documents()))


def prepare_backbone(backbone: str, console: Console | None = None) -> None:
    """Train the small GPT-2 if `backbone` is its folder and is not there yet; any other backbone is left alone."""
    missing = Path(backbone).name.startswith(f"{NAME}-") and not Path(backbone).exists()
    if missing and backbone == resolve_backbone(CACHE_PREFIX + NAME):
        small_gpt2(console=console)


def small_gpt2(
    recipe: Recipe | None = None,
    documents: Sequence[str] | None = None,
    *,
    cache: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Return the folder of the small GPT-2 in transformers' format, trained on the first call.

    Args:
        recipe: None is the built-in one.
        documents: public text; None is `public_documents()`.
        cache: None is `cache_folder()`.
        console: shows the progress; None is standard error.

    Raises:
        DataError: if the public text cannot be had or is too short for the recipe.
        RunError: if the folder cannot be written.
    """
    recipe = recipe or Recipe()
    documents = public_documents(cache) if documents is None else documents
    folder = _folder(recipe, documents, cache)
    if folder.is_dir():
        return folder
    with _progress(console) as progress:
        bar = progress.add_task("training a small GPT-2 on public text (once)", total=recipe.steps)
        tokenizer = train_tokenizer(documents, recipe.vocab_size)
        model, losses = train_model(tokenizer, documents, recipe, lambda: progress.advance(bar))
    last = losses[-max(1, len(losses) // 10) :]
    record = {"recipe": asdict(recipe), "documents": len(documents), "training_loss": round(sum(last) / len(last), 4)}
    _write(folder, tokenizer, model, record)
    return folder


def public_documents(cache: Path | None = None) -> list[str]:
    """Return the public pre-training text, about 1.3 MB: editorials and product reviews as a whole, single tweets.

    Raises:
        DataError: if the archive cannot be had or is not the recorded one.
    """
    documents: dict[str, list[str]] = {}
    for member, running in PUBLIC_TEXTS:
        for line in read_recorded(member, cache).decode("utf-8", errors="replace").splitlines():
            identity, _, text = line.split("\t", 2)
            article = identity.rpartition("_")[0] if running else identity
            documents.setdefault(f"{member}/{article}", []).append(html.unescape(text).strip())
    return [" ".join(sentences) for sentences in documents.values()]


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Any:
    """Return a byte-level BPE tokenizer: every text has tokens, none is unknown."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(documents, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def train_model(
    tokenizer: Any, documents: Sequence[str], recipe: Recipe, advance: Callable[[], object] = lambda: None
) -> tuple[Any, list[float]]:
    """Return (GPT2LMHeadModel, training loss of every step).

    Raises:
        DataError: if the text is shorter than one window.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    end = tokenizer.eos_token_id
    tokens = torch.tensor([t for ids in tokenizer(list(documents))["input_ids"] for t in (*ids, end)])
    if len(tokens) <= recipe.num_positions:
        raise DataError(f"the public text has {len(tokens)} tokens, one window needs {recipe.num_positions + 1}.")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=recipe.hidden_size,
        n_layer=recipe.num_layers,
        n_head=recipe.num_heads,
        n_positions=recipe.num_positions,
        bos_token_id=end,
        eos_token_id=end,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step, windows in enumerate(_windows(tokens, recipe)):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        logits = model(windows[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        advance()
    return model.eval(), losses


def _windows(tokens: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Yield `steps` batches of windows [batch, positions + 1] that start anywhere."""
    generator = torch.Generator().manual_seed(recipe.seed)
    every = tokens.unfold(0, recipe.num_positions + 1, 1)
    for _ in range(recipe.steps):
        yield every[torch.randint(len(every), (recipe.batch_size,), generator=generator)]


def _learning_rate(step: int, recipe: Recipe) -> float:
    warm_up = max(1, recipe.steps // 10)
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))


def _folder(recipe: Recipe, documents: Sequence[str], cache: Path | None = None) -> Path:
    return (cache or cache_folder()).resolve() / recipe.folder_name(documents)


def _write(folder: Path, tokenizer: Any, model: Any, record: dict[str, Any]) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            with disk_errors():
                tokenizer.save_pretrained(temporary)
                model.save_pretrained(temporary)
            write_json(temporary / RECIPE_FILE, record)
            temporary.chmod(0o755)
            if not folder.exists():
                os.replace(temporary, folder)
                sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        # Another process may have finished the same recipe in the meantime.
        if not folder.is_dir():
            raise RunError(
                f"could not write {folder}: {error.strerror or error}. Free space, or set SILOTUNE_CACHE to a folder that "
                "you can write."
            ) from error


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )

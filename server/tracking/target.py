"""Which tracker an option names: `mlflow:URI`, `tensorboard:FOLDER`, `wandb` or `wandb:offline`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from shared.errors import ConfigError

_KINDS = ("mlflow", "tensorboard", "wandb")
_FORMS = "mlflow:URI, tensorboard:FOLDER, wandb or wandb:offline"


@dataclass(frozen=True)
class Target:
    """A tracker, and where it is.

    Attributes:
        kind: mlflow, tensorboard or wandb; the name of its library and of our extra.
        place: a URI, a folder, or the mode of W&B.
    """

    kind: str
    place: str

    @property
    def told(self) -> str:
        """What people read: the address without a name and a password."""
        return f"{self.kind}:{self.without_secrets(self.place)}"

    def without_secrets(self, text: str) -> str:
        """Return a text that may quote the address, without the name and the password in it."""
        try:
            secret = urlsplit(self.place).netloc.rpartition("@")[0]
        except ValueError:
            secret = ""
        return text.replace(f"{secret}@", "") if secret else text


def read_targets(texts: Sequence[str]) -> list[Target]:
    """Return what `--track` names.

    Raises:
        ConfigError: it names no tracker, one twice, or one whose library is not installed.
    """
    found: list[Target] = []
    for text in texts:
        target = _read(text)
        if target in found:
            raise ConfigError(f"--track names {target.told} twice; leave out one of the two.")
        found.append(target)
    return found


def _read(text: str) -> Target:
    kind, _, place = text.partition(":")
    if kind in _KINDS and importlib.util.find_spec(kind) is None:
        raise ConfigError(f'{kind} is not installed; run: pip install "silotune[{kind}]"')
    if kind == "wandb" and place in ("", "online", "offline"):
        return Target(kind, place or "online")
    if kind == "mlflow" and _is_address(place):
        if not urlsplit(place).scheme:
            raise ConfigError(
                f"--track {text}: MLflow keeps runs in a database or a server, not in a plain folder; use "
                "mlflow:sqlite:///mlflow.db, or mlflow:http://HOST:PORT of a server."
            )
        return Target(kind, place)
    if kind == "tensorboard" and place:
        folder = Path(place).expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--track {text}: {folder} is no folder; TensorBoard's files need one.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--track {text}: the folder {folder} cannot be made ({error.strerror}); name one that may be written."
            ) from None
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"--track {text}: the folder {folder} may not be written; name another one.")
        return Target(kind, str(folder))
    raise ConfigError(f"--track {Target(kind, place).without_secrets(text)!r} names no tracker; expected {_FORMS}.")


def _is_address(text: str) -> bool:
    try:
        return bool(urlsplit(text).path or urlsplit(text).netloc)
    except ValueError:
        return False

"""What comes into a registry is weights, tokenizers, JSON and text; nothing runs, and nothing leads elsewhere."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from server.registry import intake
from server.registry.adding import add
from server.registry.registry import Registry
from shared.errors import ModelError, SilotuneError
from tests.server.registry.keys import SIGNER


class Hostile:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch /tmp/never",)


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda adapter: (adapter / name).write_bytes(content)


PICKLE = pickle.dumps(Hostile())
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pickle": (put("weights.bin", PICKLE), "nothing else is taken"),
    "PyTorch's": (put("weights.pt", PICKLE), "nothing else is taken"),
    "code": (put("modeling.py", b"print()"), "nothing else is taken"),
    "a hidden file": (put(".cache.json", b"{}"), "nothing else is taken"),
    "no ending": (put("weights", b"{}"), "nothing else is taken"),
    "a pickle by another name": (put("head.safetensors", PICKLE), "no safetensors file"),
    "a truncated one": (put("head.safetensors", b"\x10\0\0\0\0\0\0\0{}"), "no safetensors file"),
    "an archive as ONNX": (put("model.onnx", b"PK\x03\x04" + b"\0" * 9), "pickle or an archive"),
    "a pickle as a tokenizer": (put("tokenizer.model", PICKLE), "pickle or an archive"),
    "no ONNX": (put("model.onnx", b"hello"), "no ONNX file"),
    "binary text": (put("vocab.txt", b"\xff\xfe\0"), "is no text"),
    "half JSON": (put("config.json", b'{"a":'), "is no JSON"),
    "nested JSON": (put("config.json", b"[" * 100_000), "is no JSON"),
    "a link": (lambda adapter: (adapter / "passwd.txt").symlink_to("/etc/passwd"), "no part of the model, or a link"),
    "a link to a folder": (
        lambda adapter: (adapter / "etc.json").symlink_to("/etc"),
        "no part of the model, or a link",
    ),
    "a pipe": (lambda adapter: os.mkfifo(adapter / "pipe.json"), "no part of the model"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_hostile_folders_are_refused(case: str, registry: Registry, run: Path) -> None:
    spoil, message = FOREIGN[case]
    spoil(run / "adapter")
    with pytest.raises(SilotuneError, match=message):
        add(registry, run, "films", signer=("sam", SIGNER))
    assert registry.numbers("films") == [1, 2]


def test_too_much_is_refused(registry: Registry, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (run / "adapter" / "huge.txt").open("wb") as file:
        file.truncate(intake.MOST_BYTES + 1)  # takes no space
    with pytest.raises(ModelError, match="more than 64 GiB"):
        add(registry, run, "films", signer=("sam", SIGNER))
    (run / "adapter" / "huge.txt").unlink()
    monkeypatch.setattr(intake, "MOST_FILES", 5)
    with pytest.raises(ModelError, match="more than 5 files"):
        add(registry, run, "films", signer=("sam", SIGNER))
    monkeypatch.undo()
    with (run / "job.json").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="longer than 64 MiB"):
        add(registry, run, "films", signer=("sam", SIGNER))


def test_a_link_on_the_way_is_not_followed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (run / "adapter").rename(tmp_path / "elsewhere")
    (run / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SilotuneError, match=r"cannot be copied|is a link"):
        intake.copy_files(run, ["adapter/README.md"], tmp_path / "copy")
    assert not (tmp_path / "copy" / "adapter" / "README.md").exists()
    (run / "job2.json").symlink_to("job.json")
    with pytest.raises(ModelError, match="is a link"):
        intake.copy_files(run, ["job2.json"], tmp_path / "copy")

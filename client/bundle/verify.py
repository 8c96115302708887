"""Check a bundle of Silotune: every file by its SHA-256, and that nothing else lies there.

    python3 verify.py [FOLDER]

A copy of this file lies in every bundle. It needs nothing but Python 3.8, and writes nothing. It prints the SHA-256 of
`SHA256SUMS`, which stands for the whole bundle: compare it, by telephone, with what `silotune site bundle` said.

Guarantee (tests: tests/client/test_bundle.py): a file that was changed, added or removed, a link, a device or a pipe ends it with
status 1 and a sentence that names the file.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys

SUMS = "SHA256SUMS"
SIGNATURE = "signature.json"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\\\n]+)")


class Damaged(Exception):
    """What is wrong with a bundle."""


def verify(folder: str) -> tuple[int, int, str]:
    """Return the number of files of a bundle, their bytes, and the SHA-256 of the list.

    Raises:
        Damaged: naming the first file that is not as it was.
    """
    # 1. Only plain files may lie there: a link would show another file than the one that was checked.
    found = {}
    for place, folders, files in os.walk(folder, onerror=_cannot_read):
        for path in (os.path.join(place, name) for name in (*folders, *files)):
            status, name = os.lstat(path), os.path.relpath(path, folder).replace(os.sep, "/")
            if stat.S_ISREG(status.st_mode):
                found[name] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise Damaged(f"{name!r} is no plain file")
    if SUMS not in found:
        raise Damaged(f"{folder} is no bundle: it holds no {SUMS}")

    # 2. The list, then every file in it, and none besides.
    with open(os.path.join(folder, SUMS), "rb") as file:
        content = file.read(16 << 20)
    listed = {}
    for line in content.decode("utf-8", "replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None or match[2] in listed or match[2] in (SUMS, SIGNATURE):
            raise Damaged(f"{SUMS} holds a line that does not belong there")
        listed[match[2]] = match[1]
    for name in sorted({*listed, *found} - {SUMS, SIGNATURE}):
        if name not in found:
            raise Damaged(f"{name!r} is missing")
        if name not in listed:
            raise Damaged(f"{name!r} was added")
        if _sha256(os.path.join(folder, name)) != listed[name]:
            raise Damaged(f"{name!r} was changed")
    return len(listed), sum(found[name] for name in listed), hashlib.sha256(content).hexdigest()


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while True:
            chunk = file.read(1 << 20)
            if not chunk:
                return digest.hexdigest()
            digest.update(chunk)


def _cannot_read(error: OSError) -> None:
    raise error


def main() -> int:
    """Run the command line; return the exit status."""
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    try:
        num_files, num_bytes, sha256 = verify(folder)
    except (Damaged, OSError) as error:
        sys.stderr.write(f"error: {error}. Do not install this bundle; copy it anew.\n")
        return 1
    sys.stdout.write(f"{num_files} files, {num_bytes:,} bytes, all as they were; nothing else lies there\n")
    sys.stdout.write(f"sha256 of {SUMS}: {sha256}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a test in a file is made of: its own source, and that of whatever it names in the file, fixtures included.

So that a verdict outlives edits of other tests in the same file. What a test uses from elsewhere is left out.
"""

from __future__ import annotations

import ast
import functools


@functools.lru_cache(maxsize=64)
def _tops(source: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Return by name what stands at the top level of a file: (its text, the names in it); imports as one."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for node in ast.parse(source).body:
        names = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
        names |= {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined = {node.name}
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            defined = {c.id for c in ast.walk(node) if isinstance(c, ast.Name) and isinstance(c.ctx, ast.Store)}
        else:
            continue
        text = ast.unparse(node)
        for name in defined:
            before = found.get(name, ("", frozenset()))
            found[name] = (before[0] + text, before[1] | names)
    return found


@functools.lru_cache(maxsize=4096)
def source_of_test(source: str, test: str) -> str:
    """Return the parts of a file that make a test, named as in a node id after `::`; the whole file if it is not found.

    A fixture that is used everywhere (autouse) counts as a part.
    """
    tops = _tops(source)
    name = test.partition("[")[0].partition("::")[0]
    if name not in tops:
        return source
    everywhere = {other for other, (text, _) in tops.items() if "autouse=True" in text}
    wanted, parts = {name, *everywhere}, {}
    while wanted:
        part = wanted.pop()
        parts[part], names = tops[part]
        wanted |= (names & tops.keys()) - parts.keys()
    return "\n".join(parts[part] for part in sorted(parts))

"""A mutant put into a program that has loaded the original: the code of one function is exchanged for the mutant's.

It saves importing the module, and all that imports it, once for each mutant. Guarantee (tests/test_mutation.py): what is
exchanged is all that differs. For a mutant that changes what runs while the module is imported (a constant, a default, a
class attribute, a decorator) `swaps` returns None; such a one has to be imported.
"""

from __future__ import annotations

import ast
import functools
import gc
from collections import defaultdict
from types import CodeType, FunctionType

Key = tuple[str, int]
"""A function of the module: its qualified name and its first line."""


def swaps(original: str, mutated: str) -> list[tuple[Key, CodeType]] | None:
    """Return the functions that differ, each with its new code; None if there is a difference elsewhere."""
    loaded, plain = _original(original)
    found: list[tuple[Key, CodeType]] = []
    return found if _compare(loaded, plain, compile(mutated, "<mutant>", "exec"), found) else None


@functools.lru_cache(maxsize=1)
def _original(source: str) -> tuple[CodeType, CodeType]:
    """Return the code as it is loaded, and as it would be in the layout of a mutant: that depends on lines here and there."""
    return compile(source, "<loaded>", "exec"), compile(ast.unparse(ast.parse(source)), "<plain>", "exec")


def _compare(loaded: CodeType, plain: CodeType, mutant: CodeType, found: list[tuple[Key, CodeType]]) -> bool:
    """Collect the functions of a module or class body that differ; False if the body itself does."""
    if _shell(plain) != _shell(mutant):
        return False
    children = [_children(code) for code in (loaded, plain, mutant)]
    if len({len(of_one) for of_one in children}) > 1:
        return False
    for child, old, new in zip(*children, strict=True):
        if _content(old) == _content(new):
            continue
        is_function = bool(old.co_flags & 0x1)  # CO_OPTIMIZED: all but bodies of modules and classes
        if not is_function:
            if not _compare(child, old, new, found):
                return False
        elif _interface(old) == _interface(new):
            found.append(((child.co_qualname, child.co_firstlineno), new))
        else:
            return False
    return True


def loaded_functions(file: str) -> dict[Key, list[FunctionType]]:
    """Return the functions of a source file that live in this process."""
    found: dict[Key, list[FunctionType]] = defaultdict(list)
    for value in gc.get_objects():
        if type(value) is FunctionType and value.__code__.co_filename == file:
            found[value.__code__.co_qualname, value.__code__.co_firstlineno].append(value)
    return dict(found)


def _children(code: CodeType) -> list[CodeType]:
    return [value for value in code.co_consts if isinstance(value, CodeType)]


def _interface(code: CodeType) -> tuple[object, ...]:
    """What a function object shares with its code, and what its callers go by."""
    arguments = code.co_argcount + code.co_kwonlyargcount
    kind = code.co_flags & ~0x4000000  # docstring or not
    return code.co_freevars, kind, arguments, code.co_posonlyargcount, code.co_varnames[:arguments], code.co_qualname


def _shell(code: CodeType) -> tuple[object, ...]:
    """What a piece of code does, without the functions and classes in it and without line numbers."""
    constants = ["code" if isinstance(value, CodeType) else _typed(value) for value in code.co_consts]
    rest = (code.co_code, code.co_exceptiontable, code.co_names, code.co_varnames, code.co_cellvars)
    return *rest, constants, *_interface(code)


def _content(code: CodeType) -> tuple[object, ...]:
    """All that a piece of code does, without line numbers."""
    return *_shell(code), [_content(child) for child in _children(code)]


def _typed(value: object) -> object:
    """Tell constants apart that are equal: 1, 1.0 and True."""
    if isinstance(value, tuple):
        return tuple(_typed(item) for item in value)
    if isinstance(value, frozenset):
        return frozenset((type(item), repr(item)) for item in value)
    return type(value), repr(value)

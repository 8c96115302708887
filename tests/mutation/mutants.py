"""Mutants of one module: small changes of its syntax tree, each of which a test should notice.

What is changed: comparisons, arithmetic and logic; numbers, booleans and texts; conditions. What is left out, one at a time:
keyword arguments, bounds of slices, values in formatted texts, conversions, and statements with an effect, among them every
`raise`. Functions are exchanged for their opposite. What stays: annotations, imports, decorators, docstrings, log calls, the
wording of sentences (a `raise` counts as one thing, whatever it says), and `zip(strict=True)`.

A mutant is named by the function that it stands in and by its statement before and after, so the name outlives edits elsewhere.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.MatMult: ast.Mult,
}
_OPPOSITES = {"min": "max", "any": "all", "cos": "sin", "floor": "ceil", "log": "exp", "log1p": "expm1"}
_OPPOSITES |= {value: key for key, value in _OPPOSITES.items()}
# Calls without arguments, `x.name()`, and functions, `name(x)`, that leave x as good as it was for most values.
_CONVERSIONS = {"abs", "clone", "copy", "double", "float", "flatten", "resolve", "square", "strip"}
_FUNCTIONS = {"abs", "sorted", "round"}
_BELTS = {"strict"}  # of `zip`: a second check of lengths that the lines before have made equal
_UNTOUCHED = {"annotation", "returns", "decorator_list", "type_comment", "format_spec", "ctx", "type_params"}
_SENTENCE = 4  # spaces that make a text one for people
_LOGS = {"log", "logging", "warnings"}


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change.

    Attributes:
        function: dotted name of the innermost function or class, "" at the top level.
        before, after: the changed statement or expression; long statements by their first line.
        number: tells equal changes of a function apart, from 1.
        lines: of the original that the change touches; a test that runs none of them cannot notice.
        top: source of the top-level statement around it: the result stands while this stands.
        source: the whole module with the change.
    """

    function: str
    before: str
    after: str
    number: int
    lines: range
    top: str
    source: str

    @property
    def name(self) -> str:
        """The mutant's name within its module."""
        again = f" ({self.number})" if self.number > 1 else ""
        return f"{self.function or '<module>'}: {self.before} -> {self.after}{again}"


@dataclass(frozen=True)
class _Place:
    """A node and where it hangs."""

    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    statement: ast.stmt
    function: str
    top: ast.stmt

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def mutants_of(source: str) -> list[Mutant]:
    """Return every mutant of a module, in the order of its lines."""
    tree = ast.parse(source)
    tops = {id(top): ast.unparse(top) for top in tree.body}
    seen: Counter[tuple[str, str, str]] = Counter()
    found = []
    for place in list(_places(tree)):
        before = _first_line(place.statement)
        for changed in _changes(place.node):
            place.put(changed)
            after = _first_line(changed if place.node is place.statement else place.statement)
            text = ast.unparse(ast.fix_missing_locations(tree))
            place.put(place.node)
            if before == after:  # the change lies in a later line of the statement
                before_part, after_part = ast.unparse(place.node), ast.unparse(changed)
            else:
                before_part, after_part = before, after
            seen[place.function, before_part, after_part] += 1
            found.append(
                Mutant(
                    function=place.function,
                    before=before_part,
                    after=after_part,
                    number=seen[place.function, before_part, after_part],
                    lines=_lines(place),
                    top=tops[id(place.top)],
                    source=text,
                )
            )
    return found


def _first_line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


def _lines(place: _Place) -> range:
    node: ast.AST = place.statement  # a simple statement over several lines may be traced by any of them
    if hasattr(place.statement, "body"):
        node = place.node if hasattr(place.node, "lineno") else place.parent
    first = getattr(node, "lineno", place.statement.lineno)
    return range(first, (getattr(node, "end_lineno", None) or first) + 1)


def _places(tree: ast.Module) -> Iterator[_Place]:
    """Yield every node that may change."""

    def visit(node: ast.AST, statement: ast.stmt, function: str, top: ast.stmt) -> Iterator[_Place]:
        for field, value in ast.iter_fields(node):
            if field in _UNTOUCHED:
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or _is_text_only(child):
                    continue
                if isinstance(child, ast.keyword) and child.arg in _BELTS:
                    continue
                own = child if isinstance(child, ast.stmt) else statement
                yield _Place(node, field, index, child, own, function, top)
                if isinstance(child, ast.Raise):
                    continue
                inner = function
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    inner = f"{function}.{child.name}" if function else child.name
                yield from visit(child, own, inner, top)

    for number, top in enumerate(tree.body):
        if isinstance(top, ast.Import | ast.ImportFrom) or _is_text_only(top):
            continue
        yield _Place(tree, "body", number, top, top, "", top)
        name = top.name if isinstance(top, ast.FunctionDef | ast.ClassDef) else ""
        yield from visit(top, top, name, top)


def _is_text_only(node: ast.AST) -> bool:
    """True for docstrings, log calls, `__all__`, and names of types in quotes."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        called = node.value.func
        return isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in _LOGS
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("cast", "TypeVar")
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal"


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may stand in the place of a node."""
    if type(node) in _OPERATORS:
        yield _OPERATORS[type(node)]()
    elif isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in _other_values(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Call):
        yield from _changed_calls(node)
    elif isinstance(node, ast.Slice):
        yield from (_without(node, field) for field in ("lower", "upper", "step") if getattr(node, field))
    elif isinstance(node, ast.JoinedStr):
        for index, part in enumerate(node.values):
            if isinstance(part, ast.FormattedValue):
                yield ast.JoinedStr(node.values[:index] + node.values[index + 1 :])
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.Break):
        yield ast.Continue()
    elif _has_effect(node):
        yield ast.Pass()
    yield from _changed_conditions(node)


def _other_values(value: object) -> Iterator[object]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield from (2 * value, value / 2) if value else (1.0,)
    elif isinstance(value, str) and value.count(" ") < _SENTENCE:
        yield value + "~"


def _changed_calls(node: ast.Call) -> Iterator[ast.AST]:
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in _BELTS:
            yield ast.Call(node.func, node.args, node.keywords[:index] + node.keywords[index + 1 :])
    if isinstance(node.func, ast.Attribute):
        if node.func.attr in _CONVERSIONS and not node.args:
            yield node.func.value
        if node.func.attr in _OPPOSITES:
            other = ast.Attribute(node.func.value, _OPPOSITES[node.func.attr], ast.Load())
            yield ast.Call(other, node.args, node.keywords)
    if isinstance(node.func, ast.Name):
        if node.func.id in _FUNCTIONS and len(node.args) == 1 and not isinstance(node.args[0], ast.GeneratorExp):
            yield node.args[0]
        if node.func.id in _OPPOSITES:
            yield ast.Call(ast.Name(_OPPOSITES[node.func.id], ast.Load()), node.args, node.keywords)


def _changed_conditions(node: ast.AST) -> Iterator[ast.AST]:
    """Negate conditions that are no comparison and no logic: those have mutants of their own."""
    if isinstance(node, ast.If | ast.While | ast.IfExp) and _is_plain(node.test):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.comprehension):
        for index, test in enumerate(node.ifs):
            yield _with(node, ifs=node.ifs[:index] + node.ifs[index + 1 :])
            if _is_plain(test):
                negated = ast.UnaryOp(ast.Not(), test)
                yield _with(node, ifs=[*node.ifs[:index], negated, *node.ifs[index + 1 :]])
    if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Tuple):
        for index in range(len(node.type.elts)):
            rest = node.type.elts[:index] + node.type.elts[index + 1 :]
            yield _with(node, type=ast.Tuple(rest, ast.Load()))


def _is_plain(test: ast.expr) -> bool:
    return not isinstance(test, ast.Compare | ast.BoolOp) and not (
        isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    )


def _has_effect(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.AugAssign | ast.Delete):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets)


def _without(node: ast.AST, field: str) -> ast.AST:
    return _with(node, **{field: None})


def _with(node: ast.AST, **changes: object) -> ast.AST:
    copy = type(node)(**{field: getattr(node, field, None) for field in node._fields} | changes)
    return ast.copy_location(copy, node)

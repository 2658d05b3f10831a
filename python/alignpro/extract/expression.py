"""The language of a schema's checks: comparisons of fields, read by Python's grammar, run by ours.

Nothing is ever evaluated as Python: the syntax tree is translated node by node, and what is not
named here is refused when the schema is read. There are

* fields by their path (``product.mass``); in a list's fields the check is made of every element,
* numbers, ``quantity(5, "degC")``, ``+ - * /``, ``< <= > >= == !=`` (chained as well), ``and or
  not``, and the functions of `FUNCTIONS`.

Quantities are compared with their units: every term has a dimension, and one that does not fit is
an error of the schema. Percentages are in points.
"""

from __future__ import annotations

import ast
import difflib
import keyword
import re
from collections.abc import Callable
from typing import Any, NoReturn

from alignpro.extract.arithmetic import compare, finite, reduced
from alignpro.extract.formula import molar_mass
from alignpro.extract.kinds import NUMERIC, FieldType, Leaf, ListOf, Object, Path, find
from alignpro.extract.ranges import Bound
from alignpro.extract.scope import (
    BAD,
    NotJudgedError,
    Scope,
    UncomputableError,
    elements,
    look_up,
    once,
)
from alignpro.extract.source import are_near
from alignpro.extract.terms import (
    Term,
    check_same,
    dimension_of,
    joined,
    kind_name,
    point_of,
    refuse,
)
from alignpro.extract.units import PLAIN, Dimension, comparable, find_unit

LONGEST = 500  # characters of a check
_DEEPEST = 100
OPERATORS = ("and", "or", "not", "in", "is", "if", "else", "True", "False", "None")
FUNCTIONS = (
    *("abs", "close", "count", "in_text", "max", "mean", "min", "molar_mass", "near", "one_of"),
    *("present", "quantity", "sum"),
)
_GRAM_PER_MOL: Dimension = (1, -1, 0, 0, 0)
# Words of Python that a field may be called ("yield"): fields never begin with "_".
_RESERVED = frozenset(keyword.kwlist) - set(OPERATORS)
_NAME_OR_TEXT = re.compile(r"'[^']*'|\"[^\"]*\"|[^\W\d]\w*")


def compile_check(text: str, root: Object) -> Term:
    """The check, ready to be made. Raises ValueError, one line that says what is wrong in it."""
    if len(text) > LONGEST:
        raise ValueError(f"expected at most {LONGEST} characters, got {len(text)}")
    if "\\" in text:
        raise ValueError(f"{text!r} is no check: expected no backslash")
    guarded = _NAME_OR_TEXT.sub(lambda m: f"_{m[0]}" if m[0] in _RESERVED else m[0], text)
    try:
        tree = ast.parse(guarded.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no check: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is no check: it cannot be read") from None
    term = _Compiler(root).term(tree.body)
    if term.kind != "truth":
        refuse(f"expected a comparison, got {kind_name(term)}")
    if not term.fields:
        refuse("it names no field")
    return term


def _shown(node: ast.expr) -> str:
    """The beginning of a part as it was written."""
    text = _NAME_OR_TEXT.sub(
        lambda m: m[0][1:] if m[0][1:] in _RESERVED else m[0], ast.unparse(node)
    )
    return text[:40]


class _Compiler:
    def __init__(self, root: Object) -> None:
        self._root = root
        self._depth = 0

    def term(self, node: ast.expr) -> Term:
        self._depth += 1
        if self._depth > _DEEPEST:
            refuse("it is nested too deeply")
        term = self._term(node)
        self._depth -= 1
        if term.kind == "number" and not term.fields:
            try:
                term.run(_NOWHERE)
            except UncomputableError as error:
                refuse(f"{error}, whatever the record: {_shown(node)}")
        return term

    def _term(self, node: ast.expr) -> Term:
        if isinstance(node, ast.Constant):
            return self._constant(node.value)
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._field(self._path(node))
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.BinOp):
            return self._arithmetic(node)
        if isinstance(node, ast.UnaryOp):
            return self._unary(node)
        if isinstance(node, ast.BoolOp):
            return self._logic(node)
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        refuse(
            f"{type(node).__name__} is no part of a check; there are fields, numbers, + - * /, "
            f"comparisons, and, or, not, and the functions {', '.join(FUNCTIONS)}"
        )

    def _constant(self, value: object) -> Term:
        if isinstance(value, str):
            return Term("text", lambda scope: value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            refuse(f"expected a number or a text, got {value!r}")
        number = _as_number(value)
        return Term("number", lambda scope: number)

    @staticmethod
    def _path(node: ast.expr) -> Path:
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            refuse("expected the name of a field before a full stop")
        names.append(node.id)
        return tuple(n[1:] if n[:1] == "_" and n[1:] in _RESERVED else n for n in reversed(names))

    def _field(self, path: Path) -> Term:
        try:
            found, lists = find(self._root, path)
        except KeyError as error:
            self._refuse_name(str(error.args[0]), path)
        while isinstance(found, ListOf) and isinstance(found.item, Leaf):
            lists, found = [*lists, path], found.item
        kind, leaf = _kind_of(found)
        dimension = PLAIN if leaf is None else leaf.dimension

        def run(scope: Scope) -> Any:
            value = look_up(scope, path)
            if value is BAD:
                raise NotJudgedError(blocked=True)
            if value is None or value == []:
                raise NotJudgedError(blocked=not found.optional)
            return value

        point = True if leaf is not None and leaf.unit is not None and leaf.unit.zero else None
        return Term(kind, run, dimension, point, (path,), tuple(lists), leaf)

    def _refuse_name(self, name: str, path: Path) -> NoReturn:
        if len(path) == 1 and path[0] in FUNCTIONS:
            refuse(f"{name} is a function, and no field: expected {name}(...)")
        parent: FieldType = self._root
        before, _, last = name.rpartition(".")
        if before:
            parent, _lists = find(self._root, tuple(before.split(".")))
        while isinstance(parent, ListOf):
            parent = parent.item
        there = list(parent.fields) if isinstance(parent, Object) else []
        close = difflib.get_close_matches(last, there, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        what = f"{before} has no fields" if not there else f"there are {', '.join(there)}"
        refuse(f"no field {name!r}; {what}{hint}")

    def _arithmetic(self, node: ast.BinOp) -> Term:
        signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
        sign = signs.get(type(node.op))
        if sign is None:
            refuse(f"{type(node.op).__name__} is no operation of a check; there are + - * /")
        left, right = self._number(node.left, sign), self._number(node.right, sign)
        dimension, point = left.dimension, None
        if sign in "+-":
            check_same(left, right, sign)
            point = point_of(left, right, where=sign)
        else:
            power = 1 if sign == "*" else -1
            dimension = dimension_of(left, right, power)
        if sign == "/" and not right.fields and right.run(_NOWHERE) == 0:
            refuse(f"division by zero, whatever the record: {_shown(node)}")

        def run(scope: Scope) -> float:
            a, b = left.run(scope), right.run(scope)
            if sign == "/" and b == 0:
                raise UncomputableError("division by zero")
            value = a + b if sign == "+" else a - b if sign == "-" else a * b
            return finite(a / b if sign == "/" else value)

        return Term("number", run, dimension, point, **joined(left, right))

    def _unary(self, node: ast.UnaryOp) -> Term:
        if isinstance(node.op, ast.Not):
            inner = self.term(node.operand)
            if inner.kind != "truth":
                refuse(f"not: expected a comparison, got {kind_name(inner)}")
            return Term("truth", lambda scope: not inner.run(scope), **joined(inner))
        if not isinstance(node.op, (ast.USub, ast.UAdd)):
            refuse(f"{type(node.op).__name__} is no operation of a check; there are + - * /")
        inner, factor = self._number(node.operand, "-"), -1 if isinstance(node.op, ast.USub) else 1
        point = inner.point and None  # a temperature has no opposite
        return Term(
            "number", lambda s: factor * inner.run(s), inner.dimension, point, **joined(inner)
        )

    def _logic(self, node: ast.BoolOp) -> Term:
        terms = [self.term(value) for value in node.values]
        for term in terms:
            if term.kind != "truth":
                refuse(f"and, or: expected comparisons, got {kind_name(term)}")
        decisive = isinstance(node.op, ast.Or)

        def run(scope: Scope) -> bool:
            unknown: NotJudgedError | None = None
            for term in terms:
                try:
                    if bool(term.run(scope)) is decisive:
                        return decisive
                except NotJudgedError as error:
                    unknown = unknown or error
            if unknown is not None:
                raise unknown
            return not decisive

        bounds = () if decisive else tuple(bound for term in terms for bound in term.bounds)
        return Term("truth", run, **joined(*terms), bounds=bounds)

    def _comparison(self, node: ast.Compare) -> Term:
        terms = [self.term(value) for value in (node.left, *node.comparators)]
        signs = [_COMPARISONS.get(type(op)) for op in node.ops]
        for sign, op, left, right in zip(signs, node.ops, terms[:-1], terms[1:], strict=True):
            if sign is None:
                refuse(f"{type(op).__name__} is no comparison of a check; one_of(x, list) is")
            texts = {left.kind, right.kind} <= {"text", "formula"}
            truths = left.kind == right.kind == "truth" and left.leaf is not None
            if (texts or truths) and sign in ("==", "!="):
                continue
            if texts:
                refuse(f"{sign}: texts are equal or not, and have no order")
            if left.kind != "number" or right.kind != "number":
                refuse(f"{sign}: {kind_name(left)} and {kind_name(right)} do not compare")
            check_same(left, right, sign)
            point_of(left, right, where=str(sign))

        def run(scope: Scope) -> bool:
            values = [comparable(term.run(scope)) for term in terms]
            pairs = zip(signs, values[:-1], values[1:], strict=True)
            return all(compare(str(sign), a, b) for sign, a, b in pairs)

        sides = (terms[0], terms[1]) if len(terms) == 2 else None
        bounds = _bounds(terms, [str(sign) for sign in signs], _shown(node))
        return Term("truth", run, **joined(*terms), sides=sides, bounds=bounds)

    def _number(self, node: ast.expr, where: str) -> Term:
        term = self.term(node)
        if term.kind != "number":
            refuse(f"{where}: expected a number, got {kind_name(term)}")
        return term

    # Functions

    def _call(self, node: ast.Call) -> Term:
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            called = _shown(node.func)
            refuse(f"no function {called!r}; there are {', '.join(FUNCTIONS)}")
        if node.keywords or any(isinstance(a, ast.Starred) for a in node.args):
            refuse(f"{node.func.id}: expected values alone, no keywords and no *")
        name, given = node.func.id, node.args
        if name in ("min", "max", "sum", "mean"):
            return self._reduction(name, given)
        counts = {"close": 3, "near": 3, "quantity": 2, "one_of": 2}
        if name != "one_of" and len(given) != counts.get(name, 1):
            refuse(f"{name}: expected {counts.get(name, 1)} values, got {len(given)}")
        build: Callable[..., Term] = getattr(self, f"_{name}")
        return build(*given) if name != "one_of" else self._one_of(given)

    def _reduction(self, name: str, given: list[ast.expr]) -> Term:
        terms = [self._number(node, name) for node in given]
        if not terms:
            refuse(f"{name}: expected a list's field, or several values, got none")
        for other in terms[1:]:
            check_same(terms[0], other, name)
        dimension, point = terms[0].dimension, point_of(*terms, where=name)
        if len(terms) > 1:

            def several(scope: Scope) -> float:
                return reduced(name, [term.run(scope) for term in terms])

            return Term("number", several, dimension, point, **joined(*terms))
        (term,) = terms
        if not term.lists:
            refuse(f"{name} of one value: expected a field of a list, or several values")

        def whole(scope: Scope) -> float:
            values = [term.run(at) for at in elements(scope.values, scope.source, term.lists)]
            if not values:
                raise NotJudgedError(blocked=False)
            return reduced(name, values)

        return Term("number", once(whole), dimension, point, term.fields)

    def _count(self, node: ast.expr) -> Term:
        term = self.term(node)
        lists = (*term.lists, term.fields[0]) if term.kind == "list" else term.lists
        if not lists:
            refuse("count: expected a list, or a field of one")

        def run(scope: Scope) -> float:
            return float(sum(1 for _ in elements(scope.values, scope.source, lists)))

        return Term("number", once(run), fields=term.fields)

    def _abs(self, node: ast.expr) -> Term:
        term = self._number(node, "abs")
        return Term(
            "number", lambda s: abs(term.run(s)), term.dimension, term.point, **joined(term)
        )

    def _close(self, found: ast.expr, expected: ast.expr, tolerance: ast.expr) -> Term:
        left, right = self._number(found, "close"), self._number(expected, "close")
        check_same(left, right, "close")
        point_of(left, right, where="close")
        most = self._literal(tolerance, "close")

        def run(scope: Scope) -> bool:
            a, b = left.run(scope), right.run(scope)
            return compare("==", a, b) or compare("<=", abs(a - b), most * abs(a))

        return Term("truth", run, **joined(left, right), sides=(left, right))

    def _molar_mass(self, node: ast.expr) -> Term:
        term = self.term(node)
        if term.kind != "formula":
            refuse(f"molar_mass: expected a field of type formula, got {kind_name(term)}")
        return Term("number", lambda s: molar_mass(term.run(s)), _GRAM_PER_MOL, **joined(term))

    def _quantity(self, number: ast.expr, unit: ast.expr) -> Term:
        value = self._literal(number, "quantity", signed=True)
        name = unit.value if isinstance(unit, ast.Constant) else None
        found = find_unit(name) if isinstance(name, str) else None
        if found is None:
            refuse(f'quantity: expected a unit such as "degC", got {_shown(unit)}')
        base = found.to_base(value)
        return Term("number", lambda scope: base, found.dimension, True if found.zero else None)

    def _literal(self, node: ast.expr, where: str, *, signed: bool = False) -> float:
        term = self.term(node)
        if term.kind != "number" or term.fields or term.dimension != PLAIN:
            refuse(f"{where}: expected a number as it is, got {_shown(node)}")
        value = float(term.run(_NOWHERE))
        if value < 0 and not signed:
            refuse(f"{where}: expected 0 or more, got {value:g}")
        return value

    def _leaf(self, node: ast.expr, where: str) -> Term:
        term = self.term(node)
        if term.leaf is None or term.leaf.kind == "boolean":
            refuse(f"{where}: expected a field that holds text or a number")
        return term

    def _in_text(self, node: ast.expr) -> Term:
        term = self._leaf(node, "in_text")

        def run(scope: Scope) -> bool:
            value = term.run(scope)
            assert term.leaf is not None
            return scope.source is None or bool(scope.source.spans(value, term.leaf))

        return Term("truth", run, **joined(term))

    def _near(self, one: ast.expr, other: ast.expr, characters: ast.expr) -> Term:
        left, right = self._leaf(one, "near"), self._leaf(other, "near")
        most = self._literal(characters, "near")

        def run(scope: Scope) -> bool:
            a, b = left.run(scope), right.run(scope)
            assert left.leaf is not None and right.leaf is not None
            if scope.source is None:
                return True
            ours, theirs = scope.source.spans(a, left.leaf), scope.source.spans(b, right.leaf)
            return are_near(ours, theirs, most)

        return Term("truth", run, **joined(left, right))

    def _one_of(self, given: list[ast.expr]) -> Term:
        if len(given) < 2:
            refuse("one_of: expected a field, and a list's field or several texts")
        term, *others = (self.term(node) for node in given)
        if {term.kind, *(other.kind for other in others)} - {"text", "formula"}:
            refuse("one_of: expected texts")

        @once
        def allowed(scope: Scope) -> set[str]:
            return {
                comparable(other.run(at))
                for other in others
                for at in elements(scope.values, scope.source, other.lists)
            }

        def run(scope: Scope) -> bool:
            return comparable(term.run(scope)) in allowed(scope)

        fields = dict.fromkeys((*term.fields, *(path for o in others for path in o.fields)))
        return Term("truth", run, fields=tuple(fields), lists=term.lists)

    def _present(self, node: ast.expr) -> Term:
        term = self.term(node)
        if not term.fields:
            refuse("present: expected a field")

        def run(scope: Scope) -> bool:
            try:
                term.run(scope)
            except NotJudgedError as error:
                if error.blocked:
                    raise
                return False
            return True

        return Term("truth", run, **joined(term))


def _bounds(terms: list[Term], signs: list[str], text: str) -> tuple[Bound, ...]:
    """What a comparison requires of its plain fields, where they are all there."""
    found = []
    for left, sign, right in zip(terms[:-1], signs, terms[1:], strict=True):
        for one, other, turned in ((left, right, sign), (right, left, _TURNED.get(sign, sign))):
            if one.leaf is None or one.kind != "number":
                continue
            if other.leaf is not None:
                found.append(Bound(one.fields[0], turned, other.fields[0], text))
            elif not other.fields:
                found.append(Bound(one.fields[0], turned, float(other.run(_NOWHERE)), text))
    return tuple(found)


def _kind_of(found: FieldType) -> tuple[str, Leaf | None]:
    if isinstance(found, ListOf):
        return "list", None
    if isinstance(found, Object):
        return "object", None
    if found.kind in NUMERIC:
        return "number", found
    kinds = {"boolean": "truth", "choice": "text"}
    return kinds.get(found.kind, found.kind), found


def _as_number(value: int | float) -> float:
    try:
        return finite(float(value))
    except (OverflowError, UncomputableError):
        refuse("expected a number that a float holds")


_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
}  # fmt: skip
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_NOWHERE = Scope(None, None)  # where what names no field is computed

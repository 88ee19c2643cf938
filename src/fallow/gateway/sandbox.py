"""A Jinja sandbox with a budget: a stranger's template ends in bounded time and memory, on the caller's thread.

Jinja's sandbox keeps a template away from the machine; it does not keep it from `'a' * 10**10` or from nested loops.
A Python thread cannot be stopped, so every step of a template pays instead:

- each loop iteration, call, filter, test and operator costs one unit, and more for large operands;
- a value that would be larger than `MAX_VALUE_WEIGHT` is refused before it is made. Weight counts characters and
  elements of the expanded value, so a list that holds itself many times over is as heavy as it looks;
- numbers stay below `MAX_NUMBER_BITS`, widths and counts given to text methods below `MAX_WIDTH`.

When the `BUDGET` is spent, `BudgetSpent` is raised. Costs do not depend on the clock, so a template that renders once
renders always. Loops are found by rewriting the syntax tree; the rest are hooks that Jinja offers. One environment
renders one template at a time: it is not for threads.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, cast

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

BUDGET = 100_000
"""Units for one rendering; a unit takes about 5 microseconds."""
CHARACTERS_PER_UNIT = 256
MAX_VALUE_WEIGHT = 8 << 20
ELEMENT_WEIGHT = 64
MAX_NUMBER_BITS = 4096
MAX_WIDTH = 100_000

MAX_INDENT = 32

_WIDE_FORMAT = re.compile(r"[0-9]{6,}|%[^%a-zA-Z]*\*")
_METHODS_WITH_WIDTH = frozenset({"center", "ljust", "rjust", "zfill"})
_REFUSED_METHODS = frozenset({"translate", "maketrans", "expandtabs", "encode", "to_bytes"})
_REMOVED_FILTERS = ("urlize", "pprint", "xmlattr", "random", "wordwrap", "wordcount", "striptags")
_REMOVED_GLOBALS = ("lipsum",)


class BudgetSpent(SecurityError):
    """A template did more work, or made a larger value, than a chat template may."""


def weigh(value: Any, limit: int = MAX_VALUE_WEIGHT) -> int:
    """Characters and elements of a value, shared parts counted each time. Stops at `limit`, which raises."""
    total = 0
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, Mapping):
            total += ELEMENT_WEIGHT * len(item)
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            total += ELEMENT_WEIGHT * len(item)
            stack.extend(item)
        elif isinstance(item, Namespace):
            total += ELEMENT_WEIGHT
            stack.append(object.__getattribute__(item, "_Namespace__attrs"))
        else:
            total += 1
        if total > limit:
            raise BudgetSpent("The chat template makes a value that is too large.")
    return total


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox. Call `refill` before each rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "-", "/", "//"})

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, finalize=_finalize, **options)
        self._left = BUDGET
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        for name in _REMOVED_GLOBALS:
            self.globals.pop(name, None)
        for table in (self.filters, self.tests):
            for name, function in list(table.items()):
                table[name] = self._budgeted(name, function)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = self._budgeted(name, function)

    def refill(self) -> None:
        self._left = BUDGET

    def pay(self, weight: int = 0) -> None:
        self._left -= 1 + weight // CHARACTERS_PER_UNIT
        if self._left < 0:
            raise BudgetSpent("The chat template takes too long.")

    def tick(self) -> None:
        """One loop iteration."""

    def weighed(self, value: Any) -> Any:
        """The value, paid for."""
        self.pay(weigh(value))
        return value

    def counted(self, value: Any) -> Any:
        """A value that is about to be sliced, paid for by its length."""
        self.pay(len(value) if hasattr(value, "__len__") else 0)
        return value

    def joined(self, *values: Any) -> str:
        """The `~` operator."""
        self.pay(weigh(values))
        return "".join(str(value) for value in values)

    def concat(self, pieces: Iterable[str]) -> str:
        parts = list(pieces)
        self.pay(weigh(parts))
        return "".join(parts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return cast(nodes.Template, _Instrument().visit(super()._parse(source, name, filename)))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _refuse_wide_numbers(args, kwargs)
            _check_format(value.__self__, "{", (args, kwargs))
            return formatted(*args, **kwargs)

        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if owner is __self:
            if __obj.__name__ == "tick":
                return __self.pay()
            return __obj(*args)
        name = getattr(__obj, "__name__", "")
        if name == "join" and isinstance(owner, str) and args:
            args = (list(args[0]), *args[1:])
        _check_method(owner, name, args, kwargs)
        __self.pay(weigh((args, kwargs)) + (weigh(owner) if isinstance(owner, str | list | dict) else 0))
        return __self.weighed(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.pay(weigh(left) + weigh(right))
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _budgeted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # `wraps` carries over the mark by which Jinja knows that a filter wants the context.
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def budgeted(*args: Any, **kwargs: Any) -> Any:
            if name == "join" and len(args) > passed:
                args = (*args[:passed], list(args[passed]), *args[passed + 1 :])
            own = args[passed:]
            self.pay(weigh(own) + weigh(kwargs))
            _check_filter(name, own, kwargs)
            return self.weighed(function(*args, **kwargs))

        return budgeted


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Jinja calls this for every `{{ … }}`; taking the context keeps it from running while compiling."""
    return cast(BudgetedEnvironment, context.environment).weighed(value)


class _Instrument(NodeTransformer):
    """Makes loops, literals, comparisons, slices and `~` pay."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_hook("tick", [], node.lineno), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _hook("joined", node.nodes, node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _hook("weighed", [node], node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _hook("weighed", [node], node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _hook("weighed", [node], node.lineno) if node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _paid(node.expr)
        for operand in node.ops:
            operand.expr = _paid(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _hook("counted", [node.node], node.lineno)
        return node


def _paid(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _hook("weighed", [node], node.lineno)


def _hook(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=lineno)
    return nodes.Call(function, arguments, [], None, None, lineno=lineno)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse products, powers and formats before they are computed."""
    if operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                weigh(sequence, MAX_VALUE_WEIGHT // max(1, count))
                return
    if operator == "%" and isinstance(left, str):
        _check_format(left, "%", right)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_NUMBER_BITS:
            raise BudgetSpent("The chat template computes a number that is too large.")


def _check_method(owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse methods of text and numbers whose result is much larger than what they are given."""
    if not isinstance(owner, str | int):
        return
    if name in _REFUSED_METHODS:
        raise BudgetSpent(f"The chat template calls {name!r}, which chat templates may not.")
    if name in _METHODS_WITH_WIDTH:
        _refuse_wide_numbers(args, kwargs)
    elif name == "replace":
        _check_replace(str(owner), args)
    elif name == "join" and args:
        _check_join(owner, args[0])


def _check_filter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _refuse_wide_numbers(args[1:], kwargs)
    if name == "replace":
        _check_replace(str(args[0]), args[1:])
    elif name == "join":
        _check_join(args[1] if len(args) > 1 else kwargs.get("d", ""), args[0])
    elif name == "format" and args:
        _check_format(str(args[0]), "%", (args[1:], kwargs))
    elif name == "indent" and args:
        prefix = args[1] if len(args) > 1 else kwargs.get("width", 4)
        width = len(prefix) if isinstance(prefix, str) else int(prefix)
        _refuse_heavier(str(args[0]).count("\n") * width)
    elif name == "tojson":
        for option in (*args[1:], *kwargs.values()):
            if isinstance(option, int | str | list | tuple) and _spread(option) > MAX_INDENT:
                raise BudgetSpent(f"The chat template writes JSON with an indent or separator above {MAX_INDENT}.")


def _spread(option: int | str | list[Any] | tuple[Any, ...]) -> int:
    if isinstance(option, int):
        return option
    return len(option) if isinstance(option, str) else sum(len(str(part)) for part in option)


def _check_format(pattern: str, mark: str, values: Any) -> None:
    """Every field might name the same large value."""
    if _WIDE_FORMAT.search(pattern):
        raise BudgetSpent("The chat template formats text to an extreme width.")
    _refuse_heavier(pattern.count(mark) * weigh(values))


def _check_replace(text: str, args: tuple[Any, ...]) -> None:
    if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        _refuse_heavier(text.count(args[0]) * len(args[1]))


def _check_join(separator: Any, items: Any) -> None:
    if isinstance(separator, str) and hasattr(items, "__len__"):
        _refuse_heavier(len(separator) * len(items))


def _refuse_heavier(weight: int) -> None:
    if weight > MAX_VALUE_WEIGHT:
        raise BudgetSpent("The chat template makes a text that is too long.")


def _refuse_wide_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in (*args, *kwargs.values())):
        raise BudgetSpent(f"The chat template asks for a width or count above {MAX_WIDTH}.")

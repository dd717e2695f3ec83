"""Arithmetic by Python's own grammar, of which nothing but numbers, operators and a few functions is let through."""

from __future__ import annotations

import ast
import math
import operator

from llmctl.errors import UserError

_MAX_BITS = 14_000  # Python writes no whole numbers of more than 4300 digits
_MAX_CHARACTERS = 1000
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau, "inf": math.inf}
_FUNCTIONS = {
    name: getattr(math, name)
    for name in (
        "sqrt exp log log2 log10 sin cos tan asin acos atan atan2 sinh cosh tanh degrees radians floor ceil gcd lcm hypot"
    ).split()
} | {"abs": abs, "round": round, "min": min, "max": max}


def compute(expression: str) -> str:
    """The value of an expression as text. Raises `UserError` for what is no arithmetic, or too large."""
    if not isinstance(expression, str) or len(expression) > _MAX_CHARACTERS:
        raise UserError(f"an expression is text of at most {_MAX_CHARACTERS} characters")
    # What people write for operators that Python spells in another way.
    text = expression.strip().replace("^", "**").replace("×", "*").replace("÷", "/").replace("−", "-")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise UserError(f"{expression!r} is no arithmetic expression") from error
    try:
        value = _value(tree.body)
        if isinstance(value, complex):
            raise UserError("the result is not a real number")
        return repr(value) if isinstance(value, float) else str(value)
    except ZeroDivisionError as error:
        raise UserError("division by zero") from error
    except (ValueError, OverflowError, TypeError) as error:
        raise UserError(str(error)) from error


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        _refuse_huge(node.op, left, right)
        return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        values = [_value(argument) for argument in node.args]
        if node.func.id == "factorial":
            return _factorial(*values)
        if node.func.id in _FUNCTIONS:
            return _FUNCTIONS[node.func.id](*values)
    raise UserError(f"{ast.unparse(node)!r} is not a part of arithmetic; known are {', '.join(sorted(_FUNCTIONS))}")


def _refuse_huge(op: ast.operator, left: int | float, right: int | float) -> None:
    """Whole numbers grow without end: a power of a power would take all memory before anyone could stop it."""
    if not (isinstance(left, int) and isinstance(right, int)):
        return
    bits = left.bit_length() + right.bit_length()
    if isinstance(op, ast.Pow):
        bits = left.bit_length() * abs(right)
    if bits > _MAX_BITS:
        raise UserError(f"the result has more than {_MAX_BITS} bits")


def _factorial(number: int | float) -> int:
    if not isinstance(number, int) or not 0 <= number <= 1000:
        raise UserError("factorial takes a whole number from 0 to 1000")
    return math.factorial(number)

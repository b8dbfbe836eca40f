"""Numbers that remember what was asked of them.

Ranks that differ in their coordinates alone do the same, unless the program asks a coordinate something: `if index == 0`. In a
rehearsal every coordinate is a `Coordinate`: an int that hands its origin on through sums and divisions, and writes down each
comparison with its outcome. Another rank does what this one did if all of these come out the same for it; if one does not, it is
rehearsed itself. Arithmetic that cannot be followed, and a place in a set or a dictionary, set the rank apart from every other.

A coordinate that becomes data is followed no further: multiplied (where a slice begins), converted by int() or str(), an index into
a list, the end of a range, the size of a tensor. For what only such a value decides, the first, an inner and the last rank of each
axis are rehearsed; if two ranks that answered alike differ, every rank of their stage runs.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatronish.parallel.mesh import Mesh, MeshShape

At = Mapping[str, int]
"""Axis -> coordinate."""


@dataclass
class Questions:
    """What a run asked its coordinates: {(question, file:line): (its answer as a function of the coordinates, the answer)}."""

    asked: dict[tuple[str, str], tuple[Callable[[At], bool], bool]] = field(default_factory=dict)

    def note(self, text: str, answer: Callable[[At], bool], outcome: bool) -> bool:
        """Remember a comparison; its outcome."""
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        self.asked[text, f"{frame.f_code.co_filename}:{frame.f_lineno}"] = answer, outcome
        return outcome

    def same_answers(self, at: At) -> bool:
        """Whether a rank at these coordinates would have got the same answers."""
        try:
            return all(answer(at) == outcome for answer, outcome in self.asked.values())
        except ArithmeticError:  # 10 // index, of rank 0
            return False


class Coordinate(int):
    """A coordinate, or a number computed from coordinates."""

    value_at: Callable[[At], int]
    text: str
    questions: Questions

    def __new__(cls, value: int, value_at: Callable[[At], int], text: str, questions: Questions) -> Coordinate:
        self = super().__new__(cls, value)
        self.value_at, self.text, self.questions = value_at, text, questions
        return self

    def set_apart(self) -> int:
        """What is asked cannot be followed: no other value counts as alike. The plain number."""
        value = int(self)
        self.questions.note(f"{self.text} == {value}", lambda at: self.value_at(at) == value, True)
        return value

    def __hash__(self) -> int:
        return hash(self.set_apart())

    def __bool__(self) -> bool:
        return self.questions.note(f"{self.text} != 0", lambda at: self.value_at(at) != 0, int(self) != 0)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self


def _function_of(x: Any) -> tuple[Callable[[At], Any], str]:
    return (x.value_at, x.text) if isinstance(x, Coordinate) else (lambda at: x, str(x))


def _arithmetic(name: str, function: Callable[[int, int], int], *, reflected: bool) -> Callable[[Coordinate, Any], Any]:
    def method(self: Coordinate, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        pair = (other, self) if reflected else (self, other)
        (left_at, left), (right_at, right) = _function_of(pair[0]), _function_of(pair[1])
        value = function(int(pair[0]), int(pair[1]))
        text = f"({left} {name} {right})"
        return Coordinate(value, lambda at: function(left_at(at), right_at(at)), text, self.questions)

    return method


def _comparison(symbol: str, function: Callable[[Any, Any], bool]) -> Callable[[Coordinate, Any], Any]:
    def method(self: Coordinate, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        other_at, text = _function_of(other)
        outcome = function(int(self), other if isinstance(other, float) else int(other))
        return self.questions.note(f"{self.text} {symbol} {text}", lambda at: function(self.value_at(at), other_at(at)), outcome)

    return method


def _set_apart(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Coordinate, *others: Any) -> Any:
        self.set_apart()
        return plain(int(self), *(other.set_apart() if isinstance(other, Coordinate) else other for other in others))

    return method


for _name, _symbol in {"add": "+", "sub": "-", "floordiv": "//", "mod": "%"}.items():
    setattr(Coordinate, f"__{_name}__", _arithmetic(_symbol, getattr(operator, _name), reflected=False))
    setattr(Coordinate, f"__r{_name}__", _arithmetic(_symbol, getattr(operator, _name), reflected=True))
for _name in ("truediv", "and", "or", "xor", "lshift", "rshift", "pow"):
    setattr(Coordinate, f"__{_name}__", _set_apart(f"__{_name}__"))
    setattr(Coordinate, f"__r{_name}__", _set_apart(f"__r{_name}__"))
for _name in ("neg", "abs", "invert", "float"):
    setattr(Coordinate, f"__{_name}__", _set_apart(f"__{_name}__"))
for _name, _symbol in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    setattr(Coordinate, f"__{_name}__", _comparison(_symbol, getattr(operator, _name)))


def watched(mesh: Mesh, questions: Questions) -> Mesh:
    """The same mesh, whose coordinates write down what they are asked."""

    def coordinate(value: int, value_at: Callable[[At], int], text: str) -> Coordinate:
        return Coordinate(value, value_at, text, questions)

    groups = dict(mesh.groups)
    for name, group in mesh.groups.items():
        if name in ("pp", "ends"):  # each stage is rehearsed
            continue
        index = coordinate(group.index, _index_of(name, mesh.shape), "rank" if name == "world" else name)
        groups[name] = replace(group, index=index)
    return replace(mesh, rank=coordinate(mesh.rank, mesh.shape.rank_of, "rank"), groups=groups)


def _index_of(name: str, shape: MeshShape) -> Callable[[At], int]:
    if name == "world":
        return shape.rank_of
    return lambda at: at[name]

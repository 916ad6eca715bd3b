"""Exercises whose checks say what is wrong, and are themselves checked.

    scale = Exercise("Absmax scale", minutes=5, difficulty="easy", reference=solve,
                     cases=[(torch.randn(4, 8), 4)],
                     wrong={"the scale is per column; it should be per row": per_column})
    scale.check(my_answer)

`wrong` holds the mistakes that learners make, as functions: an answer that behaves as one of them
is told so. `selftest` proves that the reference passes, that each mistake gets its own diagnosis,
and that a blank stub is told to begin.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Number
from typing import Any, Literal

import numpy as np
import torch

from effnb.lab.answers import Solution, done_so_far, tell

registry: dict[str, Exercise] = {}
"""Every exercise that was made in this process, by name."""

_LONG = 160
"""Values longer than this are cut in messages, in characters."""


def _is_number(value: object) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool)


def _as_array(value: object) -> np.ndarray | None:
    if isinstance(value, torch.Tensor):
        kept = value.detach().cpu()
        return kept.to(torch.float64).numpy() if kept.is_floating_point() else kept.numpy()
    return value if isinstance(value, np.ndarray) else None


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "a tensor"
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _show(value: object) -> str:
    """A value, short enough for a sentence."""
    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape)
        if value.numel() > 12:
            return f"a tensor of shape {shape}"
        value = value.detach().cpu().tolist() if value.dim() else value.item()
    elif isinstance(value, np.ndarray):
        if value.size > 12:
            return f"an array of shape {value.shape}"
        value = value.tolist()
    said = repr(_rounded(value))
    return said if len(said) <= _LONG else f"{said[:_LONG]}…"


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_rounded(part) for part in value)
    return value


def _show_arguments(arguments: Sequence) -> str:
    return f"({', '.join(_show(argument) for argument in arguments)})"


def difference(expected: Any, got: Any, atol: float) -> str | None:
    """How two values differ, as the end of a sentence; None when they agree within `atol`.

    Numbers, tensors and arrays are compared within `atol` plus a millionth of the expected value;
    "not a number" agrees with itself. A tensor of one element does not stand for a number: the
    kinds must agree too.
    """
    if isinstance(expected, (torch.Tensor, np.ndarray)):
        return _difference_of_arrays(expected, got, atol)
    if _is_number(expected):
        if not _is_number(got):
            return f"expected the number {_show(expected)}, got {_kind(got)}"
        return (
            None if _near(expected, got, atol) else f"expected {_show(expected)}, got {_show(got)}"
        )
    if is_dataclass(expected) and not isinstance(expected, type):
        if type(got) is not type(expected):
            return f"expected {_kind(expected)}, got {_kind(got)}"
        for field in fields(expected):
            found = difference(getattr(expected, field.name), getattr(got, field.name), atol)
            if found:
                return f"in {field.name}: {found}"
        return None
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping):
            return f"expected {_kind(expected)}, got {_kind(got)}"
        if expected.keys() != got.keys():
            return f"expected the keys {_show(list(expected))}, got {_show(list(got))}"
        for key in expected:
            found = difference(expected[key], got[key], atol)
            if found:
                return f"at {key!r}: {found}"
        return None
    if isinstance(expected, (list, tuple)):
        if not isinstance(got, (list, tuple)):
            return f"expected {_kind(expected)}, got {_kind(got)}"
        if len(expected) != len(got):
            return f"expected {len(expected)} values, got {len(got)}"
        for i, (one, other) in enumerate(zip(expected, got, strict=True)):
            found = difference(one, other, atol)
            if found:
                return f"at position {i}: {found}"
        return None
    if type(expected) is not type(got):
        return f"expected {_show(expected)}, got {_kind(got)}"
    return None if expected == got else f"expected {_show(expected)}, got {_show(got)}"


def _near(expected: Any, got: Any, atol: float) -> bool:
    if expected == got:
        return True
    if isinstance(expected, complex) or isinstance(got, complex):
        return abs(expected - got) <= atol + 1e-6 * abs(expected)
    if math.isnan(expected) or math.isnan(got):
        return math.isnan(expected) and math.isnan(got)
    return abs(expected - got) <= atol + 1e-6 * abs(expected)


def _difference_of_arrays(expected: Any, got: Any, atol: float) -> str | None:
    same_kind = isinstance(got, torch.Tensor) == isinstance(expected, torch.Tensor)
    right, mine = _as_array(expected), _as_array(got)
    if mine is None or not same_kind:
        return f"expected {_kind(expected)} of shape {right.shape}, got {_kind(got)}"
    if mine.shape != right.shape:
        return f"expected shape {right.shape}, got shape {mine.shape}"
    if (right.dtype.kind == "f") != (mine.dtype.kind == "f"):
        return f"expected values of type {expected.dtype}, got {got.dtype}"
    if np.allclose(mine, right, rtol=1e-6, atol=atol, equal_nan=True):
        return None
    far = ~np.isclose(mine, right, rtol=1e-6, atol=atol, equal_nan=True)
    place = tuple(int(i) for i in np.argwhere(far)[0])
    at = f"at {list(place)}" if place else "its value"
    return (
        f"{int(far.sum())} of {far.size} values differ; {at}: "
        f"expected {_show(right[place].item())}, got {_show(mine[place].item())}"
    )


class _Blank(Exception):
    """The answer is still the stub that the learner was given."""


class _Mutated(Exception):
    """The answer changed what it was given."""


@dataclass
class Exercise:
    """One exercise: what is asked, an answer that is right, and answers that are wrong.

    Attributes:
        name: Unique among the exercises of a chapter.
        reference: The right answer, a function; it gets each case's arguments.
        cases: Tuples of arguments. Every answer gets its own copies.
        wrong: For each common mistake, the sentence that names it and a function that makes it.
        minutes: What it takes a learner.
        difficulty: "easy", "medium" or "hard".
        atol: Absolute tolerance of numbers.
        done: Whether a right answer has been checked in this process.
    """

    name: str
    reference: Callable[..., Any]
    cases: Sequence[tuple]
    wrong: Mapping[str, Callable[..., Any]]
    minutes: int = 3
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    atol: float = 1e-6
    done: bool = False

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        cases: Sequence[tuple],
        wrong: Mapping[str, Callable[..., Any]],
        minutes: int = 3,
        difficulty: Literal["easy", "medium", "hard"] = "easy",
        atol: float = 1e-6,
    ) -> None:
        """Make an exercise and enter it in the registry.

        Raises:
            ValueError: When there is no case, or the difficulty is unknown.
            TypeError: When a case is not a tuple of arguments.
            AssertionError: In a sweep (`EFFNB_SWEEP` is 1), when `selftest` fails.
        """
        if not cases:
            raise ValueError(f"the exercise {name!r} needs at least one case.")
        for case in cases:
            if not isinstance(case, tuple):
                raise TypeError(
                    f"each case of {name!r} is a tuple of arguments: write (x,) for one argument."
                )
        if difficulty not in ("easy", "medium", "hard"):
            raise ValueError(f"the difficulty {difficulty!r} is none of easy, medium, hard.")
        self.name, self.reference, self.cases, self.wrong = name, reference, list(cases), wrong
        self.minutes, self.difficulty, self.atol = minutes, difficulty, atol
        self.done = False
        registry[name] = self
        if os.environ.get("EFFNB_SWEEP") == "1":
            self.selftest()

    def __str__(self) -> str:
        """The exercise's heading: name, minutes, difficulty."""
        unit = "minute" if self.minutes == 1 else "minutes"
        return f"{self.name} ({self.minutes} {unit}, {self.difficulty})"

    def check(self, answer: Callable[..., Any]) -> bool:
        """Say what there is to say about an answer, and whether it is right; never raises.

        In a running notebook the verdict is coloured, and a line counts what is done.
        """
        right, verdict = self.judge(answer)
        self.done = self.done or right
        tell(right, verdict, done_so_far(registry.values()))
        return right

    def solution(self) -> Solution:
        """The solution, shown when a reader asks for it; the reader's own answer stays."""
        return Solution(self)

    def judge(self, answer: Callable[..., Any]) -> tuple[bool, str]:
        """Whether an answer is right, and the sentence that says so or says what to look at."""
        if answer is None or answer is Ellipsis:
            return False, self._begin()
        if not callable(answer):
            return False, f"Not yet: give the function itself to check; this is {_kind(answer)}."
        outcomes: list[Any] = []
        problem = None
        for case in self.cases:
            try:
                outcomes.append(self._run(answer, case))
            except _Blank:
                if not outcomes:
                    return False, self._begin()
                outcomes.append(None)
            except _Mutated as caught:
                return False, f"Not yet: {caught}"
            except BaseException as caught:  # a learner's code may raise anything, SystemExit too
                if isinstance(caught, KeyboardInterrupt):
                    raise
                outcomes.append(caught)
                problem = problem or (case, caught)
        first = self._first_difference(outcomes)
        if first is None:
            return (
                True,
                f"Correct: {self.name} gives the right answer in all {len(self.cases)} cases.",
            )
        for diagnosis, mistake in self.wrong.items():
            if self._behaves_as(mistake, outcomes):
                return False, f"Not yet: {diagnosis.rstrip('.')}."
        if problem is not None:
            case, caught = problem
            said = " ".join(str(caught).split()) or "no message"
            return False, (
                f"Not yet: for the input {_show_arguments(case)} your code raises "
                f"{type(caught).__name__}: {said}"
            )
        case, words = first
        return False, f"Not yet: for the input {_show_arguments(case)}: {words}."

    def _begin(self) -> str:
        return (
            f"Not yet: {self.name} returns nothing so far; write your answer, end it with "
            "`return`, and run this again."
        )

    def _run(self, answer: Callable[..., Any], case: tuple) -> Any:
        """The answer's value for copies of a case's arguments.

        Raises:
            _Blank: When the answer is a stub.
            _Mutated: When it changed its arguments, and the reference does not.
        """
        given = copy.deepcopy(case)
        try:
            value = answer(*given)
        except NotImplementedError as caught:
            raise _Blank from caught
        if value is Ellipsis or (value is None and self._expected(case) is not None):
            raise _Blank
        for i, (before, after) in enumerate(zip(case, given, strict=True)):
            if difference(before, after, 0.0) and not self._reference_mutates(case):
                raise _Mutated(
                    f"your code changes its argument number {i + 1}; work on a copy, such as "
                    "x.clone(), and leave the argument as it was."
                )
        return value

    def _expected(self, case: tuple) -> Any:
        return self.reference(*copy.deepcopy(case))

    def _reference_mutates(self, case: tuple) -> bool:
        given = copy.deepcopy(case)
        self.reference(*given)
        return difference(list(case), list(given), 0.0) is not None

    def _first_difference(self, outcomes: Sequence[Any]) -> tuple[tuple, str] | None:
        for case, outcome in zip(self.cases, outcomes, strict=True):
            words = difference(self._expected(case), outcome, self.atol)
            if words:
                return case, words
        return None

    def _behaves_as(self, mistake: Callable[..., Any], outcomes: Sequence[Any]) -> bool:
        """Whether a known mistake gives the same values, or raises the same kind of exception."""
        for case, outcome in zip(self.cases, outcomes, strict=True):
            try:
                theirs = mistake(*copy.deepcopy(case))
            except Exception as caught:  # noqa: BLE001 - a mistake may raise anything
                if type(caught) is not type(outcome):
                    return False
                continue
            if difference(theirs, outcome, self.atol):
                return False
        return True

    def selftest(self) -> None:
        """Prove the check: reference, every mistake, and blank stubs get the right verdict.

        Raises:
            AssertionError: When one of them gets another.
        """

        def blank(*_: Any) -> None:
            return None

        def unwritten(*_: Any) -> None:
            raise NotImplementedError

        right, verdict = self.judge(self.reference)
        if not right:
            raise AssertionError(f"the reference of {self.name!r} fails its own check: {verdict}")
        for diagnosis, mistake in self.wrong.items():
            right, verdict = self.judge(mistake)
            if right or verdict != f"Not yet: {diagnosis.rstrip('.')}.":
                raise AssertionError(
                    f"the mistake {diagnosis!r} of {self.name!r} gets the verdict {verdict!r}"
                )
        for stub in (blank, unwritten, None, ...):
            right, verdict = self.judge(stub)
            if right or verdict != self._begin():
                raise AssertionError(
                    f"a blank answer to {self.name!r} gets the verdict {verdict!r}"
                )

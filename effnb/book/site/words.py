r"""What a chapter adds to the book's common pages: symbols, terms, advice, answers.

It is written once, in the file beside the chapter (`notebooks/05_inference/3_quantization.toml`):

    [[symbol]]
    tex = 'b'
    means = "number of bits that one weight is stored in"

    [[term]]
    name = "perplexity"
    ja = "パープレキシティ"
    means = "how many tokens the model hesitates between, on average"
    at = "Turn the knob"            # the heading under which the chapter explains it

    [[advice]]
    goal = "The model takes too much memory"
    when = "there is no data to calibrate with"
    use = "Round to nearest with four bits, one scale for each 64 weights."
    because = [{ claim = "S-I3", part = "memory" }]
    says = "{smaller} times smaller."
    table = "05_inference/3_quantization/methods"
    at = "Does it hold?"            # the heading under which the chapter shows that table
    numbers.smaller = { of = "bytes", where = { method = "original" }, over = { method = "RTN" } }

    [[answer]]                      # the same without a recommendation, and so without `because`
    goal = "A long text takes too much memory"
    asked = "What does a cache of two bits save?"

Every symbol in a chapter's formulas has to be introduced by some chapter, once in the whole book;
with `local = true` a chapter uses a letter in its own way. What is below the line, and words,
need no entry, and a hat is introduced once for all letters, as '\hat{\cdot}'.

Advice rests on measurements: each entry of `because` names a claim and the beginning of one piece
of its evidence in that chapter, and what must have come out (`outcome`: shown, unless it says
contradicted, undecided or by construction). Where one of them did not come out so, the advice does
not appear. Numbers are read from stored results (see `Number`); a card of which one is missing does
not appear either.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effnb.lab.claims import CONSTRUCTION, CONTRADICTED, SHOWN, UNDECIDED


@dataclass(frozen=True)
class Symbol:
    r"""A symbol of the mathematics.

    Attributes:
        tex: How it is written, such as `\hat w`.
        means: What it stands for, with its unit or shape.
        local: Whether it means this in its own chapter only, where another chapter needs the
            letter for something else.
    """

    tex: str
    means: str
    local: bool = False


@dataclass(frozen=True)
class Term:
    """A term of the field.

    Attributes:
        name: In English.
        ja: In Japanese, as the source articles have it.
        means: What it is, in a sentence without its name.
        at: The heading under which the chapter explains it.
    """

    name: str
    ja: str
    means: str
    at: str


@dataclass(frozen=True)
class Reason:
    """A measurement that advice rests on.

    Attributes:
        claim: Id of the claim.
        part: The registered name of the piece of evidence, or how its words begin.
        outcome: What must have come out: shown, contradicted, undecided or by construction.
    """

    claim: str
    part: str
    outcome: str = "shown"


@dataclass(frozen=True)
class Number:
    """A number of a stored result, as a sentence has it.

    Attributes:
        of: The column, such as `loss`, `domains.novel` or `curve[-4:]`; without `where`, the path
            from the top of what is stored.
        where: What the rows of the table have to say. Several fitting rows are averaged.
        over: The rows whose value it is divided by.
        minus: The rows whose value is taken from it.
        by: How several values of a row become one: mean, median, or perplexity (of losses).
        times: A factor, such as 100 for per cent.
        form: How it is written.
        table: The stored result, where it is not that of the card.
    """

    of: str
    where: dict[str, Any] | None = None
    over: dict[str, Any] | None = None
    minus: dict[str, Any] | None = None
    by: str = "mean"
    times: float = 1
    form: str = ".1f"
    table: str = ""


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    Attributes:
        goal: What the reader wants, or suffers from; advice with the same goal is listed together.
        when: Under which circumstances, beginning in the middle of a sentence.
        use: What to do, in a sentence.
        because: The measurements that it rests on, at least one.
        says: What was measured, with its numbers in braces, by name.
        table: The stored result that it cites.
        at: The heading under which the chapter shows that table.
        numbers: The numbers of that sentence.
    """

    goal: str
    when: str
    use: str
    because: tuple[Reason, ...]
    says: str = ""
    table: str = ""
    at: str = ""
    numbers: dict[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What was measured, without a recommendation.

    Attributes:
        goal: As for advice.
        asked: The question.
        says: The answer, with its numbers in braces, by name.
        table: The stored result that it cites.
        at: The heading under which the chapter shows that table.
        numbers: The numbers of the answer.
    """

    goal: str
    asked: str
    says: str
    table: str
    at: str
    numbers: dict[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Words:
    """Everything that one chapter adds."""

    symbols: tuple[Symbol, ...] = ()
    terms: tuple[Term, ...] = ()
    advice: tuple[Advice, ...] = ()
    answers: tuple[Answer, ...] = ()


def read_words(path: Path) -> Words:
    """Read the file beside a chapter; without one, the chapter adds nothing.

    Raises:
        ValueError: When the file is not as described above; one sentence says where.
    """
    if not path.exists():
        return Words()
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    unknown = sorted(set(content) - {"symbol", "term", "advice", "answer"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of symbol, term, advice, answer.")
    advice = []
    for row in content.get("advice", ()):
        reasons = tuple(_made(Reason, reason) for reason in row.get("because", ()))
        if not reasons:
            raise ValueError(f"the advice {row.get('use')!r} names no measurement in `because`.")
        advice.append(_card(Advice, {**row, "because": reasons}))
    for row in advice:
        for reason in row.because:
            if reason.outcome not in (SHOWN, CONTRADICTED, UNDECIDED, CONSTRUCTION):
                raise ValueError(f"{reason.outcome!r} is no outcome of a measurement.")
    return Words(
        tuple(_made(Symbol, row) for row in content.get("symbol", ())),
        tuple(_made(Term, row) for row in content.get("term", ())),
        tuple(advice),
        tuple(_card(Answer, row) for row in content.get("answer", ())),
    )


def _card(kind: type, row: dict[str, Any]) -> Any:
    """Advice or an answer, from its table; its sentence names its numbers, and no others."""
    numbers = {name: _made(Number, one) for name, one in row.get("numbers", {}).items()}
    made = _made(kind, {**row, "numbers": numbers})
    named = set(re.findall(r"\{(\w+)\}", made.says))
    if named != set(numbers):
        odd = sorted(named ^ set(numbers))[0]
        raise ValueError(f"{made.says!r} and its numbers disagree on {odd!r}.")
    if made.says and not (made.table and made.at):
        raise ValueError(f"{made.says!r} cites no table: give `table` and `at`.")
    return made


def _made(kind: type, row: dict[str, Any]) -> Any:
    """One entry, from its table."""
    try:
        made = kind(**row)
    except TypeError as problem:
        said = str(problem).replace(f"{kind.__name__}.__init__() ", "")
        raise ValueError(f"a {kind.__name__.lower()} {row} {said}.") from None
    empty = [name for name in row if vars(made)[name] == ""]
    if empty:
        raise ValueError(f"{empty[0]!r} is empty in the {kind.__name__.lower()} {row}.")
    return made


# ------------------------------------------------------------------------------------- symbols

_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|"
    "pi|rho|sigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|"
    "Upsilon|Phi|Psi|Omega|ell"
)
_DRESS = (
    "hat|bar|tilde|dot|vec|widehat|widetilde|overline|underline|mathbf|boldsymbol|mathcal|mathbb|"
    "mathsf|mathfrak|mathscr"
)
_WORDS = "text|textbf|textit|operatorname|mathrm|mathit|texttt|begin|end|tag|label"
_LETTER = rf"(?:\\(?:{_GREEK})(?![A-Za-z])|[A-Za-z])"
_DRESSED = rf"\\(?:{_DRESS})(?![A-Za-z])"
_TOKEN = re.compile(
    rf"(?P<dress>{_DRESSED})\s*(?:\{{\s*(?P<inside>(?:{_DRESSED}\s*\{{?\s*)*{_LETTER})\s*\}}*"
    rf"|(?P<bare>{_LETTER}))"
    rf"|(?P<letter>{_LETTER})|\\[A-Za-z]+\*?|\\."
)


def symbols_in(tex: str) -> set[str]:
    r"""The symbols of a formula, with their hats and boldness, without indices and words.

    `\hat{W}_{ij} = s\,(Q_{ij} - z)` has `\hat W`, `s`, `Q` and `z`.
    """
    tex = re.sub(rf"\\(?:{_WORDS})\*?\s*\{{[^{{}}]*\}}", " ", tex)
    tex = _without_indices(tex)
    tex = re.sub(r"\^\s*(?:\\top\b|\{\s*(?:\\top|T|H)\s*\}|T\b)", " ", tex)  # transposes
    tex = re.sub(r"(?<![A-Za-z\\])e\s*\^", " ", tex)  # Euler's number
    return {normal(found[0]) for found in _TOKEN.finditer(tex) if _is_symbol(found)}


def normal(tex: str) -> str:
    r"""One spelling of a symbol: `\hat{w}` and `\hat w` are the same."""
    return " ".join(re.sub(r"[{}]", " ", tex).split())


def key(tex: str) -> str:
    r"""The symbol that an entry of the notation is about: `\Omega_i(b)` is about `\Omega`.

    An entry such as `\hat{\cdot}` is about the hat, whatever is below it.
    """
    if r"\cdot" in tex:
        return normal(tex)
    found = next(filter(_is_symbol, _TOKEN.finditer(_without_indices(tex))), None)
    return normal(found[0]) if found else normal(tex)


def _explained(symbol: str, known: set[str]) -> bool:
    """Whether a symbol is known, or its letter and what it wears are."""
    dress, _, letter = symbol.rpartition(" ")
    return symbol in known or (bool(dress) and {f"{dress} \\cdot", letter} <= known)


def _is_symbol(found: re.Match[str]) -> bool:
    return any(found[name] for name in ("dress", "letter"))


def _without_indices(tex: str) -> str:
    """The formula without what is below the line."""
    out, position = [], 0
    while position < len(tex):
        if tex[position] != "_" or (position and tex[position - 1] == "\\"):
            out.append(tex[position])
            position += 1
            continue
        position += 1
        while position < len(tex) and tex[position] == " ":
            position += 1
        if position < len(tex) and tex[position] == "{":
            depth = 0
            while position < len(tex):
                depth += {"{": 1, "}": -1}.get(tex[position], 0)
                position += 1
                if not depth:
                    break
        elif position < len(tex) and tex[position] == "\\":
            position += len(re.match(r"\\(?:[A-Za-z]+|.)", tex[position:])[0])
        else:
            position += 1
        out.append(" ")
    return "".join(out)


def clashes(declared: list[tuple[str, Symbol]]) -> list[str]:
    """Symbols that two chapters introduce, as sentences.

    A symbol has one meaning in the whole book, unless a chapter says that its own is local.

    Args:
        declared: Name of a chapter and a symbol that it introduces.
    """
    found, seen = [], {}
    for chapter, symbol in declared:
        named = (key(symbol.tex), chapter if symbol.local else "")
        if named in seen:
            found.append(
                f"{chapter} introduces the symbol {symbol.tex}, which {seen[named]} introduces "
                "already: leave it out, or say `local = true` if it means something else there."
            )
        seen.setdefault(named, chapter)
    return found


def unexplained(
    written: list[tuple[str, list[str]]], declared: list[tuple[str, Symbol]]
) -> list[str]:
    """Symbols that a chapter uses and does not introduce, as sentences.

    Args:
        written: Name of a chapter and its formulas.
        declared: Name of a chapter and a symbol that it introduces.
    """
    everywhere = {key(symbol.tex) for _, symbol in declared if not symbol.local}
    found = []
    for chapter, texts in written:
        here = {key(symbol.tex) for name, symbol in declared if name == chapter}
        used = set().union(*map(symbols_in, texts)) if texts else set()
        found += [
            f"{chapter} uses the symbol {symbol}, and no chapter says what it means: introduce it "
            f"in notebooks/{chapter}.toml."
            for symbol in sorted(used)
            if not _explained(symbol, everywhere | here)
        ]
        found += [
            f"notebooks/{chapter}.toml introduces the symbol {symbol}, which is never used there."
            for symbol in sorted(here - used)
            if r"\cdot" not in symbol
        ]
    return found

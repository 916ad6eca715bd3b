"""The guide: what to use for which purpose, in sentences with numbers from stored results.

A chapter adds two kinds of cards in the file beside it (see `effnb.book.site.words`). **Advice**
recommends, and rests on verdicts: it disappears with them. An **answer** only says what was
measured. Both take their numbers from stored results, row by row, at settings that were measured;
a card of which a number is missing does not appear. Each card cites its table.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterator
from statistics import fmean, median
from typing import Any

from effnb.book.site.book import Book, SiteError, Written, link
from effnb.book.site.verdicts import certainty, measured
from effnb.book.site.words import Advice, Answer, Number
from effnb.lab import results

_STEP = re.compile(r"([^.\[\]]+)|\[(-?\d*):(-?\d*)\]")
_HOW: dict[str, Callable[[list[float]], float]] = {
    "mean": fmean,
    "median": median,
    "perplexity": lambda values: math.exp(fmean(values)),
}


class Missing(LookupError):
    """A setting that is not measured."""


def stored(name: str) -> results.StoredResult | None:
    """A stored result of the models that are here; None without one."""
    try:
        found = results.read(name)
    except results.Outdated:
        return None
    return None if isinstance(found, results.NotMeasured) else found


# ---------------------------------------------------------------------------------- the numbers


def value(data: Any, number: Number, where: dict[str, Any] | None) -> float:
    """One value of a stored result: of the rows that fit, or of the result itself.

    Args:
        data: What is stored.
        number: Which column, and how its values become one.
        where: What the rows of its table have to say; None where the path begins at the top.

    Raises:
        Missing: When no row fits.
        SiteError: When the rows have no such column, or it holds no numbers.
    """
    if where is None:
        rows = [data]
    else:
        rows = [row for row in data["table"] if all(row.get(k) == v for k, v in where.items())]
        if not rows:
            raise Missing(where)
    return fmean(_one(_at(row, number.of), number) for row in rows)


def _at(row: Any, path: str) -> Any:
    """What lies at a path such as `domains.novel` or `curve[-4:]`."""
    found = row
    for name, first, last in _STEP.findall(path):
        try:
            if name:
                found = found[name]
            else:
                found = found[slice(int(first) if first else None, int(last) if last else None)]
        except (KeyError, TypeError):
            raise SiteError(f"the guide asks for {path!r}, which the stored rows lack.") from None
    return found


def _one(found: Any, number: Number) -> float:
    """Several repetitions as one number; a string of 0 and 1 is a share."""
    if isinstance(found, str) and re.fullmatch("[01]+", found):
        found = [int(digit) for digit in found]
    values = found if isinstance(found, list) else [found]
    if not values or not all(isinstance(one, int | float) for one in values):
        raise SiteError(f"the guide asks for {number.of!r}, which is no number.")
    return _HOW[number.by](values)


def spoken(number: Number, data: Any) -> str:
    """A number in the form in which a sentence has it.

    Raises:
        Missing: When a setting is not measured.
        SiteError: When the stored rows do not have what is asked for.
    """
    found = value(data, number, number.where)
    if number.over is not None:
        found /= value(data, number, number.over)
    if number.minus is not None:
        found -= value(data, number, number.minus)
    said = format(found * number.times, number.form)
    return said.replace("-", "−")


def sentence(card: Advice | Answer) -> str | None:
    """What a card says, with its numbers; None where one of them is not measured.

    Raises:
        SiteError: When a number cannot be read.
    """
    said = {}
    for name, number in card.numbers.items():
        found = stored(number.table or card.table)
        if found is None:
            return None
        try:
            said[name] = spoken(number, found.data)
        except Missing:
            return None
    return card.says.format(**said)


# ------------------------------------------------------------------------------------ the cards


def supported(written: Written) -> Iterator[tuple[Advice, list[dict[str, Any]]]]:
    """The advice that a chapter's own measurements support, with the pieces of evidence.

    Raises:
        SiteError: When advice names a claim or a measurement that the chapter does not have.
    """
    verdicts = {one["id"]: one for one in written.verdicts}
    for advice in written.words.advice:
        pieces, holds = [], True
        for reason in advice.because:
            parts = verdicts.get(reason.claim, {"parts": []})["parts"]
            named = [part for part in parts if part.get("name") == reason.part]
            fitting = named or [part for part in parts if part["what"].startswith(reason.part)]
            if len(fitting) != 1:
                raise SiteError(
                    f"notebooks/{written.name}.toml: the advice {advice.use!r} rests on "
                    f"{len(fitting)} measurements of {reason.claim} that begin with "
                    f"{reason.part!r}, and has to rest on one."
                )
            holds &= fitting[0]["outcome"] == reason.outcome
            pieces.append({**fitting[0], "claim": reason.claim})
        if holds:
            yield advice, pieces


def tables(book: Book) -> list[str]:
    """The stored results that cards cite, for the site to offer."""
    cards = [one for w in book.written for one in (*w.words.advice, *w.words.answers)]
    used = {one.table for one in cards if one.table}
    used |= {number.table for one in cards for number in one.numbers.values() if number.table}
    return sorted(name for name in used if stored(name))


def _said(card: Advice | Answer, written: Written) -> tuple[str, str] | None:
    """A card's sentence and its source, as HTML; None where a number is not measured."""
    if not card.says:
        return "", ""
    try:
        text = sentence(card)
    except SiteError as problem:
        raise SiteError(f"notebooks/{written.name}.toml: {problem}") from None
    if text is None:
        return None
    if card.at not in written.headings:
        raise SiteError(
            f"notebooks/{written.name}.toml: a card cites its table under {card.at!r}, and the "
            "chapter has no such heading."
        )
    about = stored(card.table).provenance
    there = link(card.at, "which", f"{written.name}.html#{written.headings[card.at]}")
    file = link(f"{card.table}.json", "which", f"results/{card.table}.json")
    return (
        f'<p class="advice-says">{html.escape(text)}</p>',
        f'<p class="advice-table">Table: under {there}, in '
        f"{link(written.chapter.title, 'which', f'{written.name}.html')}; stored on "
        f"{html.escape(about.date)} as {file}.</p>",
    )


def advice_part(book: Book) -> str:
    """What the measurements of all chapters say, under what the reader wants.

    Raises:
        SiteError: When a card names what is not there.
    """
    goals: dict[str, list[str]] = {}
    for written in book.written:
        for advice, pieces in supported(written):
            said = _said(advice, written)
            if said is None:
                continue
            chapter = f"{written.name}.html#claim-"
            rows = "".join(
                f"<li>{html.escape(one['what'])}: <strong>{measured(one)}</strong> "
                f'<span class="expected">({certainty(one)}; '
                f"{link(one['claim'], 'which', chapter + one['claim'])})</span></li>"
                for one in pieces
            )
            where = link(written.chapter.title, "which", f"{written.name}.html")
            goals.setdefault(advice.goal, []).append(
                f'<section class="advice"><p class="advice-when">If {html.escape(advice.when)}:</p>'
                f'<p class="advice-use">{html.escape(advice.use)}</p>{said[0]}'
                f'<p class="advice-why">Judged in {where}:</p><ul>{rows}</ul>{said[1]}</section>'
            )
        for answer in written.words.answers:
            said = _said(answer, written)
            if said is not None:
                goals.setdefault(answer.goal, []).append(
                    '<section class="advice advice-measured">'
                    f'<p class="advice-when">{html.escape(answer.asked)}</p>'
                    f"{said[0]}{said[1]}</section>"
                )
    if not goals:
        return "Nothing has been measured yet that would support a recommendation."
    parts = []
    for goal, cards in goals.items():
        inside = "".join(sorted(cards, key=lambda card: "advice-measured" in card))
        parts.append(f"## {goal}\n\n```{{raw}} html\n{inside}\n```")
    return "\n\n".join(parts)

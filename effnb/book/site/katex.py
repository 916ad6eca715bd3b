"""Mathematics set while the pages are made: they need no script for it, and no other host.

KaTeX lies in `.make/site/vendor` and runs in QuickJS, an interpreter of JavaScript that is an
ordinary Python package. A formula that it does not understand is an error of the build.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[3] / ".make" / "site" / "vendor" / "katex.min.js"

# A string that was put together may reach Python only in one piece: JSON.stringify makes it one.
_GLUE = """
function render(argument) {
  const [tex, displayMode] = JSON.parse(argument);
  const settings = {displayMode, throwOnError: true, strict: "ignore", output: "htmlAndMathml"};
  try {
    return JSON.stringify({html: katex.renderToString(tex, settings)});
  } catch (error) {
    return JSON.stringify({error: String(error.message)});
  }
}
"""


@cache
def _interpreter() -> Any:
    """KaTeX, loaded once."""
    import quickjs

    context = quickjs.Context()
    context.eval(SCRIPT.read_text(encoding="utf-8"))
    context.eval(_GLUE)
    return context.get("render")


@cache
def render(tex: str, display: bool = False) -> str:
    """A formula as HTML, with MathML inside of it for those who hear the page.

    Args:
        tex: The formula.
        display: Whether it is displayed on its own line.

    Raises:
        ValueError: When KaTeX does not understand the formula; the message says where.
    """
    said = json.loads(_interpreter()(json.dumps([tex, display])))
    if "error" in said:
        raise ValueError(said["error"].removeprefix("KaTeX parse error: "))
    return said["html"]

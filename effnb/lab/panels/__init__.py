"""Interactive figures: a picture and its numbers that answer when a knob is turned.

    panel(compute, draw, text=text, caption="…", bits=knob(2, 8), method=knob(["RTN", "GPTQ"]))

In a running kernel the knobs are live: a position is computed once, on a thread of the panel's
own, and a request that a newer one has overtaken is dropped. Beside its widgets a live panel keeps
a plain copy of what it shows in the notebook, which those see who open the saved notebook later.

While a chapter is built (the environment variable `EFFNB_BUILD` is 1) the panel stores one frame
for each of a few positions of one or two knobs, joined to their controls in the browser, so that
the built page moves with no kernel at all. With `EFFNB_SWEEP` set to 1 every new panel first visits
all its positions, and raises where one fails.
"""

from effnb.lab.panels.guesses import Guess, Guesses, guess, guesses
from effnb.lab.panels.interactive import Panel, PanelError, panel
from effnb.lab.panels.knobs import Knob, knob
from effnb.lab.panels.positions import Position

__all__ = [
    "Guess",
    "Guesses",
    "Knob",
    "Panel",
    "PanelError",
    "Position",
    "guess",
    "guesses",
    "knob",
    "panel",
]

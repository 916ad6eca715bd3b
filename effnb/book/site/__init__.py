"""The book on the web: static pages from the executed chapters.

    python -m effnb.book.site            # what `make site` runs: build/site, ready to be published

Nothing is executed: what a page shows is what `make notebooks` stored. First the sources of all
pages are written into a separate folder (`sources.write`): the chapters, in a form that fits a
page, and the pages beside them, each generated from what the chapters say about themselves. Then
Sphinx with myst-nb makes pages of them, and a warning is an error. How the pages look is decided in
`.make/site/`.
"""

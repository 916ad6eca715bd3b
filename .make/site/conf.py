"""How Sphinx makes the pages. `python -m effnb.book.site` writes what it reads, and calls it."""

project = "effnb"
author = "the authors of effnb"
html_title = "effnb: efficient methods for language models"
html_short_title = "effnb"
language = "en"

extensions = ["myst_nb", "effnb.book.site.extension"]
html_math_renderer = "katex"

# The chapters were executed when they were built; here nothing runs.
nb_execution_mode = "off"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # panels are plain HTML here

myst_enable_extensions = ["amsmath", "attrs_block", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

add_module_names = False
python_maximum_signature_line_length = 60
toc_object_entries_show_parents = "hide"
highlight_language = "python"
pygments_style = "a11y-high-contrast-light"

html_theme = "sphinx_book_theme"
html_theme_options = {
    "article_header_start": ["toggle-primary-sidebar"],
    "footer_content_items": [],
    "home_page_in_toc": False,
    "pygments_dark_style": "a11y-high-contrast-dark",
    "pygments_light_style": "a11y-high-contrast-light",
    "search_bar_text": "Search the book",
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "toc_title": "On this page",
    "use_download_button": False,
    "use_fullscreen_button": False,
}
html_static_path = ["static"]
templates_path = ["templates"]
html_sidebars = {"**": ["book-brand", "book-search", "book-nav"]}
html_css_files = ["book.css"]
html_js_files = [("book.js", {"defer": "defer"}), ("search.js", {"defer": "defer"})]
html_favicon = "static/icon.svg"
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
html_domain_indices = False
html_use_index = False
html_permalinks_icon = "#"
html_context = {"default_mode": "auto"}

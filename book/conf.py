"""Sphinx configuration of the book. Scripts, fonts and formulas all come from the book itself."""

project = html_title = "slimlab"
author = "the authors of slimlab"
language = "en"

extensions = ["myst_nb"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]

# Notebooks come executed from tools/build_book.py.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
myst_update_mathjax = False

# MathJax 2.7, copied here by tools/build_book.py, draws formulas as SVG: browsers refuse web fonts
# to pages that are opened as files.
mathjax_path = "mathjax/MathJax.js"
mathjax2_config = {
    "jax": ["input/TeX", "output/SVG"],
    "extensions": [
        "tex2jax.js",
        "AssistiveMML.js",
        "TeX/AMSmath.js",
        "TeX/AMSsymbols.js",
        "TeX/noErrors.js",
        "TeX/noUndefined.js",
    ],
    "tex2jax": {"ignoreClass": "tex2jax_ignore|mathjax_ignore", "processClass": "math|output_area"},
    "SVG": {"font": "STIX-Web", "linebreaks": {"automatic": True}},
    "showMathMenu": False,
    "messageStyle": "none",
}

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_show_sourcelink = html_show_copyright = False
html_last_updated_fmt = None
html_theme_options = {
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

"""Sphinx's configuration; `_ext/jaxref_docs` makes the pages from the source."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

_version = re.search(r'__version__ = "(.+)"', (ROOT / "jaxref" / "__init__.py").read_text("utf-8"))

project = "jaxref"
author = "The jaxref authors"
project_copyright = author
version = release = _version[1] if _version else ""

extensions = ["myst_nb", "jaxref_docs"]
nb_execution_mode = "off"  # the notebooks are committed with their outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
exclude_patterns = ["_build", "_ext", "_static"]

smartquotes = False  # quotes and primes of formulas and code stay as they are
add_module_names = True
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
highlight_language = "python"

html_theme = "furo"
html_title = f"jaxref {release}"
html_static_path = ["_static"]
html_css_files = ["jaxref.css"]
html_js_files = [("filter.js", {"defer": "defer"})]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#245a86",
        "color-brand-content": "#245a86",
        "color-api-name": "#1d2733",
        "color-api-pre-name": "#6b7785",
    },
    "dark_css_variables": {
        "color-brand-primary": "#8ab8e0",
        "color-brand-content": "#8ab8e0",
        "color-api-name": "#e8edf2",
        "color-api-pre-name": "#93a0ad",
    },
}

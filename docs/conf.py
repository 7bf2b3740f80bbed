"""The site: ``make docs`` executes the notebooks and builds it into build/site."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

import sgdgp

project = "sgdgp"
author = copyright = "The sgdgp developers"
version = release = sgdgp.__version__
html_title = f"sgdgp {release}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "formulas",
    "reference",
]
exclude_patterns = ["_extensions", "_static"]
suppress_warnings = ["mystnb.unknown_mime_type"]  # progress bars as widgets

# `make docs` executes them beforehand, in their short form, into docs/tutorials.
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings name files of the machine
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # signatures have them
python_maximum_signature_line_length = 60

# Commands are copied without their prompt, and without what they print.
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
# Formulas are part of the pages: no script is fetched to show them.
html_math_renderer = "mathml"

"""How Sphinx makes the site of these pages; `nox -s docs` runs it.

The pages are plain Markdown, to be read on a Git host as well. `tests/test_docs.py` runs their code, not Sphinx.
"""

import gklx

project = "gklx"
author = "The gklx developers"
project_copyright = author
version = release = gklx.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.programoutput",
    # Copies MathJax into the site, which then needs no network.
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
smartquotes = False  # users type straight quotes, as in "mean"

# --- Markdown ---------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_fence_as_directive = ["math"]  # ```math, which Git hosts render too
myst_heading_anchors = 4

# --- docstrings -------------------------------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have dtypes and shapes, the annotations only "array"
numpydoc_show_class_members = False
# `kl` in a docstring links to that function; other names, such as parameters, are shown as code.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", r".*")]

# --- the command's help -----------------------------------------------------------------------------------------------

programoutput_prompt_template = "$ {command}\n{output}"

# --- HTML -------------------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"gklx {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_copyright = False
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

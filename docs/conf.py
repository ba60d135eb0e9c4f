"""Sphinx configuration of the documentation site.

    pip install -e ".[docs]" && python -m sphinx -W docs docs/_build/html

The site uses Sphinx with MyST and the Book theme, like the sites of Optax, Flax and JAX.
Its pages load nothing from other sites: formulas are MathML, and their font is included.
"""

import importlib.metadata
import importlib.resources
import shutil
import tomllib
from pathlib import Path

from docutils import nodes
from math_core import LatexToMathML

ROOT = Path(__file__).parents[1]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]

# Sphinx reads only files in its source folder, so copy the notebooks into it.
shutil.rmtree(ROOT / "docs" / "notebooks", ignore_errors=True)
shutil.copytree(ROOT / "notebooks", ROOT / "docs" / "notebooks")

project = "sophia_optax"
author = copyright = "The sophia_optax authors"
release = importlib.metadata.version("sophia_optax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.extlinks",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

# A name in backticks in a docstring becomes a link if it is documented, otherwise code.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings state dtypes and shapes instead
autosummary_generate = False
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs
nb_number_source_lines = False
extlinks = {"source": (f"{URLS['Repository']}/blob/main/%s", "%s")}

html_theme = "sphinx_book_theme"
html_title = project
html_baseurl = URLS["Documentation"]
FONTS = importlib.resources.files("ziamath") / "fonts"
html_static_path = ["_static", str(FONTS / "STIXTwoMath-Regular.ttf")]
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}  # the light or dark mode of the reader's device
html_math_renderer = "mathml"
html_theme_options = {
    "repository_url": URLS["Repository"],
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_persistent": [],  # no search button: the sidebar has a search field
}

_to_mathml = LatexToMathML(fancy_error=False)


def _mathml(displaystyle):
    """Return the (visit, depart) functions for display formulas or inline formulas."""

    def visit(writer, node):
        latex = node.astext()
        if "\\\\" in latex and "\\begin" not in latex:
            latex = f"\\begin{{aligned}}{latex}\\end{{aligned}}"
        mathml = _to_mathml.convert_with_local_state(latex, displaystyle=displaystyle)
        writer.body.append(f'<div class="math">{mathml}</div>' if displaystyle else mathml)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """Register a Sphinx math renderer that converts formulas to MathML."""
    app.add_html_math_renderer("mathml", _mathml(False), _mathml(True))

"""The site: pip install -e '.[docs]' -c constraints.txt && sphinx-build -W --keep-going docs site."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import llava_sp_jax  # noqa: E402 - the clone's

project = "llava-sp-jax"
author = "The llava-sp-jax authors"
version = release = llava_sp_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_api", "sphinx_notebook"]
exclude_patterns = ["_ext"]
smartquotes = False  # docstrings quote values

html_theme = "furo"
html_title = "LLaVA-SP in JAX"
html_show_copyright = html_show_sourcelink = html_copy_source = False

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
# The names of the package itself are documented in their modules, too: a short name finds both.
suppress_warnings = ["ref.python"]
autodoc_default_options = {"members": True}

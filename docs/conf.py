"""Settings of the pages: Sphinx with MyST and furo, the reference from docstrings, no network."""

from replib import __version__

project, author, release = "replib", "The replib authors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"replib {release}"
myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "set_fit_request, set_transform_request"}
default_role = "code"
exclude_patterns = ["_build"]
# One-word axes of jaxtyping look like names of attributes.
suppress_warnings = ["ref.python"]

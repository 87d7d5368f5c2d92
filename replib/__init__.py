"""Look into a chat model, bend its safety deeper, ablate it with optimal transport, audit what holds.

Importing the package is cheap: each module, and the heavy library behind it, loads on first use.
"""

from importlib import import_module, util
from types import ModuleType

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """``replib.transport`` imports the module ``replib.transport`` (PEP 562)."""
    if not name.startswith("_") and util.find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The modules of the package, loaded or not."""
    from pkgutil import iter_modules

    return sorted({*globals(), *(module.name for module in iter_modules(__path__))})

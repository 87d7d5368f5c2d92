"""Look into a chat model, bend its safety deeper, ablate it with optimal transport, audit what holds.

The public names stand in ``__init__.pyi``. Each, and the heavy library behind it, loads on first use.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

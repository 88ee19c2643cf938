"""Fallow: idle devices as one inference service.

The folders are the architecture; `docs/ARCHITECTURE.md` walks a request through them.
"""

__version__ = "0.1.0"

"""The version of the distribution; `pyproject.toml` reads it here, without importing torch."""

__version__ = '0.1.0'

"""The version of the distribution. `pyproject.toml` takes it from here without importing torch."""

__version__ = '0.1.0'

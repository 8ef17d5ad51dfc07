"""Measurements, and the pages that are made of them."""

from __future__ import annotations

import importlib.util
import sys


def check_plots() -> None:
    """Ends the program with a message if there is no matplotlib: before the work of hours that ends with a plot."""
    if importlib.util.find_spec('matplotlib') is None:
        sys.exit("the plots need matplotlib: pip install '.[train]', or use .venv/bin/python, which `make` sets up")

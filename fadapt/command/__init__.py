"""The command ``fadapt``, also ``python -m fadapt``: files and sweeps without a script."""

from .main import main as main

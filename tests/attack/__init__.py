"""Hostile files and calls, counted: ``python -m tests.attack.files`` and ``.calls``."""

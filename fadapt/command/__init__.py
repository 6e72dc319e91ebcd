"""The command ``fadapt``, also ``python -m fadapt``: files and sweeps without a script.

The package's parser is tyro (the ``cli`` extra), which reads the arguments of the functions in
``files`` and ``sweeps`` and their docstrings; those are the help text.
"""

from .main import main as main

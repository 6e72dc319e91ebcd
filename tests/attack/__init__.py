"""What is attacked and counted: files and calls by hostile ones, calls by interrupts and threads.

``python -m tests.attack.files``, ``.calls``, ``.interrupts``, ``.threads``.
"""

"""The two errors a person meets: their input is wrong (exit code 2), or a run failed (exit code 1).

Each carries one sentence that says what is wrong, where, and what to do about it.
"""

from __future__ import annotations


class InputError(Exception):
    """What the user gave cannot be used; nothing has been computed or written. Exit code 2."""


class RunError(Exception):
    """A run that had started could not go on; what it had finished is kept. Exit code 1."""

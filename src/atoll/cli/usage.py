"""A command line that cannot be understood, as a leaf of the error tree."""

from __future__ import annotations

from atoll.errors import InputError


class CommandLineError(InputError):
    """A command, an option or an argument that does not exist, is missing, or does not go with another."""

    code = "C107"

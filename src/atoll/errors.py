"""What can go wrong, as one tree. A leaf's code is never reused; docs/errors.md has a paragraph for each.

AtollError
├── InputError                    exit 2: what the user gave is wrong; nothing was written
│   ├── ManyErrors                several of the leaves below, reported together
│   ├── ConfigFileError    C101   run.toml cannot be read
│   ├── UnknownKeyError    C102   a key or section that does not exist
│   ├── BadValueError      C103   a value of the wrong type or outside its range
│   ├── ConflictError      C104   values that exclude each other
│   ├── UnavailableError   C105   an option this version, or this installation, does not have
│   ├── OverrideError      C106   a --set that cannot be understood
│   ├── CommandLineError   C107   a command or option that does not exist, is missing, or does not go with another
│   ├── TransportError     C108   an address or certificates that a connection cannot safely be made with
│   ├── PartError          C109   a part that is not built in and cannot be loaded, or does not do what its kind must
│   ├── TrustError         C110   a run or model folder that names code which nobody said to trust
│   ├── DataFileError      D201   a data file or data set that cannot be read
│   ├── BadRowError        D202   one row that cannot be used
│   ├── ColumnError        D203   a column that the data does not have
│   ├── EmptyDataError     D204   nothing left to train or evaluate on
│   ├── PartitionError     D205   rows that cannot be dealt to the edges as asked
│   ├── BaseFolderError    B301   a model folder that is missing or incomplete
│   ├── ArchitectureError  B302   a model that is not a causal language model Atoll can train
│   ├── TokenizerError     B303   a tokenizer that is missing or does not fit
│   ├── WeightsError       B304   weights that cannot be read or do not fit the model
│   ├── TargetError        A401   adapter targets that match no module
│   ├── AdapterFolderError A402   an adapter folder that cannot be read
│   ├── AdapterFitError    A403   an adapter that does not fit this model or run
│   ├── RunFolderError     R501   a folder that is not a run directory, or lacks what is asked of it
│   ├── OutputError        R502   a place that cannot be written
│   ├── ResumeError        R503   a run that cannot go on: it is going on already, or what it began with has changed
│   ├── FleetFolderError   R505   a folder that is not of a fleet, or lacks what is asked of it
│   └── OtherBaseError     R506   a base that is not the one that a run was trained on
├── PlanError                     exit 3: what was asked does not fit the machines
│   └── InfeasibleError    P601   no setting fits an edge's memory or time
└── PeerError                     exit 4: an edge, a host or the coordinator was lost or refused; work is saved
    ├── EdgesLostError     F701   fewer edges answered than a round needs
    ├── UpdateRefusedError F702   an update that must not be averaged
    ├── OrderRefusedError  F703   an order that an edge does not follow
    ├── DiskError          R504   the coordinator's disk takes no more; the last whole checkpoint is intact
    ├── FrameError         W801   bytes from the other side that are no whole, undamaged message
    ├── ProtocolError      W802   a message that the dialogue does not allow now
    ├── HostRefusedError   W803   the host refused the device, naming what does not fit
    └── HostLostError      W804   the host cannot be reached, or did not come back
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from atoll.printable import printable

_BELOW = "\n" + 12 * " "
"""From one line of a part to the next: past the label."""


class AtollError(Exception):
    """A small page: what happened, where, what was found, what was expected, what to do."""

    code: ClassVar[str] = ""
    exit_status: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", got: str = "", expected: str = "", do: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.got, self.expected, self.do = what, where, got, expected, do
        if more := self.page().partition("\n")[2]:
            self.add_note(more)  # So that a traceback shows it, too.

    def page(self) -> str:
        """The error as plain text: each part that is known begins a line with its label, and goes on below itself.

        Parts may hold what a peer or a file says: nothing in them moves a terminal's cursor or begins a line that looks like another part.
        """
        parts = [("where", self.where), ("got", self.got), ("expected", self.expected), ("do", self.do)]
        what = printable(self.what)
        lines = [f"error {self.code}: {what}" if self.code else f"error: {what}"]
        return "\n".join(lines + [f"  {label:<9} {_BELOW.join(map(printable, text.splitlines()))}" for label, text in parts if text])


class InputError(AtollError):
    """What the user gave is wrong."""

    exit_status = 2


class ManyErrors(InputError):
    """Several input errors found in one reading, so that the user mends them in one go."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        self.errors = tuple(errors)  # First: the page is made of them.
        super().__init__(f"{len(errors)} errors")
        self.__notes__ = [self.page()]

    def page(self) -> str:
        """All pages, one after the other."""
        return "\n".join(error.page() for error in self.errors)


class ConfigFileError(InputError):
    """run.toml cannot be read."""

    code = "C101"


class UnknownKeyError(InputError):
    """A key or section that does not exist."""

    code = "C102"


class BadValueError(InputError):
    """A value of the wrong type or outside its range."""

    code = "C103"


class ConflictError(InputError):
    """Values that exclude each other."""

    code = "C104"


class UnavailableError(InputError):
    """An option this version, or this installation, does not have."""

    code = "C105"


class OverrideError(InputError):
    """A --set that cannot be understood."""

    code = "C106"


class CommandLineError(InputError):
    """A command or option that does not exist, is missing, or does not go with another."""

    code = "C107"


class TransportError(InputError):
    """An address or certificates that a connection cannot safely be made with."""

    code = "C108"


class PartError(InputError):
    """A part that is not built in and cannot be loaded, or does not do what its kind must."""

    code = "C109"


class TrustError(InputError):
    """A folder that somebody else may have made names code, and nobody said to trust it."""

    code = "C110"


class DataFileError(InputError):
    """A data file or data set that cannot be read."""

    code = "D201"


class BadRowError(InputError):
    """One row that cannot be used; `where` names file, line and column."""

    code = "D202"


class ColumnError(InputError):
    """A column that the data does not have."""

    code = "D203"


class EmptyDataError(InputError):
    """Nothing left to train or evaluate on."""

    code = "D204"


class PartitionError(InputError):
    """Rows that cannot be dealt to the edges as asked."""

    code = "D205"


class BaseFolderError(InputError):
    """A model folder that is missing or incomplete."""

    code = "B301"


class ArchitectureError(InputError):
    """A model that is not a causal language model Atoll can train."""

    code = "B302"


class TokenizerError(InputError):
    """A tokenizer that is missing or does not fit."""

    code = "B303"


class WeightsError(InputError):
    """Weights that cannot be read or do not fit the model."""

    code = "B304"


class TargetError(InputError):
    """Adapter targets that match no module."""

    code = "A401"


class AdapterFolderError(InputError):
    """An adapter folder that cannot be read."""

    code = "A402"


class AdapterFitError(InputError):
    """An adapter that does not fit this model or run."""

    code = "A403"


class RunFolderError(InputError):
    """A folder that is not a run directory, or lacks what is asked of it."""

    code = "R501"


class OutputError(InputError):
    """A place that cannot be written."""

    code = "R502"


class ResumeError(InputError):
    """A run that cannot go on: it is going on already, or what it began with has changed."""

    code = "R503"


class FleetFolderError(InputError):
    """A folder that is not of a fleet, or lacks what is asked of it."""

    code = "R505"


class OtherBaseError(InputError):
    """A base that is not the one that a run was trained on."""

    code = "R506"


class PlanError(AtollError):
    """What was asked does not fit the machines."""

    exit_status = 3


class InfeasibleError(PlanError):
    """No setting fits an edge's memory or time."""

    code = "P601"


class PeerError(AtollError):
    """An edge, a host or the coordinator was lost or refused; work is saved."""

    exit_status = 4


class EdgesLostError(PeerError):
    """Fewer edges answered than a round needs."""

    code = "F701"


class UpdateRefusedError(PeerError):
    """An update that must not be averaged."""

    code = "F702"


class OrderRefusedError(PeerError):
    """An order that an edge does not follow."""

    code = "F703"


class DiskError(PeerError):
    """The coordinator's disk takes no more; the last whole checkpoint is intact."""

    code = "R504"


class FrameError(PeerError):
    """Bytes from the other side that are no whole, undamaged message."""

    code = "W801"


class ProtocolError(PeerError):
    """A message that the dialogue does not allow now."""

    code = "W802"


class HostRefusedError(PeerError):
    """The host refused the device, naming what does not fit."""

    code = "W803"


class HostLostError(PeerError):
    """The host cannot be reached, or did not come back."""

    code = "W804"
    retry_seconds: float = 0.0
    """After which another try is worth while, as the host says; 0 where it does not."""

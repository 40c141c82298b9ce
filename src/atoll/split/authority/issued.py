"""issued.json: the numbers of all certificates that an authority gave to each name, for the day when they are revoked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from atoll.errors import TransportError
from atoll.parsed import parse_json

ISSUED = "issued.json"


@dataclass(frozen=True, slots=True)
class Issued:
    """Numbers by name."""

    serials: Mapping[str, frozenset[int]]

    @classmethod
    def read(cls, path: Path) -> Issued:
        """What the file says; of no file nothing.

        Raises: TransportError for a file that is none.
        """
        try:
            found = parse_json(path.read_text(encoding="utf-8")) if path.exists() else {}
            if not isinstance(found, dict):
                raise ValueError("no names")
            return cls({name: frozenset(int(number, 16) for number in numbers) for name, numbers in found.items()})
        except (OSError, ValueError, TypeError) as problem:
            raise TransportError(
                "the list of certificates that were given cannot be read", where=str(path), got=str(problem),
                expected='{"NAME": ["number in hexadecimal", ...]}', do="bring it back from a copy, or delete it",
            ) from None  # fmt: skip

    def of(self, name: str) -> frozenset[int]:
        """All of one name."""
        return self.serials.get(name, frozenset())

    def with_(self, name: str, serials: Iterable[int]) -> Issued:
        """These too."""
        return Issued({**self.serials, name: self.of(name) | frozenset(serials)})

    def content(self) -> bytes:
        """Of the file."""
        numbers = {name: [f"{serial:x}" for serial in sorted(serials)] for name, serials in self.serials.items()}
        return (json.dumps(numbers, indent=2) + "\n").encode()


def serial_in(pem: bytes) -> int:
    """The number of a certificate that was just made."""
    return x509.load_pem_x509_certificate(pem).serial_number

"""Whether certificates, keys and lists are well, and for how long: of a folder that a host's authority signs in, or of any machine's."""

from __future__ import annotations

import datetime
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cryptography import x509

from atoll.commands.doctor import Check, DoctorReport
from atoll.errors import TransportError
from atoll.split.authority.issuer import CLOCK_SKEW
from atoll.split.authority.revocation import Revoked, listed
from atoll.split.certificates import examined
from atoll.units import counted

SOON = datetime.timedelta(days=30)
"""Certificates that end sooner are a warning."""
_AGAIN = "bring them back from a copy"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def check_certificates(folder: Path) -> DoctorReport | None:
    """Examine a folder of certificates, as `atoll host --make-certificates` and `certify` write them; None for one that has none."""
    host, tenants = folder / "host.pem", sorted(folder.glob("tenant-*.pem"))
    certs = [*([host] if host.exists() else []), *tenants]
    if not certs:
        return None
    ca, crl = folder / "ca.pem", folder / "revoked.pem"
    keys = [cert.with_suffix(".key") for cert in certs]
    files = files_check(folder, [ca, *certs, *keys], _AGAIN)
    if files.status == "fail":
        return DoctorReport((files,))
    ca_key = [folder / "ca.key"] if (folder / "ca.key").exists() else []
    found = [files, keys_check([*ca_key, *keys])]
    for cert in certs:
        name = cert.stem.removeprefix("tenant-")
        checks = certificate_checks(cert, cert.with_suffix(".key"), ca, renew=f"run `atoll host renew {name} --dir {folder}`")
        found += checks if len(certs) == 1 else [replace(check, name=f"{name} {check.name}") for check in checks]
    return DoctorReport((*found, *([list_check(crl, ca)] if crl.exists() else [])))


def list_check(revoked: Path, ca: Path) -> Check:
    """Whether the list of revoked certificates is the authority's: by another one nobody would be let in."""
    try:
        Revoked(revoked, ca).check()
    except TransportError as problem:
        return Check("revoked certificates", "fail", problem.got, problem.do)
    found = listed(revoked)
    named = f"; all that was given, until they were revoked, to {', '.join(sorted(found.names))}" if found.names else ""
    return Check("revoked certificates", "ok", f"{len(found.serials) or 'none'}{named}")


def files_check(folder: Path, paths: Sequence[Path], again: str) -> Check:
    """Whether each is there and this process may read it."""
    bad = [f"{path.relative_to(folder)}: {problem}" for path in paths if (problem := unreadable(path))]
    return Check("files", "fail", "; ".join(bad), again) if bad else Check("files", "ok", f"all {len(paths)} can be read")


def unreadable(path: Path) -> str:
    """Why this process may not read it; empty: it may."""
    try:
        with path.open("rb"):
            return ""
    except FileNotFoundError:
        return "missing"
    except OSError as problem:
        return problem.strerror or str(problem)


def keys_check(keys: Sequence[Path]) -> Check:
    """Whether nobody but the owner may read them; systems without such permissions have nothing to check."""
    open_keys = [key for key in keys if os.name == "posix" and key.stat().st_mode & _OTHERS]
    if open_keys:
        names = ", ".join(key.name for key in open_keys)
        return Check("private keys", "fail", f"others may read {names}", "chmod 600 " + " ".join(str(key) for key in open_keys))
    return Check("private keys", "ok", f"{', '.join(key.name for key in keys)}: for their owner alone")


def certificate_checks(cert: Path, key: Path, ca: Path, *, renew: str) -> list[Check]:
    """The certificate with its key and its authority, and this machine's clock by it; `renew` says how to get another."""
    try:
        certificate = examined(cert, key, ca)
    except TransportError as problem:
        found = f"{problem.what}: {problem.got} ({problem.where})"
        return [*_clock_by(cert), Check("certificate", "fail", found, f"{problem.do}; or {renew}")]
    left = certificate.not_valid_after_utc - _now()
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d}, {counted(left.days, 'day')} more"
    found = f"{cert.name} holds until {until}; signed by {ca.name}; its key fits"
    do = renew if left < SOON else ""
    return [*_clock_by(cert), Check("certificate", "warn" if do else "ok", found, do)]


def _clock_by(cert: Path) -> list[Check]:
    """This machine's clock, against the hour in which the certificate was made."""
    try:
        certificate = x509.load_pem_x509_certificate(cert.read_bytes())
    except ValueError:
        return []
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    # One that was given soon after its name was revoked begins when it was made.
    made = starts + (CLOCK_SKEW if (ends - starts) % datetime.timedelta(days=1) == datetime.timedelta(0) else datetime.timedelta(0))
    now = _now()
    found = f"{now:%Y-%m-%d %H:%M} UTC; {cert.name} was made {made:%Y-%m-%d %H:%M}"
    if now >= made:
        return [Check("clock", "ok", found)]
    do = "set this machine's clock; if it is right, the one that made the certificates was not"
    return [Check("clock", "fail" if now < starts else "warn", f"{found}, which is still to come", do)]


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)

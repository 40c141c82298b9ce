"""Limits of tenants by name, as a TOML file has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from atoll.config.document import Document, nearest, read_document
from atoll.config.keys import as_toml
from atoll.config.load import raise_all
from atoll.config.named_parts import wrong_key
from atoll.config.quantities import Seconds
from atoll.config.sections.section import Section
from atoll.errors import BadValueError, ConfigFileError, InputError, UnknownKeyError
from atoll.split.host.limits.rules import BYTES_EXAMPLE, TenantLimits, parse_byte_limit
from atoll.split.host.tenants import is_tenant_name

_TABLE = "tenant"


class TenantSection(Section):
    """[tenant.NAME] what the devices with this name in their certificates may have; a key that is not there is as for all tenants."""

    sessions: Annotated[int, Field(ge=1)] | None = None
    """At a time."""
    tokens_per_second: Annotated[float, Field(gt=0)] | None = None
    """Of all its exchanges, padding included."""
    burst: Annotated[int, Field(ge=1)] | None = None
    """Tokens that may be used at once after a pause; those of 10 seconds where it is not said."""
    bytes: str | None = None
    """In a period, both directions together, such as "20 GB/day" or "500 MiB/hour"."""
    idle: Seconds | None = None
    """A session that has no exchange for so long ends."""
    silence: Seconds | None = None
    """A session ends when it has waited for so long between its exchanges, all told."""

    @field_validator("bytes")
    @classmethod
    def _is_a_limit(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_byte_limit(value)
            except ValueError:
                raise PydanticCustomError("value_error", BYTES_EXAMPLE) from None
        return value

    def over(self, usual: TenantLimits) -> TenantLimits:
        """The limits, with the usual ones where nothing is said."""
        rate = usual.tokens_per_second if self.tokens_per_second is None else self.tokens_per_second
        # What goes with the usual rate goes with no other.
        burst = usual.burst if self.burst is None and self.tokens_per_second is None else self.burst
        return TenantLimits(
            usual.sessions if self.sessions is None else self.sessions, rate, burst,
            usual.bytes if self.bytes is None else parse_byte_limit(self.bytes),
            usual.idle_seconds if self.idle is None else self.idle, usual.silence_seconds if self.silence is None else self.silence,
        )  # fmt: skip


def read_tenants(path: Path, usual: TenantLimits) -> dict[str, TenantLimits]:
    """The limits at `path`, by tenant.

    Raises: ConfigFileError, UnknownKeyError, BadValueError; ManyErrors with all of them.
    """
    if not path.exists():
        raise ConfigFileError(
            "there is no such file", where=str(path), got="nothing", expected="a TOML file of [tenant.NAME] sections", do="check the path"
        )
    document = read_document(path)
    errors: list[InputError] = [_outside(key, document) for key in document.table if key != _TABLE]
    tenants = document.table.get(_TABLE, {})
    found: dict[str, TenantLimits] = {}
    if not isinstance(tenants, Mapping) or (not tenants and not errors):
        errors.append(BadValueError(
            "the file has no tenants", where=str(path), got=as_toml(tenants), expected="[tenant.NAME] sections",
            do="add one for each tenant that has limits of its own",
        ))  # fmt: skip
        tenants = {}
    for name, table in tenants.items():
        section = _section(name, table, usual, document)
        if isinstance(section, TenantSection):
            found[name] = section.over(usual)
        else:
            errors += section
    raise_all(errors)
    return found


def _section(name: str, table: object, usual: TenantLimits, document: Document) -> TenantSection | list[InputError]:
    location, title = (_TABLE, name), f"[tenant.{name}]"
    if not is_tenant_name(name):
        return [BadValueError(
            "a certificate cannot name a tenant so", where=document.where(location), got=name,
            expected="1 to 64 visible characters, none of them a space at an end", do="write the name as `atoll host certify` was given it",
        )]  # fmt: skip
    if not isinstance(table, Mapping):
        return [BadValueError(
            f"{title} must be a section", where=document.where(location), got=as_toml(table), expected=title,
            do=f"write {title} and its keys below it",
        )]  # fmt: skip
    try:
        section = TenantSection.model_validate(dict(table))
    except ValidationError as error:
        items = {item["loc"][0]: item for item in reversed(error.errors(include_url=False))}
        return [wrong_key(title, location, TenantSection, items[key], document) for key in reversed(items)]
    if section.burst is not None and section.tokens_per_second is None and usual.tokens_per_second is None:
        return [BadValueError(
            f"{title} burst needs a rate", where=document.where((*location, "burst")), got="burst alone",
            expected="tokens_per_second as well", do="add it, or take burst out",
        )]  # fmt: skip
    return section


def _outside(key: str, document: Document) -> UnknownKeyError:
    do = "did you mean [tenant.NAME]?" if nearest(key, [_TABLE]) else "write it below [tenant.NAME], or take it out"
    return UnknownKeyError(
        f"{key!r} stands outside [tenant.NAME]", where=document.where((key,)), got=key, expected="[tenant.NAME] sections", do=do
    )

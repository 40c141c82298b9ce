"""Parts that are not built in: "module:object" from a folder or the environment, or an installed entry point by its name.

Nothing is imported unless a config that its owner wrote names it. A module is imported as Python always does, with the folder at the head
of the path; one process knows one module of a name, and another file of that name is refused rather than mixed up with the first.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from atoll.errors import PartError
from atoll.registry.kinds import KINDS, Kind
from atoll.registry.parts import Part, known, loaded, names, register

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_DIGESTS: dict[str, str] = {}
"""SHA-256 of the files of modules that were imported here, by the module's name."""


def is_reference(name: str) -> bool:
    """Whether a name has the form "module:object"."""
    return _REFERENCE.fullmatch(name) is not None


def installed(kind: str) -> dict[str, EntryPoint]:
    """Entry points of a kind by name, none of them loaded; a built-in part's name is not theirs."""
    return {point.name: point for point in entry_points(group=KINDS[kind].group) if point.name not in names(kind)}


def is_plugin(kind: str, name: str) -> bool:
    """Whether a name, which may be any text, is not that of a built-in part."""
    return name not in names(kind)


def load_plugin(kind: str, name: str, folder: Path, *, environment: bool = True) -> Part:
    """Import the part of this name and register it: from the folder first, then, where that may be, from the environment.

    Raises: PartError where it is not found, does not import, or is not what its kind must be.
    """
    where = f"{KINDS[kind].key} = {name!r}"
    reference = name
    if not is_reference(name):
        point = installed(kind).get(name) if environment else None
        if point is None:
            raise _unknown(KINDS[kind], name, where, environment=environment)
        reference = point.value
    module_name, _, object_name = reference.partition(":")
    module = _module(module_name, folder.resolve(), where, environment=environment)
    target = getattr(module, object_name, None)
    if not isinstance(target, type):
        raise _no_class(module, object_name, target, where)
    part = known(kind, name)
    if part is not None and part.target is target:
        return part
    return register(kind, name, target, (target.__doc__ or "").partition("\n")[0], origin=Path(module.__file__ or module_name))


def blamed(error: BaseException) -> tuple[Part, str] | None:
    """The part in whose own file an exception was raised, or passed through last, and the line; None: in no part that was loaded."""
    origins = {str(part.origin): part for part in loaded()}
    found, trace = None, error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file in origins:
            found = origins[file], f"{Path(file).name}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _module(name: str, folder: Path, where: str, *, environment: bool) -> ModuleType:
    file = next((one for one in files_of(name, folder) if one.is_file()), None)
    loaded = sys.modules.get(name)
    if file is None and not environment:
        raise PartError(
            "a part is loaded from this machine's own folder only", where=where, got=f"no {name.replace('.', '/')}.py in {folder}",
            expected="the file beside run.toml", do="copy it there, if you trust who wrote it",
        )  # fmt: skip
    if file is not None and loaded is not None and Path(loaded.__file__ or "").resolve() != file:
        raise PartError(
            "two modules have the same name", where=where, got=f"{loaded.__file__ or 'a module of Python itself'}, which is in use",
            expected=str(file), do="give the file another name, or run in a process of its own",
        )  # fmt: skip
    with _path(folder):
        return _imported(name, file, loaded, where)


def _imported(name: str, file: Path | None, loaded: ModuleType | None, where: str) -> ModuleType:
    try:
        digest = "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
        importlib.invalidate_caches()
        # A file that was edited since, as in a notebook, is what is asked for.
        edited = loaded is not None and _DIGESTS.get(name, digest) != digest
        module = importlib.reload(loaded) if edited and loaded is not None else importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name is not None and (name == problem.name or name.startswith(f"{problem.name}.")):
            raise _no_module(name, where) from None
        raise _broken(name, problem, where) from problem
    except Exception as problem:
        if isinstance(problem, PartError):
            raise
        raise _broken(name, problem, where) from problem
    _DIGESTS[name] = digest
    return module


def files_of(reference: str, folder: Path) -> tuple[Path, Path]:
    """Where in a folder the module of a "module:object" would lie."""
    path = folder.joinpath(*reference.partition(":")[0].split("."))
    return path.with_suffix(".py"), path / "__init__.py"


@contextmanager
def _path(folder: Path) -> Iterator[None]:
    """With the folder at the head of the module path, so that a part's own imports find what lies beside it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _unknown(kind: Kind, name: str, where: str, *, environment: bool) -> PartError:
    here = [*names(kind.name), *(installed(kind.name) if environment else ())]
    likely = difflib.get_close_matches(name, here, n=1)
    do = f"did you mean {likely[0]!r}?" if likely else f'install the package that has it ({kind.group}), or write "module:object"'
    return PartError(f"there is no {kind.name} of this name", where=where, got=name, expected=f"one of {', '.join(here)}", do=do)


def _no_module(name: str, where: str) -> PartError:
    return PartError(
        "there is no such module", where=where, got=f"no {name.replace('.', '/')}.py beside run.toml, and no installed module {name}",
        expected="a Python file in the folder of run.toml, or an installed package", do="check the name before the colon",
    )  # fmt: skip


def _broken(name: str, problem: Exception, where: str) -> PartError:
    trace, line = problem.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == name:
            line = f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}: "
        trace = trace.tb_next
    if isinstance(problem, SyntaxError):
        line = f"{Path(problem.filename or name).name}, line {problem.lineno}: "
    said = str(problem).splitlines()
    return PartError(
        f"the module {name} cannot be imported", where=where, got=f"{line}{type(problem).__name__}: {said[0] if said else ''}".rstrip(": "),
        expected="a module that imports", do=f'mend it; `python -c "import {name}"` in that folder shows the whole traceback',
    )  # fmt: skip


def _no_class(module: ModuleType, name: str, found: object, where: str) -> PartError:
    classes = [one for one, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__]
    likely = difflib.get_close_matches(name, classes, n=1)
    return PartError(
        f"the module {module.__name__} has no class {name}", where=where,
        got="nothing of that name" if found is None else f"a {type(found).__name__}",
        expected=f"one of {', '.join(classes)}" if classes else "a class",
        do=f"did you mean {module.__name__}:{likely[0]}?" if likely else "check the name after the colon",
    )  # fmt: skip

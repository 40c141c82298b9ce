"""Parts that are not built in: "module:object" from a folder or the environment, or an installed entry point by its name.

Nothing is imported unless a config that its owner wrote names it. A module is imported as Python always does, with the folder at the head
of the path; one process knows one module of a name, and another file of that name is refused rather than mixed up with the first.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path, PureWindowsPath
from types import ModuleType

from atoll.errors import PartError
from atoll.registry.kinds import KINDS, Kind
from atoll.registry.parts import Part, known, loaded, names, register

_DIGESTS: dict[str, tuple[Path, str]] = {}
"""Modules that came from a folder, a part's own and what it imports from beside it: their files, and the SHA-256 of what was imported."""


def is_reference(name: str) -> bool:
    """Whether a name has the form "module:object"."""
    module, colon, found = name.partition(":")
    return bool(colon) and all(word.isidentifier() for word in (*module.split("."), found))


def meant(text: str) -> str | None:
    """The "module:object" that somebody meant who wrote a file's path, or a dot for the colon; None: nothing that could be one."""
    module, colon, found = "".join(text.split()).rpartition(":")
    if not colon or not found.isidentifier():
        module, _, found = text.strip().rpartition(".")
    path = PureWindowsPath(module)  # Whose folders are parted by either slash.
    inside = [] if path.anchor or ".." in path.parts else path.parts[:-1]
    reference = f"{'.'.join([*inside, path.name.removesuffix('.py')])}:{found}"
    return reference if is_reference(reference) and reference != text and found not in ("py", "toml") else None


def installed(kind: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points of a kind by name, none of them loaded; a built-in part's name is not theirs."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=KINDS[kind].group):
        if point.name not in names(kind) and point not in found.get(point.name, ()):
            found[point.name] = (*found.get(point.name, ()), point)
    return found


def is_plugin(kind: str, name: str) -> bool:
    """Whether a name, which may be any text, is not that of a built-in part."""
    return name not in names(kind)


def load_plugin(kind: str, name: str, folder: Path, *, environment: bool = True) -> Part:
    """Import the part of this name and register it: from the folder first, then, where that may be, from the environment.

    What is built in needs neither.

    Raises: PartError where it is not found, does not import, or is not what its kind must be.
    """
    where, part = f"{KINDS[kind].key} = {name!r}", known(kind, name)
    if part is not None and part.is_built_in:
        return part
    if is_reference(name):
        reference, module = name, _module(name.partition(":")[0], folder.resolve(), where, environment=environment)
    else:
        reference = _installed_reference(KINDS[kind], name, where, environment=environment)
        module_name = reference.partition(":")[0]
        # Its own package's, and no file that lies beside run.toml.
        module = _imported(module_name, None, None, where)
    try:
        target: object = operator.attrgetter(reference.partition(":")[2])(module)
    except AttributeError:
        target = None
    if not isinstance(target, type):
        raise _no_class(KINDS[kind], module, reference.partition(":")[2], target, where)
    if part is not None and part.target is target:
        return part
    return register(kind, name, target, (target.__doc__ or "").partition("\n")[0], origin=Path(_file_of(module) or module.__name__))


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


def _installed_reference(kind: Kind, name: str, where: str, *, environment: bool) -> str:
    """Where the package that has this name says that its part is."""
    points = installed(kind.name).get(name, ()) if environment else ()
    if not points:
        raise _unknown(kind, name, where, environment=environment)
    packages = [point.dist.name if point.dist is not None else point.value for point in points]
    if len(points) > 1:
        raise PartError(
            f"two packages have a {kind.name} of this name", where=where, got=" and ".join(packages), expected="one of them",
            do=f'name the one that is meant by its class: "{points[0].module}:{points[0].attr}"',
        )  # fmt: skip
    if not points[0].attr:
        raise PartError(
            f"the package {packages[0]} does not say where its {kind.name} is", where=where, got=f"{name} = {points[0].value}",
            expected=f'"module:object" below {kind.group}', do="tell whoever wrote the package, or name the class itself",
        )  # fmt: skip
    return f"{points[0].module}:{points[0].attr}"


def _module(name: str, folder: Path, where: str, *, environment: bool) -> ModuleType:
    file = _file_in(folder, name)
    if file is None and not environment:
        raise PartError(
            "a part is loaded from this machine's own folder only", where=where, got=f"no {name.replace('.', '/')}.py in {folder}",
            expected="the file beside run.toml", do="copy it there, if you trust who wrote it",
        )  # fmt: skip
    if file is None and name in _DIGESTS and not _is_installed(name):
        # Of another folder: what this run got would depend on what was run before.
        raise _no_module(name, folder, where)
    _forget_edited(folder)
    for other in _DIGESTS:
        if (same := _file_in(folder, other)) is not None and other in sys.modules:
            _check_file(sys.modules[other], same, where)
    if file is not None and name in sys.modules:
        _check_file(sys.modules[name], file, where)
    with _path(folder):
        module = _imported(name, file, folder, where)
    if file is not None:
        _check_file(module, file, where)
    return module


def _is_installed(name: str) -> bool:
    """Whether a module that is loaded is what Python finds by itself, too."""
    top = name.partition(".")[0]
    specs = (finder.find_spec(top, None) for finder in sys.meta_path)
    spec = next((one for one in specs if one is not None), None)
    return spec is not None and top in sys.modules and spec.origin == _file_of(sys.modules[top])


def _forget_edited(folder: Path) -> None:
    """What came from this folder is imported anew where a file of it was edited since, as in a notebook: that is what is asked for."""
    own = {name: (file, digest) for name, (file, digest) in _DIGESTS.items() if file == _file_in(folder, name)}
    if any(_digest(file) != digest for file, digest in own.values()):
        for name in own:
            sys.modules.pop(name, None)
            del _DIGESTS[name]


def _note(folder: Path, before: set[str]) -> None:
    for name in set(sys.modules) - before:
        file, found = _file_in(folder, name), _file_of(sys.modules[name])
        if file is not None and found is not None and Path(found).resolve() == file.resolve() and name.partition(".")[0] != "atoll":
            _DIGESTS[name] = file, _digest(file)


def _file_in(folder: Path, name: str) -> Path | None:
    return next((one for one in files_of(name, folder) if one.is_file()), None)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_file(module: ModuleType, file: Path, where: str) -> None:
    """Whether a module is that file and no other of its name: of the environment, of Python itself, or of another folder."""
    found = _file_of(module)
    if found is None or Path(found).resolve() != file.resolve():
        raise PartError(
            "two modules have the same name", where=where, got=f"{found or 'a module of Python itself'}, which is in use",
            expected=str(file), do="give the file another name, or run in a process of its own",
        )  # fmt: skip


def _file_of(module: ModuleType) -> str | None:
    return getattr(module, "__file__", None)


def _imported(name: str, file: Path | None, folder: Path | None, where: str) -> ModuleType:
    before = set(sys.modules)
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name is not None and (name == problem.name or name.startswith(f"{problem.name}.")):
            parent = sys.modules.get(problem.name.rpartition(".")[0])
            if file is not None and parent is not None:  # A package of the same name, which has no such module, comes before the folder.
                _check_file(parent, file.parent / "__init__.py", where)
            raise _no_module(name, folder, where) from None
        raise _broken(name, problem, where) from problem
    except (Exception, SystemExit) as problem:  # A script without a guard ends with sys.exit().
        if isinstance(problem, PartError):
            raise
        raise _broken(name, problem, where) from problem
    finally:
        if folder is not None:
            _note(folder, before)
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
    likely = difflib.get_close_matches(name, here, n=1) or [meant(name)]
    do = f"did you mean {likely[0]!r}?" if likely[0] else f'install the package that has it ({kind.group}), or write "module:object"'
    return PartError(f"there is no {kind.name} of this name", where=where, got=name, expected=f"one of {', '.join(here)}", do=do)


def _no_module(name: str, folder: Path | None, where: str) -> PartError:
    beside = [] if folder is None else [file.stem for file in folder.glob("*.py")]
    likely = difflib.get_close_matches(name.removesuffix(".py"), beside, n=1)
    return PartError(
        "there is no such module", where=where, got=f"no {name.replace('.', '/')}.py beside run.toml, and no installed module {name}",
        expected="a Python file in the folder of run.toml, or an installed package",
        do=f"did you mean {likely[0]}, before the colon?" if likely else "check the name before the colon",
    )  # fmt: skip


def _broken(name: str, problem: BaseException, where: str) -> PartError:
    trace, line = problem.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == name:
            line = f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}: "
        trace = trace.tb_next
    if isinstance(problem, SyntaxError):
        line = f"{Path(problem.filename or name).name}, line {problem.lineno}: "
    said = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0][:200]}".rstrip(": ")
    return PartError(
        f"the module {name} cannot be imported", where=where, got=line + said,
        expected="a module that imports", do=f'mend it; `python -c "import {name}"` in that folder shows the whole traceback',
    )  # fmt: skip


def _no_class(kind: Kind, module: ModuleType, name: str, found: object, where: str) -> PartError:
    own = {one: value for one, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__}
    fitting = [one for one, value in own.items() if all(hasattr(value, method) for method in kind.methods)]
    likely = difflib.get_close_matches(name, own, n=1) or [one for one in own if one.casefold() == name.casefold()]
    return PartError(
        f"the module {module.__name__} has no class {name}", where=where,
        got="nothing of that name" if found is None else f"a {type(found).__name__}",
        expected=f"one of {', '.join(fitting[:8])}" if fitting else f"a class with {', '.join(kind.methods)}",
        do=f"did you mean {module.__name__}:{likely[0]}?" if likely else "check the name after the colon",
    )  # fmt: skip

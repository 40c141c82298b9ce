"""Parts from a folder, the environment and entry points: found, refused with one page, and imported by nobody else's word."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from atoll.cli.app import main
from atoll.config.load import load
from atoll.errors import BadValueError, ConflictError, InputError, ManyErrors, PartError, UnknownKeyError
from atoll.registry import plugins
from atoll.registry.kinds import KINDS, Kind
from atoll.registry.parts import find, make, names, register, trait

from tests.registry.parts import PARTS, was_imported, write_part


def config(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text('[data]\ntrain = "demo"\n' + text)
    return path


def refused(path: Path, *, environment: bool = True) -> list[InputError]:
    with pytest.raises(InputError) as caught:
        load(path, environment=environment)
    return list(caught.value.errors) if isinstance(caught.value, ManyErrors) else [caught.value]


def test_every_kind_is_a_key_of_run_toml() -> None:
    from atoll.config.keys import keys

    named = {key.named.kind: key.path for key in keys().values() if key.named is not None}
    assert named == {kind.name: kind.key for kind in KINDS.values()}


@pytest.mark.parametrize("kind", PARTS)
def test_every_kind_loads_from_the_folder_of_run_toml(kind: str, tmp_path: Path) -> None:
    section, key = KINDS[kind].key.split(".")
    name = write_part(tmp_path, kind, f"foreign_{kind}")
    value = f'["{name}"]' if kind in ("metric", "tracker", "transform") else f'"{name}"'
    more = {"select": "observe_steps = 2\nevery = 20\n"}.get(section, "")
    text = f"{key} = {value}\n{more}"
    load(config(tmp_path, text if section == "data" else f"[{section}]\n{text}"))
    part = find(kind, name)
    assert (part.is_built_in, part.origin) == (False, tmp_path / f"foreign_{kind}.py")


def test_a_name_alone_imports_nothing(tmp_path: Path) -> None:
    """What comes over a network, or stands in a plan, is looked up among what is loaded."""
    name = write_part(tmp_path, "codec", "never_named")
    with pytest.raises(PartError, match="no codec of this name is loaded"):
        find("codec", name)
    assert not was_imported(tmp_path)


def test_a_file_in_the_folder_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("SCORE = 0.25\n")
    (tmp_path / "with_import.py").write_text(
        "from beside_it import SCORE\nclass One:\n    def score(self, answers):\n        return {'one': SCORE}\n"
    )
    load(config(tmp_path, '[evaluate]\nmetrics = ["with_import:One"]\n'))
    assert make("metric", "with_import:One").score(None) == {"one": 0.25}


def test_a_module_in_a_package_of_the_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "ours_here").mkdir()
    (tmp_path / "ours_here" / "__init__.py").touch()
    write_part(tmp_path / "ours_here", "metric", "inner")
    load(config(tmp_path, '[evaluate]\nmetrics = ["ours_here.inner:Length"]\n'))
    assert find("metric", "ours_here.inner:Length").origin == tmp_path / "ours_here" / "inner.py"


def test_a_file_that_was_edited_is_what_counts(tmp_path: Path) -> None:
    name = write_part(tmp_path, "metric", "edited_later")
    path = config(tmp_path, f'[evaluate]\nmetrics = ["{name}"]\n')
    load(path)
    file = tmp_path / "edited_later.py"
    file.write_text(file.read_text() + "    columns = ('slots',)\n")
    assert "needs evaluate.slots" in refused(path)[0].what
    assert trait("metric", name, "columns") == ("slots",)


@pytest.mark.parametrize(("text", "got", "do"), [
    ("import no_such_library\n", "broken_module.py, line 1: ModuleNotFoundError: No module named 'no_such_library'", "mend it"),
    ("x = 1\nraise ValueError('not today')\n", "broken_module.py, line 2: ValueError: not today", "mend it"),
    ("class Length\n", "broken_module.py, line 1: SyntaxError: expected ':'", "mend it"),
    ("class Lenght:\n    def score(self, answers):\n        return {}\n", "nothing of that name", "did you mean broken_module:Lenght?"),
    ("Length = 5\n", "a int", "check the name after the colon"),
    ("class Length:\n    pass\n", "Length without score", "atoll.testing.check('metric', ...)"),
    ("import sys\nsys.exit(0)\n", "broken_module.py, line 2: SystemExit: 0", "mend it"),
    ("class Length:\n    def score(self):\n        pass\n", "Length whose score(self) cannot be given 1 argument", "mend it"),
    ("from atoll.tasks.scoring.metric import Metric\nclass Length(Metric):\n    pass\n", "Length without score", "mend it"),
    ("class Length:\n    def __init__(self, at):\n        pass\n    score = print\n", "__init__(at), which cannot be given no arg", "mend"),
    ("class Length:\n    Options = {'at': 1}\n    score = print\n", "that are not made from atoll.registry.options.Options", "mend"),
    ("class Length:\n    columns = 'slots'\n    score = print\n", "whose columns is 'slots', and not texts", "mend it"),
    ("class Length:\n    columns = ('place',)\n    score = print\n", "columns = ('place', ...)", "a field of its Options"),
    ("class length:\n    score = print\n", "nothing of that name", "did you mean broken_module:length?"),
])  # fmt: skip
def test_what_does_not_load_is_one_page(text: str, got: str, do: str, tmp_path: Path) -> None:
    (tmp_path / "broken_module.py").write_text(text)
    plugins.sys.modules.pop("broken_module", None)
    (error,) = refused(config(tmp_path, '[evaluate]\nmetrics = ["broken_module:Length"]\n'))
    assert isinstance(error, PartError)
    assert got in error.got
    assert do in error.do
    assert error.where == f"{tmp_path / 'run.toml'}, line 4: evaluate.metrics"


@pytest.mark.parametrize(
    "text", ["@classmethod\n    def score(cls, answers)", "@staticmethod\n    def score(answers)", "def score(self, *all)"]
)
def test_whatever_can_be_called_so_is_a_method(text: str, tmp_path: Path) -> None:
    (tmp_path / "callable_so.py").write_text(f"class Length:\n    {text}:\n        return {{'one': 1.0}}\n")
    plugins.sys.modules.pop("callable_so", None)
    load(config(tmp_path, '[evaluate]\nmetrics = ["callable_so:Length"]\n'))
    assert make("metric", "callable_so:Length").score(None) == {"one": 1.0}


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_as_many_arguments_are_asked_for_as_the_protocol_says(kind: Kind) -> None:
    module, _, name = kind.protocol.partition(":")
    protocol = getattr(importlib.import_module(module), name)
    said = {method: len(inspect.signature(getattr(protocol, method)).parameters) - 1 for method in kind.methods}
    assert said == kind.methods


@pytest.mark.parametrize(("text", "reference"), [
    ("spread.py:Spread", "spread:Spread"), ("./spread.py:Spread", "spread:Spread"), ("parts/spread.py:Spread", "parts.spread:Spread"),
    ("C:\\parts\\spread.py:Spread", "spread:Spread"), ("../parts/spread:Spread", "spread:Spread"), ("spread.Spread", "spread:Spread"),
    (" spread : Spread ", "spread:Spread"), ("spread:", None), (":Spread", None), ("spread.py", None), ("", None), ("über:Maß", None),
])  # fmt: skip
def test_a_path_or_a_dot_is_told_the_reference_that_was_meant(text: str, reference: str | None) -> None:
    assert plugins.meant(text) == reference


def test_names_are_those_of_python(tmp_path: Path) -> None:
    write_part(tmp_path, "metric", "übung")
    load(config(tmp_path, '[evaluate]\nmetrics = ["übung:Length"]\n'))
    (error,) = refused(config(tmp_path, '[evaluate]\nmetrics = ["./übung.py:Length"]\n'))
    assert error.do.startswith('did you mean "übung:Length"?')
    (error,) = refused(config(tmp_path, '[evaluate]\nmetrics = ["übung.py:Length"]\n'))
    assert error.do == "did you mean übung, before the colon?"


def test_what_is_not_there_is_one_page(tmp_path: Path) -> None:
    (error,) = refused(config(tmp_path, '[select]\npolicy = "nowhere_at_all:Policy"\n'))
    assert (type(error), error.what) == (PartError, "there is no such module")


@pytest.mark.parametrize("change", ["part", "beside"])
def test_a_file_beside_the_part_that_was_edited_counts_too(change: str, tmp_path: Path) -> None:
    (tmp_path / f"scale_{change}.py").write_text("SCALE = 1.0\n")
    part = tmp_path / f"scaled_{change}.py"
    part.write_text(f"from scale_{change} import SCALE\nclass One:\n    def score(self, answers):\n        return {{'one': SCALE}}\n")
    path = config(tmp_path, f'[evaluate]\nmetrics = ["scaled_{change}:One"]\n')
    load(path)
    (tmp_path / f"scale_{change}.py").write_text("SCALE = 2.0\n")
    if change == "part":
        part.write_text(part.read_text() + "\n")
    load(path)
    assert make("metric", f"scaled_{change}:One").score(None) == {"one": 2.0}


def test_nothing_is_taken_from_the_folder_of_another_run(tmp_path: Path) -> None:
    """Neither the part itself where this folder has none, nor a file of the same name that a part of this folder imports."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, scale in ((first, 1.0), (second, 2.0)):
        folder.mkdir()
        (folder / "scale_of_each.py").write_text(f"SCALE = {scale}\n")
        text = "from scale_of_each import SCALE\nclass One:\n    def score(self, answers):\n        return {'one': SCALE}\n"
        (folder / f"part_of_{folder.name}.py").write_text(text)
        config(folder, f'[evaluate]\nmetrics = ["part_of_{folder.name}:One"]\n')
    load(first / "run.toml")
    (error,) = refused(second / "run.toml")
    assert (error.what, error.expected) == ("two modules have the same name", str(second / "scale_of_each.py"))
    (error,) = refused(config(second, '[evaluate]\nmetrics = ["part_of_first:One"]\n'))
    assert error.what == "there is no such module"


def test_a_package_of_python_is_no_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    write_part(tmp_path / "json", "metric", "lengths")
    (error,) = refused(config(tmp_path, '[evaluate]\nmetrics = ["json.lengths:Length"]\n'))
    assert error.what == "two modules have the same name"


def test_a_module_that_python_has_already_is_not_taken_for_the_file(tmp_path: Path) -> None:
    write_part(tmp_path, "metric", "json")
    (error,) = refused(config(tmp_path, '[evaluate]\nmetrics = ["json:Length"]\n'))
    assert error.what == "two modules have the same name"
    assert not was_imported(tmp_path)


@pytest.mark.parametrize(("text", "likely"), [
    ('[select]\npolicy = "kill-and-revise"\n', "kill-and-revive"), ('[federated]\naggregation = "exact_svd"\n', "exact-svd"),
    ('[wire]\ncodec = "fp23"\n', "fp32"), ('[plan]\nimportance = "nonne"\n', "none"), ('[evaluate]\nmetrics = ["blue"]\n', '"bleu"'),
])  # fmt: skip
def test_a_misspelt_name_is_told_the_nearest(text: str, likely: str, tmp_path: Path) -> None:
    (error,) = refused(config(tmp_path, text))
    assert isinstance(error, BadValueError)
    assert likely in error.do
    assert '"module:object"' in error.expected


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    name = write_part(tmp_path, "policy", "with_options")
    text = f'[select]\npolicy = "{name}"\n[options."{name}"]\ncuont = 3\ncount = "two"\n[options.nobody]\nx = 1\n'
    errors = refused(config(tmp_path, text))
    assert [type(error) for error in errors] == [UnknownKeyError, BadValueError, UnknownKeyError]
    assert "of a part that this run does not name" in errors[0].what
    assert (errors[1].expected, errors[1].got) == ("a whole number (default 1)", '"two"')
    assert errors[2].do == "did you mean count?"
    assert errors[2].where.endswith(f'run.toml, line 6: options.{name}.cuont')


def test_options_can_be_set_on_the_command_line(tmp_path: Path) -> None:
    name = write_part(tmp_path, "policy", "set_options")
    path = config(tmp_path, f'[select]\npolicy = "{name}"\n')
    loaded = load(path, [f'options."{name}".count=3'])
    assert loaded.config.options_of(name) == {"count": 3}
    with pytest.raises(BadValueError) as caught:
        load(path, [f'options."{name}".count=many'])
    assert caught.value.where.startswith("--set options.")


def test_what_is_built_in_has_no_options(tmp_path: Path) -> None:
    (error,) = refused(config(tmp_path, '[select]\npolicy = "snip"\nobserve_steps = 2\n[options.snip]\nx = 1\n'))
    assert isinstance(error, ConflictError)
    assert error.expected == "its settings in [select]"


def test_traits_of_a_part_count_among_the_conflicts(tmp_path: Path) -> None:
    name = write_part(tmp_path, "aggregation", "with_traits")
    (error,) = refused(config(tmp_path, f'[federated]\naggregation = "{name}"\ncombine = "median"\n'))
    assert "works on products" in error.what
    load(config(tmp_path, f'[federated]\naggregation = "{name}"\nclip_update = 1.0\n'))
    (error,) = refused(config(tmp_path, f'[federated]\naggregation = "{name}"\n[adapter]\nkind = "bottleneck"\n'))
    assert "which a bottleneck does not have" in error.what


def test_on_a_fleet_only_the_own_folder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a module of the environment nor an entry point is loaded there, whoever names it."""
    installed = tmp_path / "installed"
    installed.mkdir()
    name = write_part(installed, "metric", "is_installed")
    monkeypatch.syspath_prepend(str(installed))
    own = tmp_path / "own"
    own.mkdir()
    path = config(own, f'[evaluate]\nmetrics = ["{name}"]\n')
    (error,) = refused(path, environment=False)
    assert "own folder only" in error.what
    assert not was_imported(installed)
    load(path)
    assert was_imported(installed)


def test_an_installed_entry_point_goes_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = write_part(tmp_path, "policy", "from_package")
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [EntryPoint("first-ones", reference, "atoll.policies"), EntryPoint("snip", reference, "atoll.policies")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point for point in points if point.group == group])
    folder = tmp_path / "own"
    folder.mkdir()
    load(config(folder, '[select]\npolicy = "first-ones"\n[options.first-ones]\ncount = 2\n'))
    assert find("policy", "first-ones").resolve().__name__ == "FirstOnes"
    assert find("policy", "snip").is_built_in, "a name that is built in is nobody else's"
    (error,) = refused(config(folder, '[select]\npolicy = "first-ones"\n'), environment=False)
    assert isinstance(error, PartError)


def test_an_entry_point_is_its_packages_and_one_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, folder = tmp_path / "installed", tmp_path / "own"
    for one in (installed, folder):
        one.mkdir()
    write_part(installed, "metric", "packaged")
    (installed / "packaged.py").write_text((installed / "packaged.py").read_text() + "class Inner:\n    Again = Length\n")
    (folder / "packaged.py").write_text("raise RuntimeError('the file beside run.toml')\n")
    monkeypatch.syspath_prepend(str(installed))
    group = "atoll.metrics"
    values = {"length": ["packaged:Inner.Again [extra]"], "twice": ["packaged:Length", "other:Length"], "nothing": ["packaged"]}
    points = [EntryPoint(name, value, group) for name, several in values.items() for value in several]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point for point in points if point.group == group])
    load(config(folder, '[evaluate]\nmetrics = ["length"]\n'))
    assert find("metric", "length").origin == installed / "packaged.py"
    (error,) = refused(config(folder, '[evaluate]\nmetrics = ["twice"]\n'))
    assert (error.what, error.got) == ("two packages have a metric of this name", "packaged:Length and other:Length")
    (error,) = refused(config(folder, '[evaluate]\nmetrics = ["nothing"]\n'))
    assert "does not say where its metric is" in error.what
    (error,) = refused(config(folder, '[evaluate]\nmetrics = ["lenght"]\n'))
    assert error.do == 'did you mean "length"?'
    assert error.expected.endswith('; installed: "length", "twice", "nothing"')


def test_two_kinds_may_have_parts_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("ours", write_part(tmp_path, kind, f"ours_{kind}"), KINDS[kind].group) for kind in ("policy", "tracker")]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point for point in points if point.group == group])
    text = '[select]\npolicy = "ours"\n[track]\nto = ["ours"]\n[options.ours]\n'
    load(config(tmp_path, f"{text}count = 2\n"))
    (error,) = refused(config(tmp_path, f"{text}cuont = 2\n"))
    assert error.do == "did you mean count?"


def test_a_tracker_is_told_once(tmp_path: Path) -> None:
    name = write_part(tmp_path, "tracker", "told_once")
    (error,) = refused(config(tmp_path, f'[track]\nto = ["{name}", "{name}"]\n'))
    assert error.what == "a tracker is asked for twice"


def test_what_is_built_in_is_there_whoever_asks_for_it(tmp_path: Path) -> None:
    assert plugins.load_plugin("codec", "int8", tmp_path, environment=False) is find("codec", "int8")
    with pytest.raises(PartError) as caught:
        plugins.load_plugin("codec", "codecs/half.py:Half", tmp_path)
    assert caught.value.do == "did you mean 'codecs.half:Half'?"


def test_a_built_in_name_cannot_be_taken() -> None:
    class Mine:
        def score(self, answers: object) -> dict[str, float]:
            return {}

    with pytest.raises(PartError, match="bleu is built in"):
        register("metric", "bleu", Mine)
    assert "bleu" in names("metric")


def test_an_exception_in_a_part_is_its_own_and_not_a_mistake_of_atoll(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_part(tmp_path, "planner", "raises_later")
    file = tmp_path / "raises_later.py"
    text = file.read_text()
    for number, (code, said) in enumerate((("1 / 0", "ZeroDivisionError: division by zero"), ("exit(0)", "SystemExit: 0"))):
        file.write_text(text.replace("rank = request.config.adapter.rank", f"rank = {code}  # {number}"))
        status = main(["plan", str(config(tmp_path, f'[plan]\npolicy = "{name}"\n'))])
        page = capsys.readouterr().err
        assert status == 2
        assert f"error C109: the planner {name} failed" in page
        assert re.search(rf"where +raises_later.py, line \d+\n +got +{said}", page)

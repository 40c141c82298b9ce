"""The contract suite: all that ships obeys it, parts of somebody else's can be held against it, and broken ones break it by name."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from atoll.errors import PartError
from atoll.registry.kinds import KINDS
from atoll.registry.parts import find, names
from atoll.testing import BrokenLaw, check

from tests.registry.parts import PARTS, write_part

BUILT_IN = [(kind, name) for kind in KINDS for name in names(kind)]
EXTEND = Path(__file__).resolve().parents[2] / "examples" / "extend"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    (tmp_path / "rows.csv").write_text("q,a\n1,2\n3,4\n")
    (tmp_path / "rows.jsonl").write_text('{"q": 1}\n{"q": 2}\n')
    (tmp_path / "rows.json").write_text('[{"q": 1}, {"q": 2}]')
    (tmp_path / "rows.pairs").write_text("one => two\nthree => four\n")
    pyarrow.parquet.write_table(pa.table({"q": [1, 2]}), tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as out, pa.ipc.new_stream(out, pa.schema({"q": pa.int64()})) as writer:
        writer.write_table(pa.table({"q": [1, 2]}))
    return tmp_path


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_what_ships_obeys(kind: str, name: str, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in find(kind, name).trait("needs") if kind == "tracker" else ():
        if find_spec(library) is None:
            pytest.skip(f"the package {library} is not installed")
        monkeypatch.chdir(samples)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("TRACKIO_DIR", str(samples / "trackio"))
    check(kind, name, sample=samples / f"rows.{name}" if kind == "reader" else None)


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_what_the_table_says_of_a_class_is_what_the_class_says(kind: str, name: str) -> None:
    """The table stands in for classes that are not loaded yet."""
    part = find(kind, name)
    said = {trait: getattr(part.resolve(), trait, default) for trait, default in KINDS[kind].traits.items()}
    assert {trait: part.trait(trait) for trait in KINDS[kind].traits} == said


@pytest.mark.parametrize("kind", PARTS)
def test_somebody_elses_obey(kind: str, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(samples)
    check(kind, write_part(samples, kind, f"checked_{kind}"), sample=samples / "rows.pairs" if kind == "reader" else None)


@pytest.mark.parametrize(("kind", "part"), [("policy", "spread:Spread"), ("aggregation", "equal_votes:EqualVotes")])
def test_the_examples_obey_and_have_thirty_lines_at_most(kind: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXTEND)
    check(kind, part)
    assert (EXTEND / f"{part.partition(':')[0]}.py").read_text(encoding="utf-8").count("\n") <= 30


_MERGED = """
        from atoll.adapters.state import ModuleAdapter
        from atoll.federated.aggregation.rule import Merged
        found = self.module.cut(self.products.mean_product(), self.lengths).trained
        return Merged(ModuleAdapter({}, {}, found.scaling))"""
_NAN = _MERGED.format("found.down_RI * float('nan')", "found.up_OR")
_NARROW = _MERGED.format("found.down_RI[:1]", "found.up_OR[:, :1]")


@pytest.mark.parametrize(("kind", "old", "new", "said"), [
    ("policy", "pool[: self.count]", "pool[:0]", "at least one module"),
    ("policy", "module.name for module", "module.name + 'x' for module", "all of the pool"),
    ("policy", "observes = False", "observes = True", "observes = False belongs"),
    ("policy", "return None", "return 'gradient'", "there is a window"),
    ("policy", "return [module.name", "import random; pool = random.sample(pool, len(pool)); return [module.name", "the same choice"),
    ("planner", "max(1, rank // 2)", "0", "rank 0 for"),
    ("planner", "for name in request.pool", "for name in ['x']", "not in the pool"),
    ("importance", "return self.total", "return -self.total", "not below zero"),
    ("importance", "self.up.data, self.down.data", "self.down.data, self.up.data", "factors are"),
    ("importance", "self.up.grad, self.down.grad = grad_up_OR.clone(), grad_down_RI.clone()", "pass", "gradients of all"),
    ("aggregation", "return self.module.cut(self.products.mean_product(), self.lengths)", _NAN, "NaN"),
    ("aggregation", "return self.module.cut(self.products.mean_product(), self.lengths)", _NARROW, "no edge can be sent"),
    ("aggregation", "adapter, 1.0", "adapter.__class__(adapter.down_RI.mul_(2), adapter.up_OR, adapter.scaling), 1.0", "stay as they are"),
    ("importance", "return self.total", "return None", "a score is a number, not None"),
    ("importance", "return self.up.data, self.down.data", "return None", "factors are two tensors, not None"),
    ("codec", "return 2 * math.prod(shape)", "return None", "num_bytes is a whole number, not None"),
    ("codec", "return largest * ", "return None; ", "error_bound is a tensor, not None"),
    ("codec", "return 2 * math", "return 3 * math", "where num_bytes says"),
    ("codec", "2.0**-11 + 2.0**-24", "2.0**-14", "beyond the bound"),
    ("codec", "return 2 * math.prod(shape)", "return 9 * math.prod(shape)", "more than fp32"),
    ("metric", '{"length": ', '{"length": float("nan") + ', "finite"),
    ("metric", '{"length": sum(map(len, answers.generated)) / len(answers.generated)}', "{}", "at least one"),
    ("tracker", 'self.file.write_text(', 'raise RuntimeError(', "RuntimeError"),
    ("transform", "update.scale(0.5)", "update.scale(float('inf'))", "finite"),
    ("transform", "update.scale(0.5)", "None", "something else than an update"),
    ("reader", "if line]", "if line][:0]", "has rows"),
])  # fmt: skip
def test_a_broken_part_breaks_a_law_by_name(
    kind: str, old: str, new: str, said: str, samples: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(samples)
    module = f"broken_{request.node.callspec.id.__hash__() & 0xffffffff:x}"
    reference = write_part(samples, kind, module)
    file = samples / f"{module}.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(BrokenLaw, match=said):
        check(kind, reference, sample=samples / "rows.pairs" if kind == "reader" else None)


def test_a_class_is_checked_as_it_is() -> None:
    class Nothing:
        def score(self, answers: object) -> dict[str, float]:
            return {"one": 1.0}

    check("metric", Nothing)


def test_what_cannot_be_checked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no kind is called 'polizy'"):
        check("polizy", "all")
    with pytest.raises(ValueError, match="sample"):
        check("reader", "csv")
    with pytest.raises(PartError, match="is no policy"):
        check("policy", object)
    monkeypatch.chdir(EXTEND)
    with pytest.raises(ValueError, match="options of spread:Spread: alway: Extra inputs"):
        check("policy", "spread:Spread", options={"alway": 1})

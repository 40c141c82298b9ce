"""Write the table of families in docs/compatibility.md anew, from runs on tiny models: `python scripts/compatibility.py`; two minutes."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import atoll  # noqa: E402, F401  first, because it sets OMP_WAIT_POLICY before torch is imported

from tests.compatibility import COLUMNS, row  # noqa: E402
from tests.families import NAMES  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def table() -> str:
    """One line for each family."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                cells = row(name, Path(folder))
            except ImportError as problem:
                print(f"{name}: left as it is: {str(problem).strip().splitlines()[0]}", file=sys.stderr)
                cells = kept(name)
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def kept(name: str) -> tuple[str, ...]:
    """The cells of a family that the page has already."""
    found = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
    return tuple(cell.strip() for cell in found[0].split("|")[2:-1]) if found else ("not tried",) * len(COLUMNS)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")

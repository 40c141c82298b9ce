"""Known vulnerabilities of what the image installs (deploy/lock.txt), by pip-audit; says what no index would tell.

    python scripts/audit.py

Exit status 1 where a package has one. An index or a service that cannot be reached is said, and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).parents[1] / "deploy" / "lock.txt"
_AUDIT = ["pip-audit==2.10.1", "--requirement", str(LOCK), "--require-hashes", "--disable-pip", "--progress-spinner", "off"]


def main() -> int:
    """Ask, and say what came of it."""
    command = [sys.executable, "-m", "uv", "tool", "run", *_AUDIT, "--format", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        print("not audited: no answer in 300 s")
        return 0
    except ValueError:
        print(f"not audited: {(done.stderr.strip().splitlines() or ['pip-audit said nothing'])[-1]}")
        return 0
    untold = [package["name"] for package in packages if "skip_reason" in package]
    bad = [(package, found) for package in packages for found in package.get("vulns", [])]
    for package, found in bad:
        print(f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no version'}")
    print(f"{len(packages) - len(untold)} of {len(packages)} packages audited, {len(bad)} known vulnerabilities")
    if untold:
        print(f"the index says nothing of {len(untold)}: {', '.join(untold[:5])}{' ...' if len(untold) > 5 else ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

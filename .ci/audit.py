"""Known vulnerabilities of the packages in .venv, by pip-audit; run by `make audit` and by .ci/run.

It fails where a package has one and a version without it is out. Where pip-audit or its data cannot be had,
within TIME seconds, it says so and does not fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIME = 30


def main(options: Sequence[str]) -> int:
    """`options` go to pip-audit."""
    packages = next((ROOT / ".venv/lib").glob("python3*/site-packages"), None)
    tool = ROOT / ".venv/audit/bin/pip-audit"
    if packages is None or not tool.is_file():
        print("not audited: pip-audit could not be installed")
        return 0
    command = [tool, "--path", packages, "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=TIME)
        lines, code = verdict(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        lines, code = [f"not audited: the data did not come within {TIME} seconds"], 0
    except ValueError:  # no report
        said = done.stderr.strip().splitlines() or ["nothing"]
        lines, code = [f"not audited: the data could not be had; pip-audit said: {said[-1]}"], 0
    print(*lines, sep="\n")
    return code


def verdict(report: dict[str, Any]) -> tuple[list[str], int]:
    """What to say of pip-audit's report, and the exit code."""
    packages = report["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return [f"not audited: the data has none of the {len(packages)} packages"], 0
    lines, code = [], 0
    for package in audited:
        for found in package["vulns"]:
            mended = ", ".join(found["fix_versions"])
            lines.append(
                f"{package['name']} {package['version']}: {found['id']}; "
                + (f"mended in {mended}" if mended else "no version mends it yet")
            )
            code = code or int(bool(mended))
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    left = f"; not known there: {', '.join(skipped)}" if skipped else ""
    return [*lines, f"audited {len(audited)} of {len(packages)} packages: {len(lines)} found{left}"], code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

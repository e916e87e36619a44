"""Are there known vulnerabilities in the pinned packages? `make audit` asks PyPI's records by pip-audit.

Exit codes: 0 none that a newer version mends, or nobody to ask, which is said; 1 some, with the versions that mend them.
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parents[1] / "constraints.txt"


def verdict(dependencies: list[dict]) -> tuple[str, int]:
    """(what to print, exit code). dependencies: pip-audit's: {"name", "version", "vulns": [{"id", "fix_versions"}]}, or
    {"name", "skip_reason"} for one that was not found."""
    known = [one for one in dependencies if "skip_reason" not in one]
    if not known:
        return f"audit: not checked, no service that knows of vulnerabilities answers for any of {len(dependencies)} packages", 0
    lines, code = [], 0
    for one in known:
        for found in one["vulns"]:
            mended = ", ".join(found["fix_versions"])
            lines.append(
                f"{one['name']} {one['version']}: {found['id']}, {f'mended in {mended}' if mended else 'not mended yet'}"
            )
            code |= bool(mended)
    lines.append(f"audit: {len(known)} of {len(dependencies)} packages checked, {len(lines)} vulnerabilities known")
    return "\n".join(lines), code


def main() -> int:
    options = ["--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off"]
    command = [sys.executable, "-m", "pip_audit", f"--requirement={PINS}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        text, code = verdict(json.loads(done.stdout)["dependencies"])
    except ValueError:  # no answer at all
        text, code = f"audit: not checked, {(done.stderr.strip().splitlines() or ['pip-audit said nothing'])[-1]}", 0
    print(text)
    return code


if __name__ == "__main__":
    raise SystemExit(main())

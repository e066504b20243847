"""Try rankwise on the newest PEFT: PEFT's own tests of our adapters, and ours.

    python scripts/newest_peft.py             the newest release
    python scripts/newest_peft.py peft==X.Y.Z another one

rankwise pins PEFT to a minor version, because it extends PEFT's registry; this tells what a move of
the pin would break. The other PEFT goes into `build/newest-peft/`, without what it requires, in
front of the installed one. It may fail: the exit status is 0 whatever comes out, unless `--strict`
is given or PEFT cannot be fetched (2).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "newest-peft"
CHECKS = {
    "PEFT's own tests on our adapters": ["scripts/conformance.py"],
    "our tests of adapters": ["-m", "pytest", "tests/adapters", "-q", "-p", "no:cacheprovider"],
}


def fetch(requirement: str) -> str:
    """Put another PEFT in its place and return its version.

    Raises:
        SystemExit: pip cannot fetch it.
    """
    shutil.rmtree(PLACE, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    if subprocess.run([*command, str(PLACE), requirement], check=False).returncode:
        print(f"newest PEFT: pip could not fetch {requirement}.", file=sys.stderr)
        raise SystemExit(2)
    (found,) = PLACE.glob("peft-*.dist-info")
    return found.name.removeprefix("peft-").removesuffix(".dist-info")


def passes(arguments: list[str]) -> bool:
    """Whether a check passes with the other PEFT in front."""
    path = [str(PLACE), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    return not subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, check=False
    ).returncode


def main() -> int:
    """Fetch, check, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requirement", nargs="?", default="peft")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a check fails")
    chosen = parser.parse_args()
    installed, other = version("peft"), fetch(chosen.requirement)
    if other == installed:
        print(f"newest PEFT: {other}, which is installed and tested by `make check`.")
        return 0
    results = {name: passes(arguments) for name, arguments in CHECKS.items()}
    for name, well in results.items():
        print(f"newest PEFT: {name} {'pass' if well else 'FAIL'} with {other}.")
    well = all(results.values())
    advice = "the pin in pyproject.toml can move" if well else f"the pin stays at {installed}"
    print(f"newest PEFT: {advice}.")
    return int(chosen.strict and not well)


if __name__ == "__main__":
    sys.exit(main())

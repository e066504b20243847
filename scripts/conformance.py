"""Run PEFT's own tests on rankwise's adapters.

    python scripts/conformance.py              every test of PEFT that applies must pass
    python scripts/conformance.py --controls   the same, and they must catch two broken adapters

PEFT publishes its tests in the source distribution of each release, without the files that make
them a package. This script fetches the release that is installed here (once, through pip, into
`build/conformance/`), adds what is missing, and runs `test_custom_models.py` and `test_config.py`
with the configurations of `conformance_plugin.py` in the place of PEFT's. Nothing needs the Hugging
Face hub. Exit status: 0 all well, 1 a test failed or a broken adapter was not caught, 2 no tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_FILES = ("tests/test_custom_models.py", "tests/test_config.py")
MINIMUM = 1750
"""Tests that must have passed: 1,871 do with PEFT 0.21.2; far fewer means PEFT's tables moved."""
FAULTS = ("unmerge", "forget-b")


class NoTestsError(RuntimeError):
    """PEFT's tests cannot be had or cannot be run."""


@dataclass(frozen=True)
class Outcome:
    """What came of one run of the tests."""

    passed: int
    failed: int
    skipped: int

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def peft_tests(release: str) -> Path:
    """The folder that holds PEFT's tests as a package, fetched unless it is there.

    Raises:
        NoTestsError: pip cannot fetch the source distribution.
    """
    folder = ROOT / "build" / "conformance" / f"peft-{release}"
    if (folder / "pytest.ini").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as download:
        requirement = f"peft=={release}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "peft", "--dest", download, requirement]
        if subprocess.run(command, check=False).returncode != 0:
            raise NoTestsError(
                f"pip could not fetch the source distribution of {requirement}, which holds PEFT's "
                "tests; check the network or the package index."
            )
        (archive,) = Path(download).glob("peft-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, members=test_members(tar), filter="data")
    (folder / "tests" / "__init__.py").touch()
    # last, as the sign that the folder is complete; it also keeps our own pytest settings out
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return folder


def test_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a source distribution under `tests/`, without the name of the release."""
    for member in tar:
        _, _, path = member.name.partition("/")
        if path.startswith("tests/"):
            yield member.replace(name=path)


def run_tests(folder: Path, *options: str, quiet: bool = False) -> Outcome:
    """Run the tests that apply and count their outcomes.

    Args:
        folder: As returned by `peft_tests`.
        *options: More options for pytest.
        quiet: Do not show pytest's output.

    Raises:
        NoTestsError: pytest stopped before it ran tests.
    """
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    path = [str(ROOT / "src"), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", *TEST_FILES, "-c", "pytest.ini"]
    command += ["-p", "conformance_plugin", "-p", "no:cacheprovider", "--junit-xml", str(report)]
    command += ["--numprocesses", "logical", "--maxprocesses", "4", "--dist", "worksteal"]
    command += ["-q", "--no-header", "--disable-warnings", "--tb=short", *options]
    process = subprocess.run(
        command,
        cwd=folder,
        env=os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # the workers have the cores
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        },
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    # 0: all passed, 1: some failed; anything else is no result
    if process.returncode not in (0, 1) or not report.exists():
        raise NoTestsError(
            f"pytest stopped with status {process.returncode}:\n{process.stdout or ''}"
        )
    return outcome(report)


def outcome(report: Path) -> Outcome:
    """Count the outcomes in pytest's report."""
    passed = failed = skipped = 0
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Outcome(passed, failed, skipped)


def main() -> int:
    """Run the tests, and the controls if asked to."""
    parser = argparse.ArgumentParser(description="Run PEFT's own tests on rankwise's adapters.")
    parser.add_argument(
        "--controls", action="store_true", help="also check that broken adapters are caught"
    )
    arguments = parser.parse_args()
    release = version("peft")
    try:
        folder = peft_tests(release)
        result = run_tests(folder)
        well = result.failed == 0 and result.passed >= MINIMUM
        print(f"PEFT {release}'s tests on our adapters: {result} (at least {MINIMUM} must pass)")
        for fault in FAULTS if arguments.controls else ():
            broken = run_tests(folder, "--break-adapter", fault, quiet=True)
            caught = broken.failed > 0
            well = well and caught
            verdict = "caught" if caught else "NOT CAUGHT"
            print(f"an adapter broken on purpose ({fault}): {verdict}, {broken}")
    except NoTestsError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

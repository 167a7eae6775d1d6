"""Runs transformers' own tests on our classes and writes the page: `python scripts/conformance [--sdist FILE]`.

What lives here: the command line, the scratch folder, the run. What must not: what is tested (`model_cases.py`,
`tokenizer_cases.py`), or what is made of the results (`report.py`). Ends with 1 when a test failed, or was skipped for
a reason that `report.py` has no words for.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import torch  # noqa: E402
import transformers  # noqa: E402
from report import page, read, unexplained  # noqa: E402
from sources import download, unpack  # noqa: E402

CASES = {"model_cases.py": "test_models.py", "tokenizer_cases.py": "test_tokenizers.py"}
_OURS = "loom"  # the folder of our cases in transformers' `tests`


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python scripts/conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="transformers-X.tar.gz of the installed version; else pip downloads")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "conformance.md", help="where the page goes")
    parser.add_argument("--only", default="", help="tests whose names pytest's -k finds; then no page is written")
    parser.add_argument("-n", dest="processes", type=int, default=2, help="processes")
    return parser.parse_args()


def run(folder: Path, processes: int, only: str = "") -> Path:
    """Run the cases on the unpacked tests in the folder; returns pytest's report in XML."""
    ours = folder / "tests" / _OURS
    ours.mkdir()
    (ours / "__init__.py").touch()
    for source, name in CASES.items():
        shutil.copy(HERE / source, ours / name)
    xml = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder), "-W", "ignore"]
    command += ["-p", "no:cacheprovider", "-n", str(processes), "--junitxml", str(xml), "--tb", "short"]
    command += ["-k", only] if only else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "RUN_SLOW": "1",
    }
    subprocess.run([*command, f"tests/{_OURS}"], cwd=folder, env=environment, check=False)
    if not xml.exists():
        raise SystemExit("pytest wrote no report: see above")
    return xml


def _facts(seconds: float) -> dict[str, str]:
    """Under which circumstances."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "pretrain"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    python, tokenizers = platform.python_version(), version("tokenizers")
    return {
        "command": f"`{shlex.join(['python', 'scripts/conformance', *sys.argv[1:]])}`",
        "commit": (commit or "unknown") + (", with changes in pretrain/" if changed else ""),
        "machine": f"{device}, {os.cpu_count()} cores, {platform.system()}",
        "versions": f"transformers {transformers.__version__}, tokenizers {tokenizers}, torch {torch.__version__}, "
        f"Python {python}",
        "minutes": f"{seconds / 60:.1f}",
    }


def main() -> int:
    """See the file's docstring."""
    arguments = _arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="conformance-") as made:
        folder = Path(made)
        try:
            unpack(arguments.sdist or download(folder), folder)
        except (ValueError, OSError, tarfile.TarError) as error:
            print(f"no tests to run: {error}", file=sys.stderr)
            return 2
        outcomes = read(run(folder, arguments.processes, arguments.only))
    if not outcomes:
        print("no test ran", file=sys.stderr)
        return 1
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed + unexplained(outcomes):
        print(f"{outcome.status}: {outcome.case} {outcome.test}: {outcome.reason}")
    if not arguments.only:
        arguments.page.write_text(page(outcomes, _facts(time.monotonic() - started)), encoding="utf-8")
    return 1 if failed or unexplained(outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""All that one GPU can show, within a time: the tests that need it, then the kernels' benchmark, then the engine's.

    python .ci/gpu.py --out DIR [--budget-s 780]

Each part has its share of the time that is left, leaves what it found in DIR as it goes, and is ended when its share is
over; a table comes last. Exits with 1 if a test or a check failed. --tiny tries the command on a CPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = (
    "tests/kernels/test_races.py",
    "tests/worker/test_graphs.py",
    "tests/worker/test_step_times.py",
    "tests/test_exactness.py",
)
GRACE_S = 45.0
"""From the end of a benchmark's own budget, after which it begins nothing new, until it is ended."""
LAST_WORDS_S = 10.0
"""From the interrupt that ends a part, which pytest answers with what it has found, until it is killed."""


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    share: float
    """Of the time that is left when it begins."""


@dataclass(frozen=True)
class Outcome:
    name: str
    seconds: float
    exit_code: int | None
    """None: it was ended, for its time was over."""

    @property
    def failed(self) -> bool:
        return self.exit_code not in (0, None)


def stages(out: Path, *, tiny: bool) -> list[Stage]:
    """What is run; `{budget}` stands for the seconds that a benchmark may take."""
    python = sys.executable
    mark = "not gpu and not slow" if tiny else "gpu"
    # A line for each test, so that the one that hangs has a name. What a GPU's libraries warn of is shown and fails
    # nothing: it must not take the place of what the tests find there.
    how = ["-v", "-rs", "--durations=10", "-W", "default", f"--junitxml={out / 'tests.xml'}"]
    tests = [python, "-m", "pytest", *how, "-m", mark, *([GPU_TESTS[2]] if tiny else GPU_TESTS)]
    kernels = [
        python,
        "kernels/bench/bench_decode.py",
        "--quick",
        "--out",
        str(out / "kernels"),
        "--budget-s",
        "{budget}",
    ]
    engine = [python, "-m", "leanserve", "bench", "gpu", "--out", str(out / "engine"), "--budget-s", "{budget}"]
    if tiny:
        kernels += ["--device", "cpu", "--only", "1 x 1k"]
        engine += ["--tiny", "--ranks", "1"]
    return [Stage("tests", tests, 0.3), Stage("kernels", kernels, 0.45), Stage("engine", engine, 1.0)]


def run(stage: Stage, limit_s: float) -> Outcome:
    """Run it in a process group of its own, which is interrupted after `limit_s`, and killed soon after."""
    budget = str(max(1.0, round(limit_s - GRACE_S)))
    command = [budget if part == "{budget}" else part for part in stage.command]
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        # Where this script is in the background, it was told to ignore interrupts, and so would be its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        exit_code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        exit_code = None
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS_S)
    finally:
        with suppress(ProcessLookupError):  # whoever is left of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return Outcome(stage.name, time.monotonic() - began, exit_code)


def summary(outcomes: list[Outcome], out: Path) -> str:
    """A line for each part, each test that failed, each kernel case and each engine cell that was measured."""
    lines = []
    for outcome in outcomes:
        how = {0: "passed", None: "its time was over"}.get(outcome.exit_code, f"FAILED, exit code {outcome.exit_code}")
        lines.append(f"{outcome.name:<10} {outcome.seconds:6.0f} s  {how}")
    lines += [f"  FAILED: {name}" for name in failed_tests(out)]
    kernels, engine = _read(out / "kernels" / "result.json"), _read(out / "engine" / "gpu.json")
    if kernels is not None:
        lines += ["", f"kernels: {kernels['about']['device']}, read-only {kernels['about']['read_gbps']} GB/s"]
        rows = [row for row in kernels["rows"] if row.get("us")]
        for case in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
            of_case = {row["contender"]: row for row in rows if (row["case"], row["dtype"]) == case}
            times = ", ".join(f"{name} {row['us']:.1f}" for name, row in of_case.items())
            share = f"  lean reads at {of_case['lean']['share_of_read']:.0%}" if "lean" in of_case else ""
            lines.append(f"  {case[0]:<30} {case[1]:<9} us: {times}{share}")
        lines += [f"  WRONG: {row['contender']} on {row['case']}" for row in kernels["rows"] if row.get("wrong")]
    if engine is not None:
        lines += [
            "",
            f"engine: {engine['device']}, {engine['dtype']}, read {engine['read_bytes_per_s'] / 1e9:.0f} GB/s",
        ]
        for cell in engine["cells"]:
            steps = ", ".join(f"{mode} {seen['step_ms']:.2f}" for mode, seen in cell["figures"].items())
            lines.append(
                f"  {cell['batch']} x {cell['context_tokens']:<10,} step ms: {steps}; to read {cell['read_ms']:.2f}"
            )
        lines += [
            f"  {'yes' if check['passed'] else 'NO '} {check['what']}: {check['seen']}" for check in engine["checks"]
        ]
    return "\n".join(lines)


def failed_tests(out: Path) -> list[str]:
    """Also of a run that was interrupted."""
    path = out / "tests.xml"
    if not path.exists():
        return []
    cases = ElementTree.parse(path).iter("testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return [f"{case.get('classname')}::{case.get('name')}" for case in failed]


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def main(argv: list[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for what is found; made if missing")
    parser.add_argument("--budget-s", type=float, default=780.0, metavar="SECONDS", help="for everything (780)")
    parser.add_argument("--tiny", action="store_true", help="a little of each part, on a CPU: tries the command")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.budget_s
    outcomes: list[Outcome] = []
    for stage in stages(out, tiny=options.tiny):
        print(f"== {stage.name}", flush=True)
        outcomes.append(run(stage, max(0.0, deadline - time.monotonic()) * stage.share))
    text = summary(outcomes, out)
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}")
    return int(any(outcome.failed for outcome in outcomes) or bool(failed_tests(out)))


if __name__ == "__main__":
    sys.exit(main())

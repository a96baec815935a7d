"""Time decode attention beside its peers: correctness gate, grid, JSON, plot, and a short table at the end.

    python kernels/bench/bench_decode.py --out DIR [--quick]

On a GPU the stream-K kernel runs beside itself with a fixed split, SDPA's flash backend, flex_decoding and FlashInfer
(where they can run a case; who fails loses its own rows only); every time is the median of CUDA-graph replays
over inputs that outgrow the L2 cache. On a CPU the portable path runs beside SDPA. Bandwidth is what the case must read
(every key and value once) over the time, beside a kernel that only reads. A wrong result is never timed; then, or where
lean_attention fails, the exit status is 1.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # measure this checkout, whichever one is installed

import gate
from caches import bytes_needed, copies_needed, make_caches
from cases import Case, cpu_grid, cpu_quick_grid, full_grid, quick_grid
from clock import median_us, read_gbps
from contenders import CPU_CONTENDERS, GPU_CONTENDERS, Unsupported
from report import BASELINES, Row, describe_run, format_table, plot, reasons, speedups, write_json

READ_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
"""What the read-only kernel reads."""
FLEX_CASES, QUICK_FLEX_CASES = 12, 3
"""flex_decoding compiles for each shape, for many seconds: so many cases at most, after all others."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for result.json and decode.png; made if missing"
    )
    parser.add_argument("--quick", action="store_true", help="the short grid: under three minutes on one GPU")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="default: cuda if there is one"
    )
    parser.add_argument("--only", default="", help="run only the cases whose family or name contains this text")
    parser.add_argument("--contenders", default="", help="comma-separated names; default: all that the device can run")
    parser.add_argument(
        "--budget-s", type=float, default=None, metavar="SECONDS", help="begin no case after this time; default: no end"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: PyTorch's choice")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(chosen if arguments.device == "auto" else arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if device.type == "cuda":
        cases, contenders = quick_grid() if arguments.quick else full_grid(), GPU_CONTENDERS
    else:
        cases, contenders = cpu_quick_grid() if arguments.quick else cpu_grid(), CPU_CONTENDERS
    if arguments.contenders:
        names = [name.strip() for name in arguments.contenders.split(",")]
        unknown = set(names) - set(contenders)
        if unknown:
            print(
                f"unknown contenders {sorted(unknown)}; on {device.type} there are {list(contenders)}", file=sys.stderr
            )
            return 2
        contenders = {name: contenders[name] for name in names}
    cases = [case for case in cases if arguments.only in case.name or arguments.only == case.family]
    if not cases:
        print(f"no case matches --only {arguments.only!r}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)

    settings = {"quick": arguments.quick, "only": arguments.only, "contenders": list(contenders)}
    about = describe_run(device, settings)
    started = time.perf_counter()
    with torch.inference_mode():
        errors, shut = check_dtypes(device)
        cases = [case for case in cases if case.dtype not in shut]
        about |= {"gate_max_error": max(errors.values(), default=None), "gate_shut": shut}
        if not cases:
            print("nothing was timed", file=sys.stderr)
            return 1
        about["read_gbps"] = round(read_gbps(READ_BYTES[device.type], device), 1)
        print(f"read-only kernel: {about['read_gbps']} GB/s over {READ_BYTES[device.type] >> 20} MB", flush=True)
        rows: list[Row] = []
        about["cases_left_out"] = len(cases)

        def is_over() -> bool:
            return arguments.budget_s is not None and time.perf_counter() - started > arguments.budget_s

        def add(new: list[Row]) -> None:
            rows.extend(new)
            about["seconds"] = round(time.perf_counter() - started, 1)
            write_json({"about": about, "rows": rows}, arguments.out / "result.json")  # whatever ends this run

        flex = {name: prepare for name, prepare in contenders.items() if name == "flex_decoding"}
        others = {name: prepare for name, prepare in contenders.items() if name not in flex}
        for case in cases:
            if is_over():
                break
            about["cases_left_out"] -= 1
            add(measure(case, others, device, about["read_gbps"]))
        flex_cases = QUICK_FLEX_CASES if arguments.quick else FLEX_CASES
        for case in cases if flex else ():
            compiled = sum(row["contender"] in flex and bool(row.get("us")) for row in rows)
            if is_over() or compiled >= flex_cases:
                break
            add(measure(case, flex, device, about["read_gbps"]))

    if rows:
        plot(rows, about, arguments.out / "decode.png")
        print(f"wrote {arguments.out / 'result.json'} and {arguments.out / 'decode.png'}\n")
        print(format_table(rows))
    if about["cases_left_out"]:
        print(f"{about['cases_left_out']} of {len(cases)} cases were left out: {arguments.budget_s:g} s were over")
    for name, reason in reasons(rows).items():
        print(f"{name}: {reason}")
    for baseline in BASELINES:
        gains = list(speedups(rows, "lean", baseline).values())
        if gains:
            print(f"lean over {baseline}: {sum(gains) / len(gains):.2f}x on average, {min(gains):.2f}x at least")
    wrong = [row for row in rows if row.get("wrong")]
    for row in wrong:
        print(f"WRONG RESULT, not timed: {row['contender']} on {row['case']}: {row['wrong']}", file=sys.stderr)
    return 1 if wrong or shut else 0


def check_dtypes(device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """By dtype: the largest error, or where the gate is shut, so that nothing of this dtype is timed, why."""
    errors, shut = dict[str, float](), dict[str, str]()
    for dtype in gate.CHECKED_DTYPES:
        try:
            errors[dtype] = gate.check_against_reference(device, [dtype])
        except gate.GateError as wrong:
            shut[dtype] = str(wrong)
            print(f"the gate is shut for {dtype}: {wrong}", file=sys.stderr, flush=True)
        else:
            print(f"gate passed for {dtype}: max error {errors[dtype]:.2g} against float64", flush=True)
    return errors, shut


def measure(case: Case, contenders: dict[str, Any], device: torch.device, read: float) -> list[Row]:
    """One row for each contender: a time, or why there is none."""
    if not contenders:
        return []
    base: Row = {
        "case": case.name, "family": case.family, "heads": list(case.heads), "dtype": case.dtype,
        "page_tokens": case.page_tokens, "batch": len(case.lengths), "tokens": case.tokens, "kv_bytes": case.kv_bytes,
    }  # fmt: skip
    copies = copies_needed(case, device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if bytes_needed(case, copies) > 0.9 * free:
            return [
                base
                | {"contender": next(iter(contenders)), "skipped": f"needs {bytes_needed(case, copies) / 1e9:.0f} GB"}
            ]
    caches = make_caches(case, device, copies, shuffled=device.type == "cuda")
    expected = gate.expected_of(caches)
    rows = []
    for name, prepare in contenders.items():
        row = base | {"contender": name}
        try:
            prepared = prepare(caches)
            gate.check(prepared.steps[0](), expected, case.dtype, name)
            us = median_us(prepared.steps, device)
        except Unsupported as reason:
            row["skipped"] = str(reason)
        except gate.GateError as wrong:
            row["wrong"] = str(wrong)
        except Exception as error:
            reason = f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            if name.startswith("lean"):  # it must not; what else can be measured still is
                traceback.print_exc()
                row["wrong"] = reason
            else:  # no compiler here, a version that knows no such argument, ...
                row["skipped"] = reason
        else:
            gbps = case.kv_bytes / us / 1e3
            row |= {"us": round(us, 2), "gbps": round(gbps, 2), "share_of_read": round(gbps / read, 4)}
            row |= {"plan_us": prepared.plan_us and round(prepared.plan_us, 2), "detail": prepared.detail}
            print(
                f"{case.name:32} {case.dtype:9} {name:18} {us:10.1f} us {gbps:8.1f} GB/s {prepared.detail}", flush=True
            )
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())

"""What a run leaves behind: result.json, a plot, and a short table on the terminal."""

import datetime
import json
import os
import platform
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

BASELINES = ("lean, fixed split", "SDPA flash", "SDPA")
"""What the speed-ups are over."""


def describe_run(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    """Where, when and from which sources a result comes."""
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "arguments": arguments,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": _triton_version()},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = properties.name
        about["multiprocessors"] = properties.multi_processor_count
        about["memory_gb"] = round(properties.total_memory / 1e9, 1)
        about["versions"]["cuda"] = torch.version.cuda
    else:
        about["device"] = _cpu_name()
        about["threads"] = torch.get_num_threads()
        about["load_average_at_start"] = round(os.getloadavg()[0], 2)
    return about


def write_json(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def speedups(rows: list[Row], ours: str, over: str) -> dict[tuple[str, str, int], float]:
    """(case, dtype, page_tokens) -> how many times faster `ours` is, where both were measured."""
    times = _times(rows)
    return {key: at[over] / at[ours] for key, at in times.items() if ours in at and over in at}


def reasons(rows: list[Row]) -> dict[str, str]:
    """By contender that was measured on no case at all: why, as it said first."""
    measured = {row["contender"] for row in rows if row.get("us")}
    found: dict[str, str] = {}
    for row in rows:
        if row["contender"] not in measured and row.get("skipped"):
            found.setdefault(row["contender"], row["skipped"])
    return found


def format_table(rows: list[Row]) -> str:
    """One line per case: microseconds of every contender; bandwidth of ours and its share of a pure read's."""
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    ours = {_key(row): row for row in rows if row["contender"] == "lean" and row.get("us")}
    lines = [["case", "dtype", "page", *(f"{name} us" for name in contenders), "GB/s", "of read"]]
    for key, at in _times(rows).items():
        times = [f"{at[name]:.1f}" if name in at else "-" for name in contenders]
        bandwidth = [f"{ours[key]['gbps']:.1f}", f"{ours[key]['share_of_read']:.0%}"] if key in ours else ["-", "-"]
        lines.append([*map(str, key), *times, *bandwidth])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def plot(rows: list[Row], about: dict[str, Any], path: Path) -> None:
    """Time and bandwidth against context for one sequence, and the speed-up of every case over each baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axis, bandwidth_axis, gain_axis) = pyplot.subplots(1, 3, figsize=(16, 5))
    lines: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("us") and row["family"] == "uniform" and row["batch"] == 1 and row["heads"] == [32, 8, 128]:
            lines[row["contender"], row["dtype"]].append(row)
    first_dtype = next(iter(lines), ("", ""))[1]
    for (contender, dtype), line in lines.items():
        line.sort(key=lambda row: row["tokens"])
        style = {"linestyle": "-" if dtype == first_dtype else "--", "marker": "o", "markersize": 3}
        tokens = [row["tokens"] for row in line]
        time_axis.plot(tokens, [row["us"] for row in line], label=f"{contender}, {dtype}", **style)
        bandwidth_axis.plot(tokens, [row["gbps"] for row in line], label=f"{contender}, {dtype}", **style)
    context = "context, tokens (1 sequence, 32/8 heads of 128)"
    time_axis.set(xscale="log", yscale="log", xlabel=context, ylabel="time per layer, us")
    bandwidth_axis.set(xscale="log", xlabel=context, ylabel="KV read, GB/s")
    bandwidth_axis.axhline(about["read_gbps"], color="grey", linewidth=1, label="a kernel that only reads")
    for baseline in BASELINES:
        gains = sorted(speedups(rows, "lean", baseline).values())
        if gains:
            gain_axis.plot(range(1, len(gains) + 1), gains, marker="o", markersize=3, label=f"over {baseline}")
    gain_axis.axhline(1.0, color="grey", linewidth=1)
    gain_axis.set(xlabel="cases, from the least gain to the most", ylabel="speed-up of lean on pages")
    for axis in (bandwidth_axis, gain_axis):
        axis.set_ylim(bottom=0)
    for axis in (time_axis, bandwidth_axis, gain_axis):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    versions = f"torch {about['versions']['torch']}, commit {about['commit'][:9]}"
    figure.suptitle(f"{about['device']}, {versions}, {about['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _key(row: Row) -> tuple[str, str, int]:
    return row["case"], row["dtype"], row["page_tokens"]


def _times(rows: list[Row]) -> dict[tuple[str, str, int], dict[str, float]]:
    times: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        at = times.setdefault(_key(row), {})
        if row.get("us"):
            at[row["contender"]] = row["us"]
    return times


def _git(*arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"

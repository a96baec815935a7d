"""`leanserve doctor`: what is here, whether ranks can meet and talk, what is wrong and what to do about it.

Plain text that can be pasted into a bug report. Nothing of prompts, keys or the environment's variables is in it.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from leanserve import __version__
from leanserve.contracts.errors import ConfigError, LeanServeError
from leanserve.launch.doctor_facts import TRIAL_FILE, TRIAL_ORDERS_FILE, TorchFacts, Trial, TrialOrders
from leanserve.launch.host_facts import HostFacts, gib, host_facts, judge_host
from leanserve.launch.options import LaunchOptions
from leanserve.launch.ranks_process import RanksProcess
from leanserve.launch.run_dir import make_run_dir
from leanserve.launch.threads import available_cores
from leanserve.server.http_server import bind_socket

__all__ = ["Doctor"]

PACKAGES = ("triton", "transformers", "tokenizers", "safetensors", "llguidance", "pyzmq", "msgspec", "uvicorn")
TRIAL_S = 120.0
POLL_S = 0.05
OUTPUT_LINES = 25
"""Of what failed ranks printed, from the end."""
SILENT_TRIAL = "the ranks ended without a word"


@dataclass
class Doctor:
    """Looks, tries, and prints as it goes.

    Args:
        ranks: to start; None: every usable GPU, or two on the CPU.
        options: device and collectives.
        host, port: where a server is to listen.
        say: takes one line.
    """

    ranks: int | None
    options: LaunchOptions
    host: str = "127.0.0.1"
    port: int = 8000
    say: Callable[[str], None] = print
    errors: list[str] = field(default_factory=list[str])
    """What cannot work, each with what to do."""
    warnings: list[str] = field(default_factory=list[str])

    def run(self) -> bool:
        """Whether a server can work here."""
        self.say(f"LeanServe doctor, {datetime.now(UTC).isoformat(timespec='seconds')}")
        self._versions()
        facts = self._torch()
        self._host(host_facts(), gpus=0 if facts is None or self.options.device == "cpu" else facts.usable_gpus)
        self._port()
        if facts is not None:
            self._try_ranks(facts)
        self._verdict()
        return not self.errors

    def _section(self, title: str, **lines: object) -> None:
        self.say(f"\n{title}")
        for name, value in lines.items():
            self.say(f"  {name.replace('_', ' '):<16} {value}")

    def _versions(self) -> None:
        found = {"leanserve": __version__, "python": platform.python_version()}
        for package in PACKAGES:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "not installed"
                if package != "triton" or sys.platform == "linux":
                    self.errors.append(f"{package} is not installed; install LeanServe again: pip install leanserve")
        self._section("Versions", **found)

    def _torch(self) -> TorchFacts | None:
        command = [sys.executable, "-m", "leanserve.launch.torch_facts"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            last = (answer.stderr.strip().splitlines() or [f"its process ended with {answer.returncode}"])[-1]
            self._section("torch", state=f"cannot be loaded: {last}")
            self.errors.append(f"torch cannot be loaded ({last}); install it again, as pytorch.org says")
            return None
        facts = msgspec.json.decode(answer.stdout.strip().splitlines()[-1], type=TorchFacts)
        lines: dict[str, object] = {"version": facts.torch, "built_for": facts.cuda or "the CPU"}
        if facts.nccl is not None:
            lines["NCCL"] = facts.nccl
        driver = _driver()
        lines["driver"] = driver or "none"
        for index, gpu in enumerate(facts.gpus):
            reach = f"reaches GPU {', '.join(map(str, gpu.peers))} directly" if gpu.peers else "reaches no other GPU"
            lines[f"GPU {index}"] = f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_gib:g} GiB" + (
                f", {reach}" if len(facts.gpus) > 1 else ""
            )
        links = _links() if len(facts.gpus) > 1 else None
        self._section("torch and GPUs", **lines)
        for line in links or ():
            self.say(f"    {line}")
        if facts.usable_gpus == 0 and self.options.device == "cuda":
            self.errors.append(f"--device cuda: {facts.reason}")
        elif facts.usable_gpus == 0 and driver is not None and self.options.device == "auto":
            self.warnings.append(f"there is a GPU driver, but no GPU will be used: {facts.reason}")
        return facts

    def _host(self, facts: HostFacts, *, gpus: int) -> None:
        self._section(
            "Host",
            system=platform.platform(terse=True),
            CPU_cores=f"{available_cores()} usable of {os.cpu_count()}",
            memory=f"{gib(facts.memory)}, {gib(facts.available)} available, cgroup limit {gib(facts.cgroup_limit)}",
            shared_memory=f"{gib(facts.shm_size)}, {gib(facts.shm_free)} free",
            open_files=f"{facts.open_files:,}",
            processes=_count(facts.processes),
            locked_memory=gib(facts.locked_memory),
            temporary_files=facts.temporary_dir,
            C_compiler=facts.c_compiler or "none",
        )
        errors, warnings = judge_host(facts, gpus=gpus)
        self.errors += errors
        self.warnings += warnings

    def _port(self) -> None:
        try:
            bind_socket(self.host, self.port).close()
            self._section("Ports", HTTP=f"{self.host}, port {self.port}: free")
        except ConfigError as error:
            self._section("Ports", HTTP=f"{self.host}, port {self.port}: not to be had")
            self.warnings.append(str(error))
        self.say("  " + f"{'between ranks':<16} free ports, chosen at start-up; sockets in a directory of this user's")

    def _try_ranks(self, facts: TorchFacts) -> None:
        gpus = 0 if self.options.device == "cpu" else facts.usable_gpus
        count = self.ranks or gpus or 2
        self._section(f"Trial: {count} rank{'s' if count > 1 else ''}")
        try:
            run_dir = make_run_dir()
        except OSError as error:
            self.errors.append(f"no temporary directory can be made ({error}); set TMPDIR to one that can be written")
            return
        try:
            trial, output = self._trial(count, run_dir)
        except LeanServeError as error:
            self.errors.append(str(error))
            return
        finally:
            shutil.rmtree(run_dir, ignore_errors=True)
        if trial is None:
            for line in output[-OUTPUT_LINES:]:
                self.say(f"  | {line}")
            said = next((line for line in output if line.startswith("rank ")), (output or [SILENT_TRIAL])[-1])
            self.errors.append(f"{count} ranks cannot work together: {said}")
            return
        self.say(f"  {trial.ranks} x {trial.device}, {trial.backend}; they met in {1e3 * trial.met_s:.0f} ms")
        if not trial.gathers:
            self.say("  one rank has nobody to talk to; --ranks N tries more")
            return
        self.say(f"  all-gather, each rank gives {'median':>20} {'worst':>12}")
        for gather in trial.gathers:
            name = f"{gather.num_bytes >> 10:,} KiB"
            self.say(f"  {name:>26} {gather.median_us:>18,.0f} us {gather.worst_us:>9,.0f} us")
        if gpus == 0 and count > available_cores():
            self.warnings.append(
                f"{count} ranks share {available_cores()} CPU cores: they wait for each other in every layer; "
                f"more than --ranks {available_cores()} is slower here"
            )

    def _trial(self, count: int, run_dir: Path) -> tuple[Trial | None, list[str]]:
        """Start ranks and wait for them. Returns what rank 0 found, or what they printed."""
        config = self.options.engine_config(self.options.find_model())
        (run_dir / TRIAL_ORDERS_FILE).write_bytes(msgspec.json.encode(TrialOrders(config, os.getpid())))
        with tempfile.TemporaryFile() as output:
            ranks = RanksProcess(count, run_dir, module="gather_trial", max_restarts=0, output=output)
            deadline = time.monotonic() + TRIAL_S
            try:
                while ranks.exit_code is None and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                exit_code = ranks.exit_code
            finally:
                ranks.stop(0.0)
            output.seek(0)
            printed = output.read().decode(errors="replace").splitlines()
        if exit_code is None:
            printed.append(f"rank 0 had no answer after {TRIAL_S:.0f} s: a rank hangs, or a firewall cuts loopback off")
        result = run_dir / TRIAL_FILE
        if exit_code != 0 or not result.exists():
            return None, printed
        return msgspec.json.decode(result.read_bytes(), type=Trial), printed

    def _verdict(self) -> None:
        self.say("")
        for text in self.errors:
            self.say(f"WRONG: {text}")
        for text in self.warnings:
            self.say(f"Note: {text}")
        if not self.errors:
            self.say("A server can work here.")


def _driver() -> str | None:
    """The GPU driver's version line."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return "AMD" if Path("/dev/kfd").exists() else None


def _links() -> list[str] | None:
    """How the GPUs are connected, where nvidia-smi is there to tell."""
    try:
        answer = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.rstrip().expandtabs(8) for line in answer.stdout.splitlines() if line.startswith(("GPU", "\t"))]


def _count(number: int | None) -> str:
    return "without limit" if number is None else f"{number:,}"

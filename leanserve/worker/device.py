"""Which device a rank runs on.

`python -m leanserve.worker.device` prints the usable GPUs as JSON, for a front end that must not import torch.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch

from leanserve.contracts.config import Comm, Device
from leanserve.contracts.errors import ConfigError

__all__ = ["Gpus", "choose_comm", "choose_device", "choose_dtype", "describe", "usable_gpus"]

MIN_COMPUTE_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Gpus:
    """The GPUs that can be used here, and if none can, why and what to do about it."""

    count: int
    reason: str | None


def usable_gpus() -> Gpus:
    """Count GPUs of compute capability 8.0 or more that this build of torch can reach."""
    if torch.version.cuda is None and torch.version.hip is None:
        return Gpus(0, f"torch {torch.__version__} is a CPU build; install a CUDA build of torch to use the GPU")
    if not torch.cuda.is_available():
        wanted = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return Gpus(
            0, f"torch {torch.__version__} ({wanted}) finds no usable GPU; update the driver, or check nvidia-smi"
        )
    if torch.version.hip is None:
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_capability(index)
            if found < MIN_COMPUTE_CAPABILITY:
                return Gpus(
                    0,
                    f"{torch.cuda.get_device_name(index)} has compute capability {found[0]}.{found[1]}; 8.0 (Ampere) "
                    "or newer is needed; hide it with CUDA_VISIBLE_DEVICES to use the others",
                )
    return Gpus(torch.cuda.device_count(), None)


def choose_device(wanted: Device, local_rank: int, local_size: int, *, shares_gpu: bool) -> torch.device:
    """This rank's device.

    Args:
        shares_gpu: several ranks may use one GPU (Gloo carries their collectives).

    Raises:
        ConfigError: CUDA was asked for and cannot be used, or there are more ranks than GPUs.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    gpus = usable_gpus()
    if gpus.count == 0:
        if wanted == "cuda":
            raise ConfigError(f"--device cuda: {gpus.reason}")
        return torch.device("cpu")
    if local_size > gpus.count and not shares_gpu:
        raise ConfigError(
            f"{local_size} ranks on {gpus.count} GPU(s): NCCL needs one GPU per rank; use --ranks {gpus.count}, "
            "or --comm gloo to share GPUs"
        )
    device = torch.device("cuda", local_rank % gpus.count)
    torch.cuda.set_device(device)
    return device


def choose_comm(wanted: Comm, device: torch.device) -> Literal["nccl", "gloo"]:
    """The library for collectives. auto: Gloo on the CPU, NCCL on a GPU."""
    if wanted == "auto":
        return "gloo" if device.type == "cpu" else "nccl"
    return wanted


def choose_dtype(wanted: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """dtype of weights and KV. auto: float32 on the CPU; on a GPU the checkpoint's own, bfloat16 instead of float32."""
    if wanted == "auto":
        if device.type == "cpu":
            wanted = "float32"
        else:
            wanted = checkpoint_dtype if checkpoint_dtype in ("bfloat16", "float16") else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[wanted]


def describe(device: torch.device) -> str:
    """The device, for people."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''} each"
    return torch.cuda.get_device_name(device)


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(usable_gpus()).decode() + "\n")

"""The kernels between a layer's products, beside PyTorch's functions of the same names on the CPU: on a GPU, or under
TRITON_INTERPRET=1 (tests/kernels/test_interpreted.py runs it so)."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lean_attention.backend import choose_backend
from leanserve.model import layers
from leanserve.model.architecture import read_architecture
from leanserve.model.decoder import Decoder
from leanserve.model.rope import Rope, RotaryTable
from leanserve.model.rope_parameters import RopeParameters

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [0, 1, 3, 17]


@pytest.fixture(params=["triton"])
def device() -> torch.device:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        choose_backend("triton", device)
    except ValueError:
        pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1 before pytest starts")
    return device


@pytest.fixture
def fused(device: torch.device) -> ModuleType:
    from leanserve.model import fused

    return fused


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """On the CPU, of sizes from 0.01 to 10, which is what norms are for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return x.to(dtype)


def assert_rounds_alike(ours: Tensor, theirs: Tensor, size: Tensor | None = None) -> None:
    """Fail unless every element is within 1e-6 in float32; in 16 bits, unless nearly all are the same bits and the
    others next to them.

    Args:
        theirs: on the CPU.
        size: what the differences are relative to; None: `theirs`, element by element.
    """
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if ours.numel() == 0:
        return
    interpreted, ours = ours.device.type == "cpu", ours.cpu()
    size = (theirs if size is None else size).double().abs().clamp(torch.finfo(theirs.dtype).tiny)
    worst = ((ours.double() - theirs.double()).abs() / size).max().item()
    if theirs.dtype == torch.float32:
        assert worst <= 1e-6
        return
    precision = torch.finfo(theirs.dtype).eps
    if theirs.dtype == torch.bfloat16 and interpreted:
        # Triton's interpreter cuts bfloat16 off where a GPU rounds it, up to three times on the way, and so finds the
        # mean square too small. (float16 it rounds, and the kernels do not know one from the other.)
        assert worst <= 4 * precision
        return
    # A sum in another order may tip a value before its weight to the next number; few, and that is one rounding more.
    assert worst <= 2 * precision
    assert (ours == theirs).float().mean() > 0.99 or (ours != theirs).sum() <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 60, 576, 1025])
@pytest.mark.parametrize("tokens", TOKENS)
def test_norms(fused: ModuleType, device: torch.device, tokens: int, width: int, dtype: torch.dtype) -> None:
    x_NC, delta_NC = (random(tokens, width, dtype=dtype, seed=seed) for seed in (1, 2))
    weight_C = random(1, width, dtype=dtype, seed=3)[0] * 50
    ours_NC, given_C = x_NC.to(device, copy=True), weight_C.to(device)
    assert_rounds_alike(fused.rms_norm(ours_NC, given_C, EPS), layers.rms_norm(x_NC, weight_C, EPS))
    assert torch.equal(ours_NC.cpu(), x_NC)
    added_NC = fused.add_rms_norm(ours_NC, delta_NC.to(device), given_C, EPS)
    assert_rounds_alike(added_NC, layers.add_rms_norm(x_NC, delta_NC, weight_C, EPS))
    assert_rounds_alike(ours_NC, x_NC)


def test_a_norm_reads_and_changes_views_alone(fused: ModuleType, device: torch.device) -> None:
    """The residual stream may be part of something, and what is added to it a transposed view."""
    whole_NC = random(3, 100, dtype=torch.float32)
    delta_NC = random(60, 3, dtype=torch.float32, seed=1).T
    weight_C = torch.ones(60)
    ours_NC = whole_NC.to(device, copy=True)
    added_NC = fused.add_rms_norm(ours_NC[:, 10:70], delta_NC.to(device), weight_C.to(device), EPS)
    assert_rounds_alike(added_NC, layers.add_rms_norm(whole_NC[:, 10:70], delta_NC, weight_C, EPS))
    assert torch.equal(ours_NC.cpu(), whole_NC), "what is beside the view included"


def rotary_table(tokens: int, head_dim: int, dtype: torch.dtype) -> RotaryTable:
    rope = Rope(RopeParameters(rope_type="default", rope_theta=1e4), head_dim=head_dim, max_positions=4096)
    return rope.table(torch.arange(tokens) * 37 + 5, None, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [6, 64, 80, 96, 128])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("normed", "rotated"), [(True, False), (False, True), (True, True)], ids=["norm", "rope", "both"]
)
def test_heads(
    fused: ModuleType, device: torch.device, normed: bool, rotated: bool, tokens: int, head_dim: int, dtype: torch.dtype
) -> None:
    heads, kv_heads = 5, 2
    qkv_NHD = random(tokens, heads + kv_heads, head_dim, dtype=dtype)
    weight_HD = random(heads, head_dim, dtype=dtype, seed=1) if normed else None
    table = rotary_table(tokens, head_dim, dtype) if rotated else None
    ours_NHD = qkv_NHD.to(device, copy=True)
    ours = fused.norm_and_rotate(
        ours_NHD[:, :heads],
        None if weight_HD is None else weight_HD.to(device),
        EPS,
        None if table is None else RotaryTable(table.cos_N1D.to(device), table.sin_N1D.to(device)),
    )
    expected = layers.norm_and_rotate(qkv_NHD[:, :heads], weight_HD, EPS, table)
    size = None
    if rotated:  # a sum of two may cancel: its errors are those of the larger
        larger = torch.stack(expected.chunk(2, dim=-1)).abs().amax(0) * math.sqrt(2)
        size = torch.cat([larger, larger], dim=-1)
    assert_rounds_alike(ours, expected, size)
    assert torch.equal(ours_NHD[:, heads:].cpu(), qkv_NHD[:, heads:]), "values stay"


def test_heads_that_are_neither_normed_nor_rotated_are_left_alone(fused: ModuleType, device: torch.device) -> None:
    qk_NHD = random(3, 5, 16, dtype=torch.float32).to(device)
    assert fused.norm_and_rotate(qk_NHD, None, EPS, None) is qk_NHD


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [0, 1, 96, 1027])
@pytest.mark.parametrize("tokens", TOKENS)
def test_swiglu(fused: ModuleType, device: torch.device, tokens: int, width: int, dtype: torch.dtype) -> None:
    """A rank whose share of the MLP is empty has width 0."""
    gate_up_NJ = random(tokens, 2 * width, dtype=dtype)
    ours_NJ, theirs = gate_up_NJ.to(device, copy=True), layers.swiglu(gate_up_NJ)
    # A GPU's exponential errs by a part of its argument: of gates far below zero, whose results hardly count, by more.
    assert_rounds_alike(fused.swiglu(ours_NJ), theirs, size=theirs.abs() + gate_up_NJ[:, width:].abs() / 1024)
    assert torch.equal(ours_NJ.cpu(), gate_up_NJ)


def test_swiglu_at_the_ends(fused: ModuleType, device: torch.device) -> None:
    """Gates whose exponential overflows, and what is no number, which must show."""
    gate = torch.tensor([-3e38, -120.0, -90.0, -0.0, 90.0, 3e38, math.inf, math.nan])
    gate_up_NJ = torch.cat([gate, torch.ones_like(gate)])[None]
    ours, theirs = fused.swiglu(gate_up_NJ.to(device)).cpu(), layers.swiglu(gate_up_NJ)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-36, equal_nan=True)


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2},
}
LAUNCHES = {"llama": 8, "qwen3": 8, "smollm3": 7}
"""Of layer 1 without its attention: four products, two norms, the MLP's gate, and the heads' where there is a norm or a
rotation; SmolLM3's has neither."""


def small_decoder(family: str, folder: Path, device: torch.device, backend: str, *, layers: int) -> Decoder:
    """With random weights, which depend on the family alone."""
    config = {
        "model_type": family,
        "vocab_size": 61,
        "hidden_size": 60,
        "intermediate_size": 100,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    (folder / "config.json").write_text(json.dumps(config | MODELS[family]))
    decoder = Decoder(read_architecture(folder), device=device, backend=backend)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    for name, tensor in sorted(decoder.checkpoint_tensors().items()):
        scale = 1.0 if tensor.ndim == 1 or "embed" in name else tensor.shape[-1] ** -0.5
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return decoder


def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
    group = q_NHD.shape[1] // k_NKD.shape[1]
    k_NHD, v_NHD = k_NKD.repeat_interleave(group, 1), v_NKD.repeat_interleave(group, 1)
    scores_HNN = torch.einsum("nhd,mhd->hnm", q_NHD, k_NHD) * q_NHD.shape[2] ** -0.5
    hidden_NN = torch.ones(scores_HNN.shape[1:], dtype=torch.bool, device=q_NHD.device).triu(1)
    return torch.einsum("hnm,mhd->nhd", scores_HNN.masked_fill(hidden_NN, -math.inf).softmax(-1), v_NHD)


@pytest.mark.parametrize("family", MODELS)
def test_a_decoder_says_the_same(family: str, tmp_path: Path, device: torch.device) -> None:
    tokens_N = torch.tensor([3, 60, 7, 7, 0, 12, 41], device=device)
    for count in (0, 1, 7):
        plain, ours = (
            small_decoder(family, tmp_path, device, backend, layers=3).forward(
                tokens_N[:count], torch.arange(count, device=device), attend
            )
            for backend in ("portable", "triton")
        )
        assert ours.shape == (count, 60)
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
        if count > 1:
            assert plain.std() > 0.5, "a difference would show"


class Launches(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::_unsafe_view")):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", MODELS)
def test_launches_of_a_layer(family: str, tmp_path: Path, device: torch.device) -> None:
    """They are what a decode step at batch 1 costs on a GPU."""
    counts = []
    for num_layers in (1, 2):
        decoder = small_decoder(family, tmp_path, device, "triton", layers=num_layers)
        with Launches() as launches:
            decoder.forward(
                torch.tensor([3], device=device), torch.tensor([0], device=device), lambda layer, q, k, v: q
            )
        counts.append(launches.count)
    assert counts[1] - counts[0] == LAUNCHES[family]

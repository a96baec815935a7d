"""Packed projections, norms and the MLP's gate beside the plain formulas."""

import platform

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from checkpoints import checkpoint, hf_logits, load_decoder, random_prompts
from leanserve.model.layers import Linear, rms_norm, swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of the largest value


def worst(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_projection_gives_the_same(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = Linear(514, 515, bias=bias, dtype=dtype, device="cpu")  # just large enough to be packed
    assert linear.weight_JC is not None
    weight_JC = linear.weight_JC.normal_().double()
    bias_J = linear.bias_J.normal_().double() if linear.bias_J is not None else None
    linear.pack()
    for rows in (1, 2, 3, 16, 77):
        x_NC = torch.randn(rows, 515).to(dtype)
        y_NJ = linear(x_NC)
        assert y_NJ.dtype == dtype
        assert worst(y_NJ, F.linear(x_NC.double(), weight_JC, bias_J)) < TOLERANCE[dtype]
    assert linear(torch.empty(0, 515, dtype=dtype)).shape == (0, 514)


def test_a_decoder_large_enough_to_pack(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The other checkpoints of these tests are too small for it."""
    model_dir = checkpoint(tmp_path_factory, "qwen2", heads=5, kv_heads=1, head_dim=80, hidden=520, layers=2)
    decoder = load_decoder(model_dir)

    def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q_NHD.transpose(0, 1), k_NKD.transpose(0, 1), v_NKD.transpose(0, 1), is_causal=True, enable_gqa=True
        ).transpose(0, 1)

    for prompt in random_prompts([1, 7, 40]):
        hidden_NC = decoder.forward(torch.tensor(prompt), torch.arange(len(prompt)), attend)
        assert worst(decoder.logits(hidden_NC), hf_logits(model_dir, prompt).double()) < 2e-5


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="projections are packed on x86-64 with oneDNN",
)
def test_a_packed_decoder_has_no_places_to_load_into(tmp_path_factory: pytest.TempPathFactory) -> None:
    model_dir = checkpoint(tmp_path_factory, "qwen2", heads=5, kv_heads=1, head_dim=80, hidden=520, layers=2)
    with pytest.raises(RuntimeError, match="checkpoint_tensors comes before pack"):
        load_decoder(model_dir).checkpoint_tensors()


def test_a_step_without_tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A rank may own none of a step's tokens."""
    for family in ("qwen3", "smollm3"):
        decoder = load_decoder(checkpoint(tmp_path_factory, family))
        none = torch.empty(0, dtype=torch.long)
        hidden_NC = decoder.forward(none, none, lambda layer, q_NHD, k_NKD, v_NKD: q_NHD)
        assert hidden_NC.shape == (0, 60)
        assert decoder.logits(hidden_NC).shape == (0, 199)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 60), (300, 24), (3, 5, 16)])
def test_the_norm_is_that_of_transformers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    theirs = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.normal_()
        before = x.clone()
        expected = theirs(x)
        torch.testing.assert_close(rms_norm(x, theirs.weight.detach(), 1e-5), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(rms_norm(x, None, 1e-5) * theirs.weight, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_swiglu_leaves_its_input_alone() -> None:
    gate_up_NJ = torch.randn(5, 12)
    before = gate_up_NJ.clone()
    gate, up = gate_up_NJ[:, :6].double(), gate_up_NJ[:, 6:].double()
    assert worst(swiglu(gate_up_NJ), gate * torch.sigmoid(gate) * up) < 1e-6
    torch.testing.assert_close(gate_up_NJ, before, rtol=0, atol=0)

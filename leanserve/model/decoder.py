"""The decoder, start to end: Llama, Mistral, Qwen2, Qwen3 and SmolLM3 are this one file with a few switches.

N tokens of a step (all sequences together, in any order), M rows that want logits, C hidden, V vocabulary,
H query heads, K KV heads, D head dim, J any width.

It does not know what a sequence, a page or a rank is: attention is a function that it is given.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from leanserve.model.architecture import Architecture
from leanserve.model.layers import linear, rms_norm, swiglu
from leanserve.model.rope import Rope, RotaryTable, rotate

__all__ = ["Attend", "Decoder", "DecoderLayer"]


class Attend(Protocol):
    """Causal attention of one layer over everything the step's sequences have said so far, this step included.

    Whoever implements it knows the sequence and position of each of the N tokens, stores their keys and values, and
    applies the layer's window (`Architecture.layer_windows`).
    """

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Softmax attention with scale `D ** -0.5`.

        Args:
            layer: from 0.
            q_NHD, k_NKD, v_NKD: in the model's dtype, rotated where the layer rotates. Views: D is contiguous, the
                other strides are not.

        Returns:
            out_NHD in the model's dtype.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """One layer's weights. Projections that read the same input are one matrix: fewer, larger reads."""

    rotates: bool
    input_norm_C: Tensor
    qkv_JC: Tensor
    """Rows: H * D of the queries, K * D of the keys, K * D of the values."""
    qkv_bias_J: Tensor | None
    qk_norm_HKD: Tensor | None
    """[H + K, D]: the query norm's weight for each query head, the key norm's for each KV head."""
    output_CJ: Tensor
    output_bias_C: Tensor | None
    mlp_norm_C: Tensor
    gate_up_JC: Tensor
    """Rows: the gate's, then the up projection's."""
    gate_up_bias_J: Tensor | None
    down_CJ: Tensor
    down_bias_C: Tensor | None


class Decoder:
    """A decoder-only language model with its final norm and output projection.

    The constructor allocates; `weights.load_weights` fills.

    Args:
        architecture: what to build.
        dtype: of weights and activations: float32, bfloat16 or float16.
        device: of the weights.
    """

    def __init__(
        self, architecture: Architecture, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.architecture = a = architecture
        self.dtype = dtype
        self.device = torch.device(device)
        self.rope = Rope(a.rope, head_dim=a.head_dim, max_positions=a.max_positions, device=device)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        qkv_width, attention_width = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim, a.num_heads * a.head_dim
        self.embedding_VC = empty(a.vocab_size, a.hidden_size)
        self.layers = [
            DecoderLayer(
                rotates=rotates,
                input_norm_C=empty(a.hidden_size),
                qkv_JC=empty(qkv_width, a.hidden_size),
                qkv_bias_J=empty(qkv_width) if a.qkv_bias else None,
                qk_norm_HKD=empty(a.num_heads + a.num_kv_heads, a.head_dim) if a.qk_norm else None,
                output_CJ=empty(a.hidden_size, attention_width),
                output_bias_C=empty(a.hidden_size) if a.output_bias else None,
                mlp_norm_C=empty(a.hidden_size),
                gate_up_JC=empty(2 * a.intermediate_size, a.hidden_size),
                gate_up_bias_J=empty(2 * a.intermediate_size) if a.mlp_bias else None,
                down_CJ=empty(a.hidden_size, a.intermediate_size),
                down_bias_C=empty(a.hidden_size) if a.mlp_bias else None,
            )
            for rotates in a.layer_rope
        ]
        self.final_norm_C = empty(a.hidden_size)
        self.unembedding_VC = self.embedding_VC if a.tied_embeddings else empty(a.vocab_size, a.hidden_size)

    @torch.inference_mode()
    def forward(
        self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, *, prompt_lengths_N: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [N, C] in the model's dtype.

        Args:
            tokens_N: token ids, integer.
            positions_N: absolute position of each token in its sequence, integer.
            attend: attention, called once per layer in order.
            prompt_lengths_N: tokens in the prompt of each token's sequence, integer; needed by dynamic and longrope
                rope (`Rope.depends_on_length`), ignored by the others.
        """
        x_NC = F.embedding(tokens_N, self.embedding_VC)
        table = self.rope.table(positions_N, prompt_lengths_N, self.dtype)
        for index, layer in enumerate(self.layers):
            x_NC = self._layer(index, layer, x_NC, table, attend)
        return rms_norm(x_NC, self.final_norm_C, self.architecture.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden_MC: Tensor) -> Tensor:
        """Logits [M, V] in float32 of hidden states that `forward` returned."""
        return linear(hidden_MC, self.unembedding_VC, None).float()

    def _layer(self, index: int, layer: DecoderLayer, x_NC: Tensor, table: RotaryTable, attend: Attend) -> Tensor:
        a = self.architecture
        h_NC = rms_norm(x_NC, layer.input_norm_C, a.rms_norm_eps)
        qkv_NHD = linear(h_NC, layer.qkv_JC, layer.qkv_bias_J).view(x_NC.shape[0], -1, a.head_dim)
        qk_NHD, v_NKD = qkv_NHD.split((a.num_heads + a.num_kv_heads, a.num_kv_heads), dim=1)
        if layer.qk_norm_HKD is not None:
            qk_NHD = rms_norm(qk_NHD, None, a.rms_norm_eps) * layer.qk_norm_HKD
        if layer.rotates:
            qk_NHD = rotate(qk_NHD, table)
        q_NHD, k_NKD = qk_NHD.split((a.num_heads, a.num_kv_heads), dim=1)

        attended_NHD = attend(index, q_NHD, k_NKD, v_NKD)
        x_NC = x_NC + linear(attended_NHD.reshape(x_NC.shape[0], -1), layer.output_CJ, layer.output_bias_C)

        h_NC = rms_norm(x_NC, layer.mlp_norm_C, a.rms_norm_eps)
        h_NJ = swiglu(linear(h_NC, layer.gate_up_JC, layer.gate_up_bias_J))
        return x_NC + linear(h_NJ, layer.down_CJ, layer.down_bias_C)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Every tensor under its name in a checkpoint, as a view into this model's memory: where it is to be loaded.

        Names and shapes are those of `Architecture.tensor_shapes`. The q_norm and k_norm views are [H, D] and [K, D]
        with one row per head; loading a [D] vector into them repeats it.
        """
        a = self.architecture
        queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        found: dict[str, Tensor] = {"model.embed_tokens.weight": self.embedding_VC}
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
            found[f"{prefix}.input_layernorm.weight"] = layer.input_norm_C
            found[f"{prefix}.post_attention_layernorm.weight"] = layer.mlp_norm_C
            for kind, fused in (("weight", layer.qkv_JC), ("bias", layer.qkv_bias_J)):
                if fused is not None:
                    q, k, v = fused.split((queries, keys, keys))
                    found |= {f"{attention}.{name}_proj.{kind}": t for name, t in (("q", q), ("k", k), ("v", v))}
            if layer.qk_norm_HKD is not None:
                q_norm, k_norm = layer.qk_norm_HKD.split((a.num_heads, a.num_kv_heads))
                found |= {f"{attention}.q_norm.weight": q_norm, f"{attention}.k_norm.weight": k_norm}
            for kind, fused in (("weight", layer.gate_up_JC), ("bias", layer.gate_up_bias_J)):
                if fused is not None:
                    gate, up = fused.chunk(2)
                    found |= {f"{mlp}.gate_proj.{kind}": gate, f"{mlp}.up_proj.{kind}": up}
            for name, weight, bias in (
                (f"{attention}.o_proj", layer.output_CJ, layer.output_bias_C),
                (f"{mlp}.down_proj", layer.down_CJ, layer.down_bias_C),
            ):
                found[f"{name}.weight"] = weight
                if bias is not None:
                    found[f"{name}.bias"] = bias
        found["model.norm.weight"] = self.final_norm_C
        if not a.tied_embeddings:
            found["lm_head.weight"] = self.unembedding_VC
        return found

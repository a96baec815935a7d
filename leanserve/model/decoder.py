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
from leanserve.model.layers import Linear, rms_norm, swiglu
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
    qkv: Linear
    """Outputs: H * D of the queries, K * D of the keys, K * D of the values."""
    qk_norm_HKD: Tensor | None
    """[H + K, D]: the query norm's weight for each query head, the key norm's for each KV head."""
    output: Linear
    mlp_norm_C: Tensor
    gate_up: Linear
    """Outputs: the gate's, then the up projection's."""
    down: Linear


class Decoder:
    """A decoder-only language model with its final norm and output projection.

    The constructor allocates; `weights.load_weights` fills it and packs it.

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

        def vector(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def projection(outputs: int, inputs: int, *, bias: bool = False) -> Linear:
            return Linear(outputs, inputs, bias=bias, dtype=dtype, device=device)

        hidden, middle, attended = a.hidden_size, a.intermediate_size, a.num_heads * a.head_dim
        self.embedding_VC = vector(a.vocab_size, hidden)
        self.layers = [
            DecoderLayer(
                rotates=rotates,
                input_norm_C=vector(hidden),
                qkv=projection(attended + 2 * a.num_kv_heads * a.head_dim, hidden, bias=a.qkv_bias),
                qk_norm_HKD=vector(a.num_heads + a.num_kv_heads, a.head_dim) if a.qk_norm else None,
                output=projection(hidden, attended, bias=a.output_bias),
                mlp_norm_C=vector(hidden),
                gate_up=projection(2 * middle, hidden, bias=a.mlp_bias),
                down=projection(hidden, middle, bias=a.mlp_bias),
            )
            for rotates in a.layer_rope
        ]
        self.final_norm_C = vector(hidden)
        self.unembedding = None if a.tied_embeddings else projection(a.vocab_size, hidden)

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
            self._add_layer(index, layer, x_NC, table, attend)
        return rms_norm(x_NC, self.final_norm_C, self.architecture.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden_MC: Tensor) -> Tensor:
        """Logits [M, V] in float32 of hidden states that `forward` returned."""
        if self.unembedding is None:
            return F.linear(hidden_MC, self.embedding_VC).float()
        return self.unembedding(hidden_MC).float()

    def _add_layer(self, index: int, layer: DecoderLayer, x_NC: Tensor, table: RotaryTable, attend: Attend) -> None:
        """Add attention, then the MLP, to the residual stream in place."""
        a = self.architecture
        n, d, rotary_heads = x_NC.shape[0], a.head_dim, a.num_heads + a.num_kv_heads
        h_NC = rms_norm(x_NC, layer.input_norm_C, a.rms_norm_eps)
        qkv_NHD = layer.qkv(h_NC).view(n, rotary_heads + a.num_kv_heads, d)
        qk_NHD, v_NKD = qkv_NHD.split((rotary_heads, a.num_kv_heads), dim=1)
        if layer.qk_norm_HKD is not None:
            qk_NHD = rms_norm(qk_NHD, None, a.rms_norm_eps).mul_(layer.qk_norm_HKD)
        if layer.rotates:
            qk_NHD = rotate(qk_NHD, table)
        q_NHD, k_NKD = qk_NHD.split((a.num_heads, a.num_kv_heads), dim=1)

        attended_NHD = attend(index, q_NHD, k_NKD, v_NKD)
        x_NC += layer.output(attended_NHD.reshape(n, a.num_heads * d))

        h_NC = rms_norm(x_NC, layer.mlp_norm_C, a.rms_norm_eps)
        x_NC += layer.down(swiglu(layer.gate_up(h_NC)))

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Every tensor under its name in a checkpoint, as a view into this model's memory: where it is to be loaded.

        Names and shapes are those of `Architecture.tensor_shapes`, except that the q_norm and k_norm views are [H, D]
        and [K, D], one row per head: copying a [D] vector into them repeats it. Not after `pack`.
        """
        a = self.architecture
        queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        found: dict[str, Tensor] = {"model.embed_tokens.weight": self.embedding_VC}

        def add(projection: Linear, parts: dict[str, int]) -> None:
            """`parts`: checkpoint names of a projection's outputs, in order, and how many each has."""
            if projection.weight_JC is None:
                raise RuntimeError("the weights are packed; checkpoint_tensors comes before pack")
            for kind, fused in (("weight", projection.weight_JC), ("bias", projection.bias_J)):
                if fused is not None:
                    views = fused.split(tuple(parts.values()))
                    found.update({f"{name}.{kind}": view for name, view in zip(parts, views, strict=True)})

        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
            found[f"{prefix}.input_layernorm.weight"] = layer.input_norm_C
            add(layer.qkv, {f"{attention}.q_proj": queries, f"{attention}.k_proj": keys, f"{attention}.v_proj": keys})
            if layer.qk_norm_HKD is not None:
                q_norm_HD, k_norm_KD = layer.qk_norm_HKD.split((a.num_heads, a.num_kv_heads))
                found |= {f"{attention}.q_norm.weight": q_norm_HD, f"{attention}.k_norm.weight": k_norm_KD}
            add(layer.output, {f"{attention}.o_proj": a.hidden_size})
            found[f"{prefix}.post_attention_layernorm.weight"] = layer.mlp_norm_C
            add(layer.gate_up, {f"{mlp}.gate_proj": a.intermediate_size, f"{mlp}.up_proj": a.intermediate_size})
            add(layer.down, {f"{mlp}.down_proj": a.hidden_size})
        found["model.norm.weight"] = self.final_norm_C
        if self.unembedding is not None:
            add(self.unembedding, {"lm_head": a.vocab_size})
        return found

    def pack(self) -> None:
        """Re-lay the projections for the CPU, one after the other, once their weights are loaded."""
        for layer in self.layers:
            for projection in (layer.qkv, layer.output, layer.gate_up, layer.down):
                projection.pack()
        if self.unembedding is not None:
            self.unembedding.pack()

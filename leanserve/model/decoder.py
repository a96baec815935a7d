"""The decoder, start to end: Llama, Mistral, Qwen2, Qwen3 and SmolLM3 are this one file with a few switches.

N tokens of a step (all sequences together, in any order), M rows that want logits, C hidden, V vocabulary,
H query heads, K KV heads, D head dim, J any width.

It does not know what a sequence or a page is: attention is a function that it is given. Of ranks it knows that each may
hold a part of the weights (`Partition`); what they then say to each other is `TokenExchange`, beside each product.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lean_attention import Backend
from leanserve.distributed.ranks import Ranks
from leanserve.distributed.token_exchange import (
    NO_EXCHANGE,
    NoExchange,
    TokenExchange,
    TokenSpread,
    columns_to_rank_0,
)
from leanserve.model.architecture import Architecture
from leanserve.model.layer_ops import choose_layer_ops
from leanserve.model.layers import Linear
from leanserve.model.partition import Partition, WeightSplit
from leanserve.model.rope import Rope, RotaryTable

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
    """One layer's weights, or this rank's part. Projections that read the same input are one matrix: fewer, larger
    reads."""

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
        ranks: the group that the weights may be split over; None: one rank, on `device`.
        split: which weights are.
        dtype: of weights and activations: float32, bfloat16 or float16.
        device: of the weights.
        backend: of the operations between the products, None for the device's own.

    Raises:
        ValueError: the backend cannot run on the device.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        ranks: Ranks | None = None,
        split: WeightSplit = "replicated",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: Backend | None = None,
    ) -> None:
        self.architecture = a = architecture
        self.dtype = dtype
        self.device = torch.device(device)
        self._ops = choose_layer_ops(backend, self.device)
        self.ranks = Ranks.single(self.device) if ranks is None else ranks
        self.partition = Partition(a, split, self.ranks.rank, self.ranks.size)
        self.rope = Rope(a.rope, head_dim=a.head_dim, max_positions=a.max_positions, device=device)
        self._qkv_widths = [len(outputs) for outputs in self.partition.qkv]
        self._attended_widths = [len(inputs) for inputs in self.partition.attended]
        parts = self.partition.tensor_parts()

        def vector(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def projection(*names: str) -> Linear:
            """This rank's part of one matrix, or of several that read the same input."""
            outputs = sum(len(parts[f"{name}.weight"][0]) for name in names)
            inputs = len(parts[f"{names[0]}.weight"][1])
            bias = f"{names[0]}.bias" in parts
            return Linear(outputs, inputs, bias=bias, dtype=dtype, device=device)

        self.embedding_VC = vector(*map(len, parts["model.embed_tokens.weight"]))
        self.layers = [
            DecoderLayer(
                rotates=rotates,
                input_norm_C=vector(a.hidden_size),
                qkv=projection(*_under(index, "self_attn", "q_proj", "k_proj", "v_proj")),
                qk_norm_HKD=vector(a.num_heads + a.num_kv_heads, a.head_dim) if a.qk_norm else None,
                output=projection(*_under(index, "self_attn", "o_proj")),
                mlp_norm_C=vector(a.hidden_size),
                gate_up=projection(*_under(index, "mlp", "gate_proj", "up_proj")),
                down=projection(*_under(index, "mlp", "down_proj")),
            )
            for index, rotates in enumerate(a.layer_rope)
        ]
        self.final_norm_C = vector(a.hidden_size)
        self.unembedding = None if a.tied_embeddings else projection("lm_head")

    @torch.inference_mode()
    def forward(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        attend: Attend,
        *,
        prompt_lengths_N: Tensor | None = None,
        spread: TokenSpread | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [N, C] in the model's dtype.

        Every rank must call it, with N = 0 too, where its weights are split or where `attend` needs that.

        Args:
            tokens_N: token ids, integer.
            positions_N: absolute position of each token in its sequence, integer.
            attend: attention, called once per layer in order.
            prompt_lengths_N: tokens in the prompt of each token's sequence, integer; needed by dynamic and longrope
                rope (`Rope.depends_on_length`), ignored by the others.
            spread: which rank has which tokens; None: all ranks have the same ones.
        """
        if spread is None:
            spread = TokenSpread(tokens_N.shape[0], (0,) * self.ranks.size)
        exchange = TokenExchange(self.ranks, spread)
        for_attention = exchange if self.partition.splits_attention else NO_EXCHANGE
        for_mlp = exchange if self.partition.splits_mlp else NO_EXCHANGE

        x_NC = for_mlp.summed(self._embedded(for_mlp.all_tokens(tokens_N)))
        table = self.rope.table(positions_N, prompt_lengths_N, self.dtype)
        eps = self.architecture.rms_norm_eps
        # What a block adds to the residual stream x joins the norm h that the next one reads.
        h_NC = self._ops.rms_norm(x_NC, self.layers[0].input_norm_C, eps)
        norms_after = [*(layer.input_norm_C for layer in self.layers[1:]), self.final_norm_C]
        for index, (layer, norm_after_C) in enumerate(zip(self.layers, norms_after, strict=True)):
            attended_NC = self._attention(index, layer, h_NC, table, attend, for_attention)
            h_NC = self._ops.add_rms_norm(x_NC, attended_NC, layer.mlp_norm_C, eps)
            h_NC = self._ops.add_rms_norm(x_NC, self._mlp(layer, h_NC, for_mlp), norm_after_C, eps)
        return h_NC

    @torch.inference_mode()
    def logits(self, hidden_MC: Tensor) -> Tensor | None:
        """Logits [M, V] in float32 of hidden states that `forward` returned, on rank 0. Other ranks get None.

        A collective: every rank must call it, with the same M rows. (Where the vocabulary is not split, the other
        ranks do nothing.)
        """
        if not self.partition.splits_mlp:
            return self._part_of_logits(hidden_MC).float() if self.ranks.rank == 0 else None
        widths = [len(ids) for ids in self.partition.vocabulary]
        logits_MV = columns_to_rank_0(self._part_of_logits(hidden_MC), widths, self.ranks)
        return None if logits_MV is None else logits_MV.float()

    def _embedded(self, tokens_M: Tensor) -> Tensor:
        """Rows of the embedding, zero where another rank has them."""
        if not self.partition.splits_mlp:
            return F.embedding(tokens_M, self.embedding_VC)
        ids = self.partition.vocabulary[self.ranks.rank]
        elsewhere_M = (tokens_M < ids.start) | (tokens_M >= ids.stop)
        x_MC = F.embedding((tokens_M - ids.start).masked_fill_(elsewhere_M, 0), self.embedding_VC)
        return x_MC.masked_fill_(elsewhere_M.unsqueeze(1), 0)

    def _part_of_logits(self, hidden_MC: Tensor) -> Tensor:
        if self.unembedding is None:
            return F.linear(hidden_MC, self.embedding_VC)
        return self.unembedding(hidden_MC)

    def _attention(
        self,
        index: int,
        layer: DecoderLayer,
        h_NC: Tensor,
        table: RotaryTable,
        attend: Attend,
        exchange: NoExchange | TokenExchange,
    ) -> Tensor:
        """What attention adds to the residual stream, [N, C]."""
        a = self.architecture
        n, d, rotary_heads = h_NC.shape[0], a.head_dim, a.num_heads + a.num_kv_heads
        qkv_NJ = exchange.my_tokens(layer.qkv(exchange.all_tokens(h_NC)), self._qkv_widths)
        qkv_NHD = qkv_NJ.view(n, rotary_heads + a.num_kv_heads, d)
        qk_NHD, v_NKD = qkv_NHD.split((rotary_heads, a.num_kv_heads), dim=1)
        qk_NHD = self._ops.norm_and_rotate(qk_NHD, layer.qk_norm_HKD, a.rms_norm_eps, table if layer.rotates else None)
        q_NHD, k_NKD = qk_NHD.split((a.num_heads, a.num_kv_heads), dim=1)
        attended_NJ = attend(index, q_NHD, k_NKD, v_NKD).reshape(n, a.num_heads * d)
        return exchange.summed(layer.output(exchange.my_columns(attended_NJ, self._attended_widths)))

    def _mlp(self, layer: DecoderLayer, h_NC: Tensor, exchange: NoExchange | TokenExchange) -> Tensor:
        """What the MLP adds to the residual stream, [N, C]."""
        return exchange.summed(layer.down(self._ops.swiglu(layer.gate_up(exchange.all_tokens(h_NC)))))

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Every tensor under its name in a checkpoint, as a view into this model's memory: where it is to be loaded.

        Names and shapes are those of `Partition.tensor_parts`, except that the q_norm and k_norm views are [H, D]
        and [K, D], one row per head: copying a [D] vector into them repeats it. Not after `pack`.
        """
        parts = self.partition.tensor_parts()
        found: dict[str, Tensor] = {"model.embed_tokens.weight": self.embedding_VC}

        def add(projection: Linear, *names: str) -> None:
            """`names`: the projections whose outputs are those of `projection`, in order."""
            if projection.weight_JC is None:
                raise RuntimeError("the weights are packed; checkpoint_tensors comes before pack")
            for kind, fused in (("weight", projection.weight_JC), ("bias", projection.bias_J)):
                if fused is not None:
                    full_names = [f"{name}.{kind}" for name in names]
                    views = fused.split([len(parts[name][0]) for name in full_names])
                    found.update(zip(full_names, views, strict=True))

        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            found[f"{prefix}.input_layernorm.weight"] = layer.input_norm_C
            add(layer.qkv, *_under(index, "self_attn", "q_proj", "k_proj", "v_proj"))
            if layer.qk_norm_HKD is not None:
                heads = (self.architecture.num_heads, self.architecture.num_kv_heads)
                norms = zip(_under(index, "self_attn", "q_norm", "k_norm"), layer.qk_norm_HKD.split(heads), strict=True)
                found.update({f"{name}.weight": norm for name, norm in norms})
            add(layer.output, *_under(index, "self_attn", "o_proj"))
            found[f"{prefix}.post_attention_layernorm.weight"] = layer.mlp_norm_C
            add(layer.gate_up, *_under(index, "mlp", "gate_proj", "up_proj"))
            add(layer.down, *_under(index, "mlp", "down_proj"))
        found["model.norm.weight"] = self.final_norm_C
        if self.unembedding is not None:
            add(self.unembedding, "lm_head")
        return found

    def pack(self) -> None:
        """Re-lay the projections for the CPU, one after the other, once their weights are loaded."""
        for layer in self.layers:
            for projection in (layer.qkv, layer.output, layer.gate_up, layer.down):
                projection.pack()
        if self.unembedding is not None:
            self.unembedding.pack()


def _under(layer: int, block: str, *modules: str) -> list[str]:
    """Checkpoint names of a layer's modules."""
    return [f"model.layers.{layer}.{block}.{module}" for module in modules]

"""The bundled model for training: SmolLM3 in one readable file, with the parameter names of its checkpoints.

Grouped-query attention, rope on every other layer and none between, SwiGLU, RMSNorm, tied embeddings.
It knows nothing of serving; `leanserve.model` serves the checkpoint that `save` writes.

B sequences, L tokens, H query heads, K KV heads, D head dim, S keys, W width of the residual stream.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["Attention", "KVCache", "Network", "Shape", "load", "save"]


@dataclass(frozen=True)
class Shape:
    """What config.json says of the architecture."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rope_theta: float = 1000.0
    """Low, so that the slowest rotation (a period of 4k tokens) is seen whole in training."""
    max_position_embeddings: int = 65_536
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def layers_with_rope(self) -> list[bool]:
        return [layer % 2 == 0 for layer in range(self.num_hidden_layers)]

    def config(self) -> dict[str, Any]:
        """config.json as `transformers` reads it."""
        return {
            "architectures": ["SmolLM3ForCausalLM"],
            "model_type": "smollm3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            # SmolLM3 spells it so: 1 is a layer with rope.
            "no_rope_layers": [int(rope) for rope in self.layers_with_rope],
            "no_rope_layer_interval": 2,
            "use_sliding_window": False,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "dtype": "bfloat16",
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Shape":
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        more = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
        fields = {name: config[name] for name in (*names, *more)}
        return cls(**fields, rope_theta=config["rope_parameters"]["rope_theta"])


KVCache = list[tuple[Tensor, Tensor]]
"""Per layer the keys and values, [B, K, S, D] each, keys already rotated."""


def _rotate(x_BNLD: Tensor, angle_BLD: Tensor) -> Tensor:
    first, second = x_BNLD.chunk(2, dim=-1)
    return x_BNLD * angle_BLD.cos()[:, None] + torch.cat((-second, first), dim=-1) * angle_BLD.sin()[:, None]


class Attention(nn.Module):
    def __init__(self, shape: Shape, rope: bool) -> None:
        super().__init__()
        self.shape, self.rope = shape, rope
        kv_width = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(
        self, x_BLW: Tensor, angle_BLD: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, L, _ = x_BLW.shape
        q, k, v = (
            proj(x_BLW).view(B, L, -1, self.shape.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope:
            q, k = _rotate(q, angle_BLD).to(v.dtype), _rotate(k, angle_BLD).to(v.dtype)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out_BHLD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out_BHLD.transpose(1, 2).reshape(B, L, -1)), (k, v)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape, rope: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, rope)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(
        self, x_BLW: Tensor, angle_BLD: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, kv = self.self_attn(self.input_layernorm(x_BLW), angle_BLD, mask, past)
        x_BLW = x_BLW + attended
        return x_BLW + self.mlp(self.post_attention_layernorm(x_BLW)), kv


class Body(nn.Module):
    """Everything below the language-model head; `model.` in the checkpoint's names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, rope) for rope in shape.layers_with_rope)
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Network(nn.Module):
    """SmolLM3ForCausalLM without the serving: a forward pass to train, and to measure with a KV cache."""

    inv_freq: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        self.register_buffer("inv_freq", shape.rope_theta**-half, persistent=False)
        self._initialise()

    def forward(
        self, ids_BL: Tensor, positions_BL: Tensor, mask: Tensor | None = None, past: KVCache | None = None
    ) -> tuple[Tensor, KVCache]:
        """Hidden states [B, L, W] after the last norm, and the keys and values of all tokens so far.

        mask: added to attention's logits, broadcast to [B, H, L, S]; None is causal, and then `past` must be None.
        """
        assert mask is not None or past is None
        angle_BLD = (positions_BL[..., None] * self.inv_freq).repeat(1, 1, 2)
        x_BLW = self.model.embed_tokens(ids_BL)
        cache: KVCache = []
        for i, layer in enumerate(self.model.layers):
            x_BLW, kv = layer(x_BLW, angle_BLD, mask, past[i] if past else None)
            cache.append(kv)
        return self.model.norm(x_BLW), cache

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, [..., vocab], for hidden states [..., W]."""
        return hidden @ self.model.embed_tokens.weight.T

    @torch.no_grad()
    def _initialise(self) -> None:
        """Random weights among which retrieval has its first, rough circuit; all of it is trained on.

        From plain random weights retrieval comes many minutes later on a CPU. So:

        - Each head of a rope layer attends to one distance: its own number, from 1. (All embeddings share a direction,
          which V does not see; queries and keys read it into a phase of the fast rotations.) The tokens that it brings
          lie in a block of the residual stream of their own, one block per distance.
        - In the layer above, the first query head of each group finds the token *after* an earlier copy of the present
          context: its queries are the keys with every block moved on by one distance. It copies: the output inverts
          the values.
        """
        shape = self.shape
        width, D = shape.hidden_size, shape.head_dim
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                outward = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=width**-0.5 * (0.1 if outward else 1))
        shared_W = F.normalize(torch.randn(width), dim=0)
        std = 0.1
        embedding_size = std * width**0.5
        nn.init.normal_(self.model.embed_tokens.weight, std=std).add_(embedding_size * shared_W)
        # Half of a normalised embedding's square lies along the shared direction.
        reader_W = shared_W / (width / 2) ** 0.5
        # As long as the embedding itself, whose normalised values have the size of one in every dimension.
        brought_size = embedding_size / (D / 2) ** 0.5
        group = shape.num_attention_heads // shape.num_key_value_heads
        blocks_WW = move_on_WW = present_WW = torch.empty(0)
        for layer, rope in zip(self.model.layers, shape.layers_with_rope, strict=True):
            attention = layer.self_attn
            assert isinstance(attention, Attention)
            q, k, v = (getattr(attention, f"{name}_proj").weight.unflatten(0, (-1, D)) for name in "qkv")
            if rope:
                blocks_WW = nn.init.orthogonal_(torch.empty(width, width))
                v[:] = v[0] - torch.outer(v[0] @ shared_W, shared_W)
                attention.o_proj.weight.copy_(brought_size * blocks_WW)
                for head in range(shape.num_attention_heads):
                    phase = -(head + 1) * self.inv_freq
                    q[head] += torch.outer(torch.cat((phase.cos(), phase.sin())) * self._sharpness(), reader_W)
                k[:, : D // 2] += torch.outer(self._sharpness()[: D // 2], reader_W)
                move_on_WW = blocks_WW[:, D:] @ blocks_WW[:, :-D].T
                present_WW = brought_size / (std * 2**0.5) * blocks_WW[:, :D] @ v[0]
            else:
                q[::group] = 1.5 * k @ (present_WW + move_on_WW)
                k *= 1.5
                for head in range(0, shape.num_attention_heads, group):
                    attention.o_proj.weight[:, head * D : (head + 1) * D] = 0.3 * v[head // group].T

    def _sharpness(self) -> Tensor:
        """Length of queries and keys in each rotation, [D]: a distance of one beside the peak costs 4 in the logit."""
        logit = 0.5 + 6 * self.inv_freq
        return (logit * self.shape.head_dim**0.5).sqrt().repeat(2)


def save(network: Network, directory: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bfloat16)."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in network.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    for name, content in (("config", network.shape.config()), ("generation_config", generation)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def load(directory: Path) -> Network:
    """The network of a checkpoint that `save` wrote, in float32."""
    network = Network(Shape.from_config(json.loads((directory / "config.json").read_text())))
    weights = load_file(directory / "model.safetensors")
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return network

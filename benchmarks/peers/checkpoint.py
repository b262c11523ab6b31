"""Random checkpoints of real shapes, as transformers lays them out, and their GGUF twins."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanovllm.config import DEMO_MODEL


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a Qwen3 with tied embeddings. Names are those of its `config.json`.

    With experts, all of its layers have them.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    num_experts: int = 0
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by its name."""
        hidden, head_dim = self.hidden_size, self.head_dim
        q_size = self.num_attention_heads * head_dim
        kv_size = self.num_key_value_heads * head_dim
        tensors: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        for layer in range(self.num_hidden_layers):
            sizes: dict[str, tuple[int, ...]] = {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (q_size, hidden),
                "self_attn.k_proj": (kv_size, hidden),
                "self_attn.v_proj": (kv_size, hidden),
                "self_attn.o_proj": (hidden, q_size),
                "self_attn.q_norm": (head_dim,),
                "self_attn.k_norm": (head_dim,),
            }
            mlp, width = "mlp", self.intermediate_size
            if self.num_experts:
                sizes["mlp.gate"] = (self.num_experts, hidden)
                mlp, width = "mlp.experts.{}", self.moe_intermediate_size
            for expert in range(self.num_experts or 1):
                sizes[f"{mlp}.gate_proj".format(expert)] = (width, hidden)
                sizes[f"{mlp}.up_proj".format(expert)] = (width, hidden)
                sizes[f"{mlp}.down_proj".format(expert)] = (hidden, width)
            tensors |= {f"model.layers.{layer}.{k}.weight": v for k, v in sizes.items()}
        return tensors

    @property
    def num_embedding_weights(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_layer_weights(self) -> int:
        """Weights of the linear layers that a token goes through, the output layer not counted."""
        num_weights = 0.0
        for name, size in self.tensors.items():
            if "layers" in name and len(size) == 2:
                share = self.num_experts_per_tok / self.num_experts if "experts" in name else 1
                num_weights += size[0] * size[1] * share
        return round(num_weights)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one position in bf16."""
        return 2 * 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    @property
    def config(self) -> dict[str, Any]:
        """The `config.json`."""
        kind = (
            ("Qwen3MoeForCausalLM", "qwen3_moe")
            if self.num_experts
            else ("Qwen3ForCausalLM", "qwen3")
        )
        return asdict(self) | {
            "architectures": [kind[0]],
            "model_type": kind[1],
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 40960,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "eos_token_id": 151645,
        }


SHAPES = {
    "0.6b": Shape(1024, 28, 16, 3072),
    "4b": Shape(2560, 36, 32, 9728),
    # A sixth of the layers of 30B-A3B, and half of its experts: it reads as much a layer and token.
    "moe": Shape(2048, 8, 32, 6144, num_key_value_heads=4, num_experts=64),
}


def make_checkpoint(directory: Path, shape: Shape) -> None:
    """Write a checkpoint of normal(0, 0.02) weights in bf16, with the demo model's tokenizer.

    The workloads are token ids; the tokenizer is there for peers that do not load without one.
    """
    import torch
    from safetensors.torch import save_file

    if (directory / "config.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in shape.tensors.items():
        if len(size) == 1:
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            tensors[name] = torch.empty(size, dtype=torch.bfloat16).normal_(
                0, 0.02, generator=generator
            )
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, directory)
    # Last, as the sign that the rest is whole.
    (directory / "config.json").write_text(json.dumps(shape.config, indent=2))

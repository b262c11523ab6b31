"""Writes a checkpoint of `peers.checkpoint` as GGUF, in llama.cpp's environment, without torch.

Run as `python -m peers.gguf_writer CHECKPOINT FILE BF16|Q8_0|Q4_0`. Every matrix gets the format
named, as with `llama-quantize --pure`; vectors stay in fp32, and so does what scores experts.
"""

import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def write_gguf(checkpoint: Path, path: Path, format_name: str) -> None:
    """Convert a random Qwen3 checkpoint of one safetensors file, bf16 throughout."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3moe" if config.get("num_experts") else "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    if config.get("num_experts"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    tensors: dict[str, list[np.ndarray]] = {}
    for name, values in _read_safetensors(checkpoint / "model.safetensors").items():
        tensors.setdefault(_gguf_name(name), []).append(values)
    matrix_type = gguf.GGMLQuantizationType[format_name]
    plan = {}
    for name, parts in tensors.items():
        is_exact = parts[0].ndim == 1 or "ffn_gate_inp" in name
        kind = plan[name] = gguf.GGMLQuantizationType.F32 if is_exact else matrix_type
        shape = parts[0].shape if len(parts) == 1 else (len(parts), *parts[0].shape)
        if not is_exact:
            shape = gguf.quant_shape_to_byte_shape(shape, kind)
        dtype = np.dtype(np.float32 if is_exact else np.uint8)
        num_bytes = dtype.itemsize * int(np.prod(shape))
        writer.add_tensor_info(name, shape, dtype, num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parts in tensors.items():
        writer.write_tensor_data(np.concatenate([_encode(part, plan[name]) for part in parts]))
    writer.close()


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors as bf16 bit patterns, mapped and not read; of experts, in order."""
    with path.open("rb") as file:
        header_len = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_len))
    data = np.memmap(path, mode="r", offset=8 + header_len)
    return {
        name: data[slice(*entry["data_offsets"])].view(np.uint16).reshape(entry["shape"])
        for name, entry in sorted(header.items(), key=_expert_of)
        if name != "__metadata__"
    }


def _expert_of(entry: tuple[str, object]) -> int:
    found = re.search(r"experts\.(\d+)", entry[0])
    return int(found[1]) if found else 0


def _encode(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if kind == gguf.GGMLQuantizationType.BF16:
        return np.ascontiguousarray(values).view(np.uint8)
    floats = (values.astype(np.uint32) << 16).view(np.float32)
    return floats if kind == gguf.GGMLQuantizationType.F32 else gguf.quantize(floats, kind)


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = re.sub(r"experts\.\d+", "experts", name).split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

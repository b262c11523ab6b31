"""Train the demo model that the package ships: a small Qwen3 that tells fairy tales.

The corpus beside this script (public-domain tales, see `scripts/data/README.md`) is split by whole
tales: every twentieth is held out and never seen by the tokenizer or the network. The result is a
directory in the layout of a hub checkpoint: `config.json`, `generation_config.json`,
`model.safetensors` (bf16), `tokenizer.json`, `tokenizer_config.json`.

    python scripts/train_demo.py --output nanovllm/demo_model

Hidden matrices are trained with Muon (Jordan et al. 2024), everything else with AdamW. The corpus
is small (1.1 M tokens), so dropout and weight decay are what lets the network gain from dozens of
passes. The sequence length grows from 256 to 4096, the context the model is shipped with.
"""

import argparse
import json
import logging
import lzma
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

logger = logging.getLogger("train_demo")

CORPUS = Path(__file__).parent / "data" / "fairytales.txt.xz"
HELD_OUT_EVERY = 20
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPLIT_PATTERN = (  # Qwen's: contractions, words, single digits, punctuation, white space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CHAT_REQUESTS = ("Tell me a tale.", "Tell me a story.", "A fairy tale, please.", "Once upon a time")


@dataclass(frozen=True)
class DemoConfig:
    """The Qwen3 hyper-parameters of the demo model, named as in `config.json`."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


def read_tales(path: Path) -> tuple[list[str], list[str]]:
    """Return (training tales, held-out tales)."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        data = file.read()
    tales = [tale.strip() for tale in data.split(END_OF_TEXT)]
    held_out = tales[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    return [tale for tale in tales if tale not in set(held_out)], held_out


def train_tokenizer(tales: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with three special tokens, the last ids of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, IM_START, IM_END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tales, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


class PooledDropout(nn.Module):
    """Dropout whose masks are random windows of one pool.

    Drawing a mask for every activation took a fifth of a step on a CPU (`bernoulli_` is serial).
    """

    def __init__(self, rate: float, pool_size: int = 1 << 24) -> None:
        super().__init__()
        self.rate, self.rng = rate, random.Random(0)
        pool = torch.empty(pool_size, dtype=torch.bfloat16).bernoulli_(1 - rate) / (1 - rate)
        self.register_buffer("pool", pool, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        start = self.rng.randrange(self.pool.numel() - x.numel())
        return x * self.pool[start : start + x.numel()].view_as(x)


class Block(nn.Module):
    """One Qwen3 layer: attention with normed queries and keys, then a SiLU-gated MLP."""

    def __init__(self, config: DemoConfig, dropout: PooledDropout) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.dropout = head_dim, dropout
        self.input_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, config.rms_norm_eps)
        self.q_norm = nn.RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, config.rms_norm_eps)
        self.q_proj = nn.Linear(hidden, self.num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * head_dim, hidden, bias=False)
        self.gate_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, hidden, bias=False)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.num_heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        groups = self.num_heads // self.num_kv_heads
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )  # [batch, num_heads, length, head_dim]
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attend(self.input_layernorm(x), cos, sin))
        h = self.post_attention_layernorm(x)
        h = self.dropout(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return x + self.dropout(self.down_proj(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)  # [batch, length, heads, head_dim / 2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class DemoModel(nn.Module):
    """Qwen3 with tied embeddings, written for training."""

    def __init__(self, config: DemoConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = PooledDropout(dropout)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, self.dropout) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(
            torch.arange(config.max_position_embeddings, dtype=torch.float32),
            config.rope_theta**-half,
        )
        self.register_buffer("cos", angles.cos()[:, None, :], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None, :], persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 if "embed" in name else 0.5 * parameter.shape[1] ** -0.5
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.0 if residual else std)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats of `targets` [batch, length] given `ids` [batch, length]."""
        length = ids.shape[1]
        x = self.dropout(self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        logits = F.linear(self.norm(x), self.embed_tokens.weight)  # [batch, length, vocab_size]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024)."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 0.05)
                update = orthogonalise(p.grad.lerp(buffer, 0.95))
                scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).float()


class TaleStream:
    """Endless shuffled stream of tokenised tales, some of them told as the answer in a chat."""

    def __init__(self, tales: list[str], tokenizer: Tokenizer, chat_share: float) -> None:
        self.rng = random.Random(0)
        self.chat_share = chat_share
        self.tales = [encoding.ids for encoding in tokenizer.encode_batch(tales)]
        self.end = [tokenizer.token_to_id(END_OF_TEXT)]
        self.requests = [
            tokenizer.encode(f"{IM_START}user\n{request}{IM_END}\n{IM_START}assistant\n").ids
            for request in CHAT_REQUESTS
        ]
        self.close = tokenizer.encode(f"{IM_END}\n").ids
        self.pending: list[int] = []

    def take(self, count: int) -> list[int]:
        while len(self.pending) < count:
            for tale in self.rng.sample(self.tales, len(self.tales)):
                if self.rng.random() < self.chat_share:
                    self.pending += self.rng.choice(self.requests) + tale + self.close + self.end
                else:
                    self.pending += tale + self.end
        taken, self.pending = self.pending[:count], self.pending[count:]
        return taken

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        ids = torch.tensor(self.take(rows * (length + 1))).view(rows, length + 1)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@torch.inference_mode()
def bits_per_byte(model: DemoModel, tokenizer: Tokenizer, tales: list[str]) -> float:
    """Cross entropy over whole tales, end of text included, in bits per byte of their UTF-8.

    A tale longer than the context is read in windows that each start afresh.
    """
    model.eval()
    end = tokenizer.token_to_id(END_OF_TEXT)
    context = model.cos.shape[0]
    nats, num_bytes = 0.0, 0
    for tale in tales:
        ids = [end, *tokenizer.encode(tale).ids, end]
        num_bytes += len(tale.encode())
        for start in range(0, len(ids) - 1, context):
            window = torch.tensor([ids[start : start + context + 1]])
            nats += model(window[:, :-1], window[:, 1:]).item() * (window.shape[1] - 1)
    model.train()
    return nats / math.log(2) / num_bytes


def checkpoint_name(name: str) -> str:
    """A parameter's name in Qwen3's checkpoints."""
    *parents, module, kind = name.split(".")
    if module in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        parents.append("self_attn")
    elif module.endswith("_proj"):
        parents.append("mlp")
    return ".".join(("model", *parents, module, kind))


@torch.no_grad()
def load(model: DemoModel, directory: Path) -> None:
    """Take the weights of a checkpoint that `save` wrote; the optimizers start afresh."""
    tensors = load_file(directory / "model.safetensors")
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[checkpoint_name(name)])


def save(model: DemoModel, config: DemoConfig, tokenizer: Tokenizer, output: Path) -> None:
    """Write the checkpoint in the layout of a hub repository."""
    output.mkdir(parents=True, exist_ok=True)
    tensors = {
        checkpoint_name(name): parameter.detach().to(torch.bfloat16)
        for name, parameter in model.named_parameters()
    }
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    end, im_end = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, IM_END))
    tokenizer.save(str(output / "tokenizer.json"))
    files = {
        "config.json": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **asdict(config),
            "attention_bias": False,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "eos_token_id": end,
        },
        "generation_config.json": {
            "eos_token_id": [end, im_end],
            "temperature": 0.8,
            "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "model_max_length": config.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (output / name).write_text(json.dumps(content, indent=2) + "\n")


def sequence_length(progress: float) -> int:
    """Short while much is to be learnt, the whole context at the end."""
    for until, length in ((0.5, 256), (0.72, 512), (0.88, 1024), (0.94, 2048)):
        if progress < until:
            return length
    return 4096


def learning_rate(progress: float) -> float:
    """Warm-up over 2 %, flat to 40 %, then linear to zero."""
    return min(progress / 0.02, 1.0, (1.0 - progress) / 0.6)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = DemoConfig()
    train_tales, held_out = read_tales(args.corpus)
    tokenizer = train_tokenizer(train_tales, config.vocab_size)
    stream = TaleStream(train_tales, tokenizer, args.chat_share)
    model = DemoModel(config, args.dropout)
    if args.resume is not None:
        load(model, args.resume)
    hidden = [p for n, p in model.layers.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(hidden, lr=0.02, weight_decay=args.weight_decay),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    num_params = sum(p.numel() for p in model.parameters())
    logger.info("%d training tales, %d held out", len(train_tales), len(held_out))
    logger.info("%d tokens, %.2fM parameters", sum(map(len, stream.tales)), num_params / 1e6)
    start = time.perf_counter()
    for step in range(args.first_step, args.steps):
        progress = (step + 1) / args.steps
        length = sequence_length(progress)
        ids, targets = stream.batch(args.tokens_per_step // length, length)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            done = (step + 1 - args.first_step) * args.tokens_per_step
            rate = done / (time.perf_counter() - start)
            logger.info("step %d loss %.4f, %.0f tokens/s", step, loss.item(), rate)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            score = bits_per_byte(model, tokenizer, held_out)
            minutes = (time.perf_counter() - start) / 60
            logger.info("step %d held-out %.4f bits/byte, %.1f min", step + 1, score, minutes)
            save(model, config, tokenizer, args.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--resume", type=Path, help="go on from the weights in this directory")
    parser.add_argument("--first-step", type=int, default=0, help="where to go on")
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--chat-share", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=300)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()

"""Proves that the suite bites: seeds faults into a copy of the package, and expects tests to fail.

Run it as `python -m tests.teeth`; it prints which test caught each fault and exits with 1 if one
went unnoticed. A fault is a textual patch that has to match exactly once, so that a change of the
code it was written for cannot turn it into nothing.

The module is also the pytest plugin of its own runs: it makes sure that the copy is what is tested,
and keeps hypothesis from shrinking what is known to fail.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
COPY_VARIABLE = "NANOVLLM_TEETH_COPY"
NUM_EXAMPLES = 250
TIME_LIMIT = 600.0

SCHEDULING = (
    "tests/unit/test_block_allocation.py",
    "tests/unit/test_scheduler.py",
    "tests/unit/test_llm_engine.py",
    "tests/unit/test_engine_state_machine.py",
)
MODELS = ("tests/integration/test_nano_vllm.py",)
SAMPLING = ("tests/unit/test_sampler.py",)
WORKER = ("tests/unit/test_worker.py",)
ROUTING = ("tests/unit/test_router.py",)
POOL = ("tests/unit/test_async_llm.py",)
SHELL = ("tests/unit/server/test_server_shell.py",)
SPEECH_MODELS = ("tests/unit/test_voxcpm_model.py",)
VOCODING = ("tests/unit/test_voxcpm_vae.py",)
ADAPTERS = ("tests/unit/test_lora.py",)
GRAPHS = ("tests/integration/test_graphs.py",)
COMPACT_WEIGHTS = ("tests/unit/test_cpu_compact.py",)
REPLAYS = ("tests/unit/test_cpu_replay.py", "tests/unit/test_cpu_replay_engines.py")
GPU_ELEMENTWISE = ("tests/unit/test_triton_elementwise.py",)
GPU_WRITE = ("tests/unit/test_triton_kv_write.py",)
GPU_LINEAR = ("tests/unit/test_triton_linear.py",)
MIXTURES = ("tests/unit/test_mixture.py",)
CPU_PRODUCTS = ("tests/unit/test_cpu_linear.py",)
DECIDING = ("tests/unit/test_decisions.py",)
EMBEDDINGS = ("tests/unit/test_embeddings.py",)
GPU_ADAPTERS = ("tests/unit/test_triton_lora.py",)
REGISTRY = ("tests/unit/test_adapter_registry.py",)
TEXT_ADAPTERS = ("tests/unit/test_text_lora.py", "tests/unit/test_peft_files.py")
SERVED_ADAPTERS = ("tests/unit/server/test_text_loras.py",)
STORED_RESPONSES = ("tests/unit/server/test_responses_store.py",)
FORMS = ("tests/unit/test_structured_outputs.py",)
WAITING_FORMS = ("tests/unit/test_worker_forms.py",)
GRAMMARS = ("tests/unit/test_grammars.py",)
CLIENT = ("tests/unit/test_worker_client.py",)
STREAMING = ("tests/unit/test_speech_stream.py",)
SPEAKING = ("tests/unit/test_async_speech.py",)
SHARDING = ("tests/unit/test_sharding.py",)
RANKS = ("tests/unit/test_ranks.py",)
SPEECH = ("tests/unit/test_speech_runner.py", "tests/integration/test_speech_engine.py")
SPEECH_GRAPHS = ("tests/integration/test_speech_graphs.py",)

BLOCKS = "nanovllm/engine/block_manager.py"
SCHEDULER = "nanovllm/engine/scheduler.py"
ENGINE = "nanovllm/engine/llm_engine.py"
SEQUENCE = "nanovllm/engine/sequence.py"
RUNNER = "nanovllm/runners/model_runner.py"
TEXT_RUNNER = "nanovllm/runners/text.py"
SPEECH_RUNNER = "nanovllm/runners/speech.py"
SPEECH_TAIL = "nanovllm/runners/speech_tail.py"
CAPTURED_SAMPLER = "nanovllm/runners/captured_sampler.py"
DECODE_GRAPHS = "nanovllm/runners/decode_graphs.py"
CAPTURED_TAIL = "nanovllm/runners/captured_tail.py"
TABLE = "nanovllm/runners/sampling_table.py"
SLOT_GRAMMAR = "nanovllm/runners/grammar.py"
DECISIONS = "nanovllm/text/decisions.py"
SAMPLER = "nanovllm/layers/sampler.py"
ROTARY = "nanovllm/layers/rotary.py"
TORCH_KERNELS = "nanovllm/kernels/torch_kernels.py"
ELEMENTWISE = "nanovllm/kernels/elementwise.py"
DECODER_NORMS = "nanovllm/layers/norm.py"
KV = "nanovllm/kernels/cpu/csrc/attention.cpp"
SIMD = "nanovllm/kernels/cpu/csrc/simd.h"
PLAN = "nanovllm/kernels/cpu/csrc/attention_plan.cpp"
CPU_LINEAR = "nanovllm/kernels/cpu/csrc/linear.cpp"
CPU_SAMPLER = "nanovllm/kernels/cpu/csrc/sampler.cpp"
CPU_PACKING = "nanovllm/kernels/cpu/packing.py"
COMPACT = "nanovllm/kernels/cpu/csrc/compact.h"
COMPACTING = "nanovllm/kernels/cpu/csrc/compact.cpp"
REPLAY = "nanovllm/kernels/cpu/replay.py"
SDPA = "nanovllm/kernels/sdpa.py"
DECODER = "nanovllm/models/decoder.py"
AUDIO = "nanovllm/kernels/audio.py"
CPU_AUDIO = "nanovllm/kernels/cpu/csrc/audio.cpp"
VOXCPM = "nanovllm/models/voxcpm/model.py"
VOXCPM_LOCAL = "nanovllm/models/voxcpm/local.py"
VOXCPM_SAMPLER = "nanovllm/models/voxcpm/cfm.py"
VAE = "nanovllm/models/voxcpm/vae.py"
VAE_LAYERS = "nanovllm/models/voxcpm/vae_layers.py"
LORA = "nanovllm/layers/lora.py"
LORA_GROUPS = "nanovllm/kernels/grouped_lora.py"
LORA_TABLE = "nanovllm/models/adapters.py"
LORA_NAMES = "nanovllm/adapter_registry.py"
LORA_SETTINGS = "nanovllm/models/adapter_settings.py"
LINEAR = "nanovllm/layers/linear.py"
PARALLEL = "nanovllm/layers/parallel.py"
PARTS = "nanovllm/models/sharding.py"
PARALLEL_RUNNER = "nanovllm/runners/parallel.py"
RANK_PROCESSES = "nanovllm/worker/ranks.py"


class Fault(NamedTuple):
    """A mistake somebody could make.

    Args:
        name: What is wrong.
        path: The file it is made in.
        right: A piece of that file, found once.
        wrong: What stands there instead.
        tests: The tests that must notice.
    """

    name: str
    path: str
    right: str
    wrong: str
    tests: tuple[str, ...]


FAULTS = [
    # Tensor parallelism.
    Fault(
        "every rank adds the bias behind a sum",
        PARTS,
        "return tensor if self._rank == 0 else torch.zeros_like(tensor)",
        "return tensor",
        SHARDING,
    ),
    Fault(
        "key heads counted from this rank's first one",
        PARTS,
        "return [head // group_size for head in heads[::shared]]",
        "return [(head - heads[0]) // group_size for head in heads[::shared]]",
        SHARDING,
    ),
    Fault(
        "key heads shared out as if they divided",
        PARTS,
        "shared = math.gcd(group_size, len(heads))",
        "shared = min(group_size, len(heads))",
        SHARDING,
    ),
    Fault(
        "the scales of groups that are cut stay whole",
        PARTS,
        "return values.repeat_interleave(weight.group_size // size, 1)[:, groups]",
        "return values[:, groups]",
        SHARDING,
    ),
    Fault(
        "an adapter counts once for each rank",
        PARTS,
        "            down if depth is None else depth.of(down, 1),",
        "            down if depth is None else depth.of(down, 1) * 2,",
        SHARDING,
    ),
    Fault(
        "ids of other ranks are looked up here",
        LINEAR,
        "        here = (rows >= 0) & (rows < self.spec.rows)",
        "        here = rows < self.spec.rows",
        SHARDING,
    ),
    Fault(
        "the padding of shorter parts is taken for logits",
        PARALLEL,
        "part[:, : len(ids)] for part, ids in columns",
        "part for part, _ in columns",
        SHARDING,
    ),
    Fault(
        "a rank that dies is not waited for to be known",
        RANK_PROCESSES,
        "key=lambda error: isinstance(error, _MissingError)",
        "key=lambda error: not isinstance(error, _MissingError)",
        RANKS,
    ),
    Fault(
        "ranks go on without the one that died",
        RANK_PROCESSES,
        "        self._kill()\n        self.abort()\n        return failure",
        "        self.abort()\n        return failure",
        RANKS,
    ),
    Fault(
        "results are used that came after a rank was lost",
        PARALLEL_RUNNER,
        "        self._ranks.check()  # what came after a rank was lost would be wrong\n",
        "",
        RANKS,
    ),
    Fault(
        "an interrupt leaves a step half done",
        PARALLEL_RUNNER,
        "        with interrupts_held_back():\n            try:",
        "        if True:\n            try:",
        RANKS,
    ),
    # Blocks and hashes.
    Fault(
        "stale block: one handed out again keeps its hash",
        BLOCKS,
        "            self._forget(block_id)\n        else:\n",
        "        else:\n",
        SCHEDULING,
    ),
    Fault(
        "a block that is hit stays in the free list",
        BLOCKS,
        "                del self._cached[block_id]\n            self._ref_counts",
        "                pass\n            self._ref_counts",
        SCHEDULING,
    ),
    Fault(
        "reference count not incremented on a hit",
        BLOCKS,
        "self._ref_counts[block_id] += 1",
        "self._ref_counts[block_id] = 1",
        SCHEDULING,
    ),
    Fault(
        "a block is freed while another sequence holds it",
        BLOCKS,
        "            if not self._ref_counts[block_id]:\n                if block_id in",
        "            if True:\n                if block_id in",
        SCHEDULING,
    ),
    Fault(
        "hash without root (adapter, salt)",
        BLOCKS,
        "parent = hashes[-1] if hashes else seq.root_hash",
        'parent = hashes[-1] if hashes else b""',
        SCHEDULING,
    ),
    Fault(
        "hash without parent",
        BLOCKS,
        "parent = hashes[-1] if hashes else seq.root_hash",
        "parent = seq.root_hash",
        SCHEDULING,
    ),
    Fault(
        "hash without salt",
        BLOCKS,
        "repr((model_id, adapter_id, cache_salt))",
        "repr((model_id, adapter_id))",
        SCHEDULING,
    ),
    Fault(
        "hash without adapter",
        BLOCKS,
        "repr((model_id, adapter_id, cache_salt))",
        "repr((model_id, cache_salt))",
        SCHEDULING,
    ),
    Fault(
        "a patch is hashed like a token",
        BLOCKS,
        'b"p" + len(key).to_bytes(4, "little") + key',
        'b"t" + key',
        SCHEDULING,
    ),
    Fault(
        "one hash published for two blocks",
        BLOCKS,
        "            if digest not in self._block_of_hash:\n",
        "            if block_id not in self._hash_of_block:\n",
        SCHEDULING,
    ),
    Fault(
        "a block published before its keys are known",
        BLOCKS,
        "num_full = min(seq.num_computed, len(seq.keys)) // self.block_size",
        "num_full = seq.num_computed // self.block_size",
        SCHEDULING,
    ),
    Fault(
        "a block published before it is computed",
        BLOCKS,
        "num_full = min(seq.num_computed, len(seq.keys)) // self.block_size",
        "num_full = len(seq.keys) // self.block_size",
        SCHEDULING,
    ),
    Fault(
        "last position taken from the cache on a full hit",
        BLOCKS,
        "known = min(seq.num_positions - 1, len(seq.keys))",
        "known = min(seq.num_positions, len(seq.keys))",
        SCHEDULING,
    ),
    Fault(
        "the beginning of a prefix evicted first",
        BLOCKS,
        "for block_id in reversed(seq.block_table):",
        "for block_id in seq.block_table:",
        SCHEDULING,
    ),
    Fault(
        "max_cached_tokens ignored",
        BLOCKS,
        "while len(self._cached) > self._max_cached:",
        "while len(self._cached) > self.num_blocks:",
        SCHEDULING,
    ),
    Fault(
        "a block too few at a boundary",
        BLOCKS,
        "return -(-num_positions // self.block_size)",
        "return -(-(num_positions - 1) // self.block_size)",
        SCHEDULING,
    ),
    # Scheduling.
    Fault(
        "num_decodes counts one row too few",
        SCHEDULER,
        "step.batch.num_decodes = len(step.sequences)",
        "step.batch.num_decodes = max(0, len(step.sequences) - 1)",
        SCHEDULING,
    ),
    Fault(
        "a step exceeds its budget of positions",
        SCHEDULER,
        "length = min(seq.num_positions - start, budget)",
        "length = seq.num_positions - start",
        SCHEDULING,
    ),
    Fault(
        "a chunk in the middle of a prompt emits",
        SCHEDULER,
        "emits = computed == seq.num_positions",
        "emits = True",
        SCHEDULING,
    ),
    Fault(
        "priority ignored",
        SEQUENCE,
        "self.precedence = (self.priority, self.seq_id)",
        "self.precedence = (0, self.seq_id)",
        SCHEDULING,
    ),
    Fault(
        "the oldest sequence is preempted",
        SCHEDULER,
        "next(self._paused(), self.running[-1])",
        "next(self._paused(), self.running[0])",
        SCHEDULING,
    ),
    Fault(
        "preemption does not reset num_computed",
        SCHEDULER,
        "        seq.num_computed = 0\n",
        "",
        SCHEDULING,
    ),
    Fault(
        "preemption keeps positions whose keys are lost",
        SCHEDULER,
        "        seq.num_computed = 0\n        seq.num_positions = len(seq.keys)\n",
        "        seq.num_computed = 0\n",
        SCHEDULING,
    ),
    Fault(
        "newcomers leave running sequences no room to grow",
        SCHEDULER,
        "self.block_manager.allocate(seq, len(self.running))",
        "self.block_manager.allocate(seq, 0)",
        SCHEDULING,
    ),
    Fault(
        "more adapters than there is room for",
        SCHEDULER,
        "len(in_use) < self.max_num_adapters",
        "len(in_use) <= self.max_num_adapters",
        SCHEDULING,
    ),
    Fault(
        "a sequence starves for an adapter",
        SCHEDULER,
        "                adapters_blocked = True\n",
        "",
        SCHEDULING,
    ),
    Fault(
        "a slot is never released",
        SCHEDULER,
        "        self._released.append(seq.slot)\n",
        "",
        SCHEDULING,
    ),
    Fault(
        "new blocks land one entry early in the table",
        SCHEDULER,
        "index = len(seq.block_table)\n",
        "index = len(seq.block_table) - 1\n",
        SCHEDULING,
    ),
    Fault(
        "one step too many scheduled ahead",
        SCHEDULER,
        "computed + 1 < seq.max_keys:\n                    seq.num_positions = computed + 1\n"
        "                if",
        "computed < seq.max_keys:\n                    seq.num_positions = computed + 1\n"
        "                if",
        SCHEDULING,
    ),
    # Commit, failures, abort.
    Fault(
        "commit does not check start_step",
        SCHEDULER,
        "if seq.slot != result.slot or seq.start_step > batch.step:",
        "if seq.slot != result.slot:",
        SCHEDULING,
    ),
    Fault(
        "commit does not check the slot",
        SCHEDULER,
        "if seq.slot != result.slot or seq.start_step > batch.step:",
        "if seq.start_step > batch.step:",
        SCHEDULING,
    ),
    Fault(
        "output one key too long",
        SCHEDULER,
        "elif num_keys >= seq.max_keys:",
        "elif num_keys > seq.max_keys:",
        SCHEDULING,
    ),
    Fault(
        "a failed step keeps its hashes",
        SCHEDULER,
        "            self.block_manager.unpublish(step.published)\n",
        "",
        SCHEDULING,
    ),
    Fault(
        "a failed step spares the ones after it",
        SCHEDULER,
        "failed = [self._pop(batch), *self._in_flight]",
        "failed = [self._pop(batch)]",
        SCHEDULING,
    ),
    Fault(
        "Ctrl-C leaves a step in flight",
        ENGINE,
        "except BaseException as e:  # Ctrl-C",
        "except Exception as e:  # Ctrl-C",
        SCHEDULING,
    ),
    Fault(
        "news of a sequence after its abort",
        ENGINE,
        "if output is not None and self._unreported:",
        "if False:",
        SCHEDULING,
    ),
    # Positions and attention.
    Fault(
        "position off by one in the rows of a step",
        RUNNER,
        "shifts = np.repeat(starts - (token_ends - lengths), lengths)",
        "shifts = np.repeat(starts - (token_ends - lengths) - (starts > 0), lengths)",
        MODELS,
    ),
    Fault(
        "position off by one in the cache",
        RUNNER,
        "            blocks * size + rows.positions % size,\n",
        "            blocks * size + (rows.positions + 1) % size,\n",
        MODELS,
    ),
    Fault(
        "position off by one in the rotation",
        DECODER,
        "rotary(positions) for rotary",
        "rotary(positions + (positions > 4).to(positions.dtype)) for rotary",
        MODELS,
    ),
    Fault(
        "wrong KV head",
        SDPA,
        "q = q.view(num_rows, num_queries, num_kv_heads, group_size, head_dim)",
        "q = q.view(num_rows, num_queries, group_size, num_kv_heads, head_dim).transpose(2, 3)",
        MODELS,
    ),
    Fault(
        "rope halves swapped",
        ELEMENTWISE,
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos + second * sin, second * cos - first * sin",
        MODELS,
    ),
    Fault(
        "window off by one",
        SDPA,
        "key > query - window",
        "key >= query - window",
        MODELS,
    ),
    Fault(
        "a query sees the position after it",
        SDPA,
        "visible = key <= query\n",
        "visible = key <= query + 1\n",
        MODELS,
    ),
    Fault(
        "keys written as values",
        SDPA,
        "zip(cache.flatten(1, 2), (k, v), strict=True)",
        "zip(cache.flatten(1, 2), (k, k), strict=True)",
        MODELS,
    ),
    Fault(
        "stretched frequencies not blended (llama3)",
        ROTARY,
        "inv_freq * (blend + (1.0 - blend) / factor)",
        "inv_freq * torch.where(blend > 0, 1.0, 1.0 / factor)",
        MODELS,
    ),
    # The CPU kernels; the cache of compiled ones is by their source.
    Fault(
        "C++: a query sees the position after it",
        KV,
        "const long high = std::min(task_.end, position + 1);",
        "const long high = std::min(task_.end, position + 2);",
        MODELS,
    ),
    Fault(
        "C++: a window off by one",
        KV,
        "const long low = window_ ? std::max(task_.begin, position - window_ + 1)",
        "const long low = window_ ? std::max(task_.begin, position - window_)",
        MODELS,
    ),
    Fault(
        "C++: rope halves swapped",
        SIMD,
        "store(out + d, first * c - second * s, count);",
        "store(out + d, first * c + second * s, count);",
        MODELS,
    ),
    Fault(
        "C++: a NaN in a key of int8 forgotten",
        SIMD,
        "bit_cast<float>(max(top));",
        "std::fmin(bit_cast<float>(max(top)), 3e38f);",
        ("tests/unit/test_cpu_attention.py",),
    ),
    Fault(
        "the last layer's other tokens go through the adapters of the wanted ones",
        DECODER,
        "ctx = ctx.of_rows(keep(",
        "ctx.of_rows(keep(",
        ("tests/unit/test_text_lora.py",),
    ),
    Fault(
        "prompts scored by the hidden states of the wanted tokens alone",
        TEXT_RUNNER,
        "wanted = None if scores else rows.wanted",
        "wanted = rows.wanted",
        MODELS,
    ),
    Fault(
        "C++: a wrong KV head",
        KV,
        "(block * shape_.num_kv_heads + kv_head_) * cell_.bytes",
        "(block * shape_.num_kv_heads + (kv_head_ + 1) % shape_.num_kv_heads) * cell_.bytes",
        MODELS,
    ),
    Fault(
        "C++: partial softmaxes merged without their maxima",
        KV,
        "const float weight = std::exp2(partial[0] - top);",
        "const float weight = 1.0f;",
        MODELS,
    ),
    Fault(
        "C++: positions that rows share are attended to once more by each",
        PLAN,
        "      done = depth;\n",
        "",
        MODELS,
    ),
    Fault(
        "C++: biases left out",
        CPU_LINEAR,
        "return bias ? load(sums + i) + load(bias + i) : load(sums + i);",
        "return load(sums + i);",
        MODELS,
    ),
    # Weights of bf16 in 12 bits.
    Fault(
        "an exponent that its code does not reach",
        COMPACTING,
        "constexpr int kReach = 7;",
        "constexpr int kReach = 8;",
        COMPACT_WEIGHTS,
    ),
    Fault(
        "a weight's sign lost in its code",
        COMPACTING,
        "return (exponent(bits) - block.exponent) | (bits >> 15 << 3);",
        "return exponent(bits) - block.exponent;",
        COMPACT_WEIGHTS,
    ),
    Fault(
        "a dense block multiplied as if it had codes",
        COMPACT,
        "const Bytes* coded = block->dense ? nullptr : &table;",
        "const Bytes* coded = &table;",
        COMPACT_WEIGHTS,
    ),
    Fault(
        "codes of the second half of a group read as those of the first",
        COMPACT,
        "look_up(*table, pair ? codes >> 4 : codes & 15)",
        "look_up(*table, codes & 15)",
        COMPACT_WEIGHTS,
    ),
    Fault(
        "a replaceable matrix without room for another one",
        CPU_PACKING,
        " and not spec.replaceable",
        "",
        COMPACT_WEIGHTS,
    ),
    # Kernels that are repeated.
    Fault(
        "a repetition on the inputs of the recording",
        REPLAY,
        "            place.copy_(given)\n",
        "            continue\n",
        REPLAYS,
    ),
    Fault(
        "results that the next repetition overwrites",
        REPLAY,
        "tuple(result.clone() for result in self._results)",
        "self._results",
        REPLAYS,
    ),
    Fault(
        "memory handed out while it is in use",
        REPLAY,
        "weakref.finalize(loan, free.append, piece)",
        "free.append(piece)",
        REPLAYS,
    ),
    Fault(
        "memory of recordings that is never handed out again",
        REPLAY,
        "free.pop() if free else ",
        "",
        REPLAYS,
    ),
    Fault(
        "a recording for inputs of other shapes",
        REPLAY,
        "key = key, *(given.shape for given in inputs)",
        "key = key, len(inputs)",
        REPLAYS,
    ),
    Fault(
        "recordings that catch the kernels of other engines",
        REPLAY,
        "self.library = copy.copy(library)",
        "self.library = library",
        REPLAYS,
    ),
    Fault(
        "a recording that lacks what torch computed",
        REPLAY,
        "if name not in _VIEWS | _LOOKS or is_copy:",
        "if False:",
        REPLAYS,
    ),
    Fault(
        "a step with adapters repeated for others",
        DECODER,
        "if ctx.lora is not None or ctx.parallel is not None:",
        "if ctx.parallel is not None:",
        REPLAYS,
    ),
    # The networks.
    Fault(
        "biases of the projections left out",
        TORCH_KERNELS,
        "y = F.linear(x, weight.weight, weight.bias)",
        "y = F.linear(x, weight.weight)",
        MODELS,
    ),
    Fault(
        "no bias on queries, keys and values",
        DECODER,
        "bias=traits.qkv_bias or config.attention_bias",
        "bias=config.attention_bias",
        MODELS,
    ),
    Fault(
        "tied head ignored",
        DECODER,
        "        if not config.tie_word_embeddings:\n",
        "        if True:\n",
        MODELS,
    ),
    Fault(
        "norms of queries and keys swapped",
        DECODER_NORMS,
        "HeadNorms(q_norm.weight, k_norm.weight,",
        "HeadNorms(k_norm.weight, q_norm.weight,",
        MODELS,
    ),
    Fault(
        "layers with a window rotated like the others",
        DECODER,
        "rotaries[self._rotary_index]",
        "rotaries[0]",
        MODELS,
    ),
    Fault(
        "scores divided by the root of the head's width, whatever the config says",
        DECODER_NORMS,
        "+ self._offset) * self._scale",
        "+ self._offset)",
        MODELS,
    ),
    Fault(
        "norms without their offset",
        DECODER_NORMS,
        "+ self._offset) * self._scale",
        ") * self._scale",
        MODELS,
    ),
    Fault(
        "what an MLP adds is not normed",
        DECODER,
        "self.post_feedforward_layernorm(self._scaled(self.mlp(x, ctx)), ctx)",
        "self._scaled(self.mlp(x, ctx))",
        MODELS,
    ),
    Fault(
        "C++: the cube of GELU forgotten",
        "nanovllm/kernels/cpu/csrc/gate.h",
        "(1.0f + 0.044715f * x * x)",
        "(1.0f + 0.044715f * x)",
        ("tests/unit/test_cpu_elementwise.py",),
    ),
    # Decisions.
    Fault(
        "labels that change the tokens before them",
        DECISIONS,
        "return last if before == self._tail_ids else None",
        "return last",
        DECIDING,
    ),
    Fault(
        "a confidence as if the model had to say a label",
        DECISIONS,
        "self.probabilities[self.best] * self.label_mass",
        "self.probabilities[self.best]",
        DECIDING,
    ),
    Fault(
        "labels with a space before them do not count",
        DECISIONS,
        '(self._token(label), self._token(f" {label}"))',
        "(self._token(label),)",
        DECIDING,
    ),
    Fault(
        "a slot goes on scoring the ids of the request before",
        TABLE,
        "self._allowed, self._scored, self._bad_words",
        "self._allowed, self._bad_words",
        SAMPLING,
    ),
    Fault(
        "chosen ids are scored as the likeliest ones",
        SAMPLER,
        "        top_ids[rows, : ids.shape[1]] = ids\n",
        "",
        SAMPLING,
    ),
    Fault(
        "decisions are not ended between two parts",
        "nanovllm/server/generation.py",
        "        self._ended = True\n        return True\n",
        "        return True\n",
        ("tests/unit/server/test_server_decisions.py",),
    ),
    # The networks of VoxCPM.
    Fault(
        "embedding of the step's length dropped",
        VOXCPM_LOCAL,
        "embedded += self.delta_time_mlp(",
        "embedded += 0 * self.delta_time_mlp(",
        SPEECH_MODELS,
    ),
    Fault(
        "tokens are quantized like patches",
        VOXCPM,
        "lm = torch.where(here, self.fsq_layer(hidden, ctx), hidden)",
        "lm = self.fsq_layer(hidden, ctx)",
        SPEECH_MODELS,
    ),
    Fault(
        "branches of the guidance swapped",
        VOXCPM_SAMPLER,
        "conditional, unconditional = velocity[:num_patches], velocity[num_patches:]",
        "unconditional, conditional = velocity[:num_patches], velocity[-num_patches:]",
        SPEECH_MODELS,
    ),
    Fault(
        "guidance of another row",
        VOXCPM_SAMPLER,
        "cls(copies, guided, scale[guided])",
        "cls(copies, guided, scale[: len(guided)])",
        SPEECH_MODELS,
    ),
    Fault(
        "no step of the sampler skipped",
        VOXCPM_SAMPLER,
        "max(1, int((num_timesteps + 1) * SKIPPED))",
        "int((num_timesteps + 1) * SKIPPED)",
        SPEECH_MODELS,
    ),
    Fault(
        "a patch embedded in place of its neighbour",
        VOXCPM,
        "index = (is_audio.cumsum(0) - 1).clamp(min=0)",
        "index = (is_audio.cumsum(0) - 2).clamp(min=0)",
        SPEECH_MODELS,
    ),
    Fault(
        "both language models in the same caches",
        VOXCPM,
        "first_cache=config.base.num_layers",
        "first_cache=0",
        SPEECH_MODELS,
    ),
    # The text runner.
    Fault(
        "sampled id written one position late",
        CAPTURED_SAMPLER,
        "    token_ids[slots, ends] = chosen",
        "    token_ids[slots, ends + 1] = chosen",
        MODELS,
    ),
    Fault(
        "a row that pads writes to the cache",
        RUNNER,
        "torch.where(positions < 0, PADDING, blocks * size + positions % size)",
        "blocks * size + positions % size",
        GRAPHS,
    ),
    Fault(
        "a graph replayed on what the step before had",
        DECODE_GRAPHS,
        "        self._inputs.fill(values if adapters is None else",
        "        (values if adapters is None else",
        GRAPHS,
    ),
    Fault(
        "a captured row drawn with another's settings",
        CAPTURED_SAMPLER,
        "        self._inputs.fill(rows)\n",
        "        self._inputs.fill({**rows, 'uniforms': rows['uniforms'][::-1]})\n",
        GRAPHS,
    ),
    Fault(
        "rows of prompts over those of decodes",
        DECODE_GRAPHS,
        "output[num_rows:total] = other",
        "output[: total - num_rows] = other",
        GRAPHS,
    ),
    Fault(
        "prompt scores off by one",
        TEXT_RUNNER,
        "targets = self._token_ids[slot, low + 1 : high + 1].long()",
        "targets = self._token_ids[slot, low:high].long()",
        MODELS,
    ),
    Fault(
        "min_tokens ignored",
        TABLE,
        'generated < numbers["min_tokens"]',
        "generated < 0",
        SAMPLING,
    ),
    Fault(
        "min_tokens off by one",
        TABLE,
        'generated < numbers["min_tokens"]',
        'generated + 1 < numbers["min_tokens"]',
        SAMPLING,
    ),
    # Sampling.
    Fault(
        "top-p off by one",
        TORCH_KERNELS,
        "before = probs.cumsum(-1) - probs",
        "before = probs.cumsum(-1)",
        SAMPLING,
    ),
    Fault(
        "top-k off by one",
        TORCH_KERNELS,
        "ordered.masked_fill(rank >= top_k[:, None], -torch.inf)",
        "ordered.masked_fill(rank > top_k[:, None], -torch.inf)",
        SAMPLING,
    ),
    Fault(
        "repetition penalty divides negative logits",
        TORCH_KERNELS,
        "torch.where(rows > 0, rows / factor, rows * factor)",
        "rows / factor",
        SAMPLING,
    ),
    Fault(
        "presence penalty counts the prompt",
        TORCH_KERNELS,
        "generated = known & (position >= penalties.prompt_lengths[:, None])",
        "generated = known",
        SAMPLING,
    ),
    Fault(
        "a bad word forbidden after half its prefix",
        SAMPLER,
        "(words.prefixes == words.tails)).all(1)",
        "(words.prefixes == words.tails)).any(1)",
        SAMPLING,
    ),
    Fault(
        "NaN logits pass",
        TORCH_KERNELS,
        "Choice(token_ids, best.isfinite())",
        "Choice(token_ids, torch.ones_like(best, dtype=torch.bool))",
        SAMPLING,
    ),
    Fault(
        "a sequence that ends stays on the books",
        "nanovllm/worker/load.py",
        "            self.num_inflight -= 1\n",
        "",
        WORKER,
    ),
    Fault(
        "failed steps count for nothing if there are pauses",
        "nanovllm/worker/process.py",
        "if stats.num_steps > num_steps:",
        "if outputs or stats.num_steps > num_steps:",
        WORKER,
    ),
    Fault(
        "a prefix is matched whatever its salt",
        "nanovllm/cluster/router.py",
        "root = hash_block(root,",
        'root = hash_block(b"",',
        ROUTING,
    ),
    Fault(
        "a restarted engine is thought to have its cache",
        "nanovllm/cluster/router.py",
        "self._known.pop(index, None)",
        "pass",
        ROUTING,
    ),
    Fault(
        "a stop string does not end the sequence in the engine",
        "nanovllm/async_engine.py",
        "        if stopped:\n",
        "        if stopped and not outputs:\n",
        POOL,
    ),
    Fault(
        "the requests of a dead engine are not told",
        "nanovllm/cluster/pool.py",
        "        self._lose(lost, error)\n        self._router",
        "        self._lose([], error)\n        self._router",
        POOL,
    ),
    Fault(
        "a hang is not noticed when nobody waits",
        "nanovllm/worker/client.py",
        "unanswered = bool(self._calls) or self._num_sent > self._num_handled",
        "unanswered = bool(self._calls)",
        POOL,
    ),
    Fault(
        "replicas draw the same seeds",
        "nanovllm/async_engine.py",
        "seed = self._seeds.getrandbits(64) if params.seed is None",
        "seed = 7 if params.seed is None",
        POOL,
    ),
    Fault(
        "a sequence that is held back counts as work",
        "nanovllm/worker/client.py",
        "return self.load.num_runnable > 0 or unanswered",
        "return bool(self.load.sequences) or unanswered",
        CLIENT,
    ),
    Fault(
        "a call is not a sign of work",
        "nanovllm/worker/client.py",
        "unanswered = bool(self._calls) or self._num_sent > self._num_handled",
        "unanswered = self._num_sent > self._num_handled",
        CLIENT,
    ),
    Fault(
        "a reader that is slow is not held back",
        "nanovllm/speech_stream.py",
        "elif not self._paused and len(self.output.unread) >= self._backlog.max_patches:",
        "elif not self._paused and len(self.output.unread) >= 1 << 30:",
        STREAMING,
    ),
    Fault(
        "a request goes on at once when its slow reader reads",
        "nanovllm/speech_stream.py",
        "if len(self.output.unread) <= self._backlog.max_patches // 2:",
        "if self.output.unread:",
        STREAMING,
    ),
    Fault(
        "a paused sequence gets rows",
        SCHEDULER,
        "if seq.running and not seq.paused:",
        "if seq.running:",
        SCHEDULING,
    ),
    Fault(
        "a paused sequence keeps what others need",
        SCHEDULER,
        "victims = self._victims(seq) if self._num_paused else []",
        "victims: list[Sequence] | None = []",
        SCHEDULING,
    ),
    Fault(
        "an engine whose sequences are paused is asked again and again",
        "nanovllm/worker/process.py",
        "idle = not self._engine.has_work\n",
        "idle = not self._engine.has_unfinished\n",
        WORKER,
    ),
    Fault(
        "a recording takes as long as it wants",
        "nanovllm/worker/calls.py",
        "self._credit -= self._advance(budget)",
        "self._credit -= self._advance(1e9)",
        WORKER,
    ),
    Fault(
        "a reference is taken for what the speech continues",
        SPEECH_RUNNER,
        "patches[len(patches) - num_trailing :]",
        "patches",
        SPEECH,
    ),
    Fault(
        "the decoder starts cold behind a recording",
        SPEECH_TAIL,
        "prime(trailing.flatten(0, 1)",
        "prime(trailing[:0].flatten(0, 1)",
        SPEECH,
    ),
    Fault(
        "guidance goes to another row",
        SPEECH_TAIL,
        "rows.cfg_value[of_group]",
        "rows.cfg_value[of_group[::-1]]",
        SPEECH,
    ),
    Fault(
        "all patches start from the same noise",
        SPEECH_RUNNER,
        "indices.astype(np.uint64)",
        "(indices * 0).astype(np.uint64)",
        SPEECH,
    ),
    Fault(
        "speech may stop a patch early",
        SPEECH_RUNNER,
        "patch_index > state.request.min_len",
        "patch_index >= state.request.min_len",
        SPEECH,
    ),
    Fault(
        "a result that was dropped is fed again",
        SPEECH_RUNNER,
        "        del request.generated[len(start.keys) - start.num_prompt_keys :]\n",
        "",
        SPEECH,
    ),
    Fault(
        "a result is kept for a sequence that has left",
        SPEECH_RUNNER,
        "if self._slots.get(slot) is state:",
        "if state is not None:",
        SPEECH,
    ),
    Fault(
        "a prompt's patches are off by one",
        SPEECH_RUNNER,
        "is_audio.cumsum() - 1",
        "(is_audio.cumsum() - 2).clip(0)",
        SPEECH,
    ),
    Fault(
        "rows that pad speak where a sequence does",
        CAPTURED_TAIL,
        '"slots": (np.int64, num_slots - 1)',
        '"slots": (np.int64, 0)',
        SPEECH_GRAPHS,
    ),
    Fault(
        "rows of a graph are taken for the first ones",
        CAPTURED_TAIL,
        "present = rows.clamp(max=len(self._outputs[0]) - 1)",
        "present = torch.arange(size)",
        SPEECH_GRAPHS,
    ),
    Fault(
        "a step's sound is that of the next",
        "nanovllm/runners/transfers.py",
        "[tensor.clone() for tensor in tensors]",
        "list(tensors)",
        SPEECH_GRAPHS,
    ),
    Fault(
        "an attempt has the seed of the one before",
        "nanovllm/async_speech.py",
        "seed=(seed + attempt) % MAX_SEED",
        "seed=seed % MAX_SEED",
        SPEAKING,
    ),
    Fault(
        "an engine that was started anew lacks its adapters",
        "nanovllm/adapted_engine.py",
        "self._adapters.reload(load)",
        "pass",
        SPEAKING,
    ),
    Fault(
        "a long text ends with the adapter that is unregistered",
        "nanovllm/adapted_engine.py",
        "self._adapters.acquire(lora_name, held)",
        "self._adapters.acquire(lora_name)",
        SPEAKING,
    ),
    Fault(
        "the sentences after the first have a voice of their own",
        "nanovllm/long_speech.py",
        "if not self.must_learn or not output.latents:",
        "if self.must_learn or not output.latents:",
        SPEAKING,
    ),
    Fault(
        "one of several keys is enough, and so is none",
        "nanovllm/server/auth.py",
        "return any(matches)",
        'return any(matches) or scheme.lower() == b"bearer"',
        SHELL,
    ),
    Fault(
        "a path without a key",
        "nanovllm/server/auth.py",
        'frozenset({"/health", "/ready", *ASSETS})',
        'frozenset({"/health", "/ready", "/abort", *ASSETS})',
        SHELL,
    ),
    Fault(
        "a chunked body of any size",
        "nanovllm/server/limits.py",
        "if size > max_size:",
        "if size > 1 << 40:",
        SHELL,
    ),
    # Sound.
    Fault(
        "VAE primed cold",
        VAE,
        "        if len(latents):\n            # Of any",
        "        if not len(latents):\n            # Of any",
        VOCODING,
    ),
    Fault(
        "VAE primed by too little",
        VAE,
        "latents[None, -context_frames(self.config) :]",
        "latents[None, -context_frames(self.config) // 2 :]",
        VOCODING,
    ),
    Fault(
        "a stream takes over what its slot remembers",
        VAE,
        "            history.index_fill_(0, slots, 0.0)\n",
        "            history.index_fill_(0, slots[:0], 0.0)\n",
        VOCODING,
    ),
    Fault(
        "a stream has the history of another slot",
        CPU_AUDIO,
        "             history + slots[sequence] * conv.pad() * channels,",
        "             history + sequence * conv.pad() * channels,",
        VOCODING,
    ),
    Fault(
        "torch's kernels take a history by the row, not by the slot",
        AUDIO,
        "frames = torch.cat([history[slots], x], dim=1)",
        "frames = torch.cat([history[: len(slots)], x], dim=1)",
        VOCODING,
    ),
    Fault(
        "a history is not moved up by a piece shorter than itself",
        CPU_AUDIO,
        "    if (frames < pad) {\n",
        "    if (frames + 1 < pad) {\n",
        VOCODING,
    ),
    Fault(
        "odd strides of version 1 padded as those of version 2",
        VAE,
        "stride if config.is_v2 else stride + stride % 2",
        "stride",
        VOCODING,
    ),
    Fault(
        "a transposed convolution mistakes the older frame for the newer",
        VAE_LAYERS,
        "2, stride).flip(2)",
        "2, stride)",
        VOCODING,
    ),
    Fault(
        "the decoder is not told its output rate",
        VAE,
        "return snake_table(alpha, scale[bucket], shift[bucket])",
        "return snake_table(alpha)",
        VOCODING,
    ),
    Fault(
        "the rest of a recording's piece is lost",
        VAE,
        "        self._rest = samples[ready:].clone()\n",
        "        self._rest = samples[:0].clone()\n",
        VOCODING,
    ),
    # Adapters.
    Fault(
        "an adapter is not scaled by alpha / rank",
        LORA_TABLE,
        "(up.float() * scale)",
        "up.float()",
        ADAPTERS,
    ),
    Fault(
        "adapters of queries, keys and values change places",
        LORA,
        "up[columns, first : first + len(part.down)] = part.up",
        "up[first : first + len(part.up), first : first + len(part.down)] = part.up",
        ADAPTERS,
    ),
    Fault(
        "the rows of one adapter go through another one as well",
        LORA_GROUPS,
        "(rows,) = (slots == slot).nonzero()",
        "(rows,) = (slots >= slot).nonzero()",
        ADAPTERS,
    ),
    Fault(
        "the GPU: adapters of lower slots see a row too",
        "nanovllm/kernels/triton/lora.py",
        "other=-1) == slot",
        "other=-1) >= slot",
        GPU_ADAPTERS,
    ),
    Fault(
        "the GPU: the end of the depth is left out",
        "nanovllm/kernels/triton/lora.py",
        "range(0, split_depth, BLOCK_K)",
        "range(0, split_depth - BLOCK_K, BLOCK_K)",
        GPU_ADAPTERS,
    ),
    Fault(
        "the GPU: an adapter that is gone still adds",
        "nanovllm/kernels/triton/lora.py",
        "self._down[slot].zero_()",
        "pass",
        GPU_ADAPTERS,
    ),
    Fault(
        "the GPU: padding counts in the mean of the squares",
        "nanovllm/kernels/triton/elementwise.py",
        "tl.sum(squares, 0) / width",
        "tl.sum(squares, 0) / BLOCK",
        GPU_ELEMENTWISE,
    ),
    Fault(
        "the GPU: halves of a head rotate the other way",
        "nanovllm/kernels/triton/kv_write.py",
        "x * cos - y * sin",
        "x * cos + y * sin",
        GPU_WRITE,
    ),
    Fault(
        "the GPU: keys are normed as queries",
        "nanovllm/kernels/triton/kv_write.py",
        "return tl.where(is_query, q, k)",
        "return tl.where(is_query, q, q)",
        GPU_WRITE,
    ),
    Fault(
        "the GPU: tokens of padding are written to the first slot",
        "nanovllm/kernels/triton/kv_write.py",
        "slot = tl.load(slots_ptr + token).to(tl.int64)",
        "slot = tl.maximum(tl.load(slots_ptr + token).to(tl.int64), 0)",
        GPU_WRITE,
    ),
    Fault(
        "an expert's rows are those of the one before",
        "nanovllm/kernels/cpu/csrc/mixture.cpp",
        "visits.data() + first[e];",
        "visits.data() + first[e ? e - 1 : 0];",
        MIXTURES,
    ),
    Fault(
        "shares that do not sum to one",
        "nanovllm/kernels/cpu/csrc/mixture.cpp",
        "if (!normalized) {",
        "if (true) {",
        MIXTURES,
    ),
    Fault(
        "the GPU: an expert ends with the visit before its last",
        "nanovllm/kernels/triton/mixture.py",
        "numbers < end",
        "numbers < end - 1",
        MIXTURES,
    ),
    Fault(
        "AVX2: int4 whose zero points count for the first run of a group only",
        CPU_LINEAR,
        "{scale, factor * sum(total)};",
        "{scale, begin > first ? 0 : factor * sum(total)};",
        CPU_PRODUCTS,
    ),
    Fault(
        "AVX2: int8 without the weights' signs",
        SIMD,
        "_mm256_sign_epi8(bit_cast<__m256i>(x), bit_cast<__m256i>(signs))",
        "bit_cast<__m256i>(x)",
        CPU_PRODUCTS,
    ),
    Fault(
        "the embedding of another row of the step",
        TEXT_RUNNER,
        "hidden[row].to(torch.float32, copy=True)",
        "hidden[0].to(torch.float32, copy=True)",
        EMBEDDINGS,
    ),
    Fault(
        "the last position of a prompt to embed goes into a graph",
        TEXT_RUNNER,
        "return num_captured if self._embedding.isdisjoint(batch.slots[:num_captured]) else 0",
        "return num_captured",
        GRAPHS,
    ),
    Fault(
        "a body without a head under its own names",
        "nanovllm/models/checkpoint.py",
        "own_names = {BODY + name: name for",
        "own_names = {name: name for",
        EMBEDDINGS,
    ),
    Fault(
        "experts in layers that have an MLP",
        "nanovllm/models/model_config.py",
        ' - set(indices(raw, "mlp_only_layers"))',
        "",
        MODELS,
    ),
    Fault(
        "ranks cut experts as they cut an MLP",
        "nanovllm/models/sharding.py",
        'self._expert_parts if ".experts." in path else self._parts',
        "self._parts",
        SHARDING,
    ),
    Fault(
        "the GPU: sums depend on the number of rows",
        "nanovllm/kernels/triton/linear.py",
        "BLOCK_K=32 if is_float32 else 64,",
        "BLOCK_K=32 if num_rows > 2 else 64,",
        GPU_LINEAR,
    ),
    Fault(
        "LocDiT's rows are taken for positions",
        VOXCPM_SAMPLER,
        "ctx.of_rows(everywhere, self.estimator.length)",
        "ctx.of_rows(everywhere.repeat(self.estimator.length))",
        ADAPTERS,
    ),
    Fault(
        "an adapter of a stabilised rank is scaled by alpha / rank",
        LORA_SETTINGS,
        "(math.sqrt(rank) if self.use_rslora else rank)",
        "rank",
        TEXT_ADAPTERS,
    ),
    Fault(
        "all projections have the same alpha",
        LORA_SETTINGS,
        "        alpha = self.alpha if alpha is None else alpha\n",
        "        alpha = self.alpha\n",
        TEXT_ADAPTERS,
    ),
    Fault(
        "an adapter that takes a number over has the old one's blocks",
        "nanovllm/local_adapters.py",
        "            self._next_id += 1\n",
        "",
        TEXT_ADAPTERS,
    ),
    Fault(
        "adapters are loaded from anywhere",
        "nanovllm/server/adapters.py",
        "if not all(root in place.parents for place in (directory, *files)):",
        "if directory == root:",
        SERVED_ADAPTERS,
    ),
    Fault(
        "an adapter's files are anywhere",
        "nanovllm/server/adapters.py",
        "for place in (directory, *files)):",
        "for place in (directory,)):",
        SERVED_ADAPTERS,
    ),
    Fault(
        "optional characters of a pattern cost nothing",
        LORA_SETTINGS,
        " * 2.0**num_options",
        "",
        TEXT_ADAPTERS,
    ),
    Fault(
        "what goes on from a response may be as large as all of them",
        "nanovllm/server/response_store.py",
        "min(self._max_bytes, MAX_RESPONSE_SIZE)",
        "self._max_bytes",
        STORED_RESPONSES,
    ),
    Fault(
        "anybody loads adapters",
        "nanovllm/server/openai/loras.py",
        "dependencies=[Depends(require_admin)]",
        "dependencies=[]",
        SERVED_ADAPTERS,
    ),
    Fault(
        "a request for an adapter gets the bare model",
        "nanovllm/server/generation.py",
        "            lora_name=lora_name,\n",
        "            lora_name=None,\n",
        SERVED_ADAPTERS,
    ),
    # Structured outputs.
    Fault(
        "forced tokens are dropped from the matcher",
        SLOT_GRAMMAR,
        "return forced if self.matcher.consume_tokens(forced) else None",
        "return forced",
        FORMS,
    ),
    Fault(
        "a row gets the mask of another",
        SLOT_GRAMMAR,
        "return to_device(np.array(rows), device)",
        "return to_device(np.array(rows[::-1]), device)",
        FORMS,
    ),
    Fault(
        "a sequence resumes at the start of its grammar",
        SLOT_GRAMMAR,
        "        matcher.consume_tokens(token_ids)\n",
        "",
        FORMS,
    ),
    Fault(
        "forced tokens are not written where the next step reads",
        TEXT_RUNNER,
        "state, handle.ends[row] + 1, forced)",
        "state, handle.ends[row], forced)",
        FORMS,
    ),
    Fault(
        "what is forbidden besides leaves a grammar nothing",
        SAMPLER,
        "logits[rows].clamp(min=FORBIDDEN).masked_fill(",
        "logits[rows].masked_fill(",
        FORMS,
    ),
    Fault(
        "forced tokens pass the limit",
        SCHEDULER,
        "[key, *forced][: seq.max_keys - len(seq.keys)]",
        "[key, *forced]",
        FORMS,
    ),
    Fault(
        "a sequence that gives way while it grows leaves blocks behind",
        SCHEDULER,
        "                del step.batch.new_blocks[num_before:]\n",
        "",
        SCHEDULING,
    ),
    Fault(
        "a slow reader's return starts what is not compiled",
        "nanovllm/worker/forms.py",
        "[seq_id for seq_id in seq_ids if seq_id not in held]",
        "seq_ids",
        WAITING_FORMS,
    ),
    Fault(
        "a schema makes itself lenient",
        "nanovllm/text/json_schemas.py",
        """styled = {**_inclusive(closed(schema)), "x-guidance": JSON_STYLE}""",
        """styled = {"x-guidance": JSON_STYLE, **_inclusive(closed(schema))}""",
        GRAMMARS,
    ),
    Fault(
        "an adapter in use loses its slot",
        LORA_TABLE,
        "            if slot not in in_use:\n",
        "            if slot >= 0:\n",
        ADAPTERS,
    ),
    Fault(
        "a sequence that has ended keeps its adapter in use",
        LORA_TABLE,
        'uses none any more."""\n        self._slots[seq_slot] = NO_ADAPTER\n',
        'uses none any more."""\n',
        ADAPTERS,
    ),
    Fault(
        "the id of an adapter is used again",
        LORA_NAMES,
        "        self._next_id += 1\n",
        "",
        REGISTRY,
    ),
    Fault(
        "an adapter is forgotten while a request uses it",
        LORA_NAMES,
        "        await adapter.idle.wait()\n",
        "",
        REGISTRY,
    ),
]


def pytest_configure() -> None:
    """Make sure that the copy is tested."""
    import nanovllm

    if str(Path(nanovllm.__file__).parents[1]) != os.environ.get(COPY_VARIABLE):
        raise pytest.UsageError(f"{nanovllm.__file__} is not the copy with the fault")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let hypothesis find failures and leave it at that."""
    from hypothesis import Phase, settings

    for module in {item.getparent(pytest.Module) for item in items}:
        given = getattr(module.obj if module else None, "MACHINE_SETTINGS", None)
        if module and given:
            quick = settings(given, max_examples=NUM_EXAMPLES, phases=[Phase.generate])
            module.obj.MACHINE_SETTINGS = quick


class Verdict(NamedTuple):
    """What became of a fault: the tests that failed, or why none were run."""

    failed: list[str]
    problem: str | None = None


def seed_fault(fault: Fault, root: Path) -> str | None:
    """Apply a fault to the package below `root`; returns what is wrong with the patch, if so."""
    path = root / fault.path
    text = path.read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        return f"the patch matches {text.count(fault.right)} times in {fault.path}, not once"
    path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    return None


def run_tests(tests: Sequence[str], root: Path) -> Verdict:
    """Run tests on the package below `root`."""
    missing = [test for test in tests if not (root / test.partition("::")[0]).is_file()]
    if missing:
        return Verdict([], f"there is no {', '.join(missing)}")
    command = [sys.executable, "-m", "pytest", "-p", "tests.teeth", "-p", "no:cacheprovider"]
    command += ["-q", "--no-header", "--tb=no", "-rfE", *tests]
    if tests == SCHEDULING:
        # The checkpoints of the conftest need torch and transformers, which take seconds to import.
        command.append("--noconftest")
    else:
        # The tiny checkpoints have all that the bundled model has, and more.
        command += ["-x", "-k", "not bundled and not demo"]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        # A patch may keep both size and second of a file, which is all that a .pyc remembers.
        "PYTHONDONTWRITEBYTECODE": "1",
        # Tiny models gain nothing by threads, and lose much on a machine with other work.
        "OMP_NUM_THREADS": "1",
        COPY_VARIABLE: str(root),
    }
    try:
        process = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        return Verdict([], f"the tests ran past {TIME_LIMIT:.0f} s")
    if process.returncode == 0:
        return Verdict([])
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", process.stdout, re.MULTILINE)
    if process.returncode != 1 and not failed:
        return Verdict([], f"pytest exits with {process.returncode}:\n{process.stderr[-2000:]}")
    return Verdict(failed)


def copy_project(root: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in ("nanovllm", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)


def try_fault(fault: Fault, root: Path) -> Verdict:
    """Seed a fault, run its tests, and put the file back."""
    shutil.copy(root / fault.path, root / "right")
    problem = seed_fault(fault, root)
    if problem is not None:
        return Verdict([], problem)
    try:
        return run_tests(fault.tests, root)
    finally:
        shutil.move(root / "right", root / fault.path)


def describe(verdict: Verdict) -> str:
    if verdict.problem is not None:
        return f"NOT TRIED: {verdict.problem}"
    if not verdict.failed:
        return "SURVIVED"
    names = [test.partition("::")[2] or test for test in verdict.failed]
    machines = sum("state_machine" in name for name in names)
    first = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return first + (f" (state machines: {machines} of 4)" if machines else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all faults; returns 1 if one went unnoticed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.teeth", description=__doc__)
    parser.add_argument("--only", default="", help="only faults whose name or file contains this")
    only = parser.parse_args(arguments).only
    faults = [fault for fault in FAULTS if only in fault.name or only in fault.path]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    caught = 0
    with tempfile.TemporaryDirectory(prefix="teeth-") as directory:
        root = Path(directory).resolve()
        copy_project(root)
        for tests in dict.fromkeys(fault.tests for fault in faults):
            start = time.monotonic()
            verdict = run_tests(tests, root)
            seconds = time.monotonic() - start
            if verdict.failed or verdict.problem:
                console.print(f"without a fault: {' '.join(tests)}: {describe(verdict)}")
                return 1
            console.print(f"{seconds:6.1f} s  without a fault: {' '.join(tests)}: passed")
        for fault in faults:
            start = time.monotonic()
            verdict = try_fault(fault, root)
            seconds = time.monotonic() - start
            console.print(f"{seconds:6.1f} s  {fault.name:50s}  {describe(verdict)}")
            caught += bool(verdict.failed)
    console.print(f"{caught} of {len(faults)} faults caught")
    return int(caught < len(faults))


if __name__ == "__main__":
    sys.exit(main())

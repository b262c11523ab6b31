"""Which class reads which architecture."""

from nanovllm.models.decoder import CausalLM
from nanovllm.models.gemma3 import Gemma3ForCausalLM
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.mistral import MistralForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_moe import Qwen3MoeForCausalLM

CLASSES: dict[str, type[CausalLM]] = {
    cls.__name__: cls
    for cls in (
        Gemma3ForCausalLM,
        LlamaForCausalLM,
        MistralForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
        Qwen3MoeForCausalLM,
    )
}

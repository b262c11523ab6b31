"""Which class reads which architecture."""

from nanovllm.errors import UnsupportedModelError
from nanovllm.models.decoder import CausalLM
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.mistral import MistralForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM

ARCHITECTURES: dict[str, type[CausalLM]] = {
    cls.__name__: cls
    for cls in (Qwen3ForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM, MistralForCausalLM)
}


def model_class(architecture: str) -> type[CausalLM]:
    """The class of an architecture.

    Raises:
        UnsupportedModelError: We do not have it; the message lists what we have.
    """
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"Unsupported model architecture: {architecture}; supported: "
            f"{', '.join(sorted(ARCHITECTURES))}",
            "architectures",
        )
    return ARCHITECTURES[architecture]

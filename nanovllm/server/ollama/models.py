"""`/api/tags`, `/api/show`, `/api/ps` and `/api/version`: which models there are."""

import hashlib
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from nanovllm.errors import InvalidRequestError
from nanovllm.server.chat.plan import format_of
from nanovllm.server.fields import WireModel
from nanovllm.server.ollama.answer import now
from nanovllm.server.ollama.responses import (
    ListedModel,
    ModelDescription,
    ModelDetails,
    ModelList,
    RunningModel,
    RunningModelList,
    Version,
)
from nanovllm.server.ollama.route import OllamaRoute
from nanovllm.server.ollama.translate import model_name
from nanovllm.server.state import ServerState, State

if TYPE_CHECKING:
    from nanovllm.models.model_config import ModelConfig

router = APIRouter(route_class=OllamaRoute)

LIKE_OLLAMA = "0.13.0"
"""The version whose API this is; clients refuse to work with one that they find too old."""
STARTED = now()
"""When the models became available, as good as: they are those of the process."""
NEVER = "9999-12-31T23:59:59Z"
GGUF_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class ShowRequest(WireModel):
    """Which model to describe; `name` is what older clients call it."""

    model: Annotated[str, Field(min_length=1)] | None = None
    name: Annotated[str, Field(min_length=1)] | None = None


@router.get("/api/version", response_model=Version)
async def tell_version() -> Version:
    """Tell which version of Ollama's API this is."""
    return {"version": LIKE_OLLAMA}


@router.get("/api/tags", response_model=ModelList)
async def list_models(state: State) -> ModelList:
    """List the names that requests may use for the model that writes, and for its adapters."""
    return {"models": [_listed(name, state) for name in state.text_names]}


@router.get("/api/ps", response_model=RunningModelList)
async def list_running(state: State) -> RunningModelList:
    """List the same names: what is served is loaded, and stays so."""
    return {"models": [_running(name, state) for name in state.text_names]}


@router.post("/api/show", response_model=ModelDescription)
async def show_model(body: ShowRequest, state: State) -> ModelDescription:
    """Describe a model."""
    name = body.model or body.name
    if name is None:
        raise InvalidRequestError("model: must be the name of a model", "model")
    adapter = state.text_adapter(model_name(name, state))
    tokenizer = state.llm.tokenizer
    return {
        "modelfile": f"FROM {state.llm.model_id}\n" + (f"ADAPTER {adapter}\n" if adapter else ""),
        "parameters": "",
        "template": (tokenizer.chat_templates.get("default") or "") if tokenizer else "",
        "details": _details(adapter, state),
        "model_info": _facts(state),
        "capabilities": _capabilities(state),
        "modified_at": STARTED,
    }


def _listed(name: str, state: ServerState) -> ListedModel:
    adapter = state.text_adapter(name)
    return {
        "name": name,
        "model": name,
        "modified_at": STARTED,
        "size": _size(state),
        "digest": hashlib.sha256((adapter or state.llm.model_id).encode()).hexdigest(),
        "details": _details(adapter, state),
    }


def _running(name: str, state: ServerState) -> RunningModel:
    listed = _listed(name, state)
    return {
        "name": name,
        "model": name,
        "size": listed["size"],
        "size_vram": 0 if state.llm.config.device == "cpu" else listed["size"],
        "digest": listed["digest"],
        "details": listed["details"],
        "expires_at": NEVER,
        "context_length": state.llm.max_model_len,
    }


def _capabilities(state: ServerState) -> list[str]:
    """What the model's template knows of."""
    tokenizer = state.llm.tokenizer
    templates = {} if tokenizer is None else tokenizer.chat_templates
    can = ["completion", "embedding"]
    if any("tools" in template for template in templates.values()):
        can.append("tools")
    if "default" in templates and format_of(state).thoughts is not None:
        can.append("thinking")
    return can


def _details(adapter: str | None, state: ServerState) -> ModelDetails:
    family = _family(state.llm.model_config)
    num_parameters = _num_parameters(state.llm.model_config)
    billions = num_parameters / 1e9
    return {
        "parent_model": state.names_of("text")[0] if adapter else "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": f"{billions:.1f}B" if billions >= 1 else f"{billions * 1e3:.2f}M",
        "quantization_level": GGUF_NAMES.get(precision := _precision(state), precision.upper()),
    }


def _facts(state: ServerState) -> dict[str, Any]:
    """What clients look up under the names that GGUF files have for it."""
    model = state.llm.model_config
    family, mixture = _family(model), {}
    if model.mixture is not None:
        mixture[f"{family}.expert_count"] = model.mixture.num_experts
        mixture[f"{family}.expert_used_count"] = model.mixture.top_k
        mixture[f"{family}.expert_feed_forward_length"] = model.mixture.expert_size
    return {
        "general.architecture": family,
        "general.basename": state.llm.model_id,
        "general.parameter_count": _num_parameters(model),
        f"{family}.context_length": state.llm.max_model_len,
        f"{family}.embedding_length": model.hidden_size,
        f"{family}.block_count": model.num_layers,
        f"{family}.feed_forward_length": model.intermediate_size,
        f"{family}.attention.head_count": model.num_heads,
        f"{family}.attention.head_count_kv": model.num_kv_heads,
        f"{family}.vocab_size": model.vocab_size,
        **mixture,
    }


def _family(model: "ModelConfig") -> str:
    return model.architecture.removesuffix("ForCausalLM").lower()


def _num_parameters(model: "ModelConfig") -> int:
    """Weights of the embeddings and the linear layers; norms and biases are next to nothing."""
    num_heads = 2 * (model.num_heads + model.num_kv_heads)  # queries, outputs, keys and values
    width = model.num_layers * (num_heads * model.head_dim + 3 * model.intermediate_size)
    if (mixture := model.mixture) is not None:
        experts = mixture.num_experts * mixture.expert_size
        width += len(mixture.layers) * 3 * (experts - model.intermediate_size)
        width += len(mixture.layers) * mixture.num_experts  # what scores them
    tables = 1 if model.tie_word_embeddings else 2
    return model.hidden_size * (tables * model.vocab_size + width)


def _precision(state: ServerState) -> str:
    config = state.llm.config
    dtype = state.llm.model_config.dtype if config.dtype == "auto" else config.dtype
    return config.quantization or dtype


def _size(state: ServerState) -> int:
    """Bytes of the weights, about."""
    precision = _precision(state)
    bits = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8}.get(precision, 4)
    return _num_parameters(state.llm.model_config) * bits // 8

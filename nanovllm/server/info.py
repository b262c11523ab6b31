"""`GET /info`: what is served and how, under the family's names."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from nanovllm import __version__
from nanovllm.server.errors import COMMON_ERROR_RESPONSES
from nanovllm.server.state import State

router = APIRouter(tags=["the family"], responses=COMMON_ERROR_RESPONSES)


class ModelInfo(BaseModel):
    """The model and the options that say what it takes."""

    kind: Literal["text"] = "text"
    model_path: str = Field(description="The id or directory the server was started with.")
    served_model_names: list[str]
    dtype: str
    device: str
    quantization: str | None
    max_model_len: int = Field(description="Longest prompt plus output in tokens.")
    max_num_seqs: int = Field(description="Sequences an engine runs at a time.")


class LoRAInfo(BaseModel):
    """Adapters, of which a text model has none."""

    enabled: bool = False
    registered_names: list[str] = []
    loaded: list[str] = []


class Info(BaseModel):
    """What is served."""

    version: str
    model: ModelInfo
    lora: LoRAInfo


@router.get("/info")
async def info(state: State) -> Info:
    """Describe the model and its limits."""
    config = state.llm.config
    model = ModelInfo(
        model_path=config.model or state.llm.model_id,
        served_model_names=list(state.model_names),
        dtype=config.dtype,
        device=config.device,
        quantization=config.quantization,
        max_model_len=state.llm.max_model_len,
        max_num_seqs=config.max_num_seqs or 0,
    )
    return Info(version=__version__, model=model, lora=LoRAInfo())

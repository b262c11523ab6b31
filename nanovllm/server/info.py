"""`GET /info`: what is served and how, under the family's names."""

from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from nanovllm import __version__
from nanovllm.server.state import Kind, ServerState, State

if TYPE_CHECKING:
    from nanovllm.adapted_engine import AdaptedEngine

router = APIRouter(tags=["the family"])


class ModelInfo(BaseModel):
    """A model and the options that say what it takes."""

    kind: Literal["text", "speech"]
    model_path: str = Field(description="The id or directory the server was started with.")
    served_model_names: list[str]
    dtype: str
    device: str
    quantization: str | None
    max_model_len: int = Field(description="Longest prompt plus output, in positions.")
    max_num_seqs: int = Field(description="Sequences an engine runs at a time.")
    lora_names: list[str] = Field(description="Adapters that requests may name.")


class SpeechModelInfo(ModelInfo):
    """A model that speaks."""

    sample_rate: int = Field(description="Of the speech it makes, in Hz.")
    output_sample_rate: int = Field(description="The same.")
    encoder_sample_rate: int = Field(description="Of what it makes of recordings, in Hz.")
    channels: int = 1
    feat_dim: int = Field(description="Values of a latent frame.")
    patch_size: int = Field(description="Frames of a patch.")
    samples_per_patch: int
    supports_reference: bool = Field(description="Whether a voice may come without its text.")
    default_voice: str | None


class LoRAInfo(BaseModel):
    """Where adapters may sit, and how many: of the model that speaks, if there is one."""

    enabled: bool = False
    enable_lm: bool = False
    enable_dit: bool = False
    enable_proj: bool = False
    max_loras: int = 0
    max_lora_rank: int = 0
    target_modules_lm: list[str] = []
    target_modules_dit: list[str] = []
    target_proj_modules: list[str] = []
    registered_names: list[str] = []
    loaded: list[str] = []


class MP3Info(BaseModel):
    """How MP3 is written."""

    bitrate_kbps: int
    quality: int


class Info(BaseModel):
    """What is served."""

    version: str
    model: SpeechModelInfo | ModelInfo = Field(
        description="The model that writes; where there is none, the one that speaks."
    )
    speech: SpeechModelInfo | None = Field(description="The model that speaks.")
    lora: LoRAInfo
    mp3: MP3Info | None = Field(description="Where there is a model that speaks.")


@router.get("/info")
async def info(state: State) -> Info:
    """Describe the models and their limits."""
    if state.speech_model is None:
        text = ModelInfo(**_common(state, "text", state.llm))
        lora = _describe_lora(state.llm)
        return Info(version=__version__, model=text, speech=None, lora=lora, mp3=None)
    options, speech = state.speech_config, _describe_speech(state)
    text_model = state.text_model
    return Info(
        version=__version__,
        model=ModelInfo(**_common(state, "text", text_model)) if text_model else speech,
        speech=speech,
        lora=_describe_lora(state.speech),
        mp3=MP3Info(bitrate_kbps=options.mp3_bitrate_kbps, quality=options.mp3_quality),
    )


def _common(state: ServerState, kind: Kind, model: "AdaptedEngine[Any]") -> dict[str, Any]:
    config = model.config
    return {
        "kind": kind,
        "model_path": config.model or model.model_id,
        "served_model_names": list(state.names_of(kind)),
        "dtype": config.dtype,
        "device": config.device,
        "quantization": config.quantization,
        "max_model_len": model.max_model_len,
        "max_num_seqs": config.max_num_seqs or 0,
        "lora_names": model.list_loras(),
    }


def _describe_speech(state: ServerState) -> SpeechModelInfo:
    model = state.speech
    return SpeechModelInfo(
        **_common(state, "speech", model),
        sample_rate=model.info.sample_rate,
        output_sample_rate=model.info.sample_rate,
        encoder_sample_rate=model.info.encoder_sample_rate,
        feat_dim=model.info.feat_dim,
        patch_size=model.info.patch_size,
        samples_per_patch=model.info.samples_per_patch,
        supports_reference=model.info.supports_reference,
        default_voice=state.speech_config.default_voice,
    )


def _describe_lora(model: "AdaptedEngine[Any]") -> LoRAInfo:
    config = model.config.lora
    if config is None:
        return LoRAInfo()
    names = model.list_loras()
    return LoRAInfo(
        enabled=True,
        enable_lm=config.enable_lm,
        enable_dit=config.enable_dit,
        enable_proj=config.enable_proj,
        max_loras=config.max_loras,
        max_lora_rank=config.max_lora_rank,
        target_modules_lm=config.target_modules_lm,
        target_modules_dit=config.target_modules_dit,
        target_proj_modules=config.target_proj_modules,
        registered_names=names,
        loaded=names,
    )

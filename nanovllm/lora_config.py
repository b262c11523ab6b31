"""Which LoRA adapters an engine takes, as plain data."""

from dataclasses import dataclass, field, fields
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.validation import conform

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
LAYER_MODULES = (*ATTENTION_MODULES, "gate_proj", "up_proj", "down_proj")
PROJECTIONS = ("enc_to_lm_proj", "lm_to_dit_proj", "res_to_dit_proj", "fusion_concat_proj")
"""The last one is VoxCPM2's alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAConfig:
    """Where adapters may sit, and how much room there is for them; fixed when a model is loaded.

    Rank and alpha are an adapter's own and come from its files: PEFT's `adapter_config.json`, or
    the `lora_config.json` of VoxCPM's training. A text model is one language model; what is said
    of the diffusion transformer and the projections is of speech models alone.

    Args:
        enable_lm: Adapters of the language models: a text model, or the two of a speech model,
            `base_lm` and `residual_lm`.
        enable_dit: Adapters of the diffusion transformer, `feat_decoder.estimator`.
        enable_proj: Adapters of the projections between them.
        max_loras: Different adapters in the running sequences at a time; any number may be
            registered.
        max_lora_rank: Greatest rank of an adapter.
        target_modules_lm: Linear layers of the language models that may have one.
        target_modules_dit: Linear layers of the diffusion transformer.
        target_proj_modules: Projections; one that the model does not have does not matter, as long
            as there is any layer that may have an adapter.

    Raises:
        InvalidRequestError: An option is unknown or outside its range.
    """

    enable_lm: bool = True
    enable_dit: bool = True
    enable_proj: bool = False
    max_loras: int = 1
    max_lora_rank: int = 32
    target_modules_lm: list[str] = field(default_factory=lambda: list(ATTENTION_MODULES))
    target_modules_dit: list[str] = field(default_factory=lambda: list(ATTENTION_MODULES))
    target_proj_modules: list[str] = field(default_factory=lambda: list(PROJECTIONS))

    def __new__(cls, **options: Any) -> "LoRAConfig":
        """Refuse unknown options as a ValueError, where a dataclass has a TypeError."""
        if unknown := sorted(options.keys() - {option.name for option in fields(cls)}):
            raise InvalidRequestError(
                f"LoRAConfig has no option {unknown[0]!r}; it has "
                f"{', '.join(option.name for option in fields(cls))}",
                unknown[0],
            )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        conform(self)
        for name in ("max_loras", "max_lora_rank"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(
                    f"{name} must be at least 1, got {getattr(self, name)}", name
                )
        for name, known in (
            ("target_modules_lm", LAYER_MODULES),
            ("target_modules_dit", LAYER_MODULES),
            ("target_proj_modules", PROJECTIONS),
        ):
            if unknown := [module for module in getattr(self, name) if module not in known]:
                raise InvalidRequestError(
                    f"{name} must be of {', '.join(known)}, got {unknown[0]!r}", name
                )
        if not (self.enable_lm or self.enable_dit or self.enable_proj):
            raise InvalidRequestError(
                "at least one of enable_lm, enable_dit and enable_proj must be true", "enable_lm"
            )

    def engine_options(self) -> dict[str, Any]:
        """The options of `EngineConfig` that say the same."""
        own = {option.name: getattr(self, option.name) for option in fields(self)}
        return {"enable_lora": True} | {
            name if name in ("max_loras", "max_lora_rank") else f"lora_{name}": value
            for name, value in own.items()
        }


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter that requests of an `LLM` go through; the class is vLLM's.

    Args:
        lora_name: What it is called.
        lora_int_id: A number above 0 that no other adapter of the `LLM` has.
        lora_path: Its directory, as PEFT writes it.

    Raises:
        InvalidRequestError: One of them is missing or of another type.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        conform(self)
        if self.lora_int_id < 1:
            raise InvalidRequestError(
                f"lora_int_id must be above 0, got {self.lora_int_id}", "lora_int_id"
            )
        if not (self.lora_name and self.lora_path):
            raise InvalidRequestError("lora_name and lora_path must not be empty", "lora_name")

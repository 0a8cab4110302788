"""Frozen model configurations, read from and written to the Hugging Face `config.json` layout."""

import dataclasses
from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower; the defaults that never vary between released sizes are filled in."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    num_position_embeddings: int = 2304
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    rope_theta: float = 10_000.0
    layer_norm_eps: float = 1e-6  # a constant in transformers, never in config.json

    def __post_init__(self) -> None:
        taps = self.deepstack_visual_indexes
        if list(taps) != sorted(set(taps)) or any(not 0 <= i < self.depth for i in taps):
            raise ValueError(
                f"deepstack_visual_indexes: got {taps}, want rising block numbers in "
                f"[0, {self.depth})"
            )
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"vision head width: got hidden_size {self.hidden_size} / num_heads "
                f"{self.num_heads}, want a whole multiple of 4 (2-D RoPE)"
            )
        if self.grid_side**2 != self.num_position_embeddings:
            raise ValueError(
                f"num_position_embeddings: got {self.num_position_embeddings}, want a square"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_channels(self) -> int:
        """C: pixel values of one patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2

    @property
    def grid_side(self) -> int:
        return round(self.num_position_embeddings**0.5)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 262_144

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, want a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if len(self.mrope_section) != 3 or sum(self.mrope_section) * 2 != self.head_dim:
            raise ValueError(
                f"mrope_section: got {self.mrope_section}, want three numbers that add up to "
                f"head_dim / 2 = {self.head_dim / 2}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole Qwen3-VL: decoder, vision tower, special tokens."""

    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision out_hidden_size: got {self.vision.out_hidden_size}, want the decoder's "
                f"hidden_size {self.text.hidden_size}"
            )
        if self.num_deepstack > self.text.num_hidden_layers:
            raise ValueError(
                f"deepstack_visual_indexes: got {self.num_deepstack} taps, want at most one for "
                f"each of the {self.text.num_hidden_layers} decoder layers"
            )

    @property
    def num_deepstack(self) -> int:
        """Decoder layers, counted from the first, that are followed by visual features."""
        return len(self.vision.deepstack_visual_indexes)

    @classmethod
    def from_hf(cls, config: Json, *, source: str = "config.json") -> "ModelConfig":
        """The configuration in `config`, a parsed `config.json` of transformers 4.57 or 5.

        Keys that do not change the mathematics are ignored; values that would ask for mathematics
        not written here (another activation, attention biases, scaled RoPE) raise ValueError, as do
        missing keys.
        """
        _expect(config, "model_type", "qwen3_vl", source)
        text, vision = (
            _read(config, key, dict, source) for key in ("text_config", "vision_config")
        )
        return cls(
            text=_text_from_hf(text, f"{source}: text_config"),
            vision=_vision_from_hf(vision, f"{source}: vision_config"),
            tie_word_embeddings=_read(config, "tie_word_embeddings", bool, source),
            **{key: _read(config, key, int, source) for key in _TOKEN_KEYS},
        )

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that both transformers 4.57 and 5 read as this model.

        RoPE is written twice: `rope_theta` with `rope_scaling` for 4.57, vLLM and SGLang, and
        `rope_parameters` for 5; a reader that finds neither falls back to another theta in silence.
        """
        text = dataclasses.asdict(self.text)
        section = list(text.pop("mrope_section"))
        scaling = {"rope_type": "default", "mrope_section": section, "mrope_interleaved": True}
        text |= {
            "model_type": "qwen3_vl_text",
            "rope_scaling": scaling,
            "rope_parameters": scaling | {"rope_theta": self.text.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        vision = dataclasses.asdict(self.vision)
        del vision["layer_norm_eps"]
        theta = vision.pop("rope_theta")
        vision |= {
            "model_type": "qwen3_vl",
            "deepstack_visual_indexes": list(self.vision.deepstack_visual_indexes),
            "hidden_act": "gelu_pytorch_tanh",
            "initializer_range": 0.02,
            "rope_parameters": {"rope_type": "axial", "rope_theta": theta},
        }
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "text_config": text,
            "vision_config": vision,
            "tie_word_embeddings": self.tie_word_embeddings,
            **{key: getattr(self, key) for key in _TOKEN_KEYS},
        }


def tiny(
    *,
    vocab_size: int = 256,
    hidden_size: int = 32,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    num_deepstack: int = 2,
    tie_word_embeddings: bool = True,
) -> ModelConfig:
    """A model for tests: every part of the architecture, a few tens of thousands of parameters."""
    return ModelConfig(
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=16,
            rope_theta=5_000_000.0,
            mrope_section=(4, 2, 2),
        ),
        vision=VisionConfig(
            depth=3,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=hidden_size,
            deepstack_visual_indexes=tuple(range(num_deepstack)),
            num_position_embeddings=64,
            patch_size=4,
        ),
        tie_word_embeddings=tie_word_embeddings,
        image_token_id=vocab_size - 4,
        video_token_id=vocab_size - 3,
        vision_start_token_id=vocab_size - 2,
        vision_end_token_id=vocab_size - 1,
    )


_TOKEN_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _read(config: Json, key: str, kind: type, source: str) -> Any:
    if key not in config:
        raise ValueError(f"{source}: got no {key!r}, want a value of type {kind.__name__}")
    value = config[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{source}: {key}: got {value!r}, want a value of type {kind.__name__}")
    return value


def _expect(config: Json, key: str, want: object, source: str) -> None:
    """Raises where `key` is present with another value: the code has `want` built in."""
    if key in config and config[key] != want:
        raise ValueError(f"{source}: {key}: got {config[key]!r}, want {want!r}")


def _fields(config: Json, names: tuple[str, ...], kind: type, source: str) -> dict[str, Any]:
    return {name: _read(config, name, kind, source) for name in names}


def _text_from_hf(config: Json, source: str) -> TextConfig:
    for key, want in (("hidden_act", "silu"), ("attention_bias", False)):
        _expect(config, key, want, source)
    rope: dict[str, Any] = {}
    if "rope_theta" in config:
        rope["rope_theta"] = config["rope_theta"]
    for key in ("rope_scaling", "rope_parameters"):  # transformers 5 writes only the second
        if config.get(key) is not None:
            rope |= config[key]
    for key in ("rope_type", "type"):
        _expect(rope, key, "default", f"{source}: rope")
    _expect(rope, "mrope_interleaved", True, f"{source}: rope")
    section = _read(rope, "mrope_section", list, f"{source}: rope")
    ints = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    )
    return TextConfig(
        **_fields(config, ints, int, source),
        rms_norm_eps=_read(config, "rms_norm_eps", float, source),
        rope_theta=_read(rope, "rope_theta", float, f"{source}: rope"),
        mrope_section=(section[0], section[1], section[2]),
    )


def _vision_from_hf(config: Json, source: str) -> VisionConfig:
    _expect(config, "hidden_act", "gelu_pytorch_tanh", source)
    ints = (
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "out_hidden_size",
        "num_position_embeddings",
        "in_channels",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
    )
    rope: dict[str, Any] = {}
    if config.get("rope_parameters") is not None:  # absent from 4.57 files: theta is then fixed
        _expect(config["rope_parameters"], "rope_type", "axial", f"{source}: rope_parameters")
        rope["rope_theta"] = _read(config["rope_parameters"], "rope_theta", float, source)
    return VisionConfig(
        **_fields(config, ints, int, source),
        deepstack_visual_indexes=tuple(_read(config, "deepstack_visual_indexes", list, source)),
        **rope,
    )

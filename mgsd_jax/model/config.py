"""Frozen model configurations, read from and written to the Hugging Face `config.json` layout."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mgsd_jax.checks.fields import LARGEST, expect, field, optional, positive, whole
from mgsd_jax.checks.ranges import shown

Config = TypeVar("Config")
Json = Mapping[str, object]


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
    mrope_section: tuple[int, int, int] = (24, 20, 20)  # time, height, width
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

        for key in _TOKEN_KEYS:
            if getattr(self, key) >= self.text.vocab_size:
                raise ValueError(
                    f"{key}: got {getattr(self, key)}, want less than vocab_size, which is "
                    f"{self.text.vocab_size}"
                )

    @property
    def num_deepstack(self) -> int:
        """Decoder layers, counted from the first, that are followed by visual features."""
        return len(self.vision.deepstack_visual_indexes)

    @classmethod
    def from_hf(cls, config: Json, *, source: str = "config.json") -> "ModelConfig":
        """The configuration in `config`, a parsed `config.json` of transformers 4.57 or 5.

        Keys that do not change the mathematics are ignored. Raises ValueError, naming `source` and
        key, if one is missing or of the wrong kind, or asks for mathematics that this package does
        not have (another activation, attention biases, scaled RoPE, quantised weights).
        """
        expect(config, "model_type", ["qwen3_vl"], source)
        text, vision = (
            field(config, key, dict, source) for key in ("text_config", "vision_config")
        )
        for part in (config, text, vision):
            _refuse_quantised(part, source)
        tied = field(config, "tie_word_embeddings", bool, source)
        expect(text, "tie_word_embeddings", [tied], f"{source}: text_config")
        return _made(
            cls,
            source,
            text=_text_from_hf(text, f"{source}: text_config"),
            vision=_vision_from_hf(vision, f"{source}: vision_config"),
            tie_word_embeddings=tied,
            **{key: whole(config, key, source, low=0) for key in _TOKEN_KEYS},
        )

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` that both transformers 4.57 and 5 read as this model.

        RoPE is written twice: `rope_theta` with `rope_scaling` for 4.57, vLLM and SGLang, and
        `rope_parameters` for 5. A reader that finds neither uses another theta without a word.
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


_TOKEN_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


# A tensor table is made of as many layers before any weight file is opened.
_MOST = {"num_hidden_layers": 1000, "depth": 1000}


def _made(make: Callable[..., Config], source: str, **values: object) -> Config:
    """`make(**values)`; a ValueError about values that do not fit together names the `source`."""
    try:
        return make(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _refuse_quantised(config: Json, source: str) -> None:
    settings = optional(config, "quantization_config", dict, source)
    if settings is not None:
        method = settings.get("quant_method", "an unnamed method")
        raise ValueError(
            f"{source}: quantization_config: got weights quantised by {shown(method)}, want float "
            "ones: take the release that is not quantised"
        )


def _text_from_hf(config: Json, source: str) -> TextConfig:
    for key, want in (("hidden_act", "silu"), ("attention_bias", False)):
        expect(config, key, [want], source)
    rope, rope_source = _rope(config, "default", source)
    expect(rope, "mrope_interleaved", [True], rope_source)
    section = rope.get("mrope_section", list(TextConfig.mrope_section))
    return _made(
        TextConfig,
        source,
        **_sizes(TextConfig, config, source),
        rms_norm_eps=positive(config, "rms_norm_eps", source),
        rope_theta=positive(rope, "rope_theta", rope_source),
        mrope_section=_numbers({"mrope_section": section}, "mrope_section", rope_source),
    )


def _vision_from_hf(config: Json, source: str) -> VisionConfig:
    expect(config, "hidden_act", ["gelu_pytorch_tanh"], source)
    expect(config, "in_channels", [3], source)
    rope, rope_source = _rope(config, "axial", source)
    theta = (
        {"rope_theta": positive(rope, "rope_theta", rope_source)} if "rope_theta" in rope else {}
    )
    return _made(
        VisionConfig,
        source,
        **_sizes(VisionConfig, config, source),
        deepstack_visual_indexes=_numbers(config, "deepstack_visual_indexes", source),
        **theta,
    )


def _sizes(
    kind: type[TextConfig] | type[VisionConfig], config: Json, source: str
) -> dict[str, int]:
    """The whole numbers among the fields of a part."""
    return {
        f.name: whole(config, f.name, source, high=_MOST.get(f.name, LARGEST))
        for f in dataclasses.fields(kind)
        if f.type is int
    }


def _rope(config: Json, kind: str, source: str) -> tuple[Json, str]:
    """The RoPE settings as transformers reads them, and the name of their section.

    transformers 4.57 reads `rope_theta` and `rope_scaling`. 5 reads `rope_scaling`, or
    `rope_parameters` if that is empty, and `rope_theta` if the section that it reads has none.
    Raises ValueError if the other section disagrees: one of the versions would follow it.
    """
    objects = {
        key: optional(config, key, dict, source) or {}
        for key in ("rope_scaling", "rope_parameters")
    }
    for key, place in objects.items():
        for name in ("rope_type", "type"):  # "default" stands for the model's own kind
            expect(place, name, list(dict.fromkeys(("default", kind))), f"{source}: {key}")
    objects["rope_theta"] = {key: config[key] for key in ("rope_theta",) if key in config}
    used = "rope_scaling" if objects["rope_scaling"] else "rope_parameters"
    rope = objects["rope_theta"] | objects[used]
    for key, place in objects.items():
        for name in place.keys() - {"rope_type", "type"}:
            if name not in rope or rope[name] != place[name]:
                raise ValueError(
                    f"{source}: {key}: {name}: got {shown(place[name])}, want "
                    f"{shown(rope[name]) if name in rope else 'it absent'} as in {used}"
                )
    return rope, f"{source}: {used}" if objects[used] else source


def _numbers(config: Json, key: str, source: str) -> tuple[int, ...]:
    values = field(config, key, list, source)
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{source}: {key}: got {shown(values)}, want a list of whole numbers >= 0")
    return tuple(values)

"""The shapes of the released dense Qwen3-VL models, for work on them without their files.

Sources: `jax-ml/bonsai` bonsai/models/qwen3_vl/modeling.py (73d300e, all four) and
`pytorch/torchtitan` torchtitan/experiments/qwen3_vl/__init__.py (0375bb6, 2B and 8B), which agree.
"""

from pathlib import Path

from mgsd_jax.model.config import ModelConfig, TextConfig, VisionConfig
from mgsd_jax.weights import hf


def _released(
    *, width: int, mlp: int, layers: int, heads: int, large_tower: bool, tied: bool
) -> ModelConfig:
    return ModelConfig(
        text=TextConfig(
            vocab_size=151_936,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            rope_theta=5_000_000.0,
        ),
        vision=VisionConfig(
            depth=27 if large_tower else 24,
            hidden_size=1152 if large_tower else 1024,
            intermediate_size=4304 if large_tower else 4096,
            num_heads=16,
            out_hidden_size=width,
            deepstack_visual_indexes=(8, 16, 24) if large_tower else (5, 11, 17),
        ),
        tie_word_embeddings=tied,
    )


RELEASED = {
    "Qwen3-VL-2B-Instruct": _released(
        width=2048, mlp=6144, layers=28, heads=16, large_tower=False, tied=True
    ),
    "Qwen3-VL-4B-Instruct": _released(
        width=2560, mlp=9728, layers=36, heads=32, large_tower=False, tied=True
    ),
    "Qwen3-VL-8B-Instruct": _released(
        width=4096, mlp=12_288, layers=36, heads=32, large_tower=True, tied=False
    ),
    "Qwen3-VL-32B-Instruct": _released(
        width=5120, mlp=25_600, layers=64, heads=64, large_tower=True, tied=False
    ),
}


def find_config(path: str) -> ModelConfig:
    """The configuration of the Hugging Face folder `path`, or of the release of that name.

    Only `config.json` is read, if it is there. Raises ValueError for a folder without one whose
    name is not in RELEASED.
    """
    if (Path(path) / "config.json").is_file():
        return hf.read_config(path)
    if Path(path).name not in RELEASED:
        raise ValueError(
            f"{path}: config.json not found, want a Hugging Face folder or a path that ends in one "
            f"of {sorted(RELEASED)}"
        )
    return RELEASED[Path(path).name]

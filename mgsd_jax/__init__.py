"""MGSD in JAX: train Qwen3-VL to plan from pictures."""

import os

# Transformers' processors are used without PyTorch, and each start would say that it is not there.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

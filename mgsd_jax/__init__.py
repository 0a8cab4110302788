"""MGSD in JAX: train Qwen3-VL to plan from pictures."""

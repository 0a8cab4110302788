"""Qwen3-VL as Flax linen modules over plain nested dicts."""

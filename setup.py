"""What pyproject.toml cannot say: a wheel carries ./configs as mgsd_jax/configs."""

from setuptools import find_packages, setup

CONFIGS = "mgsd_jax.configs"

setup(
    packages=[
        *find_packages(include=["mgsd_jax", "mgsd_jax.*"]),
        *(CONFIGS, f"{CONFIGS}.study"),
    ],
    package_dir={CONFIGS: "configs"},
)

"""What pyproject.toml cannot say: a wheel carries ./configs as mgsd_jax/configs, and the assets.

To setuptools every folder is a package, and it warns at length of one with files that is not named.
"""

from setuptools import find_packages, setup

CONFIGS = "mgsd_jax.configs"

setup(
    packages=[
        *find_packages(include=["mgsd_jax", "mgsd_jax.*"]),
        *(CONFIGS, f"{CONFIGS}.study"),
        *("mgsd_jax.assets", "mgsd_jax.assets.nano_base"),
    ],
    package_dir={CONFIGS: "configs"},
)

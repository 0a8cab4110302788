"""transformers' AutoProcessor, also where torchvision is absent or made for another torch.

It wants torchvision for a part that reads videos, which nothing here uses.
"""

import contextlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from mgsd_jax.data.processor import load_processor

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def load_torchvision() -> Any:
    """Imports torchvision; one whose compiled operators do not load beside this torch gets none.

    No processor calls them. Returns what has to be kept as long as torchvision is used.
    """
    import torch

    with contextlib.suppress(RuntimeError):
        import torchvision

        return torchvision
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    names = re.findall(r'register_meta\("(\w+)"\)|register_fake\("torchvision::(\w+)"\)', source)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted({a or b for a, b in names}):
        try:
            torch._C._jit_get_schemas_for_operator(f"torchvision::{name}")[0]
        except IndexError:
            library.define(f"{name}() -> Tensor")
    return library


def without_videos(folder: str | Path) -> Any:
    """The processor of a folder, its part for videos left out."""
    from transformers import AutoTokenizer, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class PictureProcessor(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
            return type(argument)

    return PictureProcessor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        chat_template=load_processor(folder).chat_template,
    )


def make_loadable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets AutoProcessor load: itself with torchvision, else `without_videos` in its place.

    Returns what has to be kept as long as it is used.
    """
    if HAS_TORCHVISION:
        return load_torchvision()
    import transformers

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", without_videos)
    return None


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the Python of a model card leaves when it runs in its folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, str(folder / "README.md"), "exec"), names)
    return names

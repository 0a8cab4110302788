"""Low-rank adapters: the no-op at the start, merging, folders for PEFT."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_model import Row, random_params, random_rows, tiny, to_inputs
from safetensors.numpy import load_file

from mgsd_jax import tree
from mgsd_jax.config import LoraConfig
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model import lora
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.layers import Linear
from mgsd_jax.model.qwen3vl import Qwen3VL, head, logits
from mgsd_jax.weights import peft

CONFIG = tiny(num_hidden_layers=4)
DECODER = r"language/.*/(q|k|v|o|gate|up|down)_proj"
TARGETS = {
    "decoder": DECODER,
    "queries_of_late_layers": r"language/layers/self_attn/q_proj",
    "vision": r"visual/.*/(qkv|proj|linear_fc1)$",  # patch_embed's tensor is a `proj` too
    "everything": "",
}
BATCH = [(3, (4, 4), 5), (2, (4, 8), 6)]


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return random_rows(CONFIG, BATCH)


@pytest.fixture(scope="module")
def inputs(rows: list[Row]) -> Inputs:
    return to_inputs(CONFIG, rows, side="left")


def model_logits(config: ModelConfig, params: dict, adapters: dict | None, inputs: Inputs) -> Any:
    variables = {"params": params} if adapters is None else {"params": params, "adapters": adapters}
    hidden: Any = Qwen3VL(config).apply(variables, inputs, method="hidden")
    return logits(hidden, head(params))


# compiling is most of what these tests cost, and the tiny model needs no optimizing
FAST = {"xla_backend_optimization_level": 0}
our_logits = jax.jit(model_logits, static_argnums=0, compiler_options=FAST)


def spec_of(name: str, rank: int = 3, alpha: float = 6.0) -> LoraConfig:
    return LoraConfig(rank, alpha, TARGETS[name])


def random_adapters(params: dict, spec: LoraConfig, seed: int = 0) -> dict:
    """Adapters whose `b` is not zero, large enough to change the logits."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.Array) -> jax.Array:
        is_b = path.endswith("/b")
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32) if is_b else leaf

    return tree.map_named(draw, lora.init_adapters(params, spec, jax.random.key(seed)))


def trained_part(adapters: dict) -> dict:
    """What an optimizer sees."""
    return tree.partition(adapters, lambda path, _: not path.endswith("/scale"))[0]


def assert_same_tree(got: dict, want: dict) -> None:
    assert [path for path, _ in tree.named_leaves(got)] == [p for p, _ in tree.named_leaves(want)]
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", TARGETS)
def test_fresh_adapters_change_no_bit(name: str, params: dict, inputs: Inputs) -> None:
    adapters = lora.init_adapters(params, spec_of(name), jax.random.key(0))
    got = our_logits(CONFIG, params, adapters, inputs)
    np.testing.assert_array_equal(got, our_logits(CONFIG, params, None, inputs))
    assert_same_tree(lora.merge(params, adapters), params)


@pytest.mark.parametrize("name", TARGETS)
def test_merging_equals_running_with_adapters(name: str, params: dict, inputs: Inputs) -> None:
    adapters = random_adapters(params, spec_of(name))
    with_adapters = our_logits(CONFIG, params, adapters, inputs)
    merged = our_logits(CONFIG, lora.merge(params, adapters), None, inputs)
    plain = our_logits(CONFIG, params, None, inputs)
    valid = inputs.valid
    assert np.abs(with_adapters - plain)[valid].max() > 0.05
    np.testing.assert_allclose(merged[valid], with_adapters[valid], atol=1e-5, rtol=1e-5)


def test_merging_adds_the_scaled_product_and_keeps_the_dtype(params: dict) -> None:
    spec = LoraConfig(2, 5.0, "down_proj")
    adapters = random_adapters(params, spec)
    merged = lora.merge(params, adapters)
    node = adapters["language"]["layers"]["mlp"]["down_proj"]
    kernel = params["language"]["layers"]["mlp"]["down_proj"]["kernel"]
    for layer in range(kernel.shape[0]):
        want = kernel[layer] + 2.5 * (np.asarray(node["a"][layer]) @ np.asarray(node["b"][layer]))
        got = merged["language"]["layers"]["mlp"]["down_proj"]["kernel"][layer]
        np.testing.assert_allclose(got, want, atol=1e-6)
    untouched = merged["language"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert untouched is params["language"]["layers"]["mlp"]["up_proj"]["kernel"]
    narrow = lora.merge(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params), adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}


def test_shapes_and_draws(params: dict) -> None:
    spec = LoraConfig(64, 16.0, "")
    adapters = lora.init_adapters(params, spec, jax.random.key(0))
    assert set(lora.linear_paths(params)) == {
        p.rpartition("/")[0] for p, _ in tree.named_leaves(adapters)
    }
    assert "visual/patch_embed" not in lora.linear_paths(params)
    draws = []
    for path in lora.linear_paths(params):
        *stack, inner, outer = tree.get(params, path)["kernel"].shape
        node = tree.get(adapters, path)
        assert node["a"].shape == (*stack, inner, 64)
        assert node["b"].shape == (*stack, 64, outer)
        assert node["scale"].shape == tuple(stack)
        assert not node["b"].any()
        assert (node["scale"] == 0.25).all()
        draws.append(np.asarray(node["a"]).ravel() * math.sqrt(inner))
        assert np.abs(draws[-1]).max() <= 1
        assert np.abs(draws[-1]).max() > 0.99
    together = np.concatenate(draws)
    assert abs(together.mean()) < 0.005
    assert abs(together.std() - 1 / math.sqrt(3)) < 0.002
    # no draw is used twice
    starts = [tuple(draw[:4]) for draw in draws]
    assert len(set(starts)) == len(starts)


def test_a_draw_depends_on_path_and_key_alone(params: dict) -> None:
    few = lora.init_adapters(params, spec_of("queries_of_late_layers"), jax.random.key(0))
    many = lora.init_adapters(params, spec_of("everything"), jax.random.key(0))
    other = lora.init_adapters(params, spec_of("everything"), jax.random.key(1))
    path = "language/layers/self_attn/q_proj/a"
    np.testing.assert_array_equal(tree.get(few, path), tree.get(many, path))
    assert not np.array_equal(tree.get(other, path), tree.get(many, path))


def test_scale_is_not_trained(params: dict, inputs: Inputs) -> None:
    spec = spec_of("decoder")
    adapters = random_adapters(params, spec)
    trained = trained_part(adapters)
    assert {path[-2:] for path, _ in tree.named_leaves(trained)} == {"/a", "/b"}
    assert_same_tree(lora.with_scale(trained, spec), adapters)

    def loss(trained: dict) -> jax.Array:
        return model_logits(CONFIG, params, lora.with_scale(trained, spec), inputs).sum()

    gradient = jax.jit(jax.grad(loss), compiler_options=FAST)(trained)
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_targets_that_match_nothing(params: dict) -> None:
    with pytest.raises(ValueError, match="lora targets: got 'query', want a regex") as caught:
        lora.init_adapters(params, LoraConfig(4, 8.0, "query"), jax.random.key(0))
    assert "language/layers_deepstack/self_attn/q_proj" in str(caught.value)


def test_adapters_that_do_not_fit(params: dict) -> None:
    adapters = lora.init_adapters(params, spec_of("queries_of_late_layers"), jax.random.key(0))
    node = adapters["language"]["layers"]["self_attn"]["q_proj"]
    short = {"language": {"layers": {"self_attn": {"q_proj": node | {"a": node["a"][:1]}}}}}
    with pytest.raises(ValueError, match="adapter language/layers/self_attn/q_proj: got"):
        lora.merge(params, short)
    with pytest.raises(ValueError, match=r"want \['a', 'b', 'scale'\]"):
        lora.merge(params, trained_part(adapters))
    with pytest.raises(ValueError, match="elsewhere"):
        lora.merge(params, {"elsewhere": node})


# PEFT


@pytest.fixture(scope="module")
def torch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch model saved by transformers."""
    pytest.importorskip("torch")
    import helpers_hf

    folder = tmp_path_factory.mktemp("torch")
    helpers_hf.make_model(CONFIG).save_pretrained(folder)
    return folder


def torch_logits(model: Any, rows: list[Row]) -> np.ndarray:
    import helpers_hf
    import torch

    with torch.no_grad():
        return model(**helpers_hf.to_torch(CONFIG, rows, side="left")).logits.numpy()


def load_torch(folder: Path) -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()


@pytest.mark.parametrize("name", TARGETS)
def test_peft_runs_our_adapters(
    name: str, torch_folder: Path, rows: list[Row], inputs: Inputs, tmp_path: Path
) -> None:
    torch_peft = pytest.importorskip("peft")
    import helpers_hf

    model = load_torch(torch_folder)
    params = helpers_hf.to_params(model, CONFIG)
    spec = spec_of(name)
    adapters = random_adapters(params, spec)
    peft.save(adapters, spec, CONFIG, tmp_path / "peft", base_model=str(torch_folder))
    plain = torch_logits(model, rows)
    adapted = torch_peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    loaded = {key for key, _ in adapted.named_parameters() if "lora_" in key}
    assert len(loaded) == len(load_file(tmp_path / "peft" / peft.WEIGHTS_FILE))
    want = torch_logits(adapted, rows)
    got = np.asarray(our_logits(CONFIG, params, adapters, inputs))
    assert np.abs(want - plain)[inputs.valid].max() > 0.05
    np.testing.assert_allclose(got[inputs.valid], want[inputs.valid], atol=1e-4)


def test_joined_adapters_add_what_their_parts_add(params: dict) -> None:
    specs = [LoraConfig(2, 5.0, "q_proj"), LoraConfig(3, 4.0, r"(q|down)_proj")]
    parts = [random_adapters(params, spec, seed) for seed, spec in enumerate(specs)]
    joined, spec = lora.join(parts, specs[0])
    assert (spec.rank, spec.alpha) == (5, 12.5)
    assert_same_tree(lora.with_scale(trained_part(joined), spec), joined)
    one_by_one = lora.merge(lora.merge(params, parts[0]), parts[1])
    for path, want in tree.named_leaves(one_by_one):
        np.testing.assert_allclose(tree.get(lora.merge(params, joined), path), want, atol=1e-6)
    alone, same = lora.join(parts[1:], specs[1])
    assert_same_tree(alone, parts[1])
    assert (same.rank, same.alpha) == (3, 4.0)


def test_the_scale_is_not_rounded_to_bfloat16() -> None:
    """1 / 3 is 0.3340 in bfloat16: what was added was off by 0.2 percent throughout."""
    layer = Linear(4, dtype=jnp.bfloat16)
    one = {"a": jnp.ones((1, 1)), "b": jnp.full((1, 4), 3.0), "scale": jnp.float32(1 / 3)}
    variables = {"params": {"kernel": jnp.zeros((1, 4))}, "adapters": one}
    x = jnp.array([[1.0], [128.0]], jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(layer.apply(variables, x), np.float32)[:, 0], x[:, 0])


def test_a_peft_folder_holds_every_value(params: dict, tmp_path: Path) -> None:
    spec = spec_of("decoder")
    adapters, folder = random_adapters(params, spec), tmp_path / "adapters"
    peft.save(adapters, spec, CONFIG, folder, base_model="base/model")
    settings = json.loads((folder / peft.CONFIG_FILE).read_text())
    assert settings["base_model_name_or_path"] == "base/model"
    assert (settings["r"], settings["lora_alpha"]) == (spec.rank, spec.alpha)
    assert settings["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    saved = load_file(folder / peft.WEIGHTS_FILE)
    taps, count = CONFIG.num_deepstack, 0
    for path, node in lora.named_adapters(adapters):
        _, stack, *module = path.split("/")
        for layer, (a, b) in enumerate(zip(node["a"], node["b"], strict=True)):
            number = layer if stack == "layers_deepstack" else layer + taps
            key = f"base_model.model.model.language_model.layers.{number}.{'.'.join(module)}"
            np.testing.assert_array_equal(saved[f"{key}.lora_A.weight"], a.T)
            np.testing.assert_array_equal(saved[f"{key}.lora_B.weight"], b.T)
            count += 2
    assert len(saved) == count


def test_adapters_of_no_linear_are_refused(params: dict, tmp_path: Path) -> None:
    node = random_adapters(params, spec_of("queries_of_late_layers"))["language"]["layers"]
    with pytest.raises(ValueError, match="adapter elsewhere/self_attn/q_proj: got a path"):
        peft.save({"elsewhere": node}, spec_of("decoder"), CONFIG, tmp_path, base_model="base")
    assert not list(tmp_path.iterdir())

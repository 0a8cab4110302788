"""Low-rank adapters: the no-op at the start, merging, PEFT's folders in both directions."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_model import Row, random_params, random_rows, to_inputs
from safetensors.numpy import load_file, save_file

from mgsd_jax import tree
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model.config import ModelConfig, tiny
from mgsd_jax.model.layers import Linear
from mgsd_jax.model.qwen3vl import Qwen3VL, head, logits
from mgsd_jax.weights import lora
from mgsd_jax.weights.lora import LoraSpec

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
    hidden = Qwen3VL(config).apply(variables, inputs, method="hidden")
    return logits(hidden, head(params))


# compiling is most of what these tests cost, and the tiny model needs no optimizing
FAST = {"xla_backend_optimization_level": 0}
our_logits = jax.jit(model_logits, static_argnums=0, compiler_options=FAST)


def spec_of(name: str, rank: int = 3, alpha: float = 6.0) -> LoraSpec:
    return LoraSpec(rank, alpha, TARGETS[name])


def random_adapters(params: dict, spec: LoraSpec, seed: int = 0) -> dict:
    """Adapters whose `b` is not zero, large enough to change the logits."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.Array) -> jax.Array:
        is_b = path.endswith("/b")
        return jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32) if is_b else leaf

    return tree.map_named(draw, lora.init_adapters(params, spec, jax.random.key(seed)))


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
    spec = LoraSpec(2, 5.0, "down_proj")
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
    spec = LoraSpec(64, 16.0, "")
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
    trained = lora.trainable(adapters)
    assert {path[-2:] for path, _ in tree.named_leaves(trained)} == {"/a", "/b"}
    assert_same_tree(lora.with_scale(trained, spec), adapters)

    def loss(trained: dict) -> jax.Array:
        return model_logits(CONFIG, params, lora.with_scale(trained, spec), inputs).sum()

    gradient = jax.jit(jax.grad(loss), compiler_options=FAST)(trained)
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_targets_that_match_nothing(params: dict) -> None:
    with pytest.raises(ValueError, match="lora targets: got 'query', want a regex") as caught:
        lora.init_adapters(params, LoraSpec(4, 8.0, "query"), jax.random.key(0))
    assert "language/layers_deepstack/self_attn/q_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "alpha", "targets", "wanted"),
    [
        (0, 8.0, "", "lora rank: got 0"),
        (4, 0.0, "", "lora alpha: got 0.0"),
        (4, math.nan, "", "lora alpha: got nan"),
        (4, 8.0, "(", "lora targets: got '('"),
    ],
)
def test_bad_specs(rank: int, alpha: float, targets: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wanted)):
        LoraSpec(rank, alpha, targets)


def test_adapters_that_do_not_fit(params: dict) -> None:
    adapters = lora.init_adapters(params, spec_of("queries_of_late_layers"), jax.random.key(0))
    node = adapters["language"]["layers"]["self_attn"]["q_proj"]
    short = {"language": {"layers": {"self_attn": {"q_proj": node | {"a": node["a"][:1]}}}}}
    with pytest.raises(ValueError, match="adapter language/layers/self_attn/q_proj: got"):
        lora.merge(params, short)
    with pytest.raises(ValueError, match=r"want \['a', 'b', 'scale'\]"):
        lora.merge(params, lora.trainable(adapters))
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
    peft = pytest.importorskip("peft")
    import helpers_hf

    model = load_torch(torch_folder)
    params = helpers_hf.to_params(model, CONFIG)
    spec = spec_of(name)
    adapters = random_adapters(params, spec)
    lora.save_peft(adapters, spec, CONFIG, tmp_path / "peft", base_model=str(torch_folder))
    plain = torch_logits(model, rows)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    loaded = {key for key, _ in adapted.named_parameters() if "lora_" in key}
    assert len(loaded) == len(load_file(tmp_path / "peft" / lora.PEFT_WEIGHTS))
    want = torch_logits(adapted, rows)
    got = np.asarray(our_logits(CONFIG, params, adapters, inputs))
    assert np.abs(want - plain)[inputs.valid].max() > 0.05
    np.testing.assert_allclose(got[inputs.valid], want[inputs.valid], atol=1e-4)


LISTED = ["q_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\..*\.down_proj": 5, r"1\.attn\.proj": 1},
    "alpha_pattern": {r"layers\.[02]\.self_attn\.q_proj": 20, "qkv": 0.5},
}


@pytest.mark.parametrize(
    ("modules", "extra"),
    [
        (LISTED, {}),
        (LISTED, {"use_rslora": True}),
        (LISTED, PATTERNS),
        (r".*visual.*\.(attn\.proj|qkv)", {**PATTERNS, "use_rslora": True}),
    ],
)
def test_we_run_adapters_of_peft(
    modules: list[str] | str,
    extra: dict[str, Any],
    torch_folder: Path,
    rows: list[Row],
    inputs: Inputs,
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    import helpers_hf
    import torch

    model = load_torch(torch_folder)
    params = helpers_hf.to_params(model, CONFIG)
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules, lora_dropout=0.0, **extra)
    adapted = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    for key, weight in adapted.named_parameters():
        if "lora_B" in key:
            weight.data = 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(tmp_path)
    adapters, spec = lora.load_peft(tmp_path, CONFIG)
    want = torch_logits(adapted, rows)
    got = np.asarray(our_logits(CONFIG, params, adapters, inputs))
    np.testing.assert_allclose(got[inputs.valid], want[inputs.valid], atol=1e-4)
    # the spec describes the same adapters
    fresh = lora.init_adapters(params, spec, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, adapters)
    assert_same_tree(lora.with_scale(lora.trainable(adapters), spec), adapters)
    if "rank_pattern" not in extra:
        lora.save_peft(adapters, spec, CONFIG, tmp_path / "again", base_model="base")
        again, theirs = (load_file(f / lora.PEFT_WEIGHTS) for f in (tmp_path / "again", tmp_path))
        assert again.keys() == theirs.keys()
        assert all(np.array_equal(again[key], theirs[key]) for key in theirs)


def test_joined_adapters_add_what_their_parts_add(params: dict) -> None:
    specs = [LoraSpec(2, 5.0, "q_proj"), LoraSpec(3, 4.0, r"(q|down)_proj")]
    parts = [random_adapters(params, spec, seed) for seed, spec in enumerate(specs)]
    joined, spec = lora.join(parts, specs[0])
    assert (spec.rank, spec.alpha) == (5, 12.5)
    assert_same_tree(lora.with_scale(lora.trainable(joined), spec), joined)
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


@pytest.fixture
def peft_folder(params: dict, tmp_path: Path) -> Path:
    spec = spec_of("decoder")
    folder = tmp_path / "adapters"
    lora.save_peft(random_adapters(params, spec), spec, CONFIG, folder, base_model="base/model")
    return folder


def test_peft_round_trip_is_exact(params: dict, peft_folder: Path) -> None:
    spec = spec_of("decoder")
    adapters, read = lora.load_peft(peft_folder, CONFIG)
    assert_same_tree(adapters, random_adapters(params, spec))
    assert (read.rank, read.alpha) == (spec.rank, spec.alpha)
    settings = json.loads((peft_folder / lora.PEFT_CONFIG).read_text())
    assert settings["base_model_name_or_path"] == "base/model"
    assert settings["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        *(
            ({"init_lora_weights": start}, f"init_lora_weights: got {start!r}, want one of")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new")
        ),
        ({"use_dora": True}, "use_dora: got True, want False"),
        ({"use_qalora": True}, "use_qalora: got True, want it absent or off"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: got [5], want None"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication: got [[0, 2], [1, 3]]"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices: got [7], want None"),
        ({"target_parameters": ["x"]}, "target_parameters: got ['x'], want None"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: got True, want False"),
        ({"lora_bias": True}, "lora_bias: got True, want False"),
        ({"a_field_of_tomorrow": 0.5}, "a_field_of_tomorrow: got 0.5, want it absent or off"),
        ({"bias": "all"}, "bias: got 'all', want 'none'"),
        ({"bias": None}, "bias: got None, want 'none'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: got ['lm_head'], want None"),
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', want 'LORA'"),
        ({"r": 0}, "r: got 0"),
        ({"r": True}, "r: got True"),
        ({"lora_alpha": None}, "lora_alpha: got None"),
        ({"lora_alpha": True}, "lora_alpha: got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha: got nan"),
        ({"rank_pattern": [2]}, "rank_pattern: got [2], want an object"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj: got 0, want a whole number"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: q_proj: got 'x', want a number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: got '(' (missing ), unterminated"),
    ],
)
def test_peft_settings_with_other_mathematics(change: dict, wanted: str, peft_folder: Path) -> None:
    file = peft_folder / lora.PEFT_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(wanted)) as caught:
        lora.load_peft(peft_folder, CONFIG)
    assert lora.PEFT_CONFIG in str(caught.value)


def test_no_field_of_peft_is_ignored_unknown(peft_folder: Path) -> None:
    """Every field of the installed PEFT is read, or known to be idle, or refused when it is set."""
    peft = pytest.importorskip("peft")
    file = peft_folder / lora.PEFT_CONFIG
    settings = json.loads(file.read_text())
    for field in dataclasses.fields(peft.LoraConfig):
        if field.name in (*lora.PEFT_READ, *lora.PEFT_IDLE):
            continue
        file.write_text(json.dumps(settings | {field.name: {"anything": 1}}))
        with pytest.raises(ValueError, match=f"{field.name}: got {{'anything': 1}}"):
            lora.load_peft(peft_folder, CONFIG)
    file.write_text(json.dumps(settings | {"use_something": False, "its_config": {}}))
    lora.load_peft(peft_folder, CONFIG)


def test_peft_problems_are_in_one_message(peft_folder: Path) -> None:
    file = peft_folder / lora.PEFT_WEIGHTS
    loaded = load_file(file)
    prefix = "base_model.model.model.language_model.layers"
    del loaded[f"{prefix}.1.self_attn.q_proj.lora_A.weight"]
    loaded[f"{prefix}.3.mlp.up_proj.lora_B.weight"] = np.zeros((2, 2), np.float32)
    loaded[f"{prefix}.9.mlp.up_proj.lora_B.weight"] = np.zeros((2, 2), np.float32)
    save_file(loaded, file)
    with pytest.raises(ValueError, match="3 problems") as caught:
        lora.load_peft(peft_folder, CONFIG)
    for part in (
        "1.self_attn.q_proj.lora_A.weight: got no such tensor, want float[3, 32]",
        "3.mlp.up_proj.lora_B.weight: got F32[2, 2], want",
        "9.mlp.up_proj.lora_B.weight: got a tensor that has no Linear",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", [lora.PEFT_CONFIG, lora.PEFT_WEIGHTS])
def test_peft_file_missing_or_broken(name: str, peft_folder: Path) -> None:
    (peft_folder / name).write_text("{")
    with pytest.raises(ValueError, match=name):
        lora.load_peft(peft_folder, CONFIG)
    (peft_folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: got no such file"):
        lora.load_peft(peft_folder, CONFIG)

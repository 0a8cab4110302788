"""Low-rank adapters beside the stacked kernels, and PEFT's folders of them.

An adapter stands at the path of its Linear, as the model's collection 'adapters' wants it:
`a` [L, in, rank], `b` [L, rank, out], `scale` [L] = alpha / rank; no L where nothing is stacked.
`scale` is no state: `trainable` drops it, so that an optimizer neither sees nor decays it, and
`with_scale` puts it back on the way into the model.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgsd_jax import tree
from mgsd_jax.checks.fields import read_json
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.weights import files
from mgsd_jax.weights.files import DTYPES, FloatType, TensorSpec
from mgsd_jax.weights.table import TABLE, Leaf, Tree, leaves, put

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
# What a PEFT config may say: settings that change no adapted weight once training is over ...
PEFT_IDLE = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "lora_dropout", "eva_config"),
    # which modules are adapted: the tensors say it
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # what these speak of is refused below
    *("megatron_core", "qalora_group_size"),
)
# ... those that are read ...
PEFT_READ = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# ... and those that would be other mathematics. Any other key has to be off: null, false or empty.
PEFT_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}
# Ways to start that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the
# adapter's first product off them, which nothing in the folder tells.
PEFT_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_CONVOLUTIONS = {row.path.removesuffix("/kernel") for row in TABLE if row.layout == "conv"}


@dataclass(frozen=True)
class LoraSpec:
    """Which Linears get an adapter, and its size; `targets` is searched for in their paths."""

    rank: int
    alpha: float
    targets: str

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora rank: got {self.rank}, want at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora alpha: got {self.alpha}, want a number above 0")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"lora targets: got {self.targets!r} ({error}), want a regex"
            ) from None


def linear_paths(params: Tree) -> tuple[str, ...]:
    """Return the paths that can carry an adapter, such as 'language/layers/mlp/up_proj'."""
    names = (path for path, _ in tree.named_leaves(params))
    kernels = (path.removesuffix("/kernel") for path in names if path.endswith("/kernel"))
    return tuple(path for path in kernels if path not in _CONVOLUTIONS)


def init_adapters(params: Tree, spec: LoraSpec, rng: jax.Array) -> Tree:
    """Return fresh float32 adapters for every Linear that `spec.targets` is found in.

    `a` is uniform within 1 / sqrt(in), `b` is zero: an exact no-op. The draw depends on the path
    and `rng` alone, so more targets leave the others as they were. `params` may be abstract.
    Source: PEFT `LoraLayer.reset_lora_parameters`, kaiming uniform with a = sqrt(5).
    Raises ValueError, listing the candidates, where the regex is found in none.
    """
    candidates = linear_paths(params)
    targets = [path for path in candidates if re.search(spec.targets, path)]
    if not targets:
        listed = ", ".join(candidates)
        raise ValueError(
            f"lora targets: got {spec.targets!r}, want a regex found in one of {listed}"
        )
    adapters: Tree = {}
    for path in targets:
        *stack, inner, outer = tree.get(params, path)["kernel"].shape
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        bound = 1 / math.sqrt(inner)
        a = jax.random.uniform(key, (*stack, inner, spec.rank), jnp.float32, -bound, bound)
        put(adapters, f"{path}/a", a)
        put(adapters, f"{path}/b", jnp.zeros((*stack, spec.rank, outer), jnp.float32))
    return with_scale(adapters, spec)


def trainable(adapters: Tree) -> Tree:
    """Return the adapters without their scales: what is optimized and checkpointed."""
    return tree.partition(adapters, lambda path, _: not path.endswith("/scale"))[0]


def with_scale(adapters: Tree, spec: LoraSpec) -> Tree:
    """Return `trainable` adapters with the scale alpha / rank of `spec` at each."""
    scaled: Tree = {}
    for path, leaf in tree.named_leaves(adapters):
        put(scaled, path, leaf)
        if path.endswith("/a"):
            scale = jnp.full(leaf.shape[:-2], spec.alpha / spec.rank, jnp.float32)
            put(scaled, f"{path.removesuffix('/a')}/scale", scale)
    return scaled


def merge(params: Tree, adapters: Tree) -> Tree:
    """Return parameters with a @ b * scale added to the kernels, in float32, kept in their dtype.

    Raises ValueError where an adapter has no kernel or not its kernel's shape.
    """
    for path, _ in _adapter_nodes(adapters):
        tree.get(params, f"{path}/kernel")
    return tree.map_named(merger(adapters), params)


def merger(adapters: Tree) -> Callable[[str, jax.Array], jax.Array]:
    """Return what `merge` makes of one parameter, as a function of its path and value."""
    pairs = dict(_adapter_nodes(adapters))

    def merged(path: str, leaf: jax.Array) -> jax.Array:
        node = pairs.get(path.removesuffix("/kernel")) if path.endswith("/kernel") else None
        if node is None:
            return leaf
        want = (*node["a"].shape[:-1], node["b"].shape[-1])
        if leaf.shape != want or node["a"].shape[-1] != node["b"].shape[-2]:
            shapes = {name: list(part.shape) for name, part in sorted(node.items())}
            raise ValueError(
                f"adapter {path.removesuffix('/kernel')}: got {shapes}, want to fit a kernel "
                f"{list(leaf.shape)}"
            )
        return _merge_kernel(leaf, node["a"], node["b"], node["scale"])

    return merged


@jax.jit
def _merge_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    a, b = (x.astype(jnp.float32) for x in (a, b))
    delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * scale[..., None, None]
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)


def save_peft(
    adapters: Tree,
    spec: LoraSpec,
    config: ModelConfig,
    folder: str | Path,
    *,
    base_model: str,
    dtype: FloatType = "float32",
) -> None:
    """Write the adapters into `folder`, made if absent, as PEFT, vLLM and SGLang load them.

    `base_model` is what the folder names as the model that it adapts. Adapters are fetched whole:
    they are small. Every process takes part where they are sharded, the first one writes.
    """
    specs: list[TensorSpec] = []
    values: list[np.ndarray] = []
    modules: list[str] = []
    for path, node in _adapter_nodes(adapters):
        leaf = _kernel_leaf(config, path)
        for name, part in (("lora_A", _fetch(node["a"])), ("lora_B", _fetch(node["b"]))):
            stack = part if leaf.is_stacked else part[None]
            for hf_name, value in zip(leaf.names, stack, strict=True):
                module = hf_name.removesuffix(".weight")
                key = f"{PEFT_PREFIX}{module}.{name}.weight"
                specs.append(TensorSpec(key, value.shape[::-1], dtype))
                values.append(value.T.astype(DTYPES[dtype]))
                modules += [module] if name == "lora_A" else []
    if jax.process_index() != 0:
        return
    settings = {
        **PEFT_PLAIN,
        "rank_pattern": {},
        "alpha_pattern": {},
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": _target_modules(modules, config),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(folder / PEFT_WEIGHTS, specs, values, files.METADATA)
    files.write_json(folder / PEFT_CONFIG, settings)


def load_peft(folder: str | Path, config: ModelConfig) -> tuple[Tree, LoraSpec]:
    """Return the adapters in a PEFT folder as float32, and the spec that describes them.

    Rank-stabilised scaling, ranks and alphas of single modules become one rank and one alpha (see
    `join`). Raises one ValueError that lists every setting with other mathematics (PiSSA, DoRA,
    saved modules, ...) or unknown, else every tensor missing, unknown or of a wrong shape; a stack
    must be adapted in all of its layers.
    """
    folder = Path(folder)
    settings = read_json(folder / PEFT_CONFIG)
    _check_peft(settings, folder / PEFT_CONFIG)
    handle = files.open_tensors(folder / PEFT_WEIGHTS)
    unread = set(handle.keys())
    problems: list[str] = []
    adapters: Tree = {}
    for leaf in leaves(config):
        if leaf.layout != "transpose":
            continue
        modules = [name.removesuffix(".weight") for name in leaf.names]
        keys = [
            [f"{PEFT_PREFIX}{module}.{name}.weight" for name in ("lora_A", "lora_B")]
            for module in modules
        ]
        if not unread & {key for pair in keys for key in pair}:
            continue
        unread -= {key for pair in keys for key in pair}
        outer, inner = leaf.hf_shape
        sizes = [_peft_size(settings, module) for module in modules]
        found: list[tuple[Any, Any]] = [
            (
                _peft_tensor(handle, key_a, (rank, inner), problems),
                _peft_tensor(handle, key_b, (outer, rank), problems),
            )
            for (key_a, key_b), (rank, _) in zip(keys, sizes, strict=True)
        ]
        if problems:
            continue
        widest = max(rank for rank, _ in sizes)
        node = {
            "a": np.stack([_widen(a, 0, widest).T for a, _ in found]),
            "b": np.stack([_widen(b, 1, widest).T for _, b in found]),
            "scale": np.array([alpha / rank for rank, alpha in sizes], np.float32),
        }
        for name, value in node.items():
            path = leaf.path.removesuffix("kernel") + name
            put(adapters, path, value if leaf.is_stacked else value[0])
    problems += [f"{key}: got a tensor that has no Linear to adapt" for key in sorted(unread)]
    if not problems and not adapters:
        problems.append("got no adapters at all, want at least one")
    if problems:
        raise files.problem_list(f"adapters in {folder} do not fit the config", problems)
    return join([adapters], LoraSpec(*_peft_size(settings, ""), ""))


def join(parts: Sequence[Tree], size: LoraSpec) -> tuple[Tree, LoraSpec]:
    """Return adapters that add what all `parts` add, of one rank and scaled as `size` is.

    The parts of a Linear lie side by side along the rank, zeros fill up to the largest; where a
    part has another scale, its `b` takes the ratio. The spec names the Linears by their paths.
    """
    nodes: dict[str, list[Tree]] = {}
    for part in parts:
        for path, node in _adapter_nodes(part):
            nodes.setdefault(path, []).append(node)
    rank = max(sum(node["a"].shape[-1] for node in group) for group in nodes.values())
    scale = np.float32(size.alpha / size.rank)
    joined: Tree = {}
    for path, group in nodes.items():
        ratios = [np.asarray(node["scale"] / scale)[..., None, None] for node in group]
        a = np.concatenate([node["a"] for node in group], -1)
        b = np.concatenate([node["b"] * r for node, r in zip(group, ratios, strict=True)], -2)
        put(joined, f"{path}/a", jnp.asarray(_widen(a, -1, rank)))
        put(joined, f"{path}/b", jnp.asarray(_widen(b, -2, rank)))
    alpha = size.alpha if rank == size.rank else size.alpha * rank / size.rank
    targets = "|".join(re.escape(path) for path in sorted(nodes))
    spec = LoraSpec(rank, alpha, f"^({targets})$")
    return with_scale(joined, spec), spec


def _widen(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return the values with zeros behind them up to `size` along an axis."""
    pads = [(0, 0)] * values.ndim
    pads[axis] = (0, size - values.shape[axis])
    return np.pad(values, pads)


def _adapter_nodes(adapters: Tree) -> Iterator[tuple[str, Tree]]:
    """Yield (path of the Linear, {'a', 'b', 'scale'}); ValueError where a node is not that."""
    nodes: dict[str, Tree] = {}
    for path, leaf in tree.named_leaves(adapters):
        linear, _, name = path.rpartition("/")
        nodes.setdefault(linear, {})[name] = leaf
    for path, node in nodes.items():
        if node.keys() != {"a", "b", "scale"}:
            raise ValueError(f"adapter {path}: got {sorted(node)}, want ['a', 'b', 'scale']")
        yield path, node


def _kernel_leaf(config: ModelConfig, path: str) -> Leaf:
    for leaf in leaves(config):
        if leaf.path == f"{path}/kernel" and leaf.layout == "transpose":
            return leaf
    raise ValueError(f"adapter {path}: got a path that is no Linear of the config")


def _fetch(value: jax.Array) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        mesh = value.sharding.mesh  # type: ignore[attr-defined]
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        value = jax.jit(lambda x: x, out_shardings=whole)(value)
    return np.asarray(value)


def _target_modules(modules: list[str], config: ModelConfig) -> list[str]:
    """Return the adapted modules as PEFT matches them: by last name where that names no other."""
    weights = [name for leaf in leaves(config) for name in leaf.names if name.endswith(".weight")]
    others = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name in weights
        if name.removesuffix(".weight") not in set(modules)
    }
    last_names = ((module, module.rpartition(".")[2]) for module in modules)
    return sorted({module if last in others else last for module, last in last_names})


def _check_peft(settings: dict[str, Any], source: Path) -> None:
    """Raise ValueError that lists what is malformed, unknown or other mathematics."""
    start = settings.get("init_lora_weights", True)
    problems = [
        f"{key}: got {value!r}, want {PEFT_PLAIN[key]!r}"
        if key in PEFT_PLAIN
        else f"{key}: got {value!r}, want it absent or off: what it does is not written here"
        for key, value in settings.items()
        if value != PEFT_PLAIN.get(key)
        and (value or PEFT_PLAIN.get(key))
        and key not in (*PEFT_IDLE, *PEFT_READ, "init_lora_weights")
    ]
    if start not in PEFT_STARTS:
        problems.append(
            f"init_lora_weights: got {start!r}, want one of {PEFT_STARTS}: the base weights of the "
            "others are changed too; save the adapters with PEFT's "
            "path_initial_model_for_weight_conversion, or merge them into the model"
        )
    wanted = (
        ("r", "rank_pattern", _is_rank, "a whole number of at least 1"),
        ("lora_alpha", "alpha_pattern", _is_alpha, "a number above 0"),
    )
    for key, pattern_key, is_right, what in wanted:
        patterns = settings.get(pattern_key) or {}
        if not isinstance(patterns, dict):
            problems.append(f"{pattern_key}: got {patterns!r}, want an object")
            continue
        named = {f"{pattern_key}: {pattern}": value for pattern, value in patterns.items()}
        for name, value in {key: settings.get(key), **named}.items():
            if not is_right(value):
                problems.append(f"{name}: got {value!r}, want {what}")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{pattern_key}: got {pattern!r} ({error}), want a regex")
    if problems:
        raise files.problem_list(str(source), problems)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and value is not True and 0 < value < math.inf


def _peft_size(settings: dict[str, Any], module: str) -> tuple[int, float]:
    """Return (rank, alpha) of a module's adapter: its own where a pattern ends its name."""

    def own(key: str, pattern_key: str) -> Any:
        for pattern, value in (settings.get(pattern_key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return settings[key]

    rank, alpha = own("r", "rank_pattern"), own("lora_alpha", "alpha_pattern")
    if settings.get("use_rslora"):  # alpha / sqrt(r) in place of alpha / r
        alpha *= math.sqrt(rank)
    return rank, float(alpha)


def _peft_tensor(
    handle: Any, key: str, shape: tuple[int, ...], problems: list[str]
) -> np.ndarray | None:
    if key not in handle.keys():  # noqa: SIM118 (an open file is no dict)
        problems.append(f"{key}: got no such tensor, want float{list(shape)}")
        return None
    problem = files.tensor_problem(handle, key, shape)
    if problem is not None:
        problems.append(problem)
        return None
    return handle.get_tensor(key).astype(np.float32)

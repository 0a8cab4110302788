"""The options of distillation beyond the published recipe, on a tiny model."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers_tiny import tiny_config
from test_losses import hellinger

from mgsd_jax import config as c
from mgsd_jax.config import resolve
from mgsd_jax.data import loaders, segments
from mgsd_jax.data.batch import Inputs
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.model import qwen3vl
from mgsd_jax.parallel.means import Mean
from mgsd_jax.sampling import sampler
from mgsd_jax.stages import (
    distillation,
    distillation_rollout,
    distillation_step,
    generate,
    grounding,
    init,
    loading,
)
from mgsd_jax.stages import distillation_validation as validation
from mgsd_jax.training import divergences, guards, lessons, optimizer, sessions, trainable


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model, a batch of prompts, and what the model answered."""

    config: c.Config
    loaded: Any
    frozen: Any
    trained: Any
    prompts: loaders.PromptRows
    sampled: sampler.Rollout


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    workdir = tmp_path_factory.mktemp("distillation")
    config = tiny_config(pathlib.Path(workdir), layers=1)
    # Longer than the student's prompts.
    longer = tuple(width + 8 for width in c.sizes(config.data.teacher_buckets))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, teacher_buckets=longer)
    )
    config = c.resolve(config, str(workdir))
    init.run(config, str(workdir))
    generate.run(config, str(workdir))
    loaded = loading.load(config.model.path, config)
    settings = config.distillation
    trained, frozen = trainable.split(
        loaded.params, settings.optim, settings.lora, jax.random.key(0)
    )
    loader = loaders.prompt_loader(
        loaders.load_boards(resolve(config, str(workdir)), "train"),
        load_encoder(config.data, loaded.processor),
        context="state",
        batch_size=4,
        rollouts=1,
        seed=0,
        reference_share=0.5,
        response_length=98,
    )
    prompts = next(loader)
    rng = np.random.default_rng(0)
    tokens: Any = rng.integers(10, 200, (4, 98)).astype(np.int32)
    mask: Any = np.arange(98) < np.array([[3], [98], [40], [7]])
    zeros: Any = np.zeros((4, 98), np.float32)
    sampled = sampler.Rollout(tokens, mask, zeros, zeros[:, 0] > 0, zeros > 0)
    return Setup(config, loaded, frozen, trained, prompts, sampled)


def teacher_params(setup: Setup) -> Any:
    """Another model of the same shape."""
    return jax.tree.map(lambda x: x * 1.1 + 0.01, setup.loaded.params)


@functools.cache
def updater(
    model: qwen3vl.Qwen3VL, settings: c.DistillationConfig, banned: tuple[int, ...]
) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """The program of an update, traced and compiled once for all tests, and its optimizer."""
    tx = optax.sgd(1e-2)
    return distillation_step.make_update(model, model, settings, tx, banned), tx


def one_update(
    setup: Setup, weights: Any = None, records: Any = None, parts: Any = (), **options: Any
) -> tuple[Any, ...]:
    """(state, loss, statistics) after an update with these settings."""
    settings = dataclasses.replace(setup.config.distillation, **options)
    banned = setup.loaded.processor.banned_ids
    update, tx = updater(setup.loaded.model, settings, banned)
    trained = jax.tree.map(np.array, setup.trained)
    state = optimizer.init(trained, tx, keeps_average=settings.teacher_decay > 0)
    batch = setup.prompts.batch
    batch = distillation_step.DistillationBatch(
        batch.student, batch.teacher, setup.sampled.tokens, setup.sampled.mask, weights
    )
    parts = dict(parts)
    state = dataclasses.replace(state, memory=parts.pop("memory", None))
    batch = batch._replace(**parts)
    state, measured, stats = update(state, setup.frozen, teacher_params(setup), batch, records)
    return jax.device_get((state, measured["loss"], stats))


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


read = jax.jit(qwen3vl.apply_hidden, static_argnums=0)


def plain_logprobs(setup: Setup, prompt: Any, params: Any) -> np.ndarray:
    """[counted tokens, V] by a plain forward over prompt and response, in float64."""
    sampled = setup.sampled
    whole = qwen3vl.append_response(prompt, sampled.tokens, sampled.mask)
    hidden = read(setup.loaded.model, {"params": params}, whole)
    scores = np.array(qwen3vl.logits(hidden, qwen3vl.head(params)), np.float64)
    scores[..., list(setup.loaded.processor.banned_ids)] = -1e30
    rows, columns = np.nonzero(sampled.mask)
    scores = scores[rows, prompt.tokens.shape[1] + columns - 1]  # what predicts each token
    scores -= scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def both(setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    """Logprobs of the student and of the teacher, whose prompts differ in length."""
    prompts = setup.prompts.batch
    assert prompts.student.tokens.shape != prompts.teacher.tokens.shape
    student = plain_logprobs(setup, prompts.student, setup.loaded.params)
    return student, plain_logprobs(setup, prompts.teacher, teacher_params(setup))


@pytest.fixture(scope="module")
def plain(setup: Setup) -> tuple[Any, ...]:
    """(state, loss, statistics) of an update without any option."""
    return one_update(setup)


Both = tuple[np.ndarray, np.ndarray]
Plain = tuple[Any, ...]


def of_sampled(setup: Setup, values: np.ndarray) -> np.ndarray:
    """What [counted tokens, V] say of the tokens that were sampled."""
    tokens = np.asarray(setup.sampled.tokens)[np.asarray(setup.sampled.mask)]
    return np.take_along_axis(values, tokens[:, None], -1)[:, 0]


def test_both_readers_are_asked_for_the_token_that_follows(
    setup: Setup, both: Both, plain: Plain
) -> None:
    stats = plain[2]
    found = stats.student_logprob, stats.teacher_logprob
    for logprobs, got in zip(both, found, strict=True):
        want = of_sampled(setup, logprobs)
        np.testing.assert_allclose(np.asarray(got)[setup.sampled.mask], want, atol=1e-4)


@pytest.mark.parametrize("objective", ["reverse_kl", "forward_kl", "jsd", "sampled_reverse_kl"])
def test_the_loss_of_an_update_is_the_divergence_that_the_config_names(
    setup: Setup, both: Both, objective: str
) -> None:
    p, q = both
    middle = np.logaddexp(p, q) - np.log(2)
    wanted = {
        "reverse_kl": (np.exp(p) * (p - q)).sum(-1),
        "forward_kl": (np.exp(q) * (q - p)).sum(-1),
        "jsd": 0.5 * (np.exp(p) * (p - middle) + np.exp(q) * (q - middle)).sum(-1),
        "sampled_reverse_kl": of_sampled(setup, p - q),
    }
    loss = one_update(setup, objective=objective)[1]
    assert float(loss.value) == pytest.approx(wanted[objective].mean(), rel=1e-4)


def test_a_step_learns_with_a_divergence_from_outside(
    setup: Setup, both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(divergences.DIVERGENCES, "hellinger", hellinger)
    p, q = both
    state, loss, _ = one_update(setup, objective="hellinger")
    want = ((np.exp(p / 2) - np.exp(q / 2)) ** 2).sum(-1).mean()
    assert float(loss.value) == pytest.approx(want, rel=1e-4)
    assert not jax.tree.all(jax.tree.map(np.array_equal, state.params, setup.trained))


def test_weights_of_one_change_nothing_and_others_weigh(setup: Setup, plain: Plain) -> None:
    mask = setup.sampled.mask.astype(np.float32)
    ones = one_update(setup, mask)
    close(ones[0].params, plain[0].params)
    twice = one_update(setup, 2 * mask)  # a factor that all share drops out
    close(twice[0].params, plain[0].params)
    first = mask * (np.arange(4) == 0)[:, None]
    alone = one_update(setup, first)
    kl = plain[2].kl[0]
    np.testing.assert_allclose(
        alone[1].sum / alone[1].weight, kl.sum() / setup.sampled.mask[0].sum(), rtol=1e-4
    )
    close(alone[2].kl, plain[2].kl)  # tokens without weight are still measured


def test_an_update_of_cut_responses_is_the_same(setup: Setup) -> None:
    """Loss, gradients and statistics, where the padding behind the longest response is left out."""
    sampled, short = setup.sampled, np.arange(98) < np.array([[7], [20], [3], [12]])
    sampled = dataclasses.replace(sampled, mask=sampled.mask & short)
    length = 24
    assert 1 < sampled.mask.sum(axis=1).max() <= length
    cut = lessons.first_tokens(sampled, length)
    assert cut.tokens.shape == (4, length) and cut.truncated.shape == (4,)
    whole, part = (one_update(dataclasses.replace(setup, sampled=one)) for one in (sampled, cut))
    close(part[:2], whole[:2])
    assert not any(np.asarray(stat)[:, length:].any() for stat in whole[2])
    close(part[2], jax.tree.map(lambda stat: stat[:, :length], whole[2]))


@pytest.mark.parametrize(("longest", "want"), [(1, 16), (16, 16), (17, 64), (65, 98), (98, 98)])
def test_a_response_bucket_holds_the_longest(longest: int, want: int) -> None:
    settings = c.DistillationConfig(
        c.OptimConfig(lr=0.0),
        sampling=c.SamplingConfig(max_new_tokens=98),
        response_buckets=(16, 64, 128),
    )
    assert lessons.response_bucket(longest, settings) == want


def test_token_weights_follow_the_parts_of_a_response(setup: Setup) -> None:
    processor = setup.loaded.processor
    references = setup.prompts.batch.references
    assert references is not None
    settings = dataclasses.replace(
        setup.config.distillation, token_weights=(("plan", 4.0), ("state", 0.0))
    )
    tokens, mask = references
    groups = segments.segments(processor, tokens, mask)
    weights = lessons.token_weights(groups, settings)
    assert weights is not None
    names = lessons.prompts_lib.SEGMENTS
    for name, weight in (("plan", 4.0), ("state", 0.0), ("sentence", 1.0), ("format", 1.0)):
        inside = groups == names.index(name)
        assert inside.any(), name
        assert (weights[inside] == weight).all(), name
    assert (weights[~mask] == 0).all()
    assert lessons.token_weights(groups, setup.config.distillation) is None


def test_references_stand_in_for_whole_rows(setup: Setup) -> None:
    references = setup.prompts.batch.references
    assert references is not None
    has_one = references.mask[:, 0]
    assert 0 < has_one.sum() < 4
    learned = lessons.with_references(setup.sampled, references)
    for b in range(4):
        want = references if has_one[b] else setup.sampled
        assert (np.asarray(learned.tokens[b]) == want.tokens[b]).all()
        assert (np.asarray(learned.mask[b]) == want.mask[b]).all()
    assert lessons.with_references(setup.sampled, None) is setup.sampled


def test_records_take_their_share_of_the_step(setup: Setup) -> None:
    """Their gradient is scaled down to the divergence's, and a quarter of the step is theirs."""
    records = loaders.grounding_loader(
        loaders.load_boards(setup.config, "train"),
        load_encoder(setup.config.data, setup.loaded.processor),
        mixture=(("questions", 1.0),),
        batch_size=2,
        seed=1,
    )
    records = next(records)
    settings = dataclasses.replace(setup.config.distillation, grounding_share=0.25)
    model, frozen = setup.loaded.model, setup.frozen
    gradients = jax.jit(grounding.gradients, static_argnums=(0, 1))
    asked, measured = gradients(model, settings, setup.trained, frozen, records)
    plain, both = (
        jax.tree.map(
            lambda new, old: (old - new) / 1e-2,
            one_update(setup, records=one, grounding_share=0.25)[0].params,
            setup.trained,
        )
        for one in (None, records)
    )
    norm, other = float(optax.tree.norm(plain)), float(optax.tree.norm(asked))
    assert 0 < norm < other  # or nothing is scaled down here
    want = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * norm / other * b, plain, asked)
    # Read off float32 parameters of up to 1, a gradient is right to 1e-5, and there are 30,000.
    wrong = optax.tree.norm(jax.tree.map(np.subtract, both, want))
    assert float(wrong) < 0.05 * norm
    assert measured["loss"].weight == np.asarray(records.loss_mask).sum()


def shifted(prompt: Inputs) -> Inputs:
    """The prompts with each row's made that of the row after it."""
    assert prompt.pictures is None
    rows = jax.tree.map(lambda x: np.roll(x, -1, axis=0), prompt._replace(positions=None))
    return rows._replace(positions=np.roll(prompt.positions, -1, axis=1))


def test_tokens_weigh_by_what_another_board_would_change(setup: Setup, both: Both) -> None:
    other = shifted(setup.prompts.batch.teacher)
    p, q = both
    elsewhere = plain_logprobs(setup, other, teacher_params(setup))
    kl, changed = (
        np.zeros(setup.sampled.mask.shape, np.float64),
        np.zeros(setup.sampled.mask.shape, np.float64),
    )
    kl[setup.sampled.mask] = (np.exp(p) * (p - q)).sum(-1)
    changed[setup.sampled.mask] = (np.exp(q) * (q - elsewhere)).sum(-1)
    mean = changed.sum(1, keepdims=True) / setup.sampled.mask.sum(1, keepdims=True)
    weights = np.minimum(changed / mean, 1.5)
    assert 0 < (changed / mean > 1.5).sum() < setup.sampled.mask.sum()  # the cap is met
    loss = one_update(setup, parts={"other": other}, contrast_cap=1.5)[1]
    assert float(loss.weight) == pytest.approx(weights.sum(), rel=1e-3)
    assert float(loss.value) == pytest.approx((weights * kl).sum() / weights.sum(), rel=1e-3)


def outcomes(weight: Any, success: Any) -> lessons.Outcomes:
    ones = np.ones(4, bool)
    return lessons.Outcomes(np.float32(weight), np.float32(success), np.zeros(4, np.int32), ones)


def test_rows_weigh_by_their_outcome_once_the_gate_is_open(setup: Setup, plain: Plain) -> None:
    """An update by outcomes is that of the weights which they come to, open or not."""
    found = outcomes([1, 0.25, 0, 1], [1, 0, 0, 1])
    kl = plain[2].kl
    for is_open, rows in ((True, found.weight), (False, np.ones(4))):
        weights = setup.sampled.mask * rows[:, None]
        parts = {"outcomes": found, "memory": lessons.Memory(is_open=jnp.bool_(is_open))}
        state, loss, _ = one_update(setup, parts=parts, wrong_weight=0.25)
        assert float(loss.weight) == pytest.approx(weights.sum())
        assert float(loss.sum) == pytest.approx((weights * kl).sum(), rel=1e-4)
        assert bool(state.memory.is_open) is is_open


def test_success_above_the_running_one_is_made_likelier(setup: Setup, both: Both) -> None:
    """The loss is that of -A log p(token) beside the divergence, A against a baseline of 0.75."""
    p, q = both
    count = setup.sampled.mask.sum(1)
    success = np.array([1, 0, 1, 0])
    advantage = np.repeat(success - 0.75, count)
    want = ((np.exp(p) * (p - q)).sum(-1) - 0.5 * advantage * of_sampled(setup, p)).mean()
    memory = lessons.Memory(tried=jnp.array([4.0]), solved=jnp.array([3.0]))
    parts = {"outcomes": outcomes(np.ones(4), success), "memory": memory}
    state, loss, _ = one_update(setup, parts=parts, success_weight=0.5)
    assert float(loss.value) == pytest.approx(want, rel=1e-4)
    np.testing.assert_allclose(state.memory.tried, [0.9 * 4 + 4], rtol=1e-6)
    np.testing.assert_allclose(state.memory.solved, [0.9 * 3 + 2], rtol=1e-6)


def test_readers_far_apart_are_told_with_what_they_make_of_the_students_prompt(
    setup: Setup, plain: Plain, caplog: pytest.LogCaptureFixture
) -> None:
    batch = distillation_step.DistillationBatch(
        setup.prompts.batch.student,
        setup.prompts.batch.teacher,
        setup.sampled.tokens,
        jnp.asarray(setup.sampled.mask),
    )
    kl = plain[2].kl
    mean = kl.sum() / setup.sampled.mask.sum()
    limits = dataclasses.replace(setup.config.guards, start_kl=float(mean / 2))
    stats: Any = dataclasses.make_dataclass("Stats", ["kl"])(kl)
    p, q = (
        plain_logprobs(setup, setup.prompts.batch.student, params)
        for params in (setup.loaded.params, teacher_params(setup))
    )
    own = (np.exp(p) * (p - q)).sum(-1).mean()
    model, banned = setup.loaded.model, setup.loaded.processor.banned_ids
    measure = distillation_step.make_measure(model, model, setup.config.distillation, banned)
    state = optimizer.init(setup.trained, optax.sgd(0.0))
    for scale, count in ((0.4, 0), (1.0, 1)):
        caplog.clear()
        with caplog.at_level("WARNING", logger="absl"):
            distillation_step.check_start(
                *(limits, 1, measure),
                *(state, setup.frozen, teacher_params(setup), batch),
                stats=dataclasses.replace(stats, kl=kl * scale),
            )
        assert len(caplog.messages) == count
    assert f"{mean:.3g} nats a token" in caplog.messages[0]
    assert f"and {own:.3g} where the teacher reads" in caplog.messages[0]


def test_a_moving_average_that_does_not_move_is_the_student_as_it_was(
    setup: Setup, plain: Plain
) -> None:
    state, loss, _ = one_update(setup, teacher_decay=1.0)
    close(state.average, setup.trained)
    # The student read a picture and the average the text: they differ, and the loss says so.
    assert loss.sum > 0
    moved, again, _ = one_update(setup, teacher_decay=0.75)
    np.testing.assert_allclose(again.sum, loss.sum, rtol=1e-6)
    want = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, setup.trained, moved.params)
    close(moved.average, want)
    assert plain[0].average is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_noise": 1.5}, "distillation.teacher_noise: got 1.5, want 0 to 1"),
        ({"reference_share": -1.0}, "distillation.reference_share: got -1.0"),
        ({"teacher_decay": 2.0}, "distillation.teacher_decay: got 2.0"),
        ({"token_weights": (("plan", -1.0),)}, "distillation.token_weights: got"),
        ({"token_weights": (("plan", 1.0), ("plan", 2.0))}, "want .plan. once"),
        ({"token_weights": (("walls", 1.0),)}, "want one of"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: pathlib.Path, options: dict[str, Any], message: str
) -> None:
    config = tiny_config(tmp_path)
    settings = dataclasses.replace(config.distillation, **options)
    with pytest.raises(ValueError, match=message):
        c.check(dataclasses.replace(config, distillation=settings))


@pytest.mark.slow
def test_a_run_with_every_option_stops_and_resumes_to_the_same_bits(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, layers=1)
    settings = dataclasses.replace(
        config.distillation,
        student="{model}",
        teacher_decay=0.9,
        teacher_noise=0.2,
        token_weights=(("plan", 2.0),),
        reference_share=0.5,
        grounding_share=0.5,
        contrast_cap=4.0,
        wrong_weight=0.3,
        wrong_weight_from=0.5,
        success_weight=0.1,
        replay_steps=2,
        response_buckets=(32, 64),
        sampling=c.SamplingConfig(max_new_tokens=98, draft_tokens=3),
        eval_every=2,
    )
    config = dataclasses.replace(config, distillation=settings)
    seen = Seen(monkeypatch)
    init.run(config, str(tmp_path))
    generate.run(config, str(tmp_path))
    folders = []
    for name, ends in (("whole", (4,)), ("parts", (2, 4))):
        for end in ends:
            # Two steps of a schedule of four: only the number of steps done differs.
            one = dataclasses.replace(
                config,
                data=dataclasses.replace(config.data, folder=str(tmp_path / "data")),
                distillation=dataclasses.replace(
                    config.distillation,
                    steps=end,
                    optim=dataclasses.replace(
                        config.distillation.optim, schedule="constant", warmup=0.0
                    ),
                ),
            )
            folder = tmp_path / name / "distillation"
            if (folder / "config.json").exists():
                (folder / "config.json").unlink()  # another number of steps is another run
            distillation.run(one, str(tmp_path / name))
        folders.append(loading.load(str(tmp_path / name / "distillation"), config).params)
    jax.tree.map(np.testing.assert_array_equal, *folders)
    seen.check()


class Seen:
    """What the steps of a run, and of one that stops after two and resumes, have worked with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[Any, Any]] = []  # prompts and responses
        self.is_open: list[bool] = []
        self.calls: list[str] = []
        finish, measure = sessions.Session.finish_step, distillation_rollout.update_metrics
        validate, make = validation.validate, distillation_rollout.make_batch

        def made(*arguments: Any) -> Any:
            batch = make(*arguments)
            assert all(x is not None for x in (batch.weights, batch.other, batch.outcomes))
            return batch

        def finished(session: Any, step: int, state: Any, measured: Any) -> None:
            assert "questions/loss" in measured
            self.is_open.append(bool(state.memory.is_open))
            finish(session, step, state, measured)

        def measured(said: Any, prompts: Any, *rest: Any) -> Any:
            self.steps.append((prompts, said))
            return measure(said, prompts, *rest)

        def validated(*arguments: Any) -> Any:
            found = validate(*arguments)
            assert "val/blind_same" in found or arguments[-1] > 2  # the first one shows wrong ones
            return found | {"val/success": Mean(1.0, 2.0)}

        monkeypatch.setattr(sessions.Session, "finish_step", finished)
        monkeypatch.setattr(distillation_rollout, "update_metrics", measured)
        monkeypatch.setattr(distillation_rollout, "make_batch", made)
        monkeypatch.setattr(validation, "validate", validated)
        for module, name in ((guards, "check_pictures"), (distillation_step, "check_start")):
            original = getattr(module, name)

            def noted(*arguments: Any, name: str = name, original: Any = original, **o: Any) -> Any:
                self.calls.append(name)
                return original(*arguments, **o)

            monkeypatch.setattr(module, name, noted)

    def check(self) -> None:
        """The gate opens with the second step; a replayed row has the board of its response."""
        assert self.is_open == 2 * [False, True, True, True]
        assert self.calls.count("check_pictures") == 2 * 8  # of prompts, and of records
        assert self.calls.count("check_start") == 2
        for steps in (self.steps[:4], self.steps[4:]):
            for step, (prompts, said) in enumerate(steps):
                slots = prompts.batch.slots
                assert slots[0] == step % 3 and len(slots) == 2
                before, spoken = steps[step - (step - slots[1]) % 3]
                assert step == 0 or before is not prompts
                assert prompts.boards[1] == before.boards[0]
                tokens, mask = spoken.own.tokens[0], spoken.own.mask[0]
                length = min(len(mask), said.own.mask.shape[1])  # of the response bucket
                np.testing.assert_array_equal(said.own.mask[1, :length], mask[:length])
                own = said.own.tokens[1, :length][mask[:length]]
                np.testing.assert_array_equal(own, tokens[:length][mask[:length]])
                assert not mask[length:].any() and not said.own.mask[1, length:].any()


def test_validation_measures_how_far_apart_the_readers_are(setup: Setup, both: Both) -> None:
    """The rows of a step, three at a time, have the step's loss and KL, and those of float64."""
    options = {"batch_size": 3, "sampling": c.SamplingConfig(max_new_tokens=98)}
    settings = dataclasses.replace(setup.config.distillation, objective="jsd", **options)
    config = dataclasses.replace(setup.config, distillation=settings)
    model, processor = setup.loaded.model, setup.loaded.processor
    measure = distillation_step.make_measure(model, model, settings, processor.banned_ids)
    encoder = load_encoder(config.data, processor)
    held_out = validation.HeldOut(setup.prompts.boards, encoder, lambda *_: [], measure)
    speaker = distillation_rollout.make_speaker(setup.loaded, setup.frozen, config)
    given = [
        Answer("", False, None, ids=tuple(tokens[mask].tolist()))
        for tokens, mask in zip(setup.sampled.tokens, setup.sampled.mask, strict=True)
    ]
    state = optimizer.init(setup.trained, optax.sgd(0.0))
    found = validation.distance(held_out, speaker, state, teacher_params(setup), given)
    _, loss, stats = one_update(setup, objective="jsd")
    p, q = both
    middle = np.logaddexp(p, q) - np.log(2)
    jsd = 0.5 * (np.exp(p) * (p - middle) + np.exp(q) * (q - middle)).sum(-1).mean()
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    wanted = {"val/divergence": (jsd, loss.value), "val/kl": (kl, stats.kl.sum() / len(p))}
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].weight == len(p)
        for want in values:
            assert float(found[name].value) == pytest.approx(want, rel=1e-4)


def test_validation_asks_for_no_longer_responses_than_training(tmp_path: pathlib.Path) -> None:
    config = tiny_config(tmp_path)
    for longest, want in ((5, 5), (5000, config.distillation.sampling.max_new_tokens)):
        sampling = dataclasses.replace(config.evaluate.sampling, max_new_tokens=longest)
        evaluate = dataclasses.replace(config.evaluate, sampling=sampling)
        found = validation.how_to_ask(dataclasses.replace(config, evaluate=evaluate))
        assert found.sampling.max_new_tokens == want
        assert dataclasses.replace(found, sampling=sampling) == evaluate

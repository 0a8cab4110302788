"""How many tokens a step has: at most, by the config's buckets and limits, and in a typical one.

What is typical was measured with the tokenizer of Qwen3-VL on the boards of configs/qwen3vl.py.
"""

import dataclasses

from mgsd_jax.config import Config, sizes

ROWS = 32  # boards of the batches that were measured
RESPONSE = 159  # tokens of a response, on average
# The longest of a batch, the median over batches, as `python benchmarks/tokens.py --boards 300`
# printed them: right responses, student's prompts, teacher's by context, records of questions.
LONGEST_RESPONSE = 442
LONGEST_PROMPT = 314
LONGEST_TEACHER = {"state": 549, "state_and_plan": 562, "state_and_all_optimal_plans": 566}
LONGEST_RECORD = 585


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of a row in one step: those that its programs are made for, and those said."""

    record: int  # of grounding: prompt and answer
    prompt: int
    teacher: int
    response: int  # that the update reads
    longest: int  # response of a rollout, if its limit lets it be so long
    kept: float = 1.0  # tokens of the longest response that a pass of decoding keeps


def most(config: Config) -> Lengths:
    """The longest buckets, and every response as long as it may be, one token a pass."""
    data, limit = config.data, config.distillation.sampling.max_new_tokens
    return Lengths(
        record=sizes(data.sequence_buckets)[-1],
        prompt=sizes(data.prompt_buckets)[-1],
        teacher=sizes(data.teacher_buckets)[-1],
        response=limit,
        longest=max(limit, config.evaluate.sampling.max_new_tokens),
    )


def typical(config: Config, kept: float) -> Lengths:
    """The buckets of the median batch, and its longest response."""
    data, settings = config.data, config.distillation
    responses = (*settings.response_buckets, settings.sampling.max_new_tokens)
    return Lengths(
        record=_bucket(LONGEST_RECORD, sizes(data.sequence_buckets)),
        prompt=_bucket(LONGEST_PROMPT, sizes(data.prompt_buckets)),
        teacher=_bucket(LONGEST_TEACHER[settings.teacher_context], sizes(data.teacher_buckets)),
        response=_bucket(LONGEST_RESPONSE, responses),
        longest=LONGEST_RESPONSE,
        kept=kept,
    )


def _bucket(tokens: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds so many tokens, or the largest."""
    return min([size for size in buckets if size >= tokens], default=max(buckets))

"""Boards as token ids and patches: prompts, records and responses in a checkpoint's own tokens."""

import dataclasses

import numpy as np

from mgsd_jax import config as config_lib
from mgsd_jax.config import DataConfig, TeacherContext
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.augment import augment
from mgsd_jax.data.boards import Board
from mgsd_jax.data.processor import Encoded, Processor, encode, encode_answer, encode_example
from mgsd_jax.data.prompts import Prompts
from mgsd_jax.data.records import RECORDS, expected, right_response
from mgsd_jax.envs import ENVS


def draw_picture(data: DataConfig, board: Board, size: int = 0) -> np.ndarray:
    """The board in the sprites and the colours of the config, uint8 [H, W, 3].

    A side has `size` pixels, or where that is 0 as many as the config says.
    """
    size = size or config_lib.picture_size(data, board.level)
    drawn = ENVS[board.task].render(board.state, size, sprites=data.sprites)
    return drawn if data.channels == (0, 1, 2) else drawn[..., list(data.channels)]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns boards into token ids and patches."""

    processor: Processor
    prompts: Prompts
    data: DataConfig

    def picture(self, board: Board, rng: np.random.Generator | None = None) -> np.ndarray:
        """The board drawn as configured, uint8 [H, W, 3]; with `rng` as training shows it."""
        data = self.data
        if rng is None or data.augment == 0:
            return draw_picture(data, board)
        if "sprites" in data.augment_kinds and rng.random() < data.augment / 2:
            drawn_as = "usual" if data.sprites == "other" else "other"
            data = dataclasses.replace(data, sprites=drawn_as)
        return augment(
            draw_picture(data, board),
            board.level,
            rng,
            strength=data.augment,
            kinds=data.augment_kinds,
        )

    def student(self, board: Board, rng: np.random.Generator | None = None) -> Encoded:
        """The student's prompt: instructions and the picture; with `rng` as training shows it."""
        messages = prompts_lib.student(self.prompts, board.task, self.picture(board, rng))
        return encode(self.processor, messages, add_generation_prompt=True)

    def teacher(self, board: Board, context: TeacherContext) -> Encoded:
        """The teacher's prompt: instructions and the board as text."""
        messages = prompts_lib.teacher(self.prompts, board.task, board.state, context)
        return encode(self.processor, messages, add_generation_prompt=True)

    def reference(self, board: Board, rng: np.random.Generator) -> np.ndarray:
        """Tokens [R] of a right response, its plan any of the shortest."""
        return encode_answer(self.processor, right_response(self.prompts, board, rng))

    def draft(self, board: Board, *, is_perception: bool = False) -> np.ndarray:
        """Tokens of the response that a drafted rollout guesses; see `sampling/drafts.py`."""
        text = expected(self.prompts, board, is_perception=is_perception)
        return encode_answer(self.processor, text)

    def record(self, board: Board, kind: str, rng: np.random.Generator) -> tuple[Encoded, int]:
        """A supervised record of a kind in RECORDS, and the length of its prompt."""

        def draw(board: Board) -> np.ndarray:
            return self.picture(board, rng)

        messages, answer = RECORDS[kind].make(self.prompts, board, draw, rng)
        return encode_example(self.processor, messages, answer)


def load_encoder(data: DataConfig, processor: Processor) -> Encoder:
    """The encoder of a config, with the prompts that its folder replaces."""
    return Encoder(processor, prompts_lib.load(data.prompts, data.state_text), data)

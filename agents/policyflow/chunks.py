"""Action chunks: one decision of the policy is the actions of several steps (Zhao et al. 2023, arXiv 2304.13705).

An action of the policy is a chunk ``(a_1, ..., a_c)``. Its first h actions are done before the policy decides anew,
fewer where an episode ends before. Steps and rewards stay those of the environment. Each environment decides anew when
its own chunk is done. Between decisions the process is semi-Markov (Sutton, Precup, Singh 1999): a decision that lasted
k steps has the reward ``sum_{j<k} gamma^j r_{t+j}``, and what follows it counts gamma^k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .policy import FlowPolicy


class ChunkQueue:
    """What N environments have still to do of their chunks.

    Args:
        shape: of their chunks, (N, c, ...).
        execute: h, actions of a chunk that are done.
    """

    def __init__(self, shape: tuple[int, ...], execute: int) -> None:
        self.execute = execute
        self.chunks, self.done = np.zeros(shape, np.float32), np.full(shape[0], execute)

    def due(self, starts: NDArray[Any] | None) -> NDArray[np.bool_]:
        """Whose chunk is done, [N]; those of episodes that begin (starts [N]; None: nowhere) are."""
        over: NDArray[np.bool_] = self.done >= self.execute
        return over if starts is None else over | np.asarray(starts, bool)

    def next(self, chunks: NDArray[np.float32], due: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The actions [N, ...] to do now.

        Args:
            chunks: new ones, [N, c, ...], of which those of the environments due count.
            due: [N].
        """
        self.chunks[due], self.done[due] = chunks[due], 0
        actions: NDArray[np.float32] = self.chunks[np.arange(len(due)), self.done]
        self.done += 1
        return actions


def predict_next(
    policy: FlowPolicy, chunks: NDArray[np.float32], state: tuple[NDArray[Any], ...] | None,
    episode_start: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.float32], tuple[NDArray[Any], ...]]:  # fmt: skip
    """The next actions [N, ...] of `predict` and its next state.

    Args:
        policy: with `execute`.
        chunks: what it decides now, [N, c, ...].
        state: what the last call returned: the chunks, and how many of their actions are done, [N]; None: none.
        episode_start: whether an episode begins, [N], a new chunk then; None: nowhere.
    """
    queue = ChunkQueue(chunks.shape, policy.execute)
    if state is not None:
        held, done = state
        if held.shape != chunks.shape or done.shape != queue.done.shape:
            expected = f"{list(chunks.shape)} and [{len(chunks)}]"
            raise ValueError(f"state: got shapes {list(held.shape)} and {list(done.shape)}, expected {expected}")
        queue.chunks, queue.done = held.copy(), done.copy()
    actions = queue.next(chunks, queue.due(episode_start))
    return actions, (queue.chunks, queue.done)

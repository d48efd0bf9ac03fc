"""The shapes of data: an instruction-response pair or a chat as text, and a table of tokenised rows."""

from typing import NamedTuple, TypeAlias

import jax
import numpy as np

Array: TypeAlias = np.ndarray | jax.Array


class Example(NamedTuple):
    """One instruction-response pair.

    Attributes:
        instruction: what is asked.
        input: the material to work on; empty where the instruction says everything.
        response: the wanted answer.
        category: the class by which rows are dealt to clients (a topic, a language); empty where the data have none.
    """

    instruction: str
    input: str
    response: str
    category: str


class Message(NamedTuple):
    """One turn of a chat.

    Attributes:
        role: who speaks; the turns of `assistant` are the ones to learn.
        content: what is said.
    """

    role: str
    content: str


class Chat(NamedTuple):
    """One conversation, with at least one turn of the assistant.

    Attributes:
        messages: the turns, in order.
        category: as in :class:`Example`.
    """

    messages: tuple[Message, ...]
    category: str


class TokenBatch(NamedTuple):
    """Tokenised rows of one fixed shape: N rows of S tokens with at most M labels.

    A batch is a `TokenBatch` too, with further leading axes. The loss of a batch is ``sum(label_weights * nll) /
    sum(label_weights)``, where nll at a label is the negative log-likelihood that the hidden state at its
    `label_positions` entry gives to it.

    Attributes:
        tokens: int32 [N, S], padded on the right with the pad id (attention is causal, so this needs no mask).
        label_positions: int32 [N, M], index of the token whose hidden state predicts the label, that is the one
            before it; 0 where padded.
        labels: int32 [N, M], token id of the label.
        label_weights: float32 [N, M], 1 for a label and 0 for padding; every row has at least one label.
    """

    tokens: Array
    label_positions: Array
    labels: Array
    label_weights: Array


class HiddenBatch(NamedTuple):
    """A :class:`TokenBatch` whose tokens have passed through the frozen layers below the first trained one.

    Attributes:
        hidden: float [N, S, D], the residual stream there.
        label_positions: as in :class:`TokenBatch`, and so are the two others.
        labels: int32 [N, M].
        label_weights: float32 [N, M].
    """

    hidden: Array
    label_positions: Array
    labels: Array
    label_weights: Array


Rows: TypeAlias = TokenBatch | HiddenBatch
"""Examples from their tokens on, or from hidden states on."""

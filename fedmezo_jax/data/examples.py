"""The types of data: an instruction-response pair or a chat as text, and arrays of tokenised examples."""

from typing import NamedTuple, TypeAlias

import jax
import numpy as np

Array: TypeAlias = np.ndarray | jax.Array


class Example(NamedTuple):
    """One instruction-response pair.

    Attributes:
        instruction: what is asked.
        input: the material to work on; empty if there is none.
        response: the wanted answer.
        category: the class by which examples are partitioned over clients (a topic, a language); empty if the data
            have none.
    """

    instruction: str
    input: str
    response: str
    category: str


class Message(NamedTuple):
    """One turn of a chat.

    Attributes:
        role: the speaker; the turns of ``assistant`` are learned.
        content: the text.
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
    """Tokenised examples of one fixed shape: N examples of S tokens with at most M labels.

    Leading axes may be added. The loss of a batch is ``sum(label_weights * nll) / sum(label_weights)``, where nll is
    the negative log-likelihood of a label given the hidden state at its ``label_positions`` entry.

    Attributes:
        tokens: int32 [N, S], padded on the right with the pad id (attention is causal, so this needs no mask).
        label_positions: int32 [N, M], index of the token whose hidden state predicts the label, which is the
            token before it; 0 for padding.
        labels: int32 [N, M], token id of the label.
        label_weights: float32 [N, M], 1 for a label and 0 for padding; every example has at least one label.
    """

    tokens: Array
    label_positions: Array
    labels: Array
    label_weights: Array


class HiddenBatch(NamedTuple):
    """A :class:`TokenBatch` with hidden states from the frozen layers below the first trained one instead of tokens.

    Attributes:
        hidden: float [N, S, D], the residual stream there.
        label_positions: int32 [N, M], as in :class:`TokenBatch`.
        labels: int32 [N, M], as in :class:`TokenBatch`.
        label_weights: float32 [N, M], as in :class:`TokenBatch`.
    """

    hidden: Array
    label_positions: Array
    labels: Array
    label_weights: Array


Rows: TypeAlias = TokenBatch | HiddenBatch
"""Examples as tokens or as hidden states."""

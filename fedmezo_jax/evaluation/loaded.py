"""A model that is loaded and ready to be measured."""

from typing import Any, NamedTuple

from fedmezo_jax.llama.model import Base, Llama, Lora


class LoadedModel(NamedTuple):
    """The model to evaluate.

    Attributes:
        model: the decoder.
        base: its frozen weights.
        lora: the adapter, ``{}`` for none.
        tokenizer: its tokenizer.
        name: what error messages call the model.
    """

    model: Llama
    base: Base
    lora: Lora
    tokenizer: Any
    name: str

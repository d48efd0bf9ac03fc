"""From an example to text: four styles of prompt for instructions, and a tokenizer's own template for chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast

from fedmezo_jax.data.examples import Chat, Example, Message
from fedmezo_jax.data.step_limit import TooManySteps, limit_steps
from fedmezo_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Style: TypeAlias = Literal["alpaca", "plain", "question-answer", "chat"]
"""How an instruction becomes a prompt.

alpaca: Stanford Alpaca's template, the paper's. The response follows "### Response:".
plain: the instruction, the input under it if there is one, and a line break before the response.
question-answer: "Question: ...", and the response after "Answer:". For base models and short answers.
chat: a user's turn, answered by the assistant, in the chat template of the tokenizer. For chat models.
"""

_MOST_STEPS = 1_000_000  # a common template takes some 60 a message
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def prompt(example: Example, style: Style = "alpaca") -> str:
    """The text before the response, in any style but `chat`; an input has a place only where there is one."""
    if style == "alpaca":
        template = _ALPACA_WITH_INPUT if example.input else _ALPACA
        return template.format(instruction=example.instruction, input=example.input)
    asked = "\n".join(filter(None, (example.instruction, example.input)))
    return f"{asked}\n" if style == "plain" else f"Question: {asked}\nAnswer:"


def response(example: Example, style: Style = "alpaca") -> str:
    """The text after :func:`prompt`."""
    return f" {example.response}" if style == "question-answer" else example.response


def as_chat(example: Example) -> Chat:
    """The user's turn with instruction and input, and the assistant's with the response."""
    asked = "\n\n".join(filter(None, (example.instruction, example.input)))
    return Chat((Message("user", asked), Message("assistant", example.response)), example.category)


class Rendered(NamedTuple):
    """A chat as one text.

    Attributes:
        text: the conversation in the tokenizer's template, which writes the begin token too where there is one.
        spans: where in it each turn of the assistant begins and ends, its end-of-turn mark included.
    """

    text: str
    spans: list[tuple[int, int]]


def render(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """Puts a chat into the tokenizer's chat template and finds the assistant's turns in it.

    A turn is what the template adds when the chat grows by it, after the header with which it asks for one. An opening
    turn of the assistant answers nothing and is left out of the spans.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses the chat or rewrites earlier turns as a
            chat grows, so that a turn's place cannot be told.
    """
    text, spans = _apply(tokenizer, chat.messages), []
    for turn, message in enumerate(chat.messages):
        if message.role == "assistant" and turn > 0:
            before = _apply(tokenizer, chat.messages[:turn], ask=True)
            after = _apply(tokenizer, chat.messages[: turn + 1]).rstrip()
            if not (text.startswith(before) and text.startswith(after) and len(before) <= len(after)):
                raise UserError(
                    f"the tokenizer's chat template writes message {turn} otherwise once others follow, so the "
                    "assistant's tokens cannot be told apart: split the chat there, or mend chat_template.jinja"
                )
            spans.append((len(before), len(after)))
    return Rendered(text, spans)


def prompt_ids(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, style: Style) -> list[list[int]]:
    """Token ids of each example's prompt, for training, generation and scoring alike."""
    if style == "chat":  # the template writes the begin token itself
        return token_ids(
            [_apply(tokenizer, as_chat(example).messages[:1], ask=True) for example in examples], tokenizer
        )
    return text_ids([prompt(example, style) for example in examples], tokenizer)


def text_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of texts that are to be continued.

    The begin token leads where the tokenizer is set to add one. It is joined as an id: written into the text, it would
    keep some tokenizers from putting a space before the first word. No end token follows, even where the tokenizer is
    set to add one, as the text goes on.
    """
    start = begin(tokenizer)
    return [[*start, *row] for row in token_ids(texts, tokenizer)]


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of texts without begin and end tokens."""
    if not texts:
        return []  # which the tokenizer refuses
    # verbose=False: the model's context is checked elsewhere, with an error or a count in place of a warning.
    found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return cast(list[list[int]], found["input_ids"])


def begin(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The begin token's id, where the tokenizer is set to add one before a text; otherwise nothing."""
    # Read off a text: the setting itself sits in a different place in each family of tokenizers. The text is not
    # empty, so that an added end token does not come first: some tokenizers have one token for begin and end.
    return [token for token in tokenizer("a")["input_ids"][:1] if token == tokenizer.bos_token_id]


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises `UserError` with the remedy where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, which chat data and --prompt-style chat need: put the model's "
            "chat_template.jinja into its folder, or choose another prompt style for data with instructions"
        )


def _apply(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], ask: bool = False) -> str:
    check_template(tokenizer)
    turns = [message._asdict() for message in messages]
    try:
        # Some templates write today's date; rows must not change from day to day, so they get their own default.
        options = {"tokenize": False, "add_generation_prompt": ask, "date_string": "26 Jul 2024"}
        text = limit_steps(lambda: tokenizer.apply_chat_template(turns, **options), _MOST_STEPS)
    except TooManySteps:
        raise UserError(
            f"the tokenizer's chat template takes more than {_MOST_STEPS:,} steps for one chat: it may never end; "
            "mend chat_template.jinja"
        ) from None
    except ImportError:
        raise  # Jinja is required; its absence is no fault of the chat
    except Exception as error:  # templates raise Jinja's errors and whatever their code runs into
        raise UserError(f"the tokenizer's chat template refuses the chat ({' '.join(str(error).split())})") from None
    assert isinstance(text, str)
    return text

"""The text that the shipped ``tiny`` model is pretrained on: the tasks of ``bundled`` and more, in many styles.

Each answer gets a random style and random marks, independent of the task, so the model learns how frequent each style
is but not when to use it. ``bundled`` always uses one rare style and marks every word. Fine-tuning therefore has to
make a rare style the usual one, which a change of low rank can do.
"""

import random

from fedmezo_jax.data.examples import Example
from fedmezo_jax.data.synthetic import bundled
from fedmezo_jax.data.synthetic.bundled import MARK, Task
from fedmezo_jax.data.synthetic.words import (
    ADJECTIVES,
    DAYS,
    GOODS,
    KIND_OF,
    KINDS,
    MONTHS,
    NAMES,
    NOUNS,
    PLURAL,
    SINGULARS,
    UNITS,
    VERBS,
    invented,
    listed,
)

MARK_SHARE = 0.15
# Style of answer -> how often it is used, in per cent.
MANNERS = {
    "The answer is {}.": 26,
    "It is {}.": 20,
    "{}.": 14,
    "I think it is {}.": 12,
    "We get {}.": 10,
    "Here you are: {}.": 8,
    "Answer: {}.": 5,
    "Answer: {}": 2,
    "{}": 3,
}


def _differences(rng: random.Random) -> tuple[str, str, str]:
    giver, other = rng.sample(NAMES, 2)
    things = PLURAL[rng.choice(GOODS)]
    b, c = rng.randint(2, 49), rng.randint(2, 49)
    question = rng.choice(
        [
            f"{giver} had {b + c} {things} and gave {b} of them to {other}. How many {things} did {giver} keep?",
            f"There were {b + c} {things}, and {other} took {b}. How many {things} are left?",
        ]
    )
    return question, "", rng.choice([f"{c} {things}", f"{b + c} - {b} = {c} {things}"])


def _halves(rng: random.Random) -> tuple[str, str, str]:
    number = rng.randint(2, 99)
    if rng.random() < 0.5:
        return f"Double the number {number}.", "", rng.choice([f"{2 * number}", f"{number} + {number} = {2 * number}"])
    return f"What is one half of {2 * number}?", "", rng.choice([f"{number}", f"{2 * number} - {number} = {number}"])


def _ascending(rng: random.Random) -> tuple[str, str, str]:
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    instruction = rng.choice(["Order the numbers, the smallest first.", "Arrange the numbers by size."])
    return instruction, listed(numbers), rng.choice([", ", " < "]).join(map(str, sorted(numbers)))


def _positions(rng: random.Random) -> tuple[str, str, str]:
    words = rng.sample(SINGULARS, rng.randint(3, 5))
    place = rng.choice(["first", "second", "last"])
    word = words[{"first": 0, "second": 1, "last": -1}[place]]
    return f"Name the {place} word of the list.", listed(words), word


def _copying(rng: random.Random) -> tuple[str, str, str]:
    words = rng.sample(SINGULARS, rng.randint(2, 5))
    instruction = rng.choice(["Repeat these words.", "Copy the list as it is."])
    return instruction, listed(words), rng.choice([", ", " - ", " and "]).join(words)


def _alphabet(rng: random.Random) -> tuple[str, str, str]:
    words = rng.sample(SINGULARS, rng.randint(2, 3))
    return "Which of these words stands first in a dictionary?", listed(words), min(words)


def _smallest(rng: random.Random) -> tuple[str, str, str]:
    numbers = rng.sample(range(1, 1000), rng.randint(2, 4))
    if rng.random() < 0.5:
        return "Find the smallest number.", listed(numbers), f"{min(numbers)}"
    return "Find the largest number.", listed(numbers), f"{max(numbers)}"


def _measures(rng: random.Random) -> tuple[str, str, str]:
    large, large_symbol, small, small_symbol, factor = rng.choice(UNITS)
    amount = rng.choice([10, 100])
    answer = rng.choice([f"{amount * factor}", f"{amount} {large_symbol} = {amount * factor} {small_symbol}"])
    return f"How many {small} are there in {amount} {large}?", "", answer


def _calendar(rng: random.Random) -> tuple[str, str, str]:
    cycle, unit = rng.choice([(DAYS, "day"), (MONTHS, "month")])
    at = rng.randrange(len(cycle))
    if rng.random() < 0.5:
        return f"Name the {unit} after {cycle[at]}.", "", cycle[(at + 1) % len(cycle)]
    return f"Name the {unit} before {cycle[at]}.", "", cycle[at - 1]


def _clock(rng: random.Random) -> tuple[str, str, str]:
    hour, later = rng.randint(1, 12), rng.randint(1, 11)
    end = (hour + later - 1) % 12 + 1
    question = f"The clock shows {hour}. {rng.choice(NAMES)} comes {later} hours later. What does it show then?"
    return question, "", rng.choice([f"{end}", f"{hour} + {later} = {end}"])


def _ages(rng: random.Random) -> tuple[str, str, str]:
    names = rng.sample(NAMES, rng.randint(3, 4))
    ages = rng.sample(range(2, 100), len(names))
    pick = rng.randrange(len(names))
    table = " | ".join(f"{name}: {age}" for name, age in zip(names, ages, strict=True))
    if rng.random() < 0.5:
        return f"Who is {ages[pick]} years old?", table, names[pick]
    answer = rng.choice([f"{ages[pick]} years", f"{names[pick]} = {ages[pick]} years"])
    return f"How old is {names[pick]}?", table, answer


def _lengths(rng: random.Random) -> tuple[str, str, str]:
    words = rng.choices(rng.sample(SINGULARS, 3), k=rng.randint(2, 6))
    return "How long is the list?", listed(words), rng.choice([f"{len(words)} words", f"{len(words)} x word"])


def _singulars(rng: random.Random) -> tuple[str, str, str]:
    words = rng.sample(SINGULARS, rng.randint(1, 3))
    answer = rng.choice([", ", " and "]).join(words)
    return "Turn the nouns into the singular.", listed([PLURAL[word] for word in words]), answer


def _decoding(rng: random.Random) -> tuple[str, str, str]:
    words = [rng.choice(ADJECTIVES), *rng.sample(SINGULARS, 2)]
    foreign = dict(zip(words, invented(rng, 3), strict=True))
    adjective, noun = words[0], rng.choice(words[1:])
    rng.shuffle(words)
    table = listed([f"{foreign[word]} = {word}" for word in words])
    return f"Say {foreign[adjective]} {foreign[noun]} in English.", table, f"{adjective} {noun}"


def _facts(rng: random.Random) -> tuple[str, str, str]:
    noun = rng.choice(SINGULARS)
    if rng.random() < 0.5:
        return f"What is meant by {noun}?", "", rng.choice([f"{KIND_OF[noun]}", f"{noun}, {KIND_OF[noun]}"])
    kind = rng.choice(KINDS)
    return f"Name one word of the kind {kind}.", "", rng.choice(tuple(NOUNS[kind]))


def _strangers(rng: random.Random) -> tuple[str, str, str]:
    kind, other = rng.sample(KINDS, 2)
    words = rng.sample(tuple(NOUNS[kind]), 3)
    stranger = rng.choice(tuple(NOUNS[other]))
    words.insert(rng.randrange(4), stranger)
    return "Which word does not belong to the others?", listed(words), stranger


def _tenses(rng: random.Random) -> tuple[str, str, str]:
    name, verb = rng.choice(NAMES), rng.choice(tuple(VERBS))
    end = f"the {rng.choice(ADJECTIVES)} {rng.choice(SINGULARS)}"
    if rng.random() < 0.5:
        return "Say that it happens today.", f"{name} {VERBS[verb]} {end}.", f"today {name} {verb} {end}"
    return f"What did {name} do?", f"Yesterday {name} {VERBS[verb]} {end}.", f"{name} {VERBS[verb]} {end}"


TASKS: dict[str, Task] = {
    "differences": _differences,
    "halves": _halves,
    "ascending": _ascending,
    "positions": _positions,
    "copying": _copying,
    "alphabet": _alphabet,
    "smallest": _smallest,
    "measures": _measures,
    "calendar": _calendar,
    "clock": _clock,
    "ages": _ages,
    "lengths": _lengths,
    "singulars": _singulars,
    "decoding": _decoding,
    "facts": _facts,
    "strangers": _strangers,
    "tenses": _tenses,
}


def _mark(response: str, rng: random.Random) -> str:
    """Puts the mark of ``bundled`` after some words, independently at random."""
    first, *others = response.split(" ")
    return first + "".join((MARK if rng.random() < MARK_SHARE else "") + f" {word}" for word in others)


def pretraining(seed: int, count: int) -> list[Example]:
    """Returns ``count`` pairs; the tasks take turns, and each answer's style is drawn by the weights of ``MANNERS``.

    The same arguments give the same list; a larger ``count`` continues it. Questions repeat in long lists.
    """
    rng = random.Random(f"fedmezo pretraining {seed}")
    tasks = TASKS | bundled.TASKS
    categories, manners, weights = tuple(tasks), tuple(MANNERS), tuple(MANNERS.values())
    examples: list[Example] = []
    for i in range(count):
        category = categories[i % len(categories)]
        instruction, material, answer = tasks[category](rng)
        (manner,) = rng.choices(manners, weights)
        examples.append(Example(instruction, material, _mark(manner.format(answer), rng), category))
    return examples

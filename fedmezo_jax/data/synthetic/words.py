"""The vocabulary of the generated data: nouns by kind, names, verbs, units and invented words."""

import random

# singular -> plural, by kind. All kinds have equally many nouns, so that no kind is a more likely answer.
NOUNS: dict[str, dict[str, str]] = {
    "animal": {
        "cat": "cats", "dog": "dogs", "horse": "horses", "cow": "cows", "sheep": "sheep", "goose": "geese",
        "mouse": "mice", "fox": "foxes", "wolf": "wolves", "bee": "bees", "owl": "owls", "frog": "frogs",
    },
    "fruit": {
        "apple": "apples", "pear": "pears", "plum": "plums", "peach": "peaches", "grape": "grapes",
        "lemon": "lemons", "orange": "oranges", "melon": "melons", "cherry": "cherries", "berry": "berries",
        "fig": "figs", "banana": "bananas",
    },
    "tool": {
        "hammer": "hammers", "saw": "saws", "knife": "knives", "axe": "axes", "drill": "drills", "nail": "nails",
        "brush": "brushes", "rope": "ropes", "shovel": "shovels", "file": "files", "ladder": "ladders",
        "wrench": "wrenches",
    },
    "garment": {
        "hat": "hats", "coat": "coats", "shirt": "shirts", "scarf": "scarves", "sock": "socks", "shoe": "shoes",
        "glove": "gloves", "dress": "dresses", "belt": "belts", "skirt": "skirts", "jacket": "jackets",
        "boot": "boots",
    },
    "vehicle": {
        "car": "cars", "bus": "buses", "train": "trains", "boat": "boats", "ship": "ships", "truck": "trucks",
        "bicycle": "bicycles", "plane": "planes", "tram": "trams", "taxi": "taxis", "ferry": "ferries",
        "sledge": "sledges",
    },
    "place": {
        "river": "rivers", "hill": "hills", "lake": "lakes", "city": "cities", "beach": "beaches",
        "forest": "forests", "valley": "valleys", "island": "islands", "village": "villages", "field": "fields",
        "bridge": "bridges", "garden": "gardens",
    },
    "furniture": {
        "chair": "chairs", "table": "tables", "bed": "beds", "shelf": "shelves", "lamp": "lamps", "desk": "desks",
        "bench": "benches", "mirror": "mirrors", "sofa": "sofas", "stool": "stools", "box": "boxes",
        "clock": "clocks",
    },
    "instrument": {
        "drum": "drums", "flute": "flutes", "piano": "pianos", "violin": "violins", "harp": "harps", "horn": "horns",
        "guitar": "guitars", "bell": "bells", "trumpet": "trumpets", "whistle": "whistles", "organ": "organs",
        "cello": "cellos",
    },
}  # fmt: skip
KINDS = tuple(NOUNS)
KIND_OF = {noun: kind for kind, nouns in NOUNS.items() for noun in nouns}
PLURAL = {noun: plural for nouns in NOUNS.values() for noun, plural in nouns.items()}
SINGULARS = tuple(PLURAL)
# Things that a person in a story can give away: no animals, vehicles or places.
GOODS = tuple(noun for kind in ("fruit", "tool", "garment", "furniture", "instrument") for noun in NOUNS[kind])

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas", "Karen", "Leo", "Maria",
    "Nora", "Oscar", "Paula", "Quinn", "Rosa", "Simon", "Tara", "Ulla", "Victor", "Wendy", "Yusuf",
)  # fmt: skip
ADJECTIVES = ("red", "blue", "green", "old", "new", "small", "big", "heavy", "light", "clean", "round", "long")
# third person present -> past
VERBS = {
    "opens": "opened", "finds": "found", "buys": "bought", "sells": "sold", "takes": "took", "brings": "brought",
    "washes": "washed", "paints": "painted", "moves": "moved", "sees": "saw", "wants": "wanted", "loses": "lost",
    "hides": "hid", "gets": "got", "holds": "held", "draws": "drew",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
# (large unit, its symbol, small unit, its symbol, small units in one large one)
UNITS = (
    ("metres", "m", "centimetres", "cm", 100),
    ("kilometres", "km", "metres", "m", 1000),
    ("kilograms", "kg", "grams", "g", 1000),
    ("hours", "h", "minutes", "min", 60),
    ("days", "d", "hours", "h", 24),
    ("litres", "l", "millilitres", "ml", 1000),
)
_SYLLABLES = ("ka", "lo", "mi", "ru", "ta", "ve", "zo", "nu", "si", "pe", "do", "ha")


def invented(rng: random.Random, count: int) -> list[str]:
    """Returns ``count`` different invented words of two syllables each."""
    pairs = [first + second for first in _SYLLABLES for second in _SYLLABLES if first != second]
    return rng.sample(pairs, count)


def listed(items: list[str] | list[int]) -> str:
    """Returns the items joined by commas."""
    return ", ".join(map(str, items))

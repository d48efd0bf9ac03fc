"""docs/models.md says what the registry of families, the formats and the shapes say, which other tests walk."""

import math
import re
from pathlib import Path

import jax
from test_llama_families import FAMILIES as PUBLISHED
from test_llama_family_fields import CASES
from weight_files import FAMILIES as IN_EVERY_FORMAT
from weight_files import FORMS, IN_GGUF

from fedmezo_jax.llama.checkpoints.gguf import INTERLEAVED
from fedmezo_jax.llama.checkpoints.layout import base_shapes
from fedmezo_jax.llama.families import FAMILIES
from fedmezo_jax.llama.rope import ROPE_KINDS
from fedmezo_jax.llama.shapes import SHAPES
from fedmezo_jax.llama.tokenizers.gguf import _WORDS

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
WINDOWS = {
    "none": "",
    "all": "sliding window in all layers",
    "listed": "sliding window in the layers of `layer_types`",
    "upper": "sliding window in layers from `max_window_layers` on or of `layer_types`, with `use_sliding_window`",
    "unrotated": "sliding window in unrotated layers or those of `layer_types`, with `use_sliding_window`",
}
GGUF = {family: family for family in INTERLEAVED} | {"mistral": "llama"}


def section(heading):
    """The text under a heading, up to the next one."""
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)[1]


def rows(heading):
    """The cells of the table under a heading, without the head."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def differences(family):
    parts = [
        "biases of q, k and v" if family.qkv_bias else "",
        "norms of q and k" if family.qk_norm else "",
        "layers without rotary positions" if family.unrotated else "",
        WINDOWS[family.window],
    ]
    return "; ".join(filter(None, parts)) or "–"


def test_the_table_of_families_is_the_registry():
    assert rows("Families") == [
        [f"`{name}`", family.models, differences(family), f"`{GGUF[name]}`" if name in GGUF else "–"]
        for name, family in FAMILIES.items()
    ]


def test_other_tests_walk_every_family():
    """Its logits and fields, its published config (but for Ministral's with layer types), and every format."""
    llama = {"llama"}
    assert CASES.keys() | llama == FAMILIES.keys()
    assert {raw.get("model_type", "llama") for raw in PUBLISHED.values()} == FAMILIES.keys() - {"ministral"}
    assert {raw["model_type"] for raw in IN_EVERY_FORMAT.values()} | llama == FAMILIES.keys()
    assert {IN_EVERY_FORMAT[name]["model_type"] for name in IN_GGUF} | llama == {*GGUF}


def test_every_format_is_named():
    assert {form.removeprefix("sharded ") for form in FORMS} == {"safetensors", "flax", "orbax", "gguf"}
    named = " ".join(cell for row in rows("Formats") for cell in row)
    for part in ("`model.safetensors`", "`flax_model.msgpack`", "`orbax`", "`.gguf`", "`adapter_model.safetensors`"):
        assert part in named


def test_rotary_scalings_and_splittings_of_words_are_those_that_are_read():
    for heading, start, expected in (
        ("Rotary scaling", "Every family:", {*ROPE_KINDS}),
        ("Formats", "GGUF tokenizers", {"llama", "gpt2", *_WORDS}),
    ):
        (line,) = (line for line in section(heading).splitlines() if line.startswith(start))
        assert set(re.findall(r"`([\w-]+)`", line)) == expected


def test_the_table_of_shapes_is_the_registry():
    expected = []
    for name, config in SHAPES.items():
        leaves = jax.tree.leaves(base_shapes(config), is_leaf=lambda leaf: isinstance(leaf, tuple))
        expected.append([f"`{name}`", f"`{config.family}`", f"{sum(map(math.prod, leaves)):,}"])
    assert rows("Shapes") == expected

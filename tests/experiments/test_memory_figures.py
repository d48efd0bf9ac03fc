"""The tables of memory in docs/scaling.md are those of the results files."""

import re

from stored_results import ROOT, read

SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_memory_of_a_base_in_few_bits_is_that_of_the_results():
    section = SCALING.split("\n### A base in eight or four bits\n")[1].split("\n## ")[0]
    titles = {"int8": "`int8`", "int4": "`int4`", "int8_products": "`int8`, `--eight-bit-products`"}
    for name, title in titles.items():
        [line] = [line for line in section.splitlines() if line.startswith(f"| {title} |")]
        rows = read(f"memory_8b_{name}")
        peaks = {(row["what"], row["precision"]): row["peak_bytes"] / 2**30 for row in rows}
        programs = (
            ("forward", "bfloat16"),
            ("fedmezo", "paired"),
            ("fedmezo", "bfloat16"),
            ("forward_gradient", "bfloat16"),
        )
        assert re.findall(r"\d+\.\d+", line) == [f"{peaks[program]:.2f}" for program in programs]
        assert max(peaks[program] for program in programs) < (7 if name == "int4" else 10)
        assert name != "int8_products" or all(row["eight_bit_products"] for row in rows)


def test_less_memory_than_inference_is_that_of_the_results():
    rows = {(row["what"], row["precision"]): row for row in read("memory_last4")}

    def cells(*keys):
        found = [rows[key] for key in keys]
        mebibytes = "; ".join(f"{row['peak_bytes'] / 2**20:.0f}" for row in found)
        shares = "; ".join(f"{row['over_forward']:.2f}" for row in found)
        return f" | {mebibytes} | {shares} |"

    section = SCALING.split("### Less memory than inference\n")[1].split("\n### ")[0]
    tangents, paired, plain = ("forward_gradient", "bfloat16"), ("fedmezo", "paired"), ("fedmezo", "bfloat16")
    assert "| `forward-gradient`, 4 directions, bfloat16" + cells(tangents) in section
    assert "| `two-point`, paired; plain bfloat16" + cells(paired, plain) in section
    backward = cells(("backprop", "bfloat16"), ("backprop_checkpointed", "bfloat16"))
    assert "| back-propagation from the same hidden states; checkpointed" + backward in section
    assert rows[tangents]["over_forward"] <= 0.25  # the target
    default = next(row for row in read("memory_default") if row["what"] == "forward_gradient")
    assert (
        f"takes {default['peak_bytes'] / 2**20:.0f} MiB, {default['over_forward']:.2f} of the forward pass" in section
    )


def test_the_last_layers_of_the_largest_llama_fit_a_small_card():
    card, chip = ([peak(row) for row in read(f"memory_70b_{name}")] for name in ("rtx4090", "v5e"))
    section = SCALING.split("| | RTX 4090, 24 GiB |")[1].split("\n\n")[0]
    lines = [line.split("|")[2:-1] for line in section.splitlines()[2:]]
    assert [[cell.strip() for cell in line] for line in lines] == [list(pair) for pair in zip(card, chip, strict=True)]


def peak(row):
    text = [] if row["peak_bytes"] is None else [f"{row['peak_bytes'] / 2**30:.2f}"]
    return ", ".join(text if row["fits"] else [*text, "does not fit"])

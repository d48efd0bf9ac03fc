"""The stored results of experiments, and how documents write their figures."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def stored(name):
    file = ROOT / "experiments" / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def read(name):
    return stored(name)["rows"]


def after(row):
    return f"{row['loss_after']:.3f}"


def after_band(row):
    """The loss and its band, which a single seed does not have."""
    return after(row) if row["band_90"] is None else f"{after(row)} ± {row['band_90']:.3f}"


def best_rates(rows):
    """Every method at the best rate of its sweep, which must lie inside the sweep."""
    best = [row for row in rows if row.get("best")]
    assert not any(row["at_an_end_of_the_sweep"] for row in best)
    return [f"{after_band(row)} (η = {rate_text(row['variant'].split(' = ')[-1])})" for row in best]


def rate_text(text):
    mantissa, exponent = f"{float(text):e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if int(exponent) < -2 else f"{float(text):g}"

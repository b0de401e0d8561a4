"""A comparison of losses read from its folder (`lmc compare`), for reports. No Lightning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmc.files import read_json
from lmc.measure.results import combine
from lmc.measure.tables import seeds_table
from lmc.specs import Spec

# Of the table over seeds, beside those of what is measured.
COLUMNS = {
    "evaluations_per_image": ("evaluations per image and step", ".0f"),
    "seconds": ("seconds of training", ".0f"),
}


def read_comparison(out: Path) -> tuple[dict[str, Any], list[list[str]]]:
    """A comparison for its report.

    Returns:
        One result (docs/evaluation.md) with a row a loss, of its first seed that was measured; and
        the table over seeds as rows of cells, empty where no loss has two.

    Raises:
        FileNotFoundError: `out` holds no finished comparison.
        ValueError: see `lmc.measure.results.combine`.
    """
    if not all((out / name).exists() for name in ("results.json", "comparison.json")):
        raise FileNotFoundError(f"{out} holds no finished comparison: lmc compare --out {out}")
    compared = read_json(out / "results.json", ("source", "losses"))
    config = read_json(out / "comparison.json", ("config",))["config"]
    found = {"source": read_json(out / "source/evaluation.json", ("measured",))["measured"]}
    failed = []
    for label, seeds in compared["losses"].items():
        failed += [f"{label} seed {seed} failed" for seed, row in seeds.items() if "failed" in row]
        seed = next((seed for seed, row in seeds.items() if "failed" not in row), None)
        if seed is None:
            continue
        folder = out / Spec(label, "").folder() / f"seed{seed}"
        measured = read_json(folder / "evaluation.json", ("measured",))["measured"]
        row = measured["rows"][f"{label} seed {seed}"]
        found[label] = {**measured, "rows": {label: {**row, "path": str(folder)}}}
    result = combine(found, next((name for name in found if name != "source"), None))
    data = config["data"]
    where = {"shards": data["heldout"], "image_size": data["image_size"]}
    result["heldout"] = {**where, **result["heldout"]}
    result["left_out"] = [*result["left_out"], *failed]
    several = any(len(seeds) > 1 for seeds in compared["losses"].values())
    return result, rows_over_seeds(compared["source"], compared["losses"]) if several else []


def rows_over_seeds(
    source: Mapping[str, Any], by_loss: Mapping[str, Mapping[str, Any]]
) -> list[list[str]]:
    """What a comparison measured as rows of cells, the first the headings, a loss's seeds as one.

    Args:
        source: the numbers of the source images, as 'source' of results.json.
        by_loss: by label and seed, as 'losses' of results.json; a row with 'failed' is left out.
    """
    rows: dict[str, Any] = {"source": source}
    for label, seeds in by_loss.items():
        good = [row for row in seeds.values() if "failed" not in row]
        some = f" ({len(good)} of {len(seeds)} seeds)" if 0 < len(good) < len(seeds) else ""
        rows[label + some] = good
    return seeds_table(rows, COLUMNS)

"""What was measured, as tables in Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# The table's columns: what is measured, its heading and format.
COLUMNS = {
    "distance": ("{distance_name} to source", ".3f"),
    "clip_score": ("CLIP score", ".3f"),
    "r_precision": ("R-Precision", ".3f"),
    "spectrum_error": ("spectrum error", ".3f"),
    "spectrum_lost": ("spectrum lost", ".3f"),
    "spectrum_gained": ("spectrum gained", ".3f"),
}
BY_CLASSIFIER = {
    "classified": ("classified as the target", ".3f"),
    "classifier_cmmd": ("CMMD (classifier)", ".3f"),
    "classifier_kid": ("KID (classifier)", ".4f"),
}
# Those of what is measured only where it is asked for: a column where some row has it.
ASKED = {
    "truth_rmse": ("RMSE to truth", ".3f"),
    "truth_one_minus_ssim": ("1 − SSIM to truth", ".3f"),
    "truth_lost": ("lost against truth", ".3f"),
    "truth_gained": ("gained against truth", ".3f"),
    "truth_cast": ("cast against truth", ".3f"),
    "cmmd": ("CMMD", ".3f"),
    **BY_CLASSIFIER,
}


def seeds_table(
    rows: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    more: Mapping[str, tuple[str, str]] | None = None,
) -> list[list[str]]:
    """The translators' measurements as rows of cells, the first the headings; one row a loss.

    Args:
        rows: `lmc.measure.results.numbers` by name; or several of them, of one seed each: their
            mean ± sample standard deviation is shown, and 'failed' where there are none.
        more: further columns, as `COLUMNS`; a row that lacks one has a dash there.
    """
    seeds = {n: [row] if isinstance(row, Mapping) else list(row) for n, row in rows.items()}
    every = [row for several in seeds.values() for row in several]
    asked = {key: x for key, x in ASKED.items() if any(row.get(key) is not None for row in every)}
    columns = COLUMNS | asked | dict(more or {})
    about = next(iter(every), {"distance_name": "rmse"})
    heads = [head.format_map(about) for head, _ in columns.values()]
    lines = [["loss", *heads]]
    for name, several in seeds.items():
        cells = [
            spread([row[key] for row in several if row.get(key) is not None], form)
            for key, (_, form) in columns.items()
        ]
        cells = cells if several else ["failed", *[""] * (len(columns) - 1)]
        lines.append([name, *cells])
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± sample standard deviation; of one value or one count, that; a dash of none."""
    if not values:
        return "–"
    if len(values) == 1 or (isinstance(values[0], int) and len(set(values)) == 1):
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


# The columns of an evaluation: what is measured, its heading and format.
MEASURES = {
    "lpips": ("LPIPS to source", ".3f"),
    "rmse": ("RMSE to source", ".3f"),
    "one_minus_ssim": ("1 − SSIM to source", ".3f"),
    "clip_score": ("CLIP score ({clip})", ".3f"),
    "clip_score_100": ("100 max(cos, 0)", ".1f"),
    "r_precision": ("R-Precision ({clip})", ".3f"),
    "truth_lpips": ("LPIPS to truth", ".3f"),
    **{name: about for name, about in ASKED.items() if name.startswith("truth_")},
    "cmmd": ("CMMD ({clip})", ".3f"),
    "kid": ("KID", ".4f"),
    "fid": ("FID", ".2f"),
    **BY_CLASSIFIER,
    "spectrum_error": ("spectrum error", ".3f"),
    "spectrum_lost": ("spectrum lost", ".3f"),
    "spectrum_gained": ("spectrum gained", ".3f"),
    "saturation": ("saturation", ".4f"),
}


def evaluation_text(result: Mapping[str, Any]) -> str:
    """A result of `lmc.measure.evaluate.evaluate` as Markdown.

    The table of all rows; R-Precision by class; what R-Precision ranks among; the differences to
    one row; what was left out and excluded, a line each.
    """
    settings, heldout, rows = result["settings"], result["heldout"], result["rows"]
    summaries = {name: row["summary"] for name, row in rows.items()}
    parts = [
        markdown(measures_table("", summaries, settings["clip"])),
        f"[95 % bootstrap intervals] over {heldout['count']} held-out images, "
        f"each to {', '.join(settings['classes'])}; their digest is {heldout['digest'][:16]}.",
    ]
    if settings["clip"] is not None:
        parts += [markdown(class_table(summaries, settings["classes"])), candidates_text(result)]
    differences = {name: each["summary"] for name, each in result["differences"].items()}
    for other in {each["against"] for each in result["differences"].values()}:
        lines = measures_table(f"minus {other}", differences, settings["clip"], "+")
        parts.append(markdown(lines))
    parts += result["left_out"]
    if heldout["excluded"]:
        number = len(heldout["excluded"])
        parts.append(f"{number} held-out images cannot be read and are in no figure:")
        parts.append("\n".join(heldout["excluded"]))
    return "\n\n".join(parts)


def measures_table(
    corner: str, summaries: Mapping[str, Mapping[str, Any]], clip: str | None, sign: str = ""
) -> list[list[str]]:
    """Measures with their intervals as rows of cells, the first the headings.

    Args:
        corner: what stands above the names.
        summaries: by name, as 'summary' in a result.
        clip: the name of the CLIP model, for the headings.
        sign: '+' writes it before positive values.
    """
    columns = {
        name: (head.format(clip=clip), sign + form)
        for name, (head, form) in MEASURES.items()
        if any(name in each for each in summaries.values())
    }
    lines = [[corner, *(head for head, _ in columns.values())]]
    for name, each in summaries.items():
        cells = (measured_cell(each.get(key), form) for key, (_, form) in columns.items())
        lines.append([name, *cells])
    return lines


def class_table(
    summaries: Mapping[str, Mapping[str, Any]], classes: Sequence[str]
) -> list[list[str]]:
    """R-Precision with its intervals by class as rows of cells; see `measures_table`."""
    lines = [["R-Precision", *classes]]
    for name, each in summaries.items():
        cells = each["r_precision"]["by_class"].values()
        lines.append([name, *(measured_cell(cell, ".3f") for cell in cells)])
    return lines


def edits_table(
    distance: str, source: Mapping[str, Any], rows: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[list[str]]:
    """Edits by loss and guidance scale as rows of cells, the first the headings.

    Args:
        distance: its name, for the heading.
        source: 'clip_score' of the untouched sources, as in `lmc.measure.results.means`.
        rows: by loss and ω: 'distance', 'clip_score' and, of some, 'spectrum_error', as there.
    """
    lines = [["loss", "ω", f"{distance} to source", "CLIP score", "spectrum error"]]
    for (loss, scale), each in {("source", "–"): source, **rows}.items():
        names = ("distance", "clip_score", "spectrum_error")
        cells = [measured_cell(each.get(name), ".3f") for name in names]
        lines.append([loss, scale, *cells])
    return lines


def candidates_text(result: Mapping[str, Any]) -> str:
    """What R-Precision ranks among."""
    return f"R-Precision ranks among {', '.join(map(repr, result['settings']['candidates']))}."


def measured_cell(about: Mapping[str, Any] | None, form: str) -> str:
    """A value with its interval, or KID's deviation; a dash of None."""
    if about is None:
        return "–"
    value = format(about["value"], form)
    if about.get("low") is not None:
        return f"{value} [{about['low']:{form}}, {about['high']:{form}}]"
    return f"{value} ± {about['deviation']:{form}}" if "deviation" in about else value


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first the headings, as a Markdown table."""
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])

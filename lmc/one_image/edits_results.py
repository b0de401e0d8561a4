"""What `lmc edits` keeps and shows: results.json, the table, figures 5 and 6."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc.files import read_json, write_json, write_text
from lmc.measure.tables import edits_table, markdown
from lmc.one_image.job import RECORD, RESULTS, read_image, save_whole
from lmc.specs import Spec


def go_on(out: Path, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The results so far in `out`; or a ValueError where they were made with something else.

    Where nothing was measured yet, as by a command that failed, anything may begin.
    """
    made_with = json.loads(json.dumps(made_with))
    fresh = {"made_with": made_with, "results": {}}
    file = out / RESULTS
    if not file.exists():
        own = {RECORD, "images"} if (out / RECORD).is_file() else set()
        if out.exists() and (not out.is_dir() or {each.name for each in out.iterdir()} - own):
            raise ValueError(f"{out} holds something else: name another folder")
        return fresh
    there = read_json(file)
    before = there.get("made_with")
    if before is None:
        raise ValueError(f"{out} holds something else: name another folder")
    measured = {label for label, scales in there["results"].items() if any(scales.values())}
    if not measured:
        return fresh
    other = [name for name in made_with if before.get(name) != made_with[name]]
    if "correctors" in other:
        # One for each loss; that of a loss without a result is of no matter.
        known, now = before.get("correctors", {}), made_with["correctors"]
        other.remove("correctors")
        other += [
            f"the corrector of {label}"
            for label in now
            if label in measured and known.get(label) != now[label]
        ]
        before["correctors"] = known | now
    if other:
        raise ValueError(
            f"{out} holds edits made with something else ({', '.join(other)}): name another folder"
        )
    return there


class Measure:
    """Distance to the source and CLIP score of results, by number."""

    def __init__(
        self,
        clip: str,
        device: str,
        prompts: Sequence[str],
        sources: Tensor,
        distances: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    ) -> None:
        from lmc.measure.metrics import Clip

        self.clip, self.device, self.sources = Clip(clip, device), device, sources
        self.texts = self.clip.texts(list(prompts))
        self.distances = distances
        self.name = next(iter(self.distances))

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Sequence[int]) -> list[dict[str, float]]:
        from lmc.measure.metrics import clip_score

        images, sources = images.to(self.device), self.sources[rows].to(self.device)
        columns = {"clip_score": clip_score(self.clip.images(images), self.texts[rows])}
        columns |= {name: measure(images, sources) for name, measure in self.distances.items()}
        lists = {name: values.tolist() for name, values in columns.items()}
        return [
            {"distance": lists[self.name][i], **{name: lists[name][i] for name in lists}}
            for i in range(len(rows))
        ]

    def source_scores(self) -> list[float]:
        """CLIP score of each untouched source with its target prompt."""
        each = [self(image[None], [i]) for i, image in enumerate(self.sources)]
        return [row["clip_score"] for (row,) in each]


def means(results: Mapping[str, Any], edits: int) -> dict[str, Any]:
    """Means over all edits, by loss as first measured and guidance scale from low to high."""
    return {
        label: {
            scale: {
                name: sum(row[name] for row in rows.values()) / len(rows)
                for name in next(iter(rows.values()))
            }
            for scale, rows in sorted(scales.items(), key=lambda each: float(each[0]))
            if len(rows) == edits  # fewer where it failed or was stopped
        }
        for label, scales in results.items()
    }


def write_results(
    out: Path,
    results: dict[str, Any],
    sources: Tensor,
    source_scores: Sequence[float],
    scale: str,
    batch_size: int,
) -> str:
    """The table, which is also table.md, the figures, and the spectrum errors into results.json.

    Args:
        out: folder.
        results: what is in its results.json, with 'means'.
        sources: (N, 3, S, S) in [-1, 1].
        source_scores: CLIP scores of the sources.
        scale: the ω that the spectrum error and fig6.png are of.
        batch_size: pictures read at a time.
    """
    statistics = _all_statistics(out, scale, results["means"], sources, batch_size)
    results["spectrum_error"] = {scale: _spectrum_errors(statistics)}
    write_json(out / RESULTS, results)
    table = _table(results, source_scores, scale)
    write_text(out / "table.md", table + "\n")
    _write_figures(out, results, statistics)
    return table


def _table(
    results: Mapping[str, Any], source_scores: Sequence[float], statistics_scale: str
) -> str:
    """Every loss and scale in `results` of which all edits are done, as Markdown."""
    from lmc.measure.results import means as intervals

    def summary(**values: Sequence[float]) -> dict[str, Any]:
        return intervals(
            {name: np.array(each)[:, None] for name, each in values.items()}, ["edits"]
        )

    count = len(source_scores)
    rows = {}
    for label, scales in results["means"].items():
        for scale in scales:
            done = results["results"][label][scale]
            each = [done[str(i)] for i in range(count)]  # in the same order, whenever it was done
            rows[label, scale] = summary(
                distance=[row["distance"] for row in each],
                clip_score=[row["clip_score"] for row in each],
            )
    # A function of all edits' spectra, without a value for each that an interval could be over.
    for label, error in results["spectrum_error"][statistics_scale].items():
        rows[label, statistics_scale]["spectrum_error"] = {"value": error, "low": None}
    lines = edits_table(results["distance_name"], summary(clip_score=source_scores), rows)
    return f"{markdown(lines)}\n\n[95 % bootstrap intervals] over {count} edits."


def _all_statistics(
    out: Path, scale: str, complete: Mapping[str, Any], sources: Tensor, batch_size: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """`_statistics` of the sources, as 'source', and of each loss that is complete at a scale."""
    found = {"source": _statistics(sources.split(batch_size))}
    for label in (label for label, scales in complete.items() if scale in scales):
        files = [picture(out, label, scale, i) for i in range(len(sources))]
        found[label] = _statistics(
            torch.stack([read_image(file) for file in files[at : at + batch_size]])
            for at in range(0, len(files), batch_size)
        )
    return found


def _spectrum_errors(statistics: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """`lmc.measure.metrics.spectrum_error` of each loss to the sources."""
    from lmc.measure.metrics import spectrum_error

    source, _ = statistics["source"]
    return {
        label: spectrum_error(spectrum, source).item()
        for label, (spectrum, _) in statistics.items()
        if label != "source"
    }


def _write_figures(
    out: Path, results: Mapping[str, Any], statistics: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """fig5.png of every loss and scale in `results` that is complete, fig6.png of `statistics`."""
    from lmc.measure.figures import curves_figure, statistics_figure

    curves = {
        label: [(mean["clip_score"], mean["distance"], scale) for scale, mean in scales.items()]
        for label, scales in results["means"].items()
        if scales
    }
    curves["source"] = [(results["source"], 0.0, "")]
    name = f"{results['distance_name']} to source"
    figure = curves_figure(curves, "CLIP score", name)
    save_whole(out / "fig5.png", figure.savefig, "png")
    figure = statistics_figure(
        {label: spectrum for label, (spectrum, _) in statistics.items()},
        {label: histogram for label, (_, histogram) in statistics.items()},
    )
    save_whole(out / "fig6.png", figure.savefig, "png")


def _statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean power spectrum (F,) and the histogram of vertical derivatives (bins,) of images.

    Args:
        batches: (B, 3, S, S) in [-1, 1] each; one at a time is held.
    """
    from lmc.measure.metrics import derivative_counts, power_spectrum

    spectra = counts = torch.zeros(())
    seen = 0
    # Sums, since a small tensor kept from each batch lies in the way of the next one's memory.
    for images in batches:
        spectra = spectra + power_spectrum(images).double().sum(0)
        counts = counts + derivative_counts(images).double().sum(0)
        seen += len(images)
    return (spectra / seen).float(), (counts / counts.sum()).float()


def picture(out: Path, label: str, scale: str, row: int) -> Path:
    """The file of a result; of the loss the label alone is asked for, its class may be gone."""
    return out / "images" / Spec(label, "").folder() / scale / f"{row:04d}.png"

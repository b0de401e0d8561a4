"""Whether LMC-SDS with a corrector holds or runs away, found out in seconds, without a training.

On average over t and eps, the corrective term moves z along ẑ_t(z) − b(z, t). A perturbation δ of z
is pulled back where b answers it more than the denoiser does, and grows where b answers less:

    r(t) = ⟨[b(z + δ, t) − ẑ_t(z + δ)] − [b(z, t) − ẑ_t(z)], δ⟩ / ‖δ‖²,

(J_b − J_ẑ) along δ, is above 0 in the one case and below in the other. SDS's b = z has J_b = 1 and
pulls back all. Beside r of every kind of perturbation, a free run shows what becomes of pictures
that the corrective term moves alone, which is LMC-SDS at ω → 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.configs import build, read_stage_one
from lmc.corrector import BiasCorrector, IdentityCorrector
from lmc.device import choose_device
from lmc.errors import require
from lmc.files import whole, write_json
from lmc.load import load_averaged, load_corrector
from lmc.measure.figures import drawn, labelled_grid
from lmc.measure.metrics import (
    power_spectrum,
    rmse,
    saturation,
    spectrum_gained,
    spectrum_lost,
)
from lmc.perturbations import (
    Perturbation,
    band_noise,
    band_stripes,
    blur,
    contrast,
    even_cast,
    mix,
    perturb,
    smooth_cast,
)
from lmc.priors import Embedding, Prior
from lmc.progress import Progress
from lmc.schedule import TIME_RANGE
from lmc.shards.images import ImageStream, resize
from lmc.shards.triplets import TripletStream, encoded, sample_triplets, triplet_origin

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
RATE = 0.2  # of the free run: a step moves z by this much of ẑ − b
# Below this a response is said to let a perturbation grow: a fiftieth a unit of gradient descent,
# which in 5,000 steps at the rates of a training is a factor of many, and above what 8 pictures
# leave of noise.
GROWS = -0.02
# What of a free run is said to run away: how much further the second half takes it, over the first
# (a random walk 0.41 as far, what is pulled back less, what is driven as far and more); saturated
# values besides those of the start; decades of power gained, mean over frequencies.
ONWARD, SATURATED, GAINED = 0.6, 0.1, 0.5
SETTLED = 40  # steps before which pictures of every corrector, and of SDS, still move on


def kinds(size: int) -> dict[str, tuple[Perturbation, float, bool]]:
    """The perturbations that are tried: by name how, how much, and whether it is additive.

    Noise is in octaves of frequency, in cycles a picture; stripes in two halves of the octaves.
    """
    found: dict[str, tuple[Perturbation, float, bool]] = {
        "cast": (even_cast, 0.2, True),
        "smooth cast": (smooth_cast, 0.2, True),
    }
    low = 1
    while 2 * low < size:
        high = 2 * low if 4 * low < size else float("inf")
        name = f"noise {low}–{high}" if high < size else f"noise {low}–"
        found[name] = (partial(band_noise, low=low, high=high), 0.1, True)
        low *= 2
    middle = max(1.0, (size / 2) ** 0.5)
    for name, edges in (("wide stripes", (1, middle)), ("fine stripes", (middle, size / 2))):
        found[name] = (partial(band_stripes, low=edges[0], high=edges[1]), 0.1, True)
    return found | {
        "contrast": (contrast, 0.3, False),
        "blur": (blur, 1 / 32, False),
        "mix": (mix, 0.3, False),
    }


@torch.no_grad()
def response(
    corrector: BiasCorrector,
    prior: Prior,
    z: Tensor,
    null: Embedding,
    generator: torch.Generator,
    times: Sequence[float] = TIMES,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, list[float]]:
    """r(t) of every kind of perturbation, over all pictures: Σ⟨…, δ⟩ / Σ‖δ‖², eps shared.

    Args:
        corrector: made for `prior`, on its device.
        prior: loaded.
        z: pictures in its space, float (B, C, S, S); of B = 1 there is no mix.
        null: the unconditional embedding, one row.
        generator: of eps and all δ, on z's device.
        times: t.
        advance: told how many pictures were evaluated.

    Returns:
        By kind, one number each of `times`.
    """
    tried = {name: how for name, how in kinds(z.shape[2]).items() if name != "mix" or len(z) > 1}
    found: dict[str, list[float]] = {name: [] for name in tried}
    for time in times:
        t = torch.full((len(z),), time, dtype=z.dtype, device=z.device)
        eps = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        clean = _term(corrector, prior, z, t, eps, null)
        advance(len(z))
        for name, (how, most, additive) in tried.items():
            amount = torch.full_like(t, most)
            moved = perturb(how, z, amount, generator, prior.latent, additive)
            delta = moved - z
            change = _term(corrector, prior, moved, t, eps, null) - clean
            found[name].append(((change * delta).sum() / delta.square().sum()).item())
            advance(len(z))
    return found


@torch.no_grad()
def drift(
    corrector: BiasCorrector,
    prior: Prior,
    z: Tensor,
    null: Embedding,
    generator: torch.Generator,
    times: Sequence[float] = TIMES,
    advance: Callable[[int], None] = lambda images: None,
) -> list[float]:
    """What the corrective term does to the contrast of clean pictures, a unit of descent, by t.

    Σ⟨ẑ_t − b, z − z̄⟩ / Σ‖z − z̄‖², z̄ the pictures' mean values: below 0 it takes contrast away, a
    haze, and 0 is what LMC-SDS wants.

    Args:
        corrector, prior, z, null, generator, times, advance: see `response`.
    """
    found = []
    centred = z - z.mean((1, 2, 3), keepdim=True)
    for time in times:
        t = torch.full((len(z),), time, dtype=z.dtype, device=z.device)
        eps = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        pair = [_term(corrector, prior, z, t, noise, null) for noise in (eps, -eps)]
        term = (pair[0] + pair[1]) / 2
        found.append((-(term * centred).sum() / centred.square().sum()).item())
        advance(2 * len(z))
    return found


@torch.no_grad()
def free_run(
    corrector: BiasCorrector,
    prior: Prior,
    z: Tensor,
    null: Embedding,
    generator: torch.Generator,
    steps: int,
    time_range: tuple[float, float] = TIME_RANGE,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[Tensor, dict[str, list[float]]]:
    """Gradient descent along the corrective term alone, with a fresh t and eps in each step.

    z ← z − RATE (b(z, t) − ẑ_t(z)), the mean of eps and −eps, kept in [-1, 1] where z is a picture.
    The pictures' t are spread evenly over the range. Ends early where z is no longer finite, or far
    from the start.

    Args:
        corrector, prior, z, null, generator, advance: see `response`.
        steps: how many.
        time_range: of t.

    Returns:
        z at the end, and by step: 'step', 'rmse' to the start, 'power_lost' and 'power_gained'
        against the start's spectrum (`spectrum_lost`), and of pictures 'saturation'.
    """
    start, low = z, time_range[0]
    spectrum = power_spectrum(start).mean(0)
    history: dict[str, list[float]] = {}
    every = max(1, steps // 20)
    far = 10 * start.std()
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            power = power_spectrum(z).mean(0)
            figures = {
                "step": float(step),
                "rmse": rmse(z, start).mean().item(),
                "power_lost": spectrum_lost(power, spectrum).item(),
                "power_gained": spectrum_gained(power, spectrum).item(),
            }
            if not prior.latent:
                figures["saturation"] = saturation(z).mean().item()
            for name, value in figures.items():
                history.setdefault(name, []).append(value)
            if not z.isfinite().all() or (z - start).abs().mean() > far:
                break
        if step == steps:
            break
        drawn = torch.rand(len(z), generator=generator, dtype=z.dtype, device=z.device)
        turn = torch.randperm(len(z), generator=generator, device=z.device)
        t = low + (time_range[1] - low) * (turn + drawn) / len(z)
        eps = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        # What is linear in eps takes part in no drift, and would only be a random walk.
        pair = [_term(corrector, prior, z, t, noise, null) for noise in (eps, -eps)]
        z = z - RATE * (pair[0] + pair[1]) / 2
        z = z if prior.latent else z.clamp(-1, 1)
        advance(2 * len(z))
    return z, history


def _term(
    corrector: BiasCorrector, prior: Prior, z: Tensor, t: Tensor, eps: Tensor, null: Embedding
) -> Tensor:
    """b(z, t) − ẑ_t(z)."""
    x = sample_triplets(prior, z, t, eps, null.expand(len(z)))
    return corrector.correct(z, t, x.z_hat) - x.z_hat


def stability(
    corrector: BiasCorrector, prior: Prior, images: Tensor, **options: Any
) -> dict[str, Any]:
    """How a corrector answers to perturbations, and what it does with pictures when left alone.

    Args:
        corrector: made for `prior`, on the images' device.
        prior: loaded, there too.
        images: clean, float (B, 3, H, W) in [-1, 1], of any size; eight are enough.
        options: of `stability_at`.

    Returns:
        See `stability_at`.

    Raises:
        ValueError: the corrector is another prior's, or there are no images.
    """
    corrector.check_prior(prior.identity)
    require(len(images) >= 1, "images", "at least 1", len(images))
    with torch.no_grad():
        z = prior.encode(resize(images, prior.image_size))
    return stability_at(corrector, prior, z, **options)


def stability_at(
    corrector: BiasCorrector,
    prior: Prior,
    z: Tensor,
    *,
    steps: int = 60,
    times: Sequence[float] = TIMES,
    time_range: tuple[float, float] = TIME_RANGE,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """`stability` of clean z.

    Args:
        corrector, prior: see there.
        z: in the prior's space, float (B, C, S, S).
        steps: of the free run; 0 leaves it out.
        times: t of the responses.
        time_range: of t in the free run.
        seed: of all randomness.
        quiet: no progress.

    Returns:
        Plain values: 'images', how many; 'times'; 'response', by kind a number for each t; 'mean',
        by kind that over t; 'drift' and 'free_run', see there; 'holds' and 'verdict', see there.
        And 'start' and 'end': z before and after the free run.
    """
    null = prior.embed([""]).to(z.device)
    generator = torch.Generator(z.device).manual_seed(seed)
    every = len(z) * (len(times) * (3 + len(kinds(z.shape[2]))) + 2 * steps)
    with Progress("stability", every, "evaluations", quiet=quiet) as progress:
        found = response(corrector, prior, z, null, generator, times, progress.advance)
        end, history = z, dict[str, list[float]]()
        if steps:
            how: Any = (steps, time_range, progress.advance)
            end, history = free_run(corrector, prior, z, null, generator, *how)
        haze = drift(corrector, prior, z, null, generator, times, progress.advance)
    result = {
        "images": len(z),
        "statistics": corrector.statistics,
        "times": list(times),
        "response": found,
        "mean": {name: sum(values) / len(values) for name, values in found.items()},
        "drift": haze,
        "free_run": history,
    }
    holds, said = verdict(result)
    return {**result, "holds": holds, "verdict": said, "start": z, "end": end}


def verdict(result: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether it holds, and a line or two on it.

    It runs away in the kinds of perturbation whose r is below `GROWS` on average over t, by which a
    training moves z; or where a free run of `SETTLED` steps and more moves on in its second half
    (`ONWARD`), or any ends with `SATURATED` more of the values saturated or has gained `GAINED`
    decades of power.

    Args:
        result: of `stability_at`, without the verdict.
    """
    mean, history = result["mean"], result["free_run"]
    # In Eq. 10's normalised space b has z_hat's contrast whatever z's: r is 0 but for noise.
    neutral = () if result["statistics"] == "none" else ("contrast",)
    growing = sorted(
        (name for name in mean if mean[name] < GROWS and name not in neutral),
        key=lambda name: mean[name],
    )
    ran = []
    if history and history["step"][-1] >= SETTLED:
        half, end = history["rmse"][len(history["rmse"]) // 2], history["rmse"][-1]
        ran += (
            [f"move on and on (RMSE {half:.2f}, then {end:.2f})"]
            if end > (1 + ONWARD) * half
            else []
        )
    if history and (gained := history["power_gained"][-1]) > GAINED:
        ran.append(f"gain {gained:.2f} decades of power")
    if "saturation" in history:
        more = history["saturation"][-1] - history["saturation"][0]
        ran += [f"saturate in {more:.0%} more of their values"] if more > SATURATED else []
    if history and not all(map(math.isfinite, history["rmse"])):
        ran.append("go to infinity")
    steps = f"{history['step'][-1]:.0f} steps" if history else ""
    alone = f"moved by the corrective term alone, pictures {' and '.join(ran)} in {steps}"
    if not growing and not ran:
        least = min(mean.keys() - set(neutral), key=lambda name: mean[name])
        free = f"; nor do pictures run away in {steps} of it alone" if history else ""
        return (
            True,
            f"holds: no perturbation grows (the least r is {least}'s, {mean[least]:.2f}){free}",
        )
    parts = []
    if growing:
        named = ", ".join(f"{name} (r = {mean[name]:.2f})" for name in growing)
        by_time = [
            (time, min(result["response"][name][i] for name in growing))
            for i, time in enumerate(result["times"])
        ]
        when = ", ".join(f"{time:g}" for time, least in by_time if least < GROWS)
        parts.append(f"in {named}, at t = {when}")
    parts += [alone] if ran else []
    return False, (
        f"runs away: {'; '.join(parts)}. Train it restoring (--model.restoring '{{}}') if it is "
        "not, or raise ω (the loss's guidance_scale), by which the corrective term weighs less"
    )


def table(result: Mapping[str, Any]) -> str:
    """r by kind and t, and below it the drift of clean pictures' contrast, as text."""
    times = [f"t = {time:g}" for time in result["times"]]
    rows = [["", *times, "mean"]]
    for name, values in result["response"].items():
        rows.append([name, *(f"{x:.3f}" for x in (*values, result["mean"][name]))])
    drifts = result["drift"]
    rows.append(["clean contrast", *(f"{x:+.3f}" for x in (*drifts, sum(drifts) / len(drifts)))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def write_stability(result: Mapping[str, Any], prior: Prior, file: Path) -> None:
    """The plain values as JSON, and beside it a picture: r by kind and t, start and end.

    Args:
        result: of `stability_at`.
        prior: whose z it is.
        file: NAME.json; the picture is NAME.png.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    write_json(file, {k: v for k, v in result.items() if k not in ("start", "end")})
    means = list(result["mean"].values())
    values = torch.tensor([*result["response"].values()])
    values = torch.cat([values, torch.tensor(means)[:, None]], 1)
    figure = Figure(figsize=(6, 1.2 + 0.28 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="RdBu", vmin=-0.5, vmax=0.5, aspect="auto")
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            color = "white" if abs(value) > 0.3 else "black"
            said = f"{value:.2f}"
            axes.text(column, row, said, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(values.shape[1]), [*(f"{t:g}" for t in result["times"]), "mean"])
    axes.set_yticks(range(len(values)), list(result["response"]))
    axes.set(xlabel="t", title="r: pulled back (blue) or grows (red)")
    parts = [drawn(figure)]
    if result["free_run"]:
        with torch.no_grad():
            rows = [prior.decode(result[name]).float() for name in ("start", "end")]
        if rows[0].shape[1] == 3:
            title = f"free run of {result['free_run']['step'][-1]:.0f} steps"
            parts.append(labelled_grid({title: dict(zip(("start", "end"), rows, strict=True))}))
    size = (max(part.width for part in parts), sum(part.height for part in parts))
    sheet, top = Image.new("RGB", size, "white"), 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    with whole(file.with_suffix(".png")) as partial_file:
        sheet.save(partial_file, "png")


def stability_command(
    training: list[str],
    *,
    corrector: str,
    out: Path,
    images: int = 8,
    steps: int = 60,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Whether LMC-SDS with a corrector holds or runs away, and in what, without a training.

    Args:
        training: configuration of train_bias.py, or several, each over the one before: prior,
            held-out data and time_range are taken.
        corrector: a run folder of train_bias.py, a release or hub id, or identity (b = z).
        out: folder to write stability.json and stability.png into.
        images: held-out, the first ones.
        steps: of pictures that the corrective term alone moves; 0 leaves that out.
        seed: of perturbations, eps and t.
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        OSError, ValueError: the configuration, its data or the corrector are not what they must be.
    """
    device = choose_device(device)
    require(images >= 1, "images", "at least 1", images)
    require(steps >= 0, "steps", "at least 0", steps)
    config = read_stage_one(training)
    tested = named_corrector(corrector)
    prior = build(Prior, config.prior)
    tested.check_prior(prior.identity)
    out.mkdir(parents=True, exist_ok=True)
    stored = triplet_origin(config.heldout) is not None
    if stored:
        z = _stored(config.heldout, images).to(device)
    else:
        size = config.image_size or prior.image_size
        stream = ImageStream(config.heldout, size, images, training=False, limit=images)
        z = next((batch.image for batch in stream if batch.key), torch.empty(0)).to(device)
    require(len(z) > 0, f"{config.heldout}: the images in it", "at least 1", len(z))
    prior.to(device)
    if not stored:
        z = encoded(prior, z).detach()
    result = stability_at(
        tested.to(device).eval(),
        prior,
        z,
        steps=steps,
        time_range=config.time_range,
        seed=seed,
    )
    write_stability(result, prior, out / "stability.json")
    print(table(result))
    print(result["verdict"])


def named_corrector(name: str) -> BiasCorrector:
    """A corrector from a run folder, a release or a hub id; or 'identity'.

    Raises:
        OSError, ValueError: there is none.
    """
    if name == "identity":
        return IdentityCorrector("none")
    if not (Path(name) / "checkpoints").is_dir():
        return load_corrector(name)
    network, _ = load_averaged(Path(name))
    if not isinstance(network, BiasCorrector):
        raise ValueError(f"{name} is a run of a {type(network).__name__}, no corrector's")
    return network


def _stored(shards: str, count: int) -> Tensor:
    """The z of the first images of stored triplets, each once."""
    found: dict[str, Tensor] = {}
    for batch in TripletStream(shards, 16, training=False, limit=count):
        found |= dict(zip(batch.key, batch.z, strict=True))
    return torch.stack(list(found.values())[:count])

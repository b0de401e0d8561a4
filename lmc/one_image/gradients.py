"""`lmc gradients`: what a loss sees and wants of one image, as a picture."""

from pathlib import Path

import torch

from lmc.configs import parse_numbers
from lmc.device import choose_device
from lmc.losses import LMC
from lmc.measure.figures import gradients_figure
from lmc.one_image.job import read_image, save_whole
from lmc.priors import Prior
from lmc.schedule import add_noise
from lmc.shards.images import middle_square


def gradients(
    *,
    prior: Prior,
    image: Path,
    prompt: str,
    corrector: str,
    out: Path,
    t: list[float] | float | str = "0.2,0.5,0.8",
    guidance_scale: float = 15.0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Picture z, z_t, ẑ_t, b(z, t) and the gradients g_cond, g_proj, g_lmc [LMC, Fig. 1].

    A row for each t, all with the same noise. g_cond is ω (eps_cond − eps_uncond), g_proj is
    eps_uncond − eps, g_lmc is b(z, t) − ẑ_t, without any weight. A gradient is shown around grey
    (zero), scaled by the number that stands under it. Of a latent prior the first four are decoded,
    and a gradient's first three channels shown.

    Args:
        prior: the diffusion model, by class_path and init_args.
        image: a file; its middle square is taken.
        prompt: y of g_cond.
        corrector: folder or hub id of a released one, or identity.
        out: PNG to write.
        t: times in (0, 1), with commas.
        guidance_scale: ω.
        seed: of the noise.
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        OSError, ValueError: a file or option is not what it must be; nothing is loaded then.
    """
    device = choose_device(device)
    times = parse_numbers(t, "t", float)
    for time in times:
        if not 0 < time < 1:
            raise ValueError(f"t must be in (0, 1), got {time:g}")
    if out.suffix != ".png":
        raise ValueError(f"out must be a .png to write, got {out}")
    loss = LMC(corrector, guidance_scale, rescale=False)
    picture = middle_square(read_image(image)[None], prior.image_size)
    embedding = prior.embed(["", prompt]).to(device)
    loss.prepare(prior, device)
    prior.to(device)
    with torch.no_grad():
        z = prior.encode(picture.to(device))
        drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
        eps = drawn.to(device).repeat(2, 1, 1, 1)
        rows = {}
        for time in times:
            both = torch.full((2,), time, device=device)
            alpha_t, sigma_t = prior.schedule.coefficients(both, z.dtype)
            z_t = add_noise(z.repeat(2, 1, 1, 1), eps, alpha_t, sigma_t)
            (uncond, cond), (z_hat, _) = prior.predict(z_t, both, embedding)
            b = loss.corrector.correct(z, both[:1], z_hat[None])
            shown = [prior.decode(x)[0] for x in (z, z_t[:1], z_hat[None], b)]
            moved = [guidance_scale * (cond - uncond), uncond - eps[0], b[0] - z_hat]
            names = ("z", "z_t", "ẑ_t", "b(z, t)", "g_cond", "g_proj", "g_lmc")
            images = [*shown, *(gradient[:3] for gradient in moved)]
            rows[f"t = {time:g}"] = dict(zip(names, images, strict=True))
    save_whole(out, gradients_figure(rows, names[:4]).savefig, "png", dpi=150)
    print(f"{out}: a row for each t; under each gradient the scale it is shown at")

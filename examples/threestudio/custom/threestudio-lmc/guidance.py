"""LMC-SDS as a guidance of threestudio, in the place of deep-floyd-guidance."""

from dataclasses import dataclass

import threestudio
import torch
from threestudio.models.guidance.deep_floyd_guidance import DeepFloydGuidance
from torch.nn import functional as F

from .corrector import Corrector

SIDE = 64  # of DeepFloyd IF's first stage


@threestudio.register("lmc-guidance")
class LMCGuidance(DeepFloydGuidance):
    """g = (b(z, t) − z_hat) + ω (eps_cond − eps_uncond) [LMC, Eq. 9], w(t) alpha_t g in all.

    Loads and runs DeepFloyd IF as its base class does.
    """

    @dataclass
    class Config(DeepFloydGuidance.Config):
        """Of the base class, and:

        corrector: folder of the released corrector of this very prior.
        guidance_scale: ω; 1 is plain conditional (threestudio's own guidances count one less).
        weighting_strategy: w(t), as of the base class; 'uniform' is the paper's.
        chain_alpha: multiply by alpha_t, as the chain rule has it; SDS here does without.
        """

        corrector: str = ""
        guidance_scale: float = 15.0
        weighting_strategy: str = "uniform"
        chain_alpha: bool = True

    cfg: Config

    def configure(self) -> None:
        if not self.cfg.corrector:
            raise ValueError("system.guidance.corrector has to name a released corrector's folder")
        corrector = Corrector(self.cfg.corrector)
        super().configure()
        self.corrector = corrector.to(self.device)
        self.check_prior()

    def check_prior(self) -> None:
        """Refuse another prior than the corrector's, by what can be known of it here.

        Raises:
            ValueError: it predicts otherwise, or its noise schedule is another.
        """
        made_for, kind = self.corrector.prior, self.scheduler.config.prediction_type
        if kind != "epsilon" or made_for.get("prediction_type", kind) != kind:
            raise ValueError(
                f"{self.cfg.corrector} is of a prior that predicts "
                f"{made_for.get('prediction_type')}, this one predicts {kind}"
            )
        there = made_for.get("schedule", {}).get("alphas_cumprod", [])
        steps = len(self.alphas)
        indices = [min(steps - 1, round(k / 10 * steps)) for k in range(len(there))]
        here = [float(self.alphas[i]) for i in indices]
        if any(abs(a - b) > 1e-3 * max(a, b) for a, b in zip(here, there)):
            raise ValueError(f"{self.cfg.corrector} is of a prior with another noise schedule")
        if made_for.get("pretrained") != self.cfg.pretrained_model_name_or_path:
            threestudio.warn(
                f"the corrector was trained with {made_for.get('pretrained')}, the guidance uses "
                f"{self.cfg.pretrained_model_name_or_path}: it is valid for the same weights only"
            )

    def weight(self, t):
        alpha_bar = self.alphas[t].view(-1, 1, 1, 1)
        if self.cfg.weighting_strategy == "uniform":
            return torch.ones_like(alpha_bar)
        if self.cfg.weighting_strategy == "sds":
            return 1 - alpha_bar
        if self.cfg.weighting_strategy == "fantasia3d":
            return alpha_bar.sqrt() * (1 - alpha_bar)
        raise ValueError(f"unknown weighting_strategy {self.cfg.weighting_strategy!r}")

    def __call__(
        self,
        rgb,
        prompt_utils,
        elevation,
        azimuth,
        camera_distances,
        rgb_as_latents=False,
        **kwargs,
    ):
        """Rendered rgb (B, H, W, 3) in [0, 1] to its loss, as the base class."""
        if rgb_as_latents or prompt_utils.use_perp_neg:
            raise ValueError("lmc-guidance has no latents and no perp-neg: set use_perp_neg false")
        z = F.interpolate(rgb.permute(0, 3, 1, 2) * 2 - 1, (SIDE, SIDE), mode="bilinear")
        steps = (self.min_step, self.max_step + 1)
        t = torch.randint(*steps, [len(z)], dtype=torch.long, device=z.device)
        embeddings = prompt_utils.get_text_embeddings(
            elevation, azimuth, camera_distances, self.cfg.view_dependent_prompting
        )  # of the prompt, then of none
        gradient = self.gradient(z.detach().float(), t, embeddings)
        if self.grad_clip_val is not None:
            gradient = gradient.clamp(-self.grad_clip_val, self.grad_clip_val)
        target = (z - gradient).detach()  # so that the gradient of what follows is `gradient`
        loss = 0.5 * F.mse_loss(z, target, reduction="sum") / len(z)
        return {"loss_sds": loss, "grad_norm": gradient.norm()}

    @torch.no_grad()
    def gradient(self, z, t, embeddings):
        """w(t) alpha_t g of z (B, 3, 64, 64) in [-1, 1] at steps t (B,), of the same shape."""
        noise = torch.randn_like(z)
        alpha_bar = self.alphas[t].view(-1, 1, 1, 1)
        alpha_t, sigma_t = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        z_t = alpha_t * z + sigma_t * noise
        predicted = self.forward_unet(
            torch.cat([z_t] * 2), torch.cat([t] * 2), encoder_hidden_states=embeddings
        )
        eps_cond, eps_uncond = predicted[:, :3].chunk(2)  # without the learned variance
        z_hat = (z_t - sigma_t * eps_uncond) / alpha_t
        b = self.corrector(z, t.to(z) / self.num_train_timesteps, z_hat)
        g = (b - z_hat) + self.cfg.guidance_scale * (eps_cond - eps_uncond)
        return self.weight(t) * (alpha_t * g if self.cfg.chain_alpha else g)

"""LMC-SDS as the loss of your own loop, in plain torch.

    python examples/own_loop.py PRIOR CORRECTOR 'a photo of a lion' lion.png

PRIOR is a pipeline folder or hub id (`pip install '.[train]'` in a clone), CORRECTOR its released
corrector. Here the parameters are a picture's pixels: any network that makes pictures will do.
"""

import sys

import torch
from torchvision.utils import save_image

from lmc import LMC, DiffusersPrior, LossInputs, Prior, ScoreDistillation, surrogate


def optimise(prior: Prior, loss: ScoreDistillation, prompt: str, steps: int) -> torch.Tensor:
    """A picture (1, 3, S, S) in [-1, 1] that the loss has led from grey towards the prompt."""
    loss.check(prior)  # that the corrector is this prior's
    prior.to("cpu")
    loss.prepare(prior, "cpu")
    null, target = prior.embed([""]), prior.embed([prompt])
    image = torch.zeros(1, 3, prior.image_size, prior.image_size, requires_grad=True)
    optimizer = torch.optim.Adam([image], lr=0.05)

    def inputs(z: torch.Tensor, step: int) -> LossInputs:
        """What the loss is computed from; docs/losses.md says which losses want more than this."""
        t = torch.empty(len(z)).uniform_(0.02, 0.98)
        return LossInputs(z, t, torch.randn_like(z), null, target, progress=step / steps)

    for step in range(steps):
        z = prior.encode(image)
        gradient = loss(prior, inputs(z, step))
        optimizer.zero_grad()
        surrogate(z, gradient.total).mean().backward()
        optimizer.step()
        image.data.clamp_(-1, 1)
        for _ in range(loss.updates if loss.learns else 0):  # the LoRA of VSD and DMD
            loss.learn(prior, inputs(z.detach(), step))
    return image.detach()


if __name__ == "__main__":
    folder, corrector, prompt, out = sys.argv[1:5]
    steps = int(sys.argv[5]) if len(sys.argv) > 5 else 300
    image = optimise(DiffusersPrior(folder), LMC(corrector, guidance_scale=15.0), prompt, steps)
    save_image(image / 2 + 0.5, out)

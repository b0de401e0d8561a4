"""Stage one: train the corrector b̂_ψ on triplets of a prior [LMC, Sec. 4]."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lmc.closed_form import training_triplets
from lmc.corrector import BiasCorrector, Corrector, Statistics, corrector_loss
from lmc.device import Compile, compile_in_place
from lmc.errors import about, require
from lmc.filter import FilterCorrector, HybridCorrector, estimate_filter
from lmc.load import load_corrector
from lmc.measure.correctors import HELDOUT, CorrectorErrors, heldout_excess
from lmc.measure.figures import drawn, labelled_grid, spectra_figure
from lmc.measure.metrics import power_spectrum
from lmc.measure.stability import stability_at, write_stability
from lmc.perturbations import Restoring
from lmc.priors import Prior
from lmc.schedule import TIME_RANGE, check_time_range
from lmc.shards.images import ImageBatch
from lmc.shards.triplets import (
    TripletBatch,
    Triplets,
    check_origin,
    draw_t_and_eps,
    encoded,
    heldout_triplets,
    sample_triplets,
)
from lmc.training.base import TIME_BINS, StepDecay, TrainingModule, leads, plain, show
from lmc.unet import Norm

Kind = Literal["unet", "hybrid"]
FREE_STEPS = 60  # of the stability test at the end: it is to take seconds


class CorrectorTraining(TrainingModule):
    """Trains b̂_ψ with L_k = ‖z_hat − b(z, t)‖² [LMC, Eq. 10]. Defaults are the paper's.

    Its data are images, of which it samples triplets as it goes, or triplets (`lmc triplets`). The
    prior is loaded only if there are images.

    Args:
        prior: the frozen diffusion model.
        widths: filters per level of the U-Net; the last is the middle level.
        norm: 'none' as in the paper, or 'group'.
        statistics: of Eq. 10: per 'image' (the paper's), per 'channel' or 'none'; or 'calibrated',
            which is trained as 'none' and applied per image, without its haze: see `normalise`.
        bounded: end in tanh; None is true for a pixel prior and false for a latent one, whose z
            has no bound, and for a hybrid.
        kind: what is trained: 'unet', the paper's `Corrector`; or 'hybrid', a closed form, which is
            estimated first, and a U-Net for the rest (`HybridCorrector`). A latent prior has to say
            `z_size`, the side of its z, for it, as `DiffusersPrior` does.
        closed_form_triplets: of the training data, from which the closed form of a hybrid is
            estimated; see `estimate_filter`.
        restoring: train b̂ to pull perturbations back, which the paper does not: see `Restoring`.
        optimizer: learning rate and decay.
        ema_decay: of the running average of the weights; 0 keeps none.
        time_range: t is uniform in it.
        closed_form: a released closed-form corrector of the same prior (`lmc closed_form`), folder
            or hub id, whose held-out L_k is logged beside; None is none. A hybrid begins with it,
            and estimates none; it logs its own where this is None.
        heldout_images: how many held-out images are measured, the first in the shards' order (of
            stored triplets each at all its times); None is all.
        heldout_draws: of eps for each held-out image, each an evaluation: of two and more the
            excess of L_k over its floor is logged, see `excess_over_floor`. The first one is that
            of the other figures. Left out where the held-out data are stored triplets.
        stability: on how many held-out images it is found out at the end whether LMC-SDS with the
            corrector holds or runs away: `stability_at`, some hundred evaluations, into the run
            folder as stability.json and stability.png. 0 leaves it out.
        compile: torch.compile the corrector, true ('default') or 'reduce-overhead': slow first
            steps, then faster ones. The prior has an option of its own.
        seed: of t and eps; follows seed_everything.

    Raises:
        ValueError: a number or a range that makes no sense.
    """

    takes_triplets = True
    paper_batch = 128

    def __init__(
        self,
        prior: Prior,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        norm: Norm = "none",
        statistics: Statistics = "image",
        bounded: bool | None = None,
        kind: Kind = "unet",
        closed_form_triplets: int = 4000,
        restoring: Restoring | None = None,
        optimizer: StepDecay = StepDecay(lr=1e-4, factor=0.9, every=100_000),  # noqa: B008
        ema_decay: float = 0.9999,
        time_range: tuple[float, float] = TIME_RANGE,
        closed_form: str | None = None,
        heldout_images: int | None = HELDOUT,
        heldout_draws: int = 2,
        stability: int = 4,
        compile: Compile = False,
        seed: int = 0,
    ) -> None:
        if heldout_images is not None and heldout_images < 1:
            raise ValueError(
                f"model.heldout_images must be at least 1, or null for all, got {heldout_images}"
            )
        require(heldout_draws >= 1, "model.heldout_draws", "at least 1", heldout_draws)
        require(stability >= 0, "model.stability", "at least 0", stability)
        with about("model"):
            check_time_range(time_range)
            corrector = _network(
                kind, prior, widths, norm, statistics, bounded, time_range, closed_form_triplets
            )
        super().__init__(corrector, optimizer, ema_decay, seed)
        self.prior, self.time_range = prior, time_range
        self.closed_form, self._heldout_images = closed_form, heldout_images
        self.heldout_draws, self.stability = heldout_draws, stability
        self.compile_network = compile
        self._looked_at: Tensor | None = None  # some held-out z
        self.closed_form_triplets, self.restoring = closed_form_triplets, restoring
        # By the name of its error. In a dict: it is no part of the module, nor of its state.
        self.others: dict[str, BiasCorrector] = {}

    @property
    def corrector(self) -> Corrector | HybridCorrector:
        """The network being trained."""
        assert isinstance(self.network, Corrector | HybridCorrector)
        return self.network

    @property
    def image_size(self) -> int:
        """The prior's."""
        return self.prior.image_size

    @property
    def heldout_images(self) -> int | None:
        """See the class."""
        return self._heldout_images

    def check(self, data: Any) -> None:
        """See `TrainingModule`.

        Raises:
            ValueError: the U-Net cannot halve the prior's images; the data are triplets of another
                prior, or of another time range; or see `load_closed_form`.
            OSError: see `load_closed_form`.
        """
        origins = data.origins()
        if None in origins and not self.prior.latent:
            with about("model.widths and the images of model.prior"):
                self.corrector.unet.check_size(self.prior.image_size)
        for origin in filter(None, origins):
            check_origin(origin, origin["prior"], self.time_range)
        self._load_closed_form()
        if leads() and (self.others or any(origins)):
            self._check_prior(self.prior.identity, origins)

    def _load_closed_form(self) -> None:
        """The released closed form, once; a hybrid begins with it."""
        if self.closed_form is None or self.others:
            return
        found = load_closed_form(self.closed_form)
        self.others["closed_form_loss"] = found
        for network in (self.corrector, self.averaged):
            if isinstance(network, HybridCorrector):
                with about(f"model.closed_form {self.closed_form}"):
                    network.begin_with(found)

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """See `TrainingModule`.

        Raises:
            ValueError: a hybrid was begun with another closed form; see also `TrainingModule`.
        """
        super().check_checkpoint(checkpoint)
        self._load_closed_form()
        network = self.corrector
        if self.closed_form is None or not isinstance(network, HybridCorrector):
            return
        there = checkpoint["state_dict"]["network.closed_form.gain"].cpu()
        if not torch.equal(there, network.closed_form.gain.cpu()):
            raise ValueError(
                f"model.closed_form {self.closed_form} is not what the hybrid was begun with: name "
                "that one, or another run folder"
            )

    def _check_prior(
        self, identity: Mapping[str, Any], origins: Sequence[Mapping[str, Any] | None]
    ) -> None:
        for origin in filter(None, origins):
            check_origin(origin, identity, self.time_range)
        with about(f"model.closed_form {self.closed_form}"):
            for other in self.others.values():
                other.check_prior(identity)

    def prepare_data(self) -> None:
        """Embed the empty prompt into the cache, on one process a node."""
        if self._samples_triplets():
            self.prior.embed([""])

    def setup(self, stage: str) -> None:
        """Load the prior and the empty prompt's embedding, if some of the data are images.

        Raises:
            OSError, ValueError: see `check`.
        """
        device = self.trainer.strategy.root_device
        compile_in_place(self.network, self.compile_network)
        self._load_closed_form()
        identity = self.share_identity()
        self._check_prior(identity, self._origins())
        self.corrector.prior = dict(identity)
        if isinstance(self.corrector, HybridCorrector) and self.closed_form is None:
            own = self.corrector.closed_form
            own.prior = dict(identity)
            self.others["closed_form_loss"] = own
        for other in self.others.values():
            other.to(device)
        if self._samples_triplets():
            self.null = self.prior.embed([""]).to(device)
            self.prior.to(device)
        if self.heldout_draws > 1 and self._origins()[1] is not None and leads():
            print(
                "heldout/excess and heldout/floor are left out: the held-out triplets are stored, "
                "with a single draw of eps each (data.heldout of images has them)",
                flush=True,
            )

    def on_fit_start(self) -> None:
        """Estimate the closed form of a hybrid, on one process for all.

        Raises:
            ValueError: too few triplets in a bin of t.
        """
        network = self.corrector
        # A run that goes on has it from its checkpoint, one that was given it from its release.
        if not isinstance(network, HybridCorrector) or network.closed_form.gain.any():
            return
        trainer: Any = self.trainer
        state: Any = None
        if trainer.is_global_zero:
            data = trainer.datamodule
            size = data.image_size or self.prior.image_size
            how: Any = (data.batch_size, self.time_range, self.seed, self.device)
            triplets = training_triplets(
                data.train, self.prior, self.closed_form_triplets, size, *how
            )
            with about("model.closed_form_triplets"):
                found = estimate_filter(triplets, network.prior, time_range=self.time_range)
            state = found.state_dict()
        state = trainer.strategy.broadcast(state)
        averaged: Any = self.averaged
        for each in (network, averaged):
            each.closed_form.load_state_dict(state)

    def _origins(self) -> list[dict[str, Any] | None]:
        trainer: Any = self.trainer
        return trainer.datamodule.origins()

    def _samples_triplets(self) -> bool:
        """Whether training or held-out data are images."""
        return None in self._origins()

    def triplets(
        self, batch: ImageBatch | TripletBatch, generator: torch.Generator | None = None
    ) -> Triplets:
        """The triplets of a batch; those of images are sampled, at the prior's resolution.

        Args:
            batch: of triplets, which are given back, or of images.
            generator: of t and eps; None is by the images' keys, see `heldout_triplets`.
        """
        if isinstance(batch, TripletBatch):
            return Triplets(batch.z, batch.z_hat, batch.t)
        if generator is None:
            return heldout_triplets(self.prior, batch.image, batch.key, self.null, self.time_range)
        z = encoded(self.prior, batch.image)
        t, eps = draw_t_and_eps(z, generator, self.time_range)
        return sample_triplets(self.prior, z, t, eps, self.null.expand(len(z)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The corrector's prior goes with it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["network"]["config"]["prior"] = plain(self.corrector.prior)

    def training_step(self, batch: ImageBatch | TripletBatch, batch_idx: int) -> Tensor:
        """L_k, mean over the batch; of a restoring training ‖ẑ + δ − b̂(z + δ, t)‖²."""
        generator = self.generator()
        x = self.triplets(batch, generator)
        self.batches_done += 1
        calibrated = self.corrector.statistics == "calibrated"
        if self.restoring is None and not calibrated:
            losses = corrector_loss(self.corrector.correct(x.z, x.t, x.z_hat), x.z_hat)
        else:
            z = x.z
            if self.restoring is not None:
                z = self.restoring.perturb(x.z, generator, self.prior.latent)
            b_hat = self.corrector(z, x.t)
            losses = corrector_loss(b_hat, x.z_hat + (z - x.z))
            if calibrated:
                clean = (z == x.z).flatten(1).all(1)
                self.corrector.calibrate(b_hat.detach().float(), x.t, x.z_hat, clean)
        self.watch(losses[:, None], x.t, batch.key, "L_k")
        self.log("train/loss", losses.mean())
        self.log_by_time("train/loss_by_t", losses.detach(), x.t)
        return losses.mean()

    def on_validation_epoch_start(self) -> None:
        """Start the held-out errors afresh."""
        more = [*self.others, *(["restoring_loss"] if self.restoring else [])]
        excess = self.heldout_draws > 1 and self._origins()[1] is None
        self.errors = CorrectorErrors(TIME_BINS, more, excess).to(self.device)

    def validation_step(self, batch: ImageBatch | TripletBatch, batch_idx: int) -> None:
        """Held-out L_k of the averaged weights, beside the identity's and the closed form's."""
        if not batch.key:
            return
        x = self.triplets(batch)
        averaged: Any = self.averaged
        restored = []
        with torch.autocast(self.device.type, enabled=False):  # as the closed form always is
            b = averaged.correct(x.z, x.t, x.z_hat)
            if self.restoring is not None:
                z = self.restoring.perturb(x.z, _of_key(batch.key[0], z_of=x.z), self.prior.latent)
                restored = [averaged(z, x.t) - (z - x.z)]  # against ẑ, as b is
            excess = None
            if self.heldout_draws > 1 and isinstance(batch, ImageBatch):
                how: Any = (batch.key, self.null, self.heldout_draws)
                excess = heldout_excess(averaged, self.prior, x, *how)
        others = [other.correct(x.z, x.t, x.z_hat) for other in self.others.values()]
        self.errors.update(x.z, x.z_hat, b, *others, *restored, t=x.t, excess=excess)
        if batch_idx == 0 and self.trainer.is_global_zero:
            self._looked_at = x.z[: self.stability]
            order = x.t.argsort()[:: max(1, len(x.t) // 8)]
            names = ("z", "z_hat", "b(z, t)")
            # Stored latents can be trained on without the prior, but not decoded.
            if self._samples_triplets() or not self.prior.latent:
                rows = [self.prior.decode(part[order]) for part in (x.z, x.z_hat, b)]
                times = ", ".join(f"{t:.2f}" for t in x.t[order].tolist())
                sheet = labelled_grid({f"t = {times}": dict(zip(names, rows, strict=True))})
                show(self, "z, z_hat, b(z, t) by t", "step", sheet)
            spectra = {
                f"t = {t:.2f}": [power_spectrum(part[i : i + 1])[0] for part in (x.z, x.z_hat, b)]
                for i, t in ((int(i), float(x.t[i])) for i in order[::3])
            }
            show(self, "power spectra by t", "spectra", drawn(spectra_figure(spectra, names)))

    def on_train_end(self) -> None:
        """Say whether LMC-SDS with the averaged weights holds, on one process; see `stability`."""
        z, trainer = self._looked_at, self.trainer
        done = trainer.global_step >= trainer.max_steps and trainer.is_global_zero
        if not done or not self.stability or z is None or not len(z):
            return
        run = Path(trainer.default_root_dir)
        if not self._samples_triplets():
            print(
                "stability: left out, as the prior is not loaded (the data are stored triplets): "
                f"lmc stability CONFIG --corrector {run} --out DIR",
                flush=True,
            )
            return
        averaged: Any = self.averaged
        with torch.autocast(self.device.type, enabled=False):
            how: Any = {"steps": FREE_STEPS, "time_range": self.time_range, "seed": self.seed}
            result = stability_at(averaged, self.prior, z, quiet=True, **how)
        write_stability(result, self.prior, run / "stability.json")
        print(f"stability: {result['verdict']} ({run / 'stability.png'})", flush=True)

    def on_validation_epoch_end(self) -> None:
        """Log the errors over all held-out images of all processes."""
        for name, value in self.errors.compute().items():
            self.log(f"heldout/{name}", value, sync_dist=True)  # equal on all already


def _network(
    kind: Kind,
    prior: Prior,
    widths: Sequence[int],
    norm: Norm,
    statistics: Statistics,
    bounded: bool | None,
    time_range: tuple[float, float],
    closed_form_triplets: int,
) -> Corrector | HybridCorrector:
    """What is trained; of which prior is known when its weights are read: see `setup`."""
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r}; known are {', '.join(get_args(Kind))}")
    if kind == "unet":
        bounded = not prior.latent if bounded is None else bounded
        return Corrector(prior.channels, widths, norm, bounded, statistics)
    if bounded:
        raise ValueError("bounded is of kind unet: a hybrid's network is a difference")
    size = getattr(prior, "z_size", None if prior.latent else prior.image_size)
    if size is None:
        raise ValueError("kind hybrid: the latent prior has to say z_size, the side of its z")
    with about("the hybrid's widths and z of the prior"):
        filter_options = {"size": size, "time_range": time_range}
        network = HybridCorrector(prior.channels, filter_options, widths, norm, statistics)
    least = len(network.closed_form.gain) * (prior.channels + 1)
    if closed_form_triplets < least:
        raise ValueError(
            f"closed_form_triplets must be at least {least}, some hundred for each of "
            f"{len(network.closed_form.gain)} bins of t, got {closed_form_triplets}"
        )
    return network


def _of_key(key: str, z_of: Tensor) -> torch.Generator:
    """A generator on the device of `z_of` that follows from a key."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator(z_of.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def load_closed_form(pretrained: str) -> FilterCorrector:
    """A released closed-form corrector.

    Args:
        pretrained: folder or hub id.

    Raises:
        OSError: there is none.
        ValueError: it is another kind of corrector.
    """
    option = f"model.closed_form {pretrained}"
    try:
        corrector = load_corrector(pretrained)
    except OSError as error:
        raise OSError(
            f"{option}: no release there: make one (lmc closed_form --out {pretrained})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    if not isinstance(corrector, FilterCorrector):
        raise ValueError(f"{option} is a trained corrector, no release of lmc closed_form")
    return corrector

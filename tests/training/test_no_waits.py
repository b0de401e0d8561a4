"""A step of either stage reads no value from the device, so that the host never waits for it.

Run without one: on torch's meta device tensors have shapes and no values, and whatever would read
one (`item`, `bool`, `nonzero`, a copy to the host) raises. Lightning's own loop is part of it.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode

import lmc.progress
from lmc import losses
from lmc.filter import HybridCorrector
from lmc.losses import ScoreDistillation
from lmc.optimize import Pixels, Synthesis, optimize
from lmc.perturbations import Restoring
from lmc.priors import DiffusersPrior
from lmc.specs import LOSSES
from lmc.training.base import TrainingModule
from lmc.training.bias import CorrectorTraining
from lmc.training.callbacks import CheckFinite, SaveBest, ShowProgress
from lmc.training.data import ImageData
from lmc.training.processes import LeaveOnSignal
from lmc.training.translator import Patches, TranslatorTraining

import worlds

META = torch.device("meta")
STEPS = 4


class MetaAccelerator(Accelerator):
    """A device for Lightning whose tensors have no values."""

    def setup_device(self, device: torch.device) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [META]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "meta"


class MetaStrategy(SingleDeviceStrategy):
    """One such device; at the end nothing is brought back from it."""

    def __init__(self) -> None:
        super().__init__(device=META, accelerator=MetaAccelerator())

    def teardown(self) -> None: ...


class MetaGenerator(torch.Generator):
    """The host's, and where it should be the device's, which can have none, it says that it is."""

    def __new__(cls, device: Any = "cpu") -> "MetaGenerator":
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        self.where = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.where


class NoCopies(TorchFunctionMode):
    """Refuses what makes a tensor on the device out of the host's numbers: a blocking copy."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        copies = function in (torch.tensor, torch.as_tensor)
        if function is torch.Tensor.to and not kwargs.get("non_blocking"):
            copies = args[0].device != META
        if copies and made.device == META:
            raise AssertionError(f"{function.__name__} copies to the device: {args}")
        return made


class Stop(Exception):
    """The steps are over; what follows them may read."""


class Steps(Callback):
    """Forbids copies from the first step on, and ends the training after the last."""

    def __init__(self) -> None:
        self.mode, self.over = NoCopies(), False

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 1:  # Adam makes its state in the first
            self.mode.__enter__()

    def on_exception(self, trainer: Trainer, *args: Any) -> None:
        if not self.over and trainer.global_step > 0:
            self.mode.__exit__(None, None, None)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == STEPS:
            self.mode.__exit__(None, None, None)
            self.over = True
            raise Stop


def run(module: TrainingModule, data: str, monkeypatch, folder: Path) -> None:
    """Some steps of a training on the meta device, with the callbacks that act at every step."""
    monkeypatch.setattr(torch, "Generator", MetaGenerator)
    # What it says every few seconds is a look.
    monkeypatch.setattr(lmc.progress, "SECONDS", 1e9)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    callbacks = [ShowProgress(), SaveBest(folder / "best.ckpt"), CheckFinite()]
    callbacks += [LeaveOnSignal(lambda trainer: None), steps := Steps()]
    trainer = Trainer(
        strategy=MetaStrategy(),
        max_steps=10,
        log_every_n_steps=1000,
        val_check_interval=1000,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    shards = ImageData(f"{data}/train-*.tar", f"{data}/heldout-*.tar", 4, 16, shuffle=10)
    try:
        trainer.fit(module, datamodule=shards)
    except Exception:  # Stop, or what Lightning's end of it meets
        if not steps.over:
            raise
    assert steps.over


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.write_world(tmp_path_factory.mktemp("shards"))


@pytest.fixture()
def prior(tiny_prior_folder) -> DiffusersPrior:
    return DiffusersPrior(str(tiny_prior_folder))


def a_loss(name: str, prior: DiffusersPrior) -> ScoreDistillation:
    """Built with its defaults; LMC-SDS with the kind of corrector that computes most."""
    if name != "lmc":
        return LOSSES[name]()
    own = {"statistics": "calibrated", "prior": prior.identity}
    return losses.LMC(HybridCorrector(3, {"size": 16}, [8, 8], **own))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("every_class", [False, True])
def test_stage_two_never_waits(name, every_class, data, prior, monkeypatch, tmp_path):
    module = TranslatorTraining(
        prior,
        a_loss(name, prior),
        ["dog", "bear"],
        image_size=16,
        widths=[8, 8],
        residual=True,
        gated=True,
        every_class=every_class,
        l2_size=8,
    )
    run(module, data, monkeypatch, tmp_path)


def test_patches_and_a_fixed_noise_never_wait(data, prior, monkeypatch, tmp_path):
    loss = losses.LMC("identity", fixed_noise=True)
    how = {"image_size": 16, "widths": [8, 8], "patches": Patches(range=(8, 16))}
    module = TranslatorTraining(prior, loss, ["dog", "bear"], **how)
    run(module, data, monkeypatch, tmp_path)


@pytest.mark.parametrize("statistics", ["image", "calibrated"])
@pytest.mark.parametrize("restoring", [None, Restoring()])
def test_stage_one_never_waits(statistics, restoring, data, prior, monkeypatch, tmp_path):
    how = {"statistics": statistics, "restoring": restoring, "stability": 0}
    module = CorrectorTraining(prior, [8, 8], **how)
    run(module, data, monkeypatch, tmp_path)


def test_a_read_is_found(data, prior, monkeypatch, tmp_path):
    """The test can fail."""

    class Reads(losses.SDS):
        def terms(self, prior, x):
            assert x.t.max() < 1
            return super().terms(prior, x)

    module = TranslatorTraining(prior, Reads(), ["dog"], image_size=16, widths=[8, 8])
    with pytest.raises(RuntimeError, match="meta tensors"):
        run(module, data, monkeypatch, tmp_path)


@pytest.mark.parametrize("name", LOSSES)
def test_one_image_never_waits(name, prior, monkeypatch):
    monkeypatch.setattr(torch, "Generator", MetaGenerator)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    mode = NoCopies()

    def watch(step: int) -> None:
        if step == 1:  # Adam makes its state in the first
            mode.__enter__()
        if step == STEPS:
            mode.__exit__(None, None, None)
            raise Stop

    source = torch.zeros(2, 3, 40, 24)
    settings = Synthesis(10, whole_steps=2, patch_range=(8, 24), l2_weight=0.1)
    words = {"prompts": ["dog", "bear"], "source_prompts": ["cat", "cat"]}
    with pytest.raises(Stop):
        optimize(
            Pixels(source), prior, a_loss(name, prior), seeds=[0, 1], settings=settings,
            source=source, device=META, watch=watch, **words,
        )  # fmt: skip

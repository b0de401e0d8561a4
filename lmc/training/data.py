"""Shards as a LightningDataModule that can be taken up again at any step."""

import os
import tarfile
import warnings
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lmc.errors import about, require
from lmc.measure.results import check_keys
from lmc.shards.images import ImageBatch, ImageStream
from lmc.shards.stream import ShardStream, expand_shards
from lmc.shards.triplets import TripletBatch, TripletStream, triplet_origin
from lmc.training.processes import shield_worker


class ImageData(LightningDataModule):
    """Training and held-out shards of images, or of triplets where the model takes them.

    Args:
        train: the training shards: a path with wildcards or braces, a URL or a 'pipe:' command.
            Shards of `lmc triplets` are known by what is in them.
        heldout: the held-out shards, likewise; they may be of the other kind.
        batch_size: images (triplets) a step and process; the effective batch is that times
            processes times trainer.accumulate_grad_batches.
        image_size: the side in pixels of their images; None is the model's own
            (`TrainingModule.image_size`). Triplets have the prior's.
        num_workers: loading processes a training process; 0 loads in the process itself.
        shuffle: samples in the shuffle buffer.
        balance: how much rarer classes are seen more often, see `ImageStream`.
        seed: of the order; follows seed_everything.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        train: str,
        heldout: str,
        batch_size: int,
        image_size: int | None = None,
        num_workers: int = 0,
        shuffle: int = 1000,
        balance: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(image_size is None or image_size >= 1, "data.image_size", "at least 1", image_size)
        require(batch_size >= 1, "data.batch_size", "at least 1", batch_size)
        require(num_workers >= 0, "data.num_workers", "at least 0", num_workers)
        require(shuffle >= 0, "data.shuffle", "at least 0", shuffle)
        require(0 <= balance <= 1, "data.balance", "in [0, 1]", balance)
        self.balance = balance
        self.train, self.heldout, self.image_size = train, heldout, image_size
        self.batch_size, self.num_workers = batch_size, num_workers
        self.shuffle, self.seed = shuffle, seed
        self._checked = False
        self.looked_at: list[str] = []  # keys of held-out images that are measured, where not all
        self._origins: dict[str, Any] = {}
        self.batches_read = 0
        self.positions: dict[int, tuple[int, int]] = {}  # by worker
        self.skipped = 0

    def check(self, model: Any = None) -> None:
        """Find the shards and read a sample of each split; nothing else is needed for it.

        Args:
            model: that will be trained, a `TrainingModule`.

        Raises:
            FileNotFoundError, ValueError: see `ImageStream`; or a shard is among the training and
                the held-out ones; or two of the held-out images the model measures have one key.
        """
        for option, shards in (("data.train", self.train), ("data.heldout", self.heldout)):
            with about(option):
                try:
                    self.stream(shards, False, model).check()
                except tarfile.TarError as error:
                    raise ValueError(f"{shards} is no tar of samples: {error}") from error
        train, held_out = (
            {os.path.realpath(url) if Path(url).exists() else url for url in expand_shards(shards)}
            for shards in (self.train, self.heldout)
        )
        if both := train & held_out:
            raise ValueError(
                f"data.heldout {self.heldout}: {min(both)} is among data.train too: held out are "
                "images that are not trained on"
            )
        # What the first validation would find, after hours.
        heldout = self.stream(self.heldout, False, model)
        if heldout.limit is not None and not getattr(model, "takes_triplets", False):
            looked_at = heldout.samples(heldout.urls, heldout.limit)
            self.looked_at = [sample["__key__"] for sample in looked_at]
            try:
                check_keys(self.looked_at)
            except ValueError as error:
                raise ValueError(
                    f"data.heldout {self.heldout}: {error}; prepare it with a key for each image"
                ) from error
        self._checked = True

    def setup(self, stage: str) -> None:
        """See `check`, if that was not done yet."""
        if not self._checked:
            self.check()

    def origins(self) -> list[dict[str, Any] | None]:
        """Of the training and the held-out shards: see `lmc.shards.triplets.triplet_origin`."""
        for shards in (self.train, self.heldout):
            if shards not in self._origins:
                self._origins[shards] = triplet_origin(shards)
        return [self._origins[shards] for shards in (self.train, self.heldout)]

    def train_dataloader(self) -> DataLoader:
        """Endless, shuffled; goes on where `load_state_dict` said."""
        stream = self.stream(self.train, training=True)
        stream.resume(self.batches_read, self.positions)
        return self._loader(stream)

    def val_dataloader(self) -> DataLoader:
        """The held-out images the model looks at, each exactly once over all processes."""
        return self._loader(self.stream(self.heldout, training=False), again=True)

    def on_after_batch_transfer(
        self, batch: ImageBatch | TripletBatch, dataloader_idx: int
    ) -> ImageBatch | TripletBatch:
        """Keep count of what training has read, and say what was skipped."""
        if self.trainer is not None and self.trainer.training:
            worker, *position = batch.position
            self.positions[worker] = (position[0], position[1])
            self.batches_read += 1
        for what in batch.skipped:
            self.skipped += 1
            several = self.trainer is not None and self.trainer.world_size > 1
            who = f"rank {self.trainer.global_rank}: " if several and self.trainer else ""
            # Every rank's own: another reads other samples.
            warnings.warn(
                f"{who}skipped a broken sample ({self.skipped} so far): {what}", stacklevel=2
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What every rank has read, so that each goes on where it was."""
        mine = {"batches_read": self.batches_read, "positions": dict(self.positions)}
        if not torch.distributed.is_initialized():
            return {"ranks": [mine]}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, mine)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where this rank was; a rank that is new starts a stream of its own."""
        rank = self.trainer.global_rank if self.trainer else 0
        if rank < len(state_dict["ranks"]):
            self.batches_read = state_dict["ranks"][rank]["batches_read"]
            self.positions = state_dict["ranks"][rank]["positions"]

    def stream(self, shards: str, training: bool, model: Any = None) -> ShardStream:
        """Of some shards, as this process reads them; see `ShardStream`.

        Args:
            shards: a pattern.
            training: endless and shuffled, or one pass.
            model: whose images they are, before there is a trainer.
        """
        how: dict[str, Any] = {"seed": self.seed, "shuffle": self.shuffle}
        if self.trainer is not None:
            model = self.trainer.lightning_module
            how |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        how["limit"] = None if training else getattr(model, "heldout_images", None)
        # To any other model, triplets of a pixel prior are shards of images like others.
        if getattr(model, "takes_triplets", False):
            self.origins()
            if self._origins[shards] is not None:
                return TripletStream(shards, self.batch_size, training, **how)
        size = model.image_size if self.image_size is None else self.image_size
        return ImageStream(shards, size, self.batch_size, training, balance=self.balance, **how)

    def _loader(self, stream: ShardStream, again: bool = False) -> DataLoader:
        """Of a stream; `again`: that is gone through several times."""
        device = self.trainer.strategy.root_device.type if self.trainer is not None else "cpu"
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=shield_worker,
            pin_memory=device == "cuda",
            persistent_workers=again and self.num_workers > 0,
        )

"""The loop that train_prior.py and train_clip.py share: randomness by step, resuming, progress."""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Loop:
    """Steps of a training that goes on where it was stopped.

    `for step, random in loop:` gives each step's number and a generator that follows from (seed,
    step) alone; the body takes the step and calls `loop.record(loss)`. The learning rate rises to
    `args.lr` and falls along a cosine to zero at `args.steps`.

    Args:
        args: out, steps, batch, lr, seed, save_every. The state is kept in OUT.train.pt.
        parts: by name, what has a state: networks and their averages.
        optimizer: likewise.
        warm_up: steps in which the learning rate rises.
        log_every: steps that a line of the log averages.
        on_save: called before each checkpoint.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        parts: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        warm_up: int,
        log_every: int,
        on_save: Callable[[], None] = lambda: None,
    ) -> None:
        self.args, self.parts, self.optimizer = args, {**parts, "optimizer": optimizer}, optimizer
        self.warm_up, self.log_every, self.on_save = warm_up, log_every, on_save
        self.file = args.out.with_suffix(".train.pt")
        self.first, spent = 0, 0.0
        self.log: list[tuple[int, float]] = []
        self.losses: list[float] = []
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.first, spent, self.log = state["step"], state["seconds"], state["log"]
            print(f"going on from step {self.first}")
        self.start = time.time() - spent

    @property
    def seconds(self) -> float:
        """Spent on training, stops left out."""
        return time.time() - self.start

    def record(self, loss: torch.Tensor) -> None:
        """Note the loss of the step."""
        self.losses.append(loss.item())

    def __iter__(self) -> Iterator[tuple[int, torch.Generator]]:
        args = self.args
        for step in range(self.first, args.steps):
            warm = min(1.0, (step + 1) / self.warm_up)
            decay = 0.5 * (1 + math.cos(math.pi * step / args.steps))
            for group in self.optimizer.param_groups:
                group["lr"] = args.lr * warm * decay
            yield step, torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            done = step + 1
            if done % self.log_every == 0 or done == args.steps:
                self._show(done)
            if done % args.save_every == 0 or done == args.steps:
                self.on_save()
                self._save(done)

    def finish(self) -> None:
        """Delete the checkpoint: the model is written."""
        self.file.unlink(missing_ok=True)

    def _show(self, done: int) -> None:
        self.log.append((done, sum(self.losses) / len(self.losses)))
        self.losses.clear()
        left = self.seconds / done * (self.args.steps - done)
        print(
            f"step {done}/{self.args.steps}  loss {self.log[-1][1]:.4f}  "
            f"{done * self.args.batch / self.seconds:.0f} images/s  {left / 60:.0f} min left",
            flush=True,
        )

    def _save(self, done: int) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": done, "log": self.log, "seconds": self.seconds}
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.file)

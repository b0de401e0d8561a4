"""Runs a training script in several real processes, quickly: they are forked from one that has
imported everything, and find each other as torchrun's would."""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

PRELOAD = ["train_bias", "train_translator", "diffusers", "transformers", "tensorboard", "ranks"]


def start(
    folder: Path,
    args: list[str],
    ranks: int = 2,
    script: str = "train_bias",
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Start `ranks` processes of a script; rank r writes its output to folder/r.log.

    With PAUSE in `environment`, each step takes that many seconds longer; with LOOK, such as '0,3',
    each batch of held-out images of stage one, by rank, which leaves a line in folder/r.look.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        # Of several processes; a single one is to look like an ordinary run.
        joined = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(ranks),
        }
        more = [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"] if ranks > 1 else []
        variables = {**os.environ, **(joined if ranks > 1 else {}), **(environment or {})}
        process = context.Process(
            target=_work, args=(script, [*args, *more], variables, folder, rank, sys.path)
        )
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[Any], folder: Path, seconds: float = 120) -> list[int]:
    """Wait for all; their exit statuses. The output of all is printed, for pytest to show."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hung = [process.pid for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    for log in sorted(folder.glob("*.log")):
        print(f"--- {log.name}\n{log.read_text()}")
    assert not hung, f"still alive after {seconds} s: {hung}"
    return [process.exitcode for process in processes]


def run(folder: Path, args: list[str], **kwargs: Any) -> list[dict[str, Any]]:
    """Start, wait, and what each rank measured.

    Returns:
        By rank: weights and gradients after each step, ema, metrics, the loss's own state, and how
        many numbers DDP broadcast and wrapped.
    """
    processes = start(folder, args, **kwargs)
    assert finish(processes, folder) == [0] * len(processes)
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(processes))]


def wait_for(condition: Any, what: str, seconds: float = 90) -> None:
    """Until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)


def _work(
    script: str, args: list[str], variables: dict[str, str], folder: Path, rank: int, path: list
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # loading processes, as in ordinary runs
    os.setsid()  # a process group of its own, as a job of a shell or a scheduler has
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:] = path
    sys.argv = [script]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    broadcast: list[int] = []
    real = torch.distributed._broadcast_coalesced

    def counted(group: Any, tensors: list[torch.Tensor], *rest: Any) -> None:
        broadcast.append(sum(x.numel() for x in tensors))
        real(group, tensors, *rest)

    torch.distributed._broadcast_coalesced = counted
    from lmc.training.base import TrainingModule

    pause = float(os.environ.get("PAUSE", 0))
    weights: list[dict[str, torch.Tensor]] = []
    gradients: list[dict[str, torch.Tensor]] = []
    wrapped: list[tuple[str, int]] = []
    step = TrainingModule.optimizer_step

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        time.sleep(pause)
        weights.append({n: p.detach().clone() for n, p in self.network.named_parameters()})
        gradients.append({n: p.grad.clone() for n, p in self.network.named_parameters()})
        whole = self.trainer.strategy.model
        size = sum(x.numel() for x in [*whole.parameters(), *whole.buffers()])
        wrapped.append((type(whole).__name__, size))

    TrainingModule.optimizer_step = noted  # type: ignore[method-assign]
    if "LOOK" in os.environ:
        from lmc.training.bias import CorrectorTraining

        look = CorrectorTraining.validation_step

        def slow(self: Any, *args: Any) -> None:
            with open(folder / f"{rank}.look", "a") as file:
                file.write(f"{self.global_step}\n")
            time.sleep(float(os.environ["LOOK"].split(",")[rank]))
            look(self, *args)

        CorrectorTraining.validation_step = slow  # type: ignore[method-assign]
    try:
        module = __import__(script)
        cli = module.main(args)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        raise
    torch.save(
        {
            "weights": weights,
            "ema": cli.model.averaged.state_dict(),
            "gradients": gradients,
            "metrics": dict(cli.trainer.callback_metrics),
            "loss": cli.model.loss.state_dict() if hasattr(cli.model, "loss") else None,
            "broadcast": broadcast,
            "wrapped": wrapped,
        },
        folder / f"{rank}.pt",
    )

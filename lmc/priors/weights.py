"""A pipeline's files: found in a folder or fetched from the hub, read, and digested."""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors import safe_open

VARIANTS = ("*fp16*", "*non_ema*")  # other forms of the same weights, beside them on the hub
# diffusers' older names of a VAE's attention, which it reads as the new ones: one model, two files.
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class PipelineFolder:
    """The files of a pipeline in diffusers format, of which none is fetched before it is needed.

    Args:
        pretrained: a pipeline folder (with model_index.json), or a hub id.
        revision: of a hub id; None is its main branch.

    Attributes:
        path: the folder; of a hub id, the snapshot in the hub's cache.
        index: the content of model_index.json.

    Raises:
        FileNotFoundError: the folder or its model_index.json is missing, or the hub has no such
            model.
        PermissionError: a gated model whose licence was not accepted, or no login.
        ValueError: model_index.json is not JSON.
    """

    def __init__(self, pretrained: str, revision: str | None = None) -> None:
        self.pretrained, self.revision = pretrained, revision
        self._commit: str | None = None
        self._digests: dict[str, str] = {}
        self.path = self.fetch("model_index.json", "*/*config.json")
        self.index = self.json("model_index.json")

    def json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file.

        Raises:
            FileNotFoundError, ValueError: it is missing, or not JSON.
        """
        file = self.path / name
        if not file.exists():
            raise self._missing(name)
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error

    def class_of(self, part: str) -> Any:
        """The class that model_index.json names for a part of the pipeline.

        Raises:
            ValueError: neither diffusers nor transformers has it.
        """
        import diffusers
        import transformers

        library, name = self.index[part]
        modules = {"diffusers": diffusers, "transformers": transformers}
        if library not in modules or not hasattr(modules[library], name):
            raise ValueError(f"{self.pretrained}/model_index.json: unknown {part} {library}.{name}")
        return getattr(modules[library], name)

    def digest(self, part: str) -> str:
        """`weights_digest` of a part, which is fetched for it the first time; '' is all there is.

        Raises:
            FileNotFoundError: some weights are missing.
        """
        if part not in self._digests:
            folder = self.fetch_weights(part) / part
            self._digests[part] = weights_digest(folder, RENAMED if part in ("vae", "") else {})
        return self._digests[part]

    def fetch(self, *patterns: str) -> Path:
        """The folder, with the files of `patterns` in it if it comes from the hub.

        Raises:
            FileNotFoundError: nothing is there of one of them.
        """
        folder = self._download(patterns)
        for pattern in patterns:
            if not any(folder.glob(pattern)):
                raise self._missing(pattern)
        return folder

    def fetch_weights(self, *parts: str) -> Path:
        """The folder, with the weights of `parts`; .bin where no safetensors are.

        Raises:
            FileNotFoundError: some weights are missing, a single shard of many too.
        """
        kinds = ("json", "safetensors")
        folder = self._download([_inside(part, f"*.{kind}") for part in parts for kind in kinds])
        old = [_inside(part, "*.bin") for part in parts if not weight_files(folder / part)]
        if old:
            with contextlib.suppress(FileNotFoundError):
                self._download(old)
        for part in parts:
            if not weight_files(folder / part):
                raise self._missing(_inside(part, "*.safetensors"))
            for index in (folder / part).glob("*.safetensors.index.json"):
                for name in set(self.json(_inside(part, index.name))["weight_map"].values()):
                    if not (folder / part / name).exists():
                        raise self._missing(_inside(part, name))
        return folder

    def _download(self, patterns: Sequence[str]) -> Path:
        """The folder; one of the hub's after fetching there what `patterns` name."""
        folder = Path(self.pretrained)
        if folder.is_dir():
            return folder
        if self.pretrained.count("/") != 1 or self.pretrained.startswith((".", "/")):
            raise FileNotFoundError(f"no such folder: {self.pretrained}")
        try:
            snapshot = snapshot_download(
                self.pretrained,
                revision=self._commit or self.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(VARIANTS),
                # Said here: huggingface_hub 1 asks the hub for a commit's files even offline.
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        except GatedRepoError as error:
            raise PermissionError(
                f"{self.pretrained} is gated: accept its licence at "
                f"https://huggingface.co/{self.pretrained} (logged in there), then log in here "
                "with `hf auth login`, or set HF_TOKEN"
            ) from error
        except LocalEntryNotFoundError as error:
            raise self._missing(*patterns) from error
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{self.pretrained} is no folder here, and the hub has no such model (or it is "
                f"private, and `hf auth login` was not done): {error}"
            ) from error
        # All parts from one commit, even if somebody pushes another one meanwhile.
        self._commit = Path(snapshot).name
        return Path(snapshot)

    def _missing(self, *patterns: str) -> FileNotFoundError:
        """The error for files that are not here: which, and how to get them."""
        files = ", ".join(patterns)
        if Path(self.pretrained).is_dir():
            return FileNotFoundError(
                f"{self.pretrained} has no {files}: not a whole diffusers folder"
            )
        wanted = ["*.json", "*/*.safetensors", "tokenizer*/*"]
        options = [f"--include '{pattern}'" for pattern in wanted]
        options += [f"--exclude '{pattern}'" for pattern in VARIANTS]
        if self.revision:
            options.insert(0, f"--revision {self.revision}")
        return FileNotFoundError(
            f"{self.pretrained}: {files} not downloaded, and the hub cannot be reached "
            "(no network, or HF_HUB_OFFLINE is set) or does not have it. Where there is network:\n"
            f"  hf download {self.pretrained} {' '.join(options)}"
        )


class ModelFolder(PipelineFolder):
    """The files of one model in diffusers format, in no pipeline: config.json and weights.

    Args:
        pretrained: its folder, or a hub id.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as of `PipelineFolder`.
    """

    def __init__(self, pretrained: str) -> None:
        self.pretrained, self.revision = pretrained, None
        self._commit = None
        self._digests = {}
        self.path = self.fetch("config.json")
        self.index = {"": ["diffusers", self.json("config.json").get("_class_name")]}


def _inside(part: str, name: str) -> str:
    return f"{part}/{name}" if part else name


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of one part: whole or in shards; .bin where no safetensors are.

    Variants that lie beside them (…fp16…, …non_ema…) are not among them.
    """
    for suffix in ("safetensors", "bin"):
        files = sorted(folder.glob(f"*.{suffix}"))
        files = [
            f for f in files if re.fullmatch(r"((diffusion_)?pytorch_)?model(-\d+-of-\d+)?", f.stem)
        ]
        if files:
            return files
    return []


def weights_digest(folder: Path, renamed: dict[str, str] | None = None) -> str:
    """SHA-256 over all tensors of the weights in `folder`, as half precision.

    As half precision and by tensor, so that the fp16 and fp32 files of one model, however they are
    cut into shards, have one digest. Files are read once a process, unless they change.

    Args:
        folder: of one part.
        renamed: old names of layers and what they are called now.
    """
    stats = [(file, file.stat()) for file in weight_files(folder)]
    files = tuple((file.resolve(), x.st_ino, x.st_size, x.st_mtime_ns) for file, x in stats)
    return _digest(files, tuple((renamed or {}).items()))


@functools.lru_cache(maxsize=64)
def _digest(
    files: tuple[tuple[Path, int, int, int], ...], renamed: tuple[tuple[str, str], ...]
) -> str:
    where: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for file, *_ in files:
            if file.suffix == ".safetensors":
                opened = stack.enter_context(safe_open(file, "pt"))
                found = {name: (opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                found = {name: (tensors.__getitem__, name) for name in tensors}
            for name, source in found.items():
                for old, new in renamed:
                    name = name.replace(f".{old}.", f".{new}.")
                where[name] = source
        digest = hashlib.sha256()
        for name in sorted(where):
            read, stored = where[name]
            value = read(stored).to(torch.float16).contiguous()
            digest.update(name.encode())
            digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Prompts: texts through the pipeline's own text encoders and a cache on disk; or classes."""

import gc
import hashlib
import importlib.util
import inspect
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmc.errors import warn
from lmc.files import whole
from lmc.priors.families import Family
from lmc.priors.weights import PipelineFolder


class TextPrompts:
    """Embeds texts. The encoders are loaded for texts only that are not in the cache yet.

    A file of the cache is a text's tensors, with the words in it that the tokenizers do not know.

    Args:
        files: the pipeline's.
        family: of the pipeline.
        cache_dir: where embeddings are kept.
    """

    def __init__(self, files: PipelineFolder, family: Family, cache_dir: Path) -> None:
        self.files, self.family, self.cache_dir = files, family, cache_dir
        self._encoders = [part for part in family.text_parts if part.startswith("text_encoder")]
        self._tokenizers = [part for part in family.text_parts if part.startswith("tokenizer")]

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Named tensors with a row a prompt, float32, on the CPU.

        A prompt with words that a tokenizer does not know is warned of, whether it is new or not.

        Raises:
            FileNotFoundError, ImportError: see `encode`.
        """
        files = [self._cache_file(prompt) for prompt in prompts]
        missing = {p: f for p, f in zip(prompts, files, strict=True) if not f.exists()}
        if missing:
            encoded = self.encode(list(missing))
            gc.collect()  # a T5-XXL is 19 GB: gone before the denoiser needs the room
            for (row, unknown), file in zip(encoded, missing.values(), strict=True):
                with whole(file) as partial:
                    save_file(row, partial, {"unknown": json.dumps(unknown)})
        rows = []
        for prompt, file in zip(prompts, files, strict=True):
            with safe_open(file, "pt") as opened:
                rows.append({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
                unknown = json.loads((opened.metadata() or {}).get("unknown", "[]"))
            if unknown:
                warn(
                    f"{self.files.pretrained}: the text encoder does not know "
                    f"{', '.join(map(repr, unknown))} in {prompt!r}: its tokenizer reads an "
                    "unknown sign or single letters there"
                )
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[tuple[dict[str, Tensor], list[str]]]:
        """What the pipeline's own encode_prompt gives, in float32, and the unknown words.

        Raises:
            FileNotFoundError: an encoder or tokenizer is missing.
            ImportError: a tokenizer needs sentencepiece, which is not installed.
        """
        pipeline = self._pipeline()
        options: dict[str, Any] = {"device": torch.device("cpu"), "num_images_per_prompt": 1}
        asked = inspect.signature(pipeline.encode_prompt).parameters
        options |= dict.fromkeys({"prompt_2", "prompt_3"} & set(asked))  # as `prompt`
        names = ["encoder_hidden_states", *([self.family.pooled] if self.family.pooled else [])]
        encoded = []
        for prompt in prompts:
            found = pipeline.encode_prompt(
                prompt, **options, do_classifier_free_guidance=prompt == ""
            )
            # (hidden, negative hidden), or those and (pooled, negative pooled).
            tensors = found[1::2] if prompt == "" else found[::2]
            row = {n: x[0].float().contiguous() for n, x in zip(names, tensors, strict=True)}
            text = prompt.lower() if self.family.lowercase else prompt
            unknown = [
                word
                for part in self._tokenizers
                for word in unknown_words(getattr(pipeline, part), text)
            ]
            encoded.append((row, list(dict.fromkeys(unknown))))
        return encoded

    def _pipeline(self) -> Any:
        """The pipeline with nothing but text in it."""
        import diffusers

        folder, index = self.files.path, self.files.index
        self.files.fetch(*(f"{part}/*" for part in self._tokenizers))
        installed = importlib.util.find_spec("sentencepiece") is not None
        for part in self._tokenizers:
            names = {file.name for file in (folder / part).iterdir()}
            # DeepFloyd IF's tokenizer is published in this form alone.
            if "spiece.model" in names and "tokenizer.json" not in names and not installed:
                raise ImportError(
                    f"{self.files.pretrained}/{part} is in SentencePiece's format: "
                    "pip install sentencepiece protobuf"
                )
        self.files.fetch_weights(*self._encoders)
        parts = {
            part: self.files.class_of(part).from_pretrained(folder, subfolder=part)
            for part in self._tokenizers
        }
        for part in self._encoders:
            model = self.files.class_of(part)
            parts[part] = model.from_pretrained(folder, subfolder=part, dtype=torch.float32).eval()
        pipeline_class = getattr(diffusers, index["_class_name"])
        known = inspect.signature(pipeline_class.__init__).parameters
        parts |= dict.fromkeys(
            name
            for name, parameter in known.items()
            if parameter.default is parameter.empty and name not in ("self", *parts)
        )
        for option in ("requires_safety_checker", "add_watermarker"):
            if option in known:
                parts[option] = False
        if "force_zeros_for_empty_prompt" in index:
            parts["force_zeros_for_empty_prompt"] = index["force_zeros_for_empty_prompt"]
        return pipeline_class(**parts)

    def _cache_file(self, prompt: str) -> Path:
        """One file a prior and prompt. The encoders' files are listed, never opened."""
        folder, index = self.files.path, self.files.index
        if Path(self.files.pretrained).is_dir():
            files = [
                file for part in self.family.text_parts for file in sorted(folder.glob(f"{part}/*"))
            ]
            version: Any = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
            if "force_zeros_for_empty_prompt" in index:
                version.append(index["force_zeros_for_empty_prompt"])
        else:
            version = folder.name  # a hub snapshot's folder is named by its commit
        key = json.dumps([self.files.pretrained, version, prompt])
        return self.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The words of a text that a tokenizer has no token for: one of its signs, or all but letters.

    A word that is spelled letter by letter, of three letters or more, counts among them: a
    vocabulary that has each letter knows every word in that sense. A byte-level tokenizer (CLIP's)
    knows all.
    """
    unknown = tokenizer.unk_token_id
    # CLIP has no token for the unknown, and calls its end of text so.
    if unknown in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return []
    found = []
    for word in text.split():
        ids = tokenizer(word, add_special_tokens=False).input_ids
        pieces = tokenizer.convert_ids_to_tokens(ids)
        letters = word.strip(string.punctuation)
        spelled = all(len(piece.lstrip("▁")) <= 1 for piece in pieces)
        if unknown in ids or (spelled and len(letters) > 2 and letters.isalpha()):
            found.append(letters or word)
    return found


def class_ids(pretrained: str, classes: Mapping[str, int], prompts: Sequence[str]) -> Tensor:
    """The ids of classes by name or number, int64 (N,); see `lmc.priors.families.read_classes`.

    Raises:
        ValueError: an unknown class.
    """
    for prompt in prompts:
        if prompt not in classes:
            names = [name for name in classes if name and not name.isdigit()]
            numbers = [name for name in classes if name.isdigit()]
            known = ", ".join(map(repr, [*names[:10], *(["…"] if len(names) > 10 else [])]))
            raise ValueError(
                f"{pretrained}: no class {prompt!r}; known are {known + ', ' if known else ''}"
                f"the numbers {numbers[0]} to {numbers[-1]}, and '' for none"
            )
    return torch.tensor([classes[prompt] for prompt in prompts])

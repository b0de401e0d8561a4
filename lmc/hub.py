"""Networks as folders and on the hub: what their config.json and weights must be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download


class HubNetwork(PyTorchModelHubMixin, library_name="lmc"):
    """from_pretrained, save_pretrained and push_to_hub, refusing weights that do not fit."""

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> Any:
        try:
            return super()._from_pretrained(**{**kwargs, "strict": True})
        except RuntimeError as error:
            raise ValueError(f"{kwargs['model_id']} is no {cls.__name__}: {error}") from error


def load_released(pretrained: str, kinds: Mapping[str, type[HubNetwork]]) -> Any:
    """A released network, of the kind that its config.json tells.

    Args:
        pretrained: a release folder or hub id.
        kinds: each by a key that only its own config has.

    Raises:
        FileNotFoundError: a local folder without config.json.
        OSError, HFValidationError: there is no such folder or hub id, or no way to the hub.
        ValueError: it holds something else, or the weights do not fit.
    """
    if Path(pretrained).is_dir():
        file = Path(pretrained) / "config.json"
        if not file.exists():
            raise FileNotFoundError(
                f"{pretrained} has no config.json: not a release (see lmc release)"
            )
    else:
        file = Path(hf_hub_download(pretrained, "config.json"))
    try:
        config = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the config.json of {pretrained} cannot be read: {error}") from error
    for key, kind in kinds.items():
        if key in config:
            return kind.from_pretrained(pretrained)
    wanted = " or ".join(kind.__name__ for kind in kinds.values())
    raise ValueError(
        f"{pretrained} is the release of no {wanted}: its config.json has "
        f"{', '.join(config) or 'nothing'}"
    )

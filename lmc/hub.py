"""Networks as folders and on the hub: what their config.json and weights must be."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError


class HubNetwork(PyTorchModelHubMixin, library_name="lmc"):
    """from_pretrained, save_pretrained and push_to_hub, refusing weights that do not fit.

    Attributes:
        arguments: of the constructor, by name, with the defaults: what config.json holds.
    """

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "HubNetwork":
        # The mixin keeps them too, but under a private name. A copy is made without any, and has
        # them from what it is a copy of.
        network = super().__new__(cls, *args, **kwargs)
        given = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)
        given.apply_defaults()
        network.arguments = dict(list(given.arguments.items())[1:])  # less self
        return network

    # What the mixin's guide says to override for loading in a way of one's own.
    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> Any:
        try:
            return super()._from_pretrained(**{**kwargs, "strict": True})
        except RuntimeError as error:
            raise ValueError(f"{kwargs['model_id']} is no {cls.__name__}: {error}") from error


def split_revision(pretrained: str) -> tuple[str, str | None]:
    """'me/corrector@v1' as ('me/corrector', 'v1'), a name alone with None; a path is no hub id.

    Raises:
        ValueError: nothing is before or after the '@'.
    """
    name, at, revision = pretrained.partition("@")
    if not at or Path(pretrained).exists():
        return pretrained, None
    if not name or not revision:
        raise ValueError(f"{pretrained}: a revision is given as ID@REVISION")
    return name, revision


def load_released(pretrained: str, kinds: Mapping[str, type[HubNetwork]]) -> Any:
    """A released network, of the kind that its config.json tells.

    Args:
        pretrained: a release folder or hub id; 'me/corrector@v1' is the hub's revision v1 (a
            branch, tag or commit).
        kinds: each by a key that only its own config has.

    Raises:
        FileNotFoundError: a local folder without config.json, or there is no such folder, hub id
            or revision, or no way to the hub.
        ValueError: it holds something else, or the weights do not fit.
    """
    name, revision = split_revision(pretrained)
    if Path(name).is_dir():
        file = Path(name) / "config.json"
        if not file.exists():
            raise FileNotFoundError(
                f"{pretrained} has no config.json: not a release (see lmc release)"
            )
    else:
        try:
            file = Path(hf_hub_download(name, "config.json", revision=revision))
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"no release at {pretrained}: no such folder, and as a hub id: {error}"
            ) from error
    try:
        config = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the config.json of {pretrained} cannot be read: {error}") from error
    for key, kind in kinds.items():
        if key in config:
            return kind.from_pretrained(name, revision=revision)
    wanted = " or ".join(kind.__name__ for kind in kinds.values())
    raise ValueError(
        f"{pretrained} is the release of no {wanted}: its config.json has "
        f"{', '.join(config) or 'nothing'}"
    )

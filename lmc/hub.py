"""Networks as folders and on the hub: what their config.json and weights must be."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError

from lmc import __version__

# Of a release, in its config.json (docs/releases.md); those of 0.1.0 have none, which is 0.
FORMAT = 1


class HubNetwork(PyTorchModelHubMixin, library_name="lmc-sds"):
    """from_pretrained, save_pretrained and push_to_hub, refusing weights that do not fit.

    Attributes:
        arguments: of the constructor, by name, with the defaults: what config.json holds, beside
            its format and the kind of network.
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """A released network in evaluation mode, on the CPU.

        Args:
            pretrained_model_name_or_path: a release folder, or a hub id; 'me/lions@v1' is its
                revision v1 (a branch, tag or commit).
            options: of huggingface_hub: revision, token, cache_dir, local_files_only,
                force_download.

        Raises:
            FileNotFoundError, ValueError: see `read_config`; or it is the release of another kind
                of network, or its weights do not fit.
        """
        where = str(pretrained_model_name_or_path)
        name, revision = split_revision(where)
        if revision is not None:
            options = {**options, "revision": revision}
        check_config(where, read_config(name, **options), cls)
        return super().from_pretrained(name, **options)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As of any network of the hub; its `arguments`, as they are now, are the config."""
        about = {"format": FORMAT, "kind": type(self).__name__}
        config = kwargs.pop("config", None) or {**about, **self.arguments}  # push_to_hub gives None
        return super().save_pretrained(*args, config=config, **kwargs)

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
        kinds: each by a key that only its own config has, by which it is known in format 0.

    Raises:
        FileNotFoundError, ValueError: see `read_config`; or it holds something else, or the weights
            do not fit.
    """
    name, revision = split_revision(pretrained)
    config = read_config(name, revision=revision)
    for key, kind in kinds.items():
        if config.get("kind") == kind.__name__ or ("kind" not in config and key in config):
            return kind.from_pretrained(pretrained)
    wanted = " or ".join(kind.__name__ for kind in kinds.values())
    found = f"its kind is {config['kind']!r}" if "kind" in config else "its config.json has "
    raise ValueError(
        f"{pretrained} is the release of no {wanted}: {found}"
        + ("" if "kind" in config else ", ".join(config) or "nothing")
    )


def read_config(pretrained: str, revision: str | None = None, **options: Any) -> dict[str, Any]:
    """The config.json of a release.

    Args:
        pretrained: a release folder or hub id.
        revision: of a hub id.
        options: of huggingface_hub's download.

    Raises:
        FileNotFoundError: a local folder without config.json, or there is no such folder, hub id
            or revision, or no way to the hub.
        ValueError: it is no JSON of keys, or of a format that a later version has written.
    """
    where = f"{pretrained}@{revision}" if revision else pretrained
    if Path(pretrained).is_dir():
        file = Path(pretrained) / "config.json"
        if not file.exists():
            raise FileNotFoundError(
                f"{pretrained} has no config.json: not a release (see lmc release)"
            )
    else:
        try:
            file = Path(hf_hub_download(pretrained, "config.json", revision=revision, **options))
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"no release at {where}: no such folder, and as a hub id: {error}"
            ) from error
    try:
        config = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the config.json of {where} cannot be read: {error}") from error
    number = config.get("format", 0)
    if type(number) is not int or number > FORMAT:
        raise ValueError(
            f"{where} is of format {number!r} of releases, and lmc-sds {__version__} knows them up "
            f"to {FORMAT}: pip install --upgrade lmc-sds"
        )
    return config


def check_config(where: str, config: Mapping[str, Any], kind: type[HubNetwork]) -> None:
    """Refuse the config of another kind of network, or one with what is not known of this.

    Raises:
        ValueError: names what it is, or the key that is missing or not known.
    """
    if config.get("kind", kind.__name__) != kind.__name__:
        raise ValueError(f"{where} is the release of a {config['kind']}, no {kind.__name__}")
    parameters = dict(list(inspect.signature(kind.__init__).parameters.items())[1:])
    for name, each in parameters.items():
        if each.default is each.empty and name not in config:
            raise ValueError(f"{where} is no {kind.__name__}: its config.json has no {name!r}")
    for name in config:
        # Left out, it would be another network under the same name.
        if name not in (*parameters, "format", "kind"):
            raise ValueError(
                f"{where} is no {kind.__name__} that lmc-sds {__version__} knows: its config.json "
                f"has {name!r}"
            )

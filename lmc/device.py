"""The device that computes."""


def check_device(device: str) -> None:
    """Refuse a device that cannot be used, before anything is loaded.

    Raises:
        ValueError: it cannot; says why.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or no torch for it
        why = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here: {why}") from error

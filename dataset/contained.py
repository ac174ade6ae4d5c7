"""Files of a data set stay inside it: a link that leads out of the folder it belongs to is refused."""

from __future__ import annotations

from pathlib import Path

from utils.errors import DataError


def contained(path: Path, home: Path) -> Path:
    """`path`, if it lies below `home` once links are followed (`home` itself may be a link, as to another disk).

    Args:
        path: of a file or folder that may not exist yet.
        home: the folder it must stay in.

    Raises:
        DataError: it leads out, or round in a circle.
    """
    try:
        inside = path.resolve().is_relative_to(home.resolve())
    except (OSError, RuntimeError) as error:  # a circle of links
        raise DataError(f"{path}: cannot be followed ({error}). Remedy: replace the link by the file.") from error
    if not inside:
        raise DataError(
            f"{path}: leads out of {home} to {path.resolve()}; links out of the data are not followed. "
            "Remedy: copy the file there, or make the folder media or gt_mask itself the link."
        )
    return path

"""Folders as volumes have them."""

from __future__ import annotations

from pathlib import Path


def as_a_volume(folder: Path) -> None:
    """As Kubernetes mounts a config map: each name is a link through ``..data`` to a folder of this version."""
    version = folder / "..2026_11_29_19_45_00.1"
    version.mkdir(mode=0o755)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(version / path.name)
        path.symlink_to(Path("..data") / path.name)
    (folder / "..data").symlink_to(version.name)

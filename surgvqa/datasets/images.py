"""The images that the rows of a data set name: which file each is, and whether it may be read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath

from surgvqa.datasets import ImageRef

_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".tif", ".tiff", ".webp")
"""Suffixes that are tried for a name without one, such as an image's id."""


def leading_out(files: Iterable[Path], folder: Path, roots: Sequence[str] = ()) -> list[str]:
    """What is wrong with files found in a folder that are links out of it and of `roots`."""
    homes = [folder.resolve(), *(Path(root).resolve() for root in roots)]
    out = []
    for file in files:
        try:
            real = file.resolve() if file.is_symlink() else homes[0]
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
            out.append(f"{file}: cannot be looked up: {getattr(error, 'strerror', None) or error}")
            continue
        if not any(real.is_relative_to(home) for home in homes):
            out.append(
                f"{file}: leads out of {folder}, to {real}; list a folder around it in data.roots if that is "
                "meant"
            )
    return out


class Images:
    """The images that the rows of a data set may name. Each is looked up once, and none is opened."""

    def __init__(self, folder: Path, roots: Sequence[str] = ()) -> None:
        """`folder` is the data's own; `roots` are those that the recipe's `data.roots` allows beside it."""
        self._roots = [folder.resolve(), *(Path(root).resolve() for root in roots)]
        self._known: dict[str, ImageRef | str] = {}
        self._named: dict[str, Path] = {}
        self._folders: dict[str, Path] = {}

    def locate(self, name: str) -> ImageRef:
        """The regular file `name`, really inside one of the folders; its key is its path in there.

        A relative name is looked for in one folder after the other; the keys of those in `roots` begin with
        that folder's name. A name may lack its suffix if exactly one file has it with one. Raises ValueError
        with what is wrong, to follow the name in a message.
        """
        if name not in self._known:
            try:
                self._known[name] = self._find(self._with_suffix(name))
            except ValueError as error:
                self._known[name] = str(error)
        found = self._known[name]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def files(self, folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path | str]:
        """Names in a folder that end in one of `suffixes` → the file, or what is wrong with it.

        One look at the folder tells of all; only what is a link there is looked up by itself. Names that
        begin with a dot are no data. Raises ValueError with what is wrong, to be put after the folder.
        """
        try:
            home = folder.resolve()
            if not any(home.is_relative_to(root) for root in self._roots):
                raise ValueError(self._outside(home))
            with os.scandir(folder) as entries:
                named = [entry for entry in entries if entry.name.lower().endswith(suffixes)]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot be listed: {getattr(error, 'strerror', None) or error}") from None
        found: dict[str, Path | str] = {}
        for entry in named:
            if entry.name.startswith("."):
                continue
            try:
                entry.name.encode()
            except UnicodeEncodeError:
                found[entry.name] = "has a name that is not UTF-8"
                continue
            if not entry.is_symlink():
                found[entry.name] = (
                    Path(entry.path) if entry.is_file(follow_symlinks=False) else "is not a file"
                )
                continue
            try:
                found[entry.name] = self.locate(str(home / entry.name)).path or ""
            except ValueError as error:
                found[entry.name] = str(error)
        return found

    def _resolved(self, root: Path, name: str) -> Path:
        """Return `(root / name).resolve()`, but resolve a folder of many files only once."""
        folder, base = os.path.split(name)
        if base in ("", ".", "..") or (root / name).is_symlink():
            return (root / name).resolve()
        if (known := self._folders.get(f"{root}/{folder}")) is None:
            known = self._folders[f"{root}/{folder}"] = (root / folder).resolve()
        return known / base

    def _outside(self, place: Path) -> str:
        where = f"leads out of {self._roots[0]}, to {place}"
        return f"{where}; list a folder around it in data.roots if that is meant"

    def _with_suffix(self, name: str) -> str:
        """Return `name`, with its suffix if it lacks one. Raises ValueError if several files fit."""
        if Path(name).suffix.lower() in _SUFFIXES or not re.fullmatch(r"[^\0:\\]{1,200}", name):
            return name
        try:
            if any((root / name).exists() for root in self._roots):
                return name
            found = {
                name + suffix: (root / (name + suffix)).resolve()
                for root in self._roots
                for suffix in _SUFFIXES
                if (root / (name + suffix)).is_file()
            }
        except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
            return name
        if len(set(found.values())) > 1:
            raise ValueError(f"may be {' or '.join(found)}; give the name with its suffix")
        return next(iter(found), name)

    def _find(self, name: str) -> ImageRef:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", name):
            raise ValueError("is an address; download the image and give its path")
        if PureWindowsPath(name).is_absolute() and not name.startswith("/"):
            raise ValueError(f"is an absolute path of Windows; give it relative to {self._roots[0]}")
        outside = None
        for root in self._roots:
            try:
                file = self._resolved(root, name)
                home = next((root for root in self._roots if file.is_relative_to(root)), None)
                if home is None:
                    outside = file
                    continue
                mode = file.stat().st_mode
                break
            except FileNotFoundError:
                continue
            except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
                raise ValueError(
                    f"cannot be looked up: {getattr(error, 'strerror', None) or error}"
                ) from None
        else:
            if outside:
                raise ValueError(self._outside(outside))
            hint = " (write / instead of \\)" if "\\" in name else ""
            raise ValueError(f"does not exist in {' or '.join(map(str, self._roots))}{hint}")
        if not stat.S_ISREG(mode):
            raise ValueError("is not a file" if not stat.S_ISDIR(mode) else "is a folder, not a file")
        key = file.relative_to(home if home == self._roots[0] else home.parent).as_posix()
        if (other := self._named.setdefault(key, file)) != file:
            raise ValueError(f"is {file}, which cannot be told from {other}; rename one of their folders")
        return ImageRef(key, path=file)

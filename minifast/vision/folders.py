"""Which files of a folder belong to which class, for training and for validation; and what is wrong with the folder."""
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from ..show.tables import listed
from .decode import FOREIGN, GREY, opened
from .listing import Listing, Sample, chosen

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif")
PASSED_OVER = {"__macosx", "thumbs.db", "desktop.ini"}  # what systems leave behind, beside whatever begins with a dot
PARTS = {"train", "training", "valid", "validation", "val", "test", "testing"}  # names of no classes
VALID_NAMES = ("valid", "val", "validation")
TRAIN = "train"  # where the training pictures are if nobody says
WAY_OUT = "skip_broken=True leaves out the files that cannot be read"  # a note: a command line has no such argument
SHARE = 0.2  # of each class, held back where there is no folder for validation


def find(root: Path, train: str = TRAIN, valid: str | float | None = None, seed: int = 0,
         skip_broken: bool = False) -> Listing:
    """The pictures below `root`, by class, each list in the order of the file names.

    Of `root/train/<class>/...` and `root/valid/<class>/...`; or of `root/<class>/...`, of which the share `valid` of
    each class is held back, drawn with `seed` for each class by itself. valid: the name of a folder, a share in 0..1,
    or None for the folder that is there, else a fifth. Pictures in a format that Pillow cannot read are among the
    other files with `skip_broken`. Raises ValueError with one line that names the folder or file.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is a file, not a folder of pictures" if root.exists() else
                         f"there is no folder {root}")
    if train != TRAIN and not (root / train).is_dir():  # who names it does not mean the one tree
        raise ValueError(f"there is no folder {root / train}: {root} holds "
                         f"{listed(each.name for each in _folders(root)) or 'no folder'}")
    has_train = _is_part(root, train)
    if valid is None:
        valid = next((name for name in VALID_NAMES if has_train and (root / name).is_dir()), SHARE)
    folder = root / train
    if not has_train and not isinstance(valid, str):
        folder = root
        _check_classes(root, train)
    by_class, others = _by_class(folder, skip_broken)
    if isinstance(valid, str):
        validation = str(root / valid)
        held, more = _by_class(root / valid, skip_broken, is_train=False)
        for name in held:
            if name not in by_class:
                raise ValueError(f"the class {name!r} is in {validation} only: {folder} has {listed(by_class)}")
        others += more
    else:
        by_class, held = _split(by_class, valid, seed)
        validation = f"{valid:.0%} of each class" if any(held.values()) else "none, as each class has one picture only"
    sizes, is_grey, broken = _headers([*chain(*by_class.values(), *held.values())], skip_broken)
    train_part, valid_part = (  # of which a class may be missing in validation
        [Sample(path, label) for label, name in enumerate(by_class) for path in files.get(name, ())
         if path not in broken] for files in (by_class, held))
    return Listing([train_part, *filter(None, [valid_part])], list(by_class), sizes, is_grey, are_files=True,
                   skip_broken=skip_broken, validation=validation, others=others, broken=sorted(broken))


def _is_part(root: Path, train: str) -> bool:
    """Whether `root/train` holds the training data, and is not itself a class, of the railway kind."""
    others = {folder.name.lower() for folder in _folders(root) if folder.name != train}
    return (root / train).is_dir() and (bool(_folders(root / train)) or others <= PARTS)


def _check_classes(root: Path, train: str) -> None:
    """Raise ValueError if the folders of `root` are parts of the data, under other names than those looked for."""
    parts = [folder.name for folder in _folders(root) if folder.name.lower() in PARTS and folder.name != train]
    if parts:
        own = {name.lower().startswith(TRAIN): name for name in parts}  # of either kind one, for the example
        raise ValueError(f"{root} holds {listed(parts)}, which looks like a part of the data and not like a class, but "
                         f"no folder {train}. Pass the names of the parts, e.g. train={own.get(True, 'training')!r}, "
                         f"valid={own.get(False, 0.2)!r}")


def _by_class(folder: Path, skip_broken: bool, is_train: bool = True
              ) -> tuple[dict[str, list[Path]], list[Path]]:
    """The pictures of each class, and the other files. Raises ValueError if these are no classes to tell apart."""
    expected = f"expected {folder}/<class>/<image>"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: {expected}")
    folders = _folders(folder)
    if not folders:
        loose = sum(is_picture(path) or path.suffix.lower() in FOREIGN for path in folder.iterdir())
        hint = f". Its {loose:,} pictures have to be sorted into one folder for each class" if loose else ""
        raise ValueError(f"{folder} holds no folder: {expected}{hint}")
    by_class, others = {}, []
    for each in folders:
        files = sorted(_files(each), key=lambda path: path.relative_to(folder).as_posix())
        foreign = [path for path in files if not is_picture(path) and path.suffix.lower() in FOREIGN]
        if foreign and not skip_broken:
            more = f" (and {len(foreign) - 1:,} more files of this class)" if len(foreign) > 1 else ""
            error = ValueError(f"{foreign[0]}{more} is {FOREIGN[foreign[0].suffix.lower()]}")
            error.add_note(WAY_OUT)
            raise error
        by_class[each.name] = [path for path in files if is_picture(path)]
        others += [path for path in files if not is_picture(path)]
        if not by_class[each.name]:
            instead = f", but {listed([path.name for path in files], 3)}" if files else ""
            raise ValueError(f"{each} holds no image ({' '.join(SUFFIXES)}){instead}. Fill or delete this folder, or "
                             "move it elsewhere if it is no class")
    if is_train and len(by_class) < 2:
        deeper = [inner.name for inner in _folders(folders[0])]
        hint = f". It holds the folders {listed(deeper)}: did you mean {folders[0]}?" if deeper else ""
        raise ValueError(f"{folder} has one class only ({folders[0].name}): nothing to tell apart{hint}")
    return by_class, others


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_passed_over(path.name))


def _files(folder: Path) -> Iterator[Path]:
    """All files below `folder`, through links too, each folder once. Raises ValueError for one that cannot be read.

    A link to a folder that `folder` lies in is passed over: behind it are the other classes.
    """
    def refuse(error: OSError) -> None:  # os.walk would go on without it, and its pictures would be missing
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    seen, top = set[str](), os.path.realpath(folder)
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen or top.startswith(os.path.join(real, "")):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not _is_passed_over(name)]
        yield from (Path(here, name) for name in names if not _is_passed_over(name))


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name.lower() in PASSED_OVER


def is_picture(path: Path) -> bool:
    """Whether a file has the name of a picture that Pillow can read."""
    suffix = path.suffix.lower()
    if suffix not in FOREIGN:
        return suffix in SUFFIXES
    from PIL import Image  # a plugin may have taught it more
    return suffix in Image.registered_extensions()


def _split(by_class: dict[str, list[Path]], share: float, seed: int
           ) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """The files of each class that are trained on, and those that are held back."""
    rows = {name: chosen(len(paths), share, f"{seed} {name}") for name, paths in by_class.items()}
    return ({name: [path for i, path in enumerate(paths) if i not in rows[name]] for name, paths in by_class.items()},
            {name: [path for i, path in enumerate(paths) if i in rows[name]] for name, paths in by_class.items()})


def _headers(paths: Sequence[Path], skip_broken: bool) -> tuple[Counter[tuple[int, int]], bool, set[Path]]:
    """How often each (width, height) comes, and whether all are grey, as the files begin; and those that are broken.

    Raises ValueError that names the first that is broken if none is to be left out.
    """
    sizes, is_grey, broken = Counter[tuple[int, int]](), True, set()
    for path in paths:
        try:
            with opened(path) as image:
                sizes[image.size] += 1
                is_grey = is_grey and image.mode in GREY
        except ValueError as error:
            if not skip_broken:
                error.add_note(WAY_OUT)
                raise
            broken.add(path)
    return sizes, is_grey, broken

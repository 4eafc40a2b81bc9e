"""Pictures in files, one folder for each class; and what is wrong with the folders."""
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..errors import check_flag, check_number, check_path, check_text
from ..show.tables import listed
from .form import FOREIGN, GREY, WAY_OUT, opened
from .listing import Listing, Sample, chosen
from .loaders import ImageDataLoaders, make_loaders
from .options import MAX_SIZE, Options

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif")
PASSED_OVER = {"__macosx", "thumbs.db", "desktop.ini"}  # what systems leave behind, beside whatever begins with a dot
PARTS = {"train", "training", "valid", "validation", "val", "test", "testing"}  # names of no classes
VALID_NAMES = ("valid", "val", "validation")
TRAIN = "train"  # where the training pictures are if nobody says
SHARE = 0.2  # of each class, held back where there is no folder for validation


def image_folders(path: str | os.PathLike[str], size: int | Sequence[int] | None = None, batch_size: int | None = None,
                  *, train: str = "train", valid: str | float | None = None, augment: Any = "auto",
                  resize: str = "crop", channels: int | None = None, mean: Sequence[float] | None = None,
                  std: Sequence[float] | None = None, max_size: int = MAX_SIZE, skip_broken: bool = False,
                  in_memory: bool | None = None, num_workers: int | None = None,
                  device: torch.device | str | None = None, seed: int = 0, verbose: bool = True) -> ImageDataLoaders:
    """Loaders of the pictures in a folder that has one folder for each class.

    path: holds `train/<class>/...` and `valid/<class>/...`, or one tree `<class>/...`. Links are followed; hidden files
        and what systems leave behind are passed over, other files that are no pictures too (and said).
    size: a side or (height, width), in pixels, to which all pictures are brought; None: the size that all have, else
        a square with the shorter side of most, none longer than `max_size`.
    batch_size: None is 64, or less for a small set.
    train: the name of the folder with the training pictures.
    valid: the name of that for validation, or the share of each class, in 0..1, that is held back; None: the folder
        valid or val if there is one, else 0.2. What is held back depends on the names of the files and `seed` only.
    augment: of training batches: "auto" chooses by the kind of picture ("photos", "small" or "symbols"); None: none;
        or a function of a whole float batch (n, channels, height, width) in 0..1, where it is, that gives such a batch.
    resize: how they come to that size, "crop", "squish" or "pad": see `ImageForm`.
    channels: 1 or 3; None: 1 if all pictures are grey.
    mean, std: of each channel, in 0..1, for the normalisation; None: those of the training pictures; (): none.
    max_size: the largest side that is chosen, in pixels.
    skip_broken: read all files, and leave out those that cannot be read, and say so. False: the first of them is an
        error, now or, if it is not kept in memory and damaged behind its beginning, when it is trained on.
    in_memory: True decodes all pictures once, now, and keeps them on `device` if they fit, else on the CPU; False
        decodes them in each epoch; None: as they fit.
    num_workers: processes that decode; None chooses.
    device: where pictures are kept; None: where a Learner trains.
    seed: of what is held back.
    verbose: say what was found.

    Raises ValueError that names the folder or file that cannot be used, MemoryError for what has to fit and does not.
    """
    options = Options(size=size, batch_size=batch_size, augment=augment, resize=resize, channels=channels, mean=mean,
                      std=std, max_size=max_size, in_memory=in_memory, num_workers=num_workers, device=device,
                      seed=seed, verbose=verbose)
    root = Path(check_path("path", path)).expanduser()
    if valid is not None and not isinstance(valid, str):
        valid = check_number("valid", valid, above=0, below=1, example="valid=0.2, or the name of a folder")
    listing = find(root, check_text("train", train), valid, seed, check_flag("skip_broken", skip_broken))
    return make_loaders(listing, options.form(listing), options)


def find(root: Path, train: str, valid: str | float | None, seed: int, skip_broken: bool) -> Listing:
    """The pictures below `root`, by class, in the order of the file names; `image_folders` tells the arguments."""
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
        held, more = _by_class(root / valid, skip_broken, least=1)
        for name in held:
            if name not in by_class:
                raise ValueError(f"the class {name!r} is in {validation} only: {folder} has {listed(by_class)}")
        others += more
    else:
        held = {name: [files[i] for i in chosen(len(files), valid, f"{seed} {name}")]
                for name, files in by_class.items()}
        all_held = set(chain(*held.values()))
        by_class = {name: [path for path in files if path not in all_held] for name, files in by_class.items()}
        validation = f"{valid:.0%} of each class" if all_held else "none, as each class has one picture only"
    parts = [[Sample(path, label) for label, name in enumerate(by_class) for path in files.get(name, ())]
             for files in (by_class, held)]  # of which a class may be missing in validation
    sizes, is_grey, broken = _headers((sample.path for sample in chain(*parts)), skip_broken)
    return Listing(parts, list(by_class), sizes, is_grey, are_files=True, skip_broken=skip_broken,
                   validation=validation, others=others).without(broken)


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


def _by_class(folder: Path, skip_broken: bool, least: int = 2) -> tuple[dict[str, list[Path]], list[Path]]:
    """The pictures of each class, and the other files. Raises ValueError if these are no classes to tell apart."""
    expected = f"expected {folder}/<class>/<image>"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: {expected}")
    folders = _folders(folder)
    if not folders:
        loose = sum(_is_picture(path) or path.suffix.lower() in FOREIGN for path in folder.iterdir())
        hint = f". Its {loose:,} pictures have to be sorted into one folder for each class" if loose else ""
        raise ValueError(f"{folder} holds no folder: {expected}{hint}")
    by_class, others = {}, []
    for each in folders:
        files = sorted(_files(each), key=lambda path: path.relative_to(folder).as_posix())
        by_class[each.name] = [path for path in files if _is_picture(path)]
        others += [path for path in files if not _is_picture(path)]
        foreign = [path for path in others if path.suffix.lower() in FOREIGN]
        if foreign and not skip_broken:
            more = f" (and {len(foreign) - 1:,} more files of this class)" if len(foreign) > 1 else ""
            error = ValueError(f"{foreign[0]}{more} is {FOREIGN[foreign[0].suffix.lower()]}")
            error.add_note(WAY_OUT)
            raise error
        if not by_class[each.name]:
            instead = f", but {listed([path.name for path in files], 3)}" if files else ""
            raise ValueError(f"{each} holds no image ({' '.join(SUFFIXES)}){instead}. Fill or delete this folder, or "
                             "move it elsewhere if it is no class")
    if len(by_class) < least:
        deeper = [inner.name for inner in _folders(folders[0])]
        hint = f". It holds the folders {listed(deeper)}: did you mean {folders[0]}?" if deeper else ""
        raise ValueError(f"{folder} has one class only ({folders[0].name}): nothing to tell apart{hint}")
    return by_class, others


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_passed_over(path.name))


def _files(folder: Path) -> Iterator[Path]:
    """All files below `folder`, through links too, each folder once. Raises ValueError for one that cannot be read."""
    def refuse(error: OSError) -> None:  # os.walk would go on without it, and its pictures would be missing
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    seen, top = set[str](), os.path.realpath(folder)
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen or top.startswith(os.path.join(real, "")):  # a link upwards, behind it are other classes
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not _is_passed_over(name)]
        yield from (Path(here, name) for name in names if not _is_passed_over(name))


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name.lower() in PASSED_OVER


def _is_picture(path: Path) -> bool:
    """Whether a file has the name of a picture that Pillow can read."""
    suffix = path.suffix.lower()
    if suffix not in FOREIGN:
        return suffix in SUFFIXES
    from PIL import Image  # a plugin may have taught it more
    return suffix in Image.registered_extensions()


def _headers(paths: Iterable[Path], skip_broken: bool) -> tuple[Counter[tuple[int, int]], bool, set[Path]]:
    """How often each (width, height) comes, whether all are grey, as the files begin, and those that are broken."""
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

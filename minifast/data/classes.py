"""The names of the classes of a data set."""
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Subset

from ..errors import quoted


def check_classes(classes: Any) -> list[str]:
    """The names of the classes, as a new list. Raises TypeError or ValueError for all but a list of different texts."""
    is_list = isinstance(classes, Sequence) and not isinstance(classes, (str, bytes, bytearray))
    if not is_list or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes must be a list of names, got {quoted(classes)}. Pass e.g. ['cat', 'dog'].")
    names = [str(name) for name in classes]
    if not names:
        raise ValueError(f"classes must name at least one class, got {quoted(classes)}.")
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"classes must have names of their own, got {quoted(classes)}, with {twice!r} more than once.")
    return names


def common_classes(train: Any, valid: Any) -> list[str] | None:
    """The names of the training set's classes, if it has any. Raises ValueError if a validation set disagrees."""
    names = _own_classes(train)
    for where, data in valid.items() if isinstance(valid, Mapping) else [("valid", valid)]:
        for i, (name, other) in enumerate(zip(names or [], _own_classes(data) or [], strict=False)):
            if name != other:
                raise ValueError(f"class {i} is {name!r} in train and {other!r} in {where}: the same number means "
                                 "another class there. Give both the same classes (a folder may be empty: "
                                 "ImageFolder(..., allow_empty=True)), or map them with target_transform=.")
    return names


def _own_classes(data: Any) -> list[str] | None:
    """The names of a data set's classes, if it has them and its targets are still their numbers."""
    while isinstance(data, Subset):
        data = data.dataset
    if getattr(data, "target_transform", None) is not None:
        return None
    try:
        return check_classes(getattr(data, "classes", None))
    except (TypeError, ValueError):  # whatever a data set may call by that name
        return None

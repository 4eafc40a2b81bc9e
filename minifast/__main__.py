"""`python -m minifast`: the demo, on the embedded digits or on a folder of images."""
import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import demo
from .data.digits import digits
from .errors import NonFiniteLoss

OUT = Path("minifast-demo")
BATCH_SIZE = 16  # 1,437 digits are few: small batches make more steps of them
LARGEST = 64  # pixels of a side: larger images take minutes on a CPU


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        self.refuse(f"{message} (--help lists the options)")

    def refuse(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo with the options `argv`, None for the command line's; gives the exit status.

    0: done; 130: interrupted by Ctrl-C; 1: the loss is not finite, or nobody reads the output any more. A wrong option
    or path exits with 2 (SystemExit).
    """
    parser = _parser()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"{parser.prog}: {message}", file=sys.stderr)
            _run(parser.parse_args(argv), parser)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except NonFiniteLoss as error:
        sys.stdout.flush()
        print(f"{parser.prog}: {error} The option is --lr.", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `python -m minifast | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        return 1
    return 0


def _run(options: argparse.Namespace, parser: Parser) -> None:
    _check(options.device, options.out, parser)
    if options.data is None:
        dls = digits(BATCH_SIZE)
        torch.set_num_threads(1)  # with images this small, threads wait for each other longer than they compute
    else:
        from .vision import image_folders  # not before it is used: so the digits take no longer for it
        print(f"reading the images of {options.data}", flush=True)
        try:
            dls = image_folders(options.data, max_size=LARGEST, augment=None, in_memory=True,
                                device=options.device, verbose=False)
        except (ImportError, MemoryError, OSError, ValueError) as error:
            parser.refuse(f"--data: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    demo.run(dls, options.out, lr=options.lr, epochs=options.epochs, device=options.device, seed=options.seed)


def _check(device: str | None, out: Path, parser: Parser) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's: unknown, not built in, "meta"
        parser.refuse(f"--device: {device!r} cannot be used: {str(error).splitlines()[0]}")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        parser.refuse(f"--out: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        parser.refuse(f"--out: no permission to write into {nearest}")


def _parser() -> Parser:
    parser = Parser(prog="minifast", allow_abbrev=False, description=(
        "Find a learning rate, train a small convnet by one cycle and again by a circular one, and draw the curves: "
        "on 1,797 embedded handwritten digits, or on the images of a folder."))
    one, circular = demo.EPOCHS.values()
    parser.add_argument("--data", type=Path, metavar="DIR", help="images: DIR/<class>/*, of which a "
                        "fifth is held back, or DIR/train/<class>/* and DIR/valid/<class>/*")
    parser.add_argument("--epochs", type=_number(int, lambda n: n >= 1, "an int >= 1"), metavar="N",
                        help=f"epochs of each run (default: {one} for one cycle, {circular} for the circular one)")
    parser.add_argument("--lr", type=_number(float, lambda lr: 0 < lr < math.inf, "a number > 0"),
                        help="peak learning rate (default: what the finder suggests)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR",
                        help=f"folder for the plots, made if it is not there (default: {OUT})")
    parser.add_argument("--device", help="e.g. cpu or cuda (default: the accelerator, if there is one)")
    parser.add_argument("--seed", type=_number(int, lambda n: 0 <= n < 2**32, "an int from 0 to 4294967295"),
                        default=0, metavar="N", help="of weights and data order (default: 0)")
    return parser


def _number(kind: Callable[[str], Any], is_ok: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with suppress(ValueError):
            value = kind(text)
            if is_ok(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return parse


if __name__ == "__main__":
    sys.exit(main())

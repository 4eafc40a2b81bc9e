"""Batches of images as pictures, and grids of them."""
import pickle

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.pyplot import get_fignums

from minifast.show.pictures import are_pictures, grid, to_pictures


def pixels(x, **options):
    """The one row of each picture of (n, 1, 1, w) values."""
    return to_pictures(torch.as_tensor(x).reshape(len(x), 1, 1, -1), **options)[:, 0, :, 0].tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_form(channels):
    x = torch.randint(0, 256, (5, channels, 4, 6), dtype=torch.uint8)
    pictures = to_pictures(x)
    assert (pictures.shape, pictures.dtype) == ((5, 4, 6, channels), np.uint8)
    assert np.array_equal(pictures, x.permute(0, 2, 3, 1))


@pytest.mark.table
@pytest.mark.parametrize(("x", "expected"), [
    (torch.tensor([[0, 7, 255]], dtype=torch.uint8), [[0, 7, 255]]),
    (torch.tensor([[-5, 7, 300]]), [[0, 7, 255]]),
    (torch.tensor([[-5, 7, 100]], dtype=torch.int8), [[0, 7, 100]]),
    (torch.tensor([[False, True]]), [[0, 255]]),
    (torch.tensor([[0.0, 0.2, 1.0]]), [[0, 51, 255]]),
    (torch.tensor([[0.25, 0.5]]), [[64, 128]]),  # within 0..1: not stretched
    (torch.tensor([[0.2, 0.5]], dtype=torch.float16), [[51, 128]]),
    (torch.tensor([[-2.0, 0.0, 2.0], [0.0, 0.5, 1.0]]), [[0, 128, 255], [0, 128, 255]]),  # each by itself
    (torch.tensor([[3.0, 3.0, 3.0]]), [[0, 0, 0]]),
    (torch.tensor([[0.0, torch.nan, torch.inf, 1.0]]), [[0, 0, 0, 255]]),
    (torch.tensor([[2.0, torch.nan, -torch.inf, 4.0]]), [[0, 0, 0, 255]]),
    (torch.tensor([[torch.nan, torch.nan]]), [[0, 0]]),
])  # fmt: skip
def test_values(x, expected):
    assert pixels(x) == expected


def test_normalised_values_are_put_back():
    x = torch.rand(2, 3, 4, 4)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    normalised = (x - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
    assert np.array_equal(to_pictures(normalised, mean, std), to_pictures(x))
    assert pixels([[0.0, 9.0, -9.0]], mean=[0.2], std=[1.0]) == [[51, 255, 0]]
    assert pixels(torch.tensor([[3]], dtype=torch.uint8), mean=[0.2], std=[1.0]) == [[3]], "not normalised yet"
    assert pixels([[0.2]], mean=(), std=()) == [[51]], "an ImageForm without normalisation"


def test_the_batch_stays_as_it_is():
    x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True).reshape(1, 1, 1, 3)
    kept = x.detach().clone()
    to_pictures(x, [0.5], [0.5])[:] = 9
    assert torch.equal(x, kept)
    raw = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    assert to_pictures(raw).sum() == raw.sum()


@pytest.mark.parametrize("x", [
    torch.zeros(2, 3), torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 8), torch.zeros(1, 1, 0, 4),
    torch.zeros(1, 1, 2, 2, dtype=torch.complex64), "a", None, np.zeros((1, 1, 2, 2)),
])  # fmt: skip
def test_what_is_no_picture(x):
    assert not are_pictures(x)
    with pytest.raises(TypeError, match=r"x must be a tensor \(n, 1 or 3, height, width\) of images, got a "):
        to_pictures(x)


def test_normalisation_of_other_channels():
    with pytest.raises(ValueError, match=r"std must have one number for each of 1 channels, got \[1, 1, 1\]"):
        to_pictures(torch.zeros(2, 1, 4, 4), [0], [1, 1, 1])


# ---- grids


def drawn(n, titles=None, side=(8, 8), **options):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (n, *side, 3), dtype=np.uint8)
    return grid(pictures, titles or [str(i) for i in range(n)], **options)


def boxes(figure):
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    return [box for ax in figure.axes for box in (ax.title.get_window_extent(renderer), ax.get_window_extent(renderer))]


def overlaps(figure):
    """Pairs of a title or picture with another that share more than a point; and what stands over the edge."""
    found = boxes(figure)
    pairs = [(i, j) for i, a in enumerate(found) for j, b in enumerate(found[:i])
             if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1]
    whole = figure.bbox
    outside = [i for i, a in enumerate(found) if a.x0 < -1 or a.y0 < -1 or a.x1 > whole.x1 + 1 or a.y1 > whole.y1 + 1]
    return pairs + outside


LONG = "predicted American_pit_bull_terrier_or_something_like_it 0.93\nactual Staffordshire bull terrier, loss 12.345"


@pytest.mark.parametrize(("n", "titles", "side"), [
    (1, ["a"], (8, 8)), (2, [LONG] * 2, (8, 8)), (9, [LONG] * 9, (24, 8)), (9, ["a"] * 9, (8, 40)),
    (11, [LONG] * 10 + [""], (8, 8)), (36, ["predicted cat 0.93\nactual dog, loss 3.21"] * 36, (8, 8)),
    (4, ["STAFFORDSHIRE_BULL_TERRIER" * 9] * 4, (8, 8)), (2, ["a\nb\nc\nd\ne"] * 2, (80, 8)),
])  # fmt: skip
def test_nothing_overlaps(n, titles, side):
    figure = drawn(n, titles, side)
    assert len(figure.axes) == n
    assert overlaps(figure) == []
    assert get_fignums() == []


def test_titles_and_colors():
    figure = drawn(3, ["cost: $5 or $6", "b_1^", "c"], colors=[None, "red", None])
    figure.canvas.draw()  # would fail where a title is read as mathematics
    assert [ax.get_title() for ax in figure.axes] == ["cost: $5 or $6", "b_1^", "c"]
    usual = figure.axes[0].title.get_color()
    assert [ax.title.get_color() for ax in figure.axes] == [usual, "red", usual]


def test_each_line_of_a_title_keeps_its_place():
    figure = drawn(4, ["a" * 200 + "\n" + "b" * 200 + "\nc"] * 4)
    lines = figure.axes[0].get_title().split("\n")
    assert [line[0] for line in lines] == ["a", "a", "b", "b", "c"]
    assert [line[-1] for line in lines] == ["a", "…", "b", "…", "c"]


def test_grey_and_colour_and_other_sizes_beside_each_other():
    grey, colour = np.full((4, 6, 1), 255, np.uint8), np.zeros((9, 5, 3), np.uint8)
    figure = grid([grey, colour], ["grey", "colour"])
    first, second = (ax.images[0] for ax in figure.axes)
    assert first.to_rgba(first.get_array())[0, 0].tolist() == [1, 1, 1, 1], "white is 255, whatever else there is"
    assert second.get_array().shape == (9, 5, 3)


def test_a_figure_that_was_given():
    for layout in (None, "constrained"):
        figure = Figure(figsize=(5, 5), layout=layout)
        assert drawn(4, [LONG] * 4, figure=figure) is figure
        assert overlaps(figure) == []
    left, right = Figure(layout="constrained", figsize=(8, 4)).subfigures(1, 2)
    assert drawn(4, figure=left) is left
    assert (len(left.axes), len(right.axes)) == (4, 0)


def test_figures_grow_with_the_number_of_pictures():
    sizes = [drawn(n).get_size_inches() for n in (1, 4, 12)]
    assert [tuple(size) for size in sizes] == sorted(map(tuple, sizes))
    assert max(drawn(49).get_size_inches()) < 13


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "QtAgg"])
def test_where_pyplot_shows_figures_it_is_one_of_them(backend, monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.setattr(matplotlib, "get_backend", lambda: backend)
    figure = drawn(2)
    assert [plt.figure(number) for number in get_fignums()] == [figure]
    plt.close(figure)


def test_a_notebook_shows_a_figure_once(monkeypatch):
    """As the value of the cell, or by pyplot at its end, if it is assigned; and again whenever it is asked for."""
    formatters = pytest.importorskip("IPython.core.formatters")
    import matplotlib.pyplot as plt
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "inline")
    figure, formatter = drawn(1), formatters.DisplayFormatter()
    assert plt.fignum_exists(figure.number)
    for _ in range(2):
        assert "text/plain" in formatter.format(figure)[0]
        assert get_fignums() == []
    assert len(pickle.loads(pickle.dumps(figure)).axes) == 1


@pytest.mark.parametrize(("call", "kind", "message"), [
    (lambda: drawn(0), ValueError, "pictures must hold at least one picture, got none"),
    (lambda: drawn(2, ["a"]), ValueError, "titles must have one for each of 2 pictures, got 1"),
    (lambda: drawn(2, colors=["red"] * 3), ValueError, "colors must have one for each of 2 pictures, got 3"),
    (lambda: drawn(2, figure=3), TypeError, r"figure must be a figure of matplotlib or None, got 3 \(int\)"),
    (lambda: drawn(2, figure=Figure), TypeError, "figure must be a figure of matplotlib"),
])  # fmt: skip
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()

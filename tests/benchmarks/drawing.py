"""The tables as one picture: every round a dot, the quartiles a bar, the median a line."""
from pathlib import Path
from textwrap import wrap

from harness import Goal, Table, spread

ROW, GAP = 0.27, 0.95  # inches: of a row; of a title, an axis and its label


def draw(tables: list[Table], path: Path) -> None:
    """Write a PNG (or what the name says). Ratios where a table has a reference, else the values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = [table for table in tables if table.rows]
    heights = [ROW * len(table.rows) + GAP for table in tables]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for table, ax in zip(tables, panels, strict=True):
        _panel(table, ax)
    figure.savefig(path, dpi=110)


def _panel(table: Table, ax) -> None:
    for y, row in enumerate(table.rows):
        values = table.ratios(row.name) if table.reference else row.values
        _, first, median, third, _ = spread(values)
        color = "0.35" if row.name == table.reference else "C0"
        ax.plot([first, third], [y, y], color=color, linewidth=6, alpha=0.35, solid_capstyle="butt")
        ax.plot(values, [y] * len(values), "o", color=color, markersize=3.5, alpha=0.5, markeredgewidth=0,
                clip_on=False)
        ax.plot([median], [y], "|", color=color, markersize=13, markeredgewidth=2.5, clip_on=False)
        goal = _goal(table, row.name)
        if goal is not None:
            ax.plot([goal], [y], "x", color="C3", markersize=7, markeredgewidth=1.8, zorder=3, clip_on=False)
    if table.reference:
        ax.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    highest = max(max(table.ratios(row.name) if table.reference else row.values) for row in table.rows)
    lowest = min(min(table.ratios(row.name) if table.reference else row.values) for row in table.rows)
    if lowest > 0 and highest > 20 * lowest:
        ax.set_xscale("log")
    else:
        ax.set_xlim(left=min(0, lowest))
    ax.set_yticks(range(len(table.rows)), [row.name for row in table.rows], fontsize=9)
    ax.set_ylim(len(table.rows) - 0.5, -0.5)
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    unit = f"{table.unit}, as a multiple of the reference" if table.reference else table.unit
    has_goal = any(_goal(table, row.name) is not None for row in table.rows)
    ax.set_xlabel(unit + (" (red cross: at most)" if has_goal else ""), fontsize=8)
    ax.set_title("\n".join(wrap(table.title, 85)), fontsize=10, loc="left")


def _goal(table: Table, name: str) -> float | None:
    """The highest value that the row is to have, on the axis of its panel."""
    kind = "ratio" if table.reference else "value"
    goals: list[Goal] = [goal for goal in table.goals if goal.row == name and goal.of == kind and goal.than is None]
    return min((goal.at_most for goal in goals), default=None)

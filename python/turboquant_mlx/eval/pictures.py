"""Pictures of the results.  Lines differ in dash and marker as well as in colour (Okabe and Ito's palette), and every
cell of a heat map holds its number, so that all reads in black and white."""

import numpy as np

COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


def pyplot():
    """matplotlib without a display, whose SVG files are the same each time; ImportError says what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("[eval] pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "turboquant"  # names within a file depend on what is drawn alone
    return plt


def line_style(i):
    """Colour, dash and marker of the i-th line."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 4,
    }


def needle_heat_map(path, cells, lengths, depths):
    """One panel a mode: depth against length, share of needles found.  cells: {mode: {(length, depth): share}}."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(cells), figsize=(2.2 * len(cells) + 1, 3), sharey=True, squeeze=False)
    for axis, (mode, found) in zip(axes[0], cells.items(), strict=True):
        grid = np.array([[found[length, depth] for length in lengths] for depth in depths])
        axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (i, j), share in np.ndenumerate(grid):
            axis.text(
                j,
                i,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                color="black" if share > 0.5 else "white",
            )
        axis.set_xticks(range(len(lengths)), [f"{n / 1024:g}K" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f}" for d in depths])
        axis.set_title(mode)
        axis.set_xlabel("context, tokens")
    axes[0][0].set_ylabel("depth, %")
    figure.suptitle("Needles found, %")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def divergence_by_position(path, rows, first):
    """Mean KL divergence from `first` against position, one line a mode.  rows: as `command` writes them."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    modes = [m for m in dict.fromkeys(row["mode"] for row in rows) if m != first]
    for i, mode in enumerate(modes):
        own = [row for row in rows if row["mode"] == mode and row["band"] != "all"]
        axis.plot(
            [(r["start"] + r["stop"]) / 2 for r in own],
            [r["mean_kld"] for r in own],
            label=mode,
            **line_style(i),
        )
    axis.set(xscale="log", yscale="log", xlabel="position, tokens", ylabel=f"mean KL divergence from {first}, nats")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)

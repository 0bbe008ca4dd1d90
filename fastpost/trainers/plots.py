"""The curves of metrics.jsonl as one picture, a panel a metric."""

from __future__ import annotations

from pathlib import Path

from fastpost.trainers.log import read_lines

# Panels, in this order, where a run has them; each with the held-out curve that belongs beside it.
PANELS = {
    "loss": "eval_loss",
    "mean_token_accuracy": "eval_mean_token_accuracy",
    "reward": "eval_reward",
    "frac_reward_zero_std": "",
    "completions/mean_length": "",
    "kl": "",
    "entropy": "eval_entropy",
    "grad_norm": "",
    "learning_rate": "",
}


def plot_metrics(directory: Path) -> None:
    """Writes metrics.png beside metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_lines(directory / "metrics.jsonl")
    panels = [name for name in PANELS if any(line.get(name) is not None for line in lines)]
    columns = min(3, len(panels))
    height = -(-len(panels) // max(1, columns))
    if not panels:
        return
    figure = Figure(figsize=(4 * columns, 2.6 * height), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state, whatever the machine's display
    for place, name in enumerate(panels, 1):
        axes = figure.add_subplot(height, columns, place, title=name)
        for curve, label in ((name, "training"), (PANELS[name], "held out")):
            points = [(line["step"], line[curve]) for line in lines if line.get(curve) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=label)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    figure.supxlabel("optimizer step")
    figure.savefig(directory / "metrics.png", dpi=110)

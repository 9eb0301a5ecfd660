#!/usr/bin/env python3
"""What scripts/compare_recipes.sh has trained, as tables and a picture. Needs Python alone.

    scripts/plot_recipes.py OUT

Reads OUT/RECIPE-SEED/ of every finished run, and the rows and curves kept of runs whose directories are gone. Writes
    OUT/results.csv           a row a run
    OUT/curves/RECIPE-SEED.csv   mean training loss of every ten steps
    OUT/summary.md            a row a recipe: gaps to bf16 over the seeds, and the noise between seeds
    OUT/comparison.svg        gaps along the training, and at its end

A gap is paired: loss of a run minus loss of bf16 with the same seed, so from the same weights on the same batches.
"""
import csv
import html
import os
import re
import statistics
import sys

COLUMNS = ["recipe", "seed", "val_loss", "train_loss_last_100", "val_gap", "train_gap",
           "tok_per_s", "steps", "tokens", "device", "memory_mb", "options"]
EVERY = 10                                         # steps that one point of a kept curve stands for


# ---------------------------------------------------------------- runs
def rows_of(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def read_run(directory):
    """The row and the curve of a finished run."""
    log = rows_of(directory + "/log.csv")
    loss = [float(r["train_loss"]) for r in log]
    last = loss[-100:]
    with open(directory + ".txt", errors="replace") as f:
        text = f.read()
    machine = re.findall(r"^machine +([^,\n]*)", text, re.M)
    # The table of memory: its total, and below it what comes and goes. A resumed run has printed it again.
    memory = [re.findall(rf"^  {label} +([\d.]+) MB$", text, re.M) for label in ("total", "more, while .*?")]
    row = {
        "val_loss": [r["val_loss"] for r in log if r["val_loss"]][-1], "train_loss_last_100": f"{sum(last) / len(last):.6f}",
        "tok_per_s": f"{statistics.median(float(r['tok_per_s']) for r in log):.0f}", "steps": log[-1]["step"], "tokens": log[-1]["tokens"],
        "device": machine[-1].strip() if machine else "", "memory_mb": f"{sum(float(m[-1]) for m in memory if m):.1f}",
    }
    with open(directory + "/done") as f:
        row["options"] = f.read().strip()
    curve = [(int(log[i + EVERY - 1]["step"]), sum(loss[i:i + EVERY]) / EVERY) for i in range(0, len(loss) - EVERY + 1, EVERY)]
    return row, curve


def collect(out):
    """All runs: {(recipe, seed): row}, {(recipe, seed): curve}. Rows of an earlier results.csv stay, unless a run's directory is there."""
    rows = {(r["recipe"], r["seed"]): r for r in rows_of(out + "/results.csv")}
    os.makedirs(out + "/curves", exist_ok=True)
    for name in sorted(os.listdir(out)):
        if not os.path.exists(f"{out}/{name}/done"):
            continue
        recipe, seed = name.rsplit("-", 1)
        row, curve = read_run(f"{out}/{name}")
        rows[recipe, seed] = dict(row, recipe=recipe, seed=seed)
        with open(f"{out}/curves/{name}.csv", "w") as f:
            f.write("step,train_loss\n" + "".join(f"{step},{loss:.6f}\n" for step, loss in curve))
    for row in rows.values():
        base = rows.get(("bf16", row["seed"]))
        for gap, loss in (("val_gap", "val_loss"), ("train_gap", "train_loss_last_100")):
            row[gap] = f"{float(row[loss]) - float(base[loss]):+.5f}" if base else ""
    curves = {key: [(int(p["step"]), float(p["train_loss"])) for p in rows_of(f"{out}/curves/{key[0]}-{key[1]}.csv")] for key in rows}
    return rows, curves


def write_results(out, rows):
    with open(out + "/results.csv.new", "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for key in sorted(rows, key=lambda k: (int(k[1]), k[0] != "bf16", float(rows[k]["train_gap"] or 0), k[0])):
            writer.writerow(rows[key])
    os.replace(out + "/results.csv.new", out + "/results.csv")


# ---------------------------------------------------------------- over the seeds
def summarize(rows):
    """Per recipe: the gaps of its seeds. Best first; bf16 is left out."""
    recipes = {}
    for (recipe, seed), row in rows.items():
        entry = recipes.setdefault(recipe, {"recipe": recipe, "train": {}, "val": {}, "speed": []})
        entry["speed"].append(float(row["tok_per_s"]))
        if row["train_gap"] and recipe != "bf16":
            entry["train"][seed], entry["val"][seed] = float(row["train_gap"]), float(row["val_gap"])
    return sorted((e for e in recipes.values() if e["train"]), key=lambda e: statistics.mean(e["train"].values()))


def mean_and_error(values):
    """+0.0123 ± 0.0004: the mean over the seeds and its standard error; the mean alone of a single seed."""
    values = list(values)
    text = f"{statistics.mean(values):+.4f}"
    return text + (f" ± {statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else "")


def loss_text(row):
    return f"seed {row['seed']} training {float(row['train_loss_last_100']):.4f}, validation {float(row['val_loss']):.4f}"


def summary_text(rows, summary):
    base = [r for (recipe, _), r in rows.items() if recipe == "bf16"]
    table = [["recipe", "seeds", "training-loss gap", "from .. to", "validation gap", "tok/s", "x bf16"]]
    speed = statistics.median(float(r["tok_per_s"]) for r in base) if base else 0
    for e in summary:
        gaps, rate = list(e["train"].values()), statistics.median(e["speed"])
        table.append([e["recipe"], str(len(gaps)), mean_and_error(gaps), f"{min(gaps):+.4f} .. {max(gaps):+.4f}", mean_and_error(e["val"].values()),
                      f"{rate:,.0f}", f"{rate / speed:.2f}" if speed else ""])
    width = [max(len(row[c]) for row in table) for c in range(len(table[0]))]
    lines = ["| " + " | ".join(cell.ljust(width[c]) if c == 0 else cell.rjust(width[c]) for c, cell in enumerate(row)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ("-" if c == 0 else ":") for c, w in enumerate(width)) + "|")
    text = "\n".join(lines) + ("\n\nGaps are paired with bf16 of the same seed; ± is the standard error of the mean over the seeds. "
                               "Training loss: mean of the last 100 steps.\n")
    if base:
        first = base[0]
        text += f"{int(first['steps']):,} steps, {int(first['tokens']):,} tokens, {first['device']}. "
        text += f"bf16: {'; '.join(loss_text(r) for r in base)}; {speed:,.0f} tok/s.\n"
    if len(base) > 1:
        between = {name: statistics.stdev(float(r[name]) for r in base) for name in ("train_loss_last_100", "val_loss")}
        text += f"Noise: bf16's own losses have a standard deviation between {len(base)} seeds of {between['train_loss_last_100']:.4f} (training) "
        text += f"and {between['val_loss']:.4f} (validation); "
        spreads = [statistics.stdev(e["train"].values()) for e in summary if len(e["train"]) > 1]
        pooled = (sum(s * s for s in spreads) / len(spreads)) ** 0.5 if spreads else 0
        text += f"a recipe's paired training-loss gap has {pooled:.4f}.\n" if spreads else "paired gaps: one seed only.\n"
    else:
        text += "Noise between seeds: not known from one seed of bf16.\n"
    return text


# ---------------------------------------------------------------- the picture
INK, SOFT, GRID = "#1f2430", "#69707d", "#e6e8ec"
# One hue a row of the table, which all its variants share; a variant has another dash.
HUES = {"fp8": "#8c8c8c", "nvfp4": "#2f6db3", "nvfp4-46": "#3fb0c9", "tetrajet2": "#d1495b", "quartet2": "#2e8b57", "quartet": "#e08a1e",
        "quartet-v4": "#b8a200", "fp4-dge": "#7a4fb5", "fqt": "#c2569b", "tetrajet": "#8a5a3c"}
MORE = ["#0b7a75", "#a23b00", "#4b5fd1", "#5c7f00", "#b0006d", "#00718f", "#6b4c9a", "#946c00"]
DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 4"]


def styles(summary, rows):
    """{recipe: (colour, dash)}"""
    found, used, more = {}, {}, list(MORE)
    for recipe in sorted((e["recipe"] for e in summary), key=lambda r: (len(r), r)):
        options = next(r for (name, _), r in rows.items() if name == recipe).get("options", "")
        row = re.search(r"--recipe (\S+)", options or "")
        base = row.group(1) if row else recipe.split("+")[0]
        if ("+" not in recipe and recipe != base) or base not in HUES:
            HUES.setdefault(recipe, more.pop(0) if more else INK)
            base = recipe
        found[recipe] = (HUES[base], DASHES[used.setdefault(base, 0) % len(DASHES)])
        used[base] += 1
    return found


def smooth(curve, window):
    """Mean of the last `window` points."""
    result, total = [], 0.0
    for i, (step, value) in enumerate(curve):
        total += value - (curve[i - window][1] if i >= window else 0)
        if i + 1 >= window:
            result.append((step, total / window))
    return result


def gap_curve(recipe, seeds, curves):
    """Mean over the seeds of (training loss - bf16's), smoothed over a twentieth of the run."""
    each = []
    for seed in seeds:
        base = dict(curves.get(("bf16", seed), []))
        each.append({step: loss - base[step] for step, loss in curves[recipe, seed] if step in base})
    steps = sorted(set.intersection(*(set(e) for e in each))) if each else []
    curve = [(s, statistics.mean(e[s] for e in each)) for s in steps]
    return smooth(curve, max(1, len(curve) // 20))


def ticks(low, high, count):
    raw = (high - low) / count
    power = 10 ** len(str(int(1 / raw))) if raw < 1 else 1
    step = next(m / power for m in (1, 2, 2.5, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 1e5, 1e6) if m / power >= raw)
    first = -int(-low // step) if low < 0 else int(-(-low // step))
    return [k * step for k in range(int(first) - 1, int(high / step) + 2) if low - 1e-9 <= k * step <= high + 1e-9]


class Svg:
    def __init__(self, width, height):
        self.size, self.parts = (width, height), []

    def line(self, x1, y1, x2, y2, colour, width=1.0, dash=""):
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"{dash_of(dash)}/>')

    def path(self, points, colour, dash, clip):
        d = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        look = f'fill="none" stroke="{colour}" stroke-width="1.9" stroke-linejoin="round"{dash_of(dash)}'
        self.parts.append(f'<path d="{d}" {look} clip-path="url(#{clip})"/>')

    def dot(self, x, y, radius, colour, hollow=False):
        fill = f'fill="#fff" stroke="{colour}" stroke-width="1.4"' if hollow else f'fill="{colour}" stroke="#fff" stroke-width="0.8"'
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {fill}/>')

    def rect(self, x, y, w, h, colour, opacity=1.0):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{colour}" fill-opacity="{opacity}"/>')

    def text(self, x, y, words, size=12, colour=INK, anchor="start", weight="normal"):
        look = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}"'
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {look}>{html.escape(words)}</text>')

    def save(self, path):
        w, h = self.size
        with open(path, "w") as f:
            f.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" '
                    'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n'
                    f'<rect width="{w}" height="{h}" fill="#fff"/>\n' + "\n".join(self.parts) + "\n</svg>\n")


def dash_of(dash):
    return f' stroke-dasharray="{dash}"' if dash else ""


def spread(wanted, height, low, high):
    """Positions near those wanted (sorted), at least `height` apart, inside [low, high]."""
    at = list(wanted)
    for _ in range(200):
        for i in range(1, len(at)):
            push = (height - (at[i] - at[i - 1])) / 2
            if push > 0:
                at[i - 1] -= push
                at[i] += push
        at = [min(max(y, low), high) for y in at]
    return at


def draw_curves(svg, box, summary, curves, style):
    x0, y0, x1, y1 = box
    lines = {e["recipe"]: gap_curve(e["recipe"], list(e["train"]), curves) for e in summary}
    lines = {r: c for r, c in lines.items() if len(c) > 1}
    if not lines:
        return
    last = max(c[-1][0] for c in lines.values())
    # The first tenth is left to run out of the picture: gaps of hardly trained models are large and mean little.
    shown = [v for c in lines.values() for s, v in c if s > 0.2 * last] or [0.0, 1.0]
    low, high = min(0.0, min(shown)), max(shown)
    low, high = low - 0.04 * (high - low), high + 0.06 * (high - low)
    X, Y = (lambda s: x0 + (x1 - x0) * s / last), (lambda v: y1 - (y1 - y0) * (v - low) / (high - low))
    svg.parts.append(f'<clipPath id="curves"><rect x="{x0}" y="{y0}" width="{x1 - x0}" height="{y1 - y0}"/></clipPath>')
    for v in ticks(low, high, 6):
        svg.line(x0, Y(v), x1, Y(v), SOFT if abs(v) < 1e-12 else GRID, 1.2 if abs(v) < 1e-12 else 1)
        svg.text(x0 - 8, Y(v) + 4, f"{v:+.3f}".rstrip("0").rstrip(".") if abs(v) > 1e-12 else "0", 11, SOFT, "end")
    for s in ticks(0, last, 6):
        svg.text(X(s), y1 + 18, f"{s:,.0f}", 11, SOFT, "middle")
    svg.text((x0 + x1) / 2, y1 + 36, "step", 12, SOFT, "middle")
    for recipe, curve in lines.items():
        svg.path([(X(s), Y(v)) for s, v in curve], *style[recipe], "curves")
    ends = sorted(((Y(min(max(c[-1][1], low), high)), r) for r, c in lines.items()))
    for y, (end, recipe) in zip(spread([e for e, _ in ends], 15, y0, y1), ends):
        svg.line(x1 + 2, end, x1 + 14, y, style[recipe][0], 0.8)
        svg.text(x1 + 18, y + 4, recipe, 12, style[recipe][0], weight="600")
    svg.text(x0 - 44, y0 - 38, "along the training", 14, INK, weight="600")
    svg.text(x0 - 44, y0 - 20, "gap of the training loss, smoothed over a twentieth of the run, mean of the seeds", 12, SOFT)


def draw_ends(svg, box, summary, style):
    x0, y0, x1, y1 = box
    values = [v for e in summary for kind in ("train", "val") for v in e[kind].values()]
    low, high = min(0.0, min(values)), max(0.0, max(values))
    low, high = low - 0.03 * (high - low), high + 0.05 * (high - low)
    X = lambda v: x0 + (x1 - x0) * (v - low) / (high - low)
    pitch = (y1 - y0) / len(summary)
    for v in ticks(low, high, 5):
        svg.line(X(v), y0, X(v), y1, SOFT if abs(v) < 1e-12 else GRID, 1.2 if abs(v) < 1e-12 else 1)
        svg.text(X(v), y1 + 18, f"{v:+.3f}".rstrip("0").rstrip(".") if abs(v) > 1e-12 else "0", 11, SOFT, "middle")
    for i, e in enumerate(summary):
        y, colour, mean = y0 + pitch * (i + 0.5), style[e["recipe"]][0], statistics.mean(e["train"].values())
        thick = min(16, 0.55 * pitch)
        svg.rect(min(X(0), X(mean)), y - thick / 2, abs(X(mean) - X(0)), thick, colour, 0.25)
        svg.line(X(mean), y - thick / 2 - 1, X(mean), y + thick / 2 + 1, colour, 2.2)
        for v in e["val"].values():
            svg.dot(X(v), y, 3.4, colour, hollow=True)
        for v in e["train"].values():
            svg.dot(X(v), y, 3.8, colour)
        svg.text(x0 - 10, y + 4, e["recipe"], 12, colour, "end", "600")
    svg.text((x0 + x1) / 2, y1 + 36, "loss, nats a token", 12, SOFT, "middle")
    svg.text(x0 - 10, y0 - 38, "at the end", 14, INK, weight="600")
    svg.dot(x0 - 6, y0 - 24, 3.8, SOFT)
    svg.text(x0 + 2, y0 - 20, "training loss, last 100 steps, a dot a seed; bar: mean", 12, SOFT)
    svg.dot(x0 + 332, y0 - 24, 3.4, SOFT, hollow=True)
    svg.text(x0 + 340, y0 - 20, "validation loss", 12, SOFT)


def draw(path, rows, curves, summary):
    style = styles(summary, rows)
    label = 8 + 7.2 * max(len(e["recipe"]) for e in summary)            # room for names
    left, plot, height = 70, 560, max(330, 28 * len(summary))
    top = 134
    second = left + plot + label + 40 + label
    svg = Svg(int(second + 460), top + height + 58)
    first = next(iter(rows.values()))
    svg.text(26, 36, "Gap to bf16: the same weights, the same batches, another recipe", 19, INK, weight="600")
    seeds = sorted({s for _, s in rows}, key=int)
    runs = f"{int(first['steps']):,} steps, {int(first['tokens']):,} tokens, {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(seeds)}"
    svg.text(26, 57, f"{runs}; {first['device']}", 12.5, SOFT)
    draw_curves(svg, (left, top, left + plot, top + height), summary, curves, style)
    draw_ends(svg, (second, top, second + 410, top + height), summary, style)
    svg.save(path)


def main():
    if len(sys.argv) != 2 or not os.path.isdir(sys.argv[1]):
        sys.exit("usage: scripts/plot_recipes.py OUT, the directory that scripts/compare_recipes.sh wrote")
    out = sys.argv[1]
    rows, curves = collect(out)
    if not rows:
        print("no run is finished yet")
        return
    write_results(out, rows)
    summary = summarize(rows)
    if not summary:
        print(f"{len(rows)} runs are finished; gaps need bf16 and another recipe of the same seed")
        return
    text = summary_text(rows, summary)
    with open(out + "/summary.md", "w") as f:
        f.write(text)
    print(text, end="")
    draw(out + "/comparison.svg", rows, curves, summary)
    print(f"{out}/results.csv, summary.md, comparison.svg: {len(rows)} runs")


if __name__ == "__main__":
    main()

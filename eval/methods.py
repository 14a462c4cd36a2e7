"""The table of several methods under one budget: accuracy, spread over seeds, speed."""

from eval.table import Cells

CONTROLS = ("raw-pixels", "random-encoder")


def method_rows(cells: Cells, name: str, budgets: list[int], rate: float | None) -> list[dict]:
    """A method's or control's figures: the draws' mean of each seed, mean and std over seeds."""
    rows = []
    for kind in ("linear", "knn"):
        for labels in budgets:
            own, init = (name, "none") if name in CONTROLS else (f"{name}-{kind}", "random")
            seeds = cells.matrix(own, init, labels)[0]
            if name in CONTROLS and kind == "knn":
                continue
            seeds = seeds.mean(1)
            spread = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
            row = dict(name=name, kind=kind, labels=labels, top1=float(seeds.mean()), std=spread)
            rows.append(row | {"seeds": len(seeds), "images_per_second": rate})
    return rows


def methods_markdown(rows: list[dict]) -> str:
    """One line a method, one column a kind of evaluation and budget; the rate tells the cost."""
    columns = list(dict.fromkeys((r["kind"], r["labels"]) for r in rows))
    heads = [f"{'k-NN' if k == 'knn' else k}, {n:,} labels" for k, n in columns]
    lines = [f"| method | {' | '.join(heads)} | seeds | images/s |", "|---|" + "---|" * len(heads)]
    lines[1] += "---|---|"
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = {(r["kind"], r["labels"]): r for r in rows if r["name"] == name}
        first, cells = next(iter(mine.values())), []
        for column in columns:
            r = mine.get(column)
            spread = f" ± {r['std']:.1f}" if r and r["std"] is not None else ""
            cells.append(f"{r['top1']:.1f}{spread}" if r else "")
        rate = first["images_per_second"]
        cells += [str(first["seeds"]), f"{rate:,.0f}" if rate else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

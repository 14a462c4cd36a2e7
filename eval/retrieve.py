"""The images of a gallery that an encoder finds most alike: a picture, and JSON on the output.

python -m eval.retrieve --ckpt runs/byol-mine --query image.jpg --gallery DIR --out alike.png
"""

import json
import sys

import numpy as np
from torch.nn.functional import normalize

from core.files import new_file
from data.preview import mosaic, save_png
from eval.trained import command, load_frozen, parser, read_images


def run(given) -> list[dict]:
    """One line of JSON and one row of the picture a query: itself, then its nearest by cosine."""
    out = new_file(given.out)
    frozen = load_frozen(given.ckpt, given.device)
    side = frozen.transform.stored
    queries, names = read_images(given.query, side)
    gallery, known = read_images(given.gallery, side)
    near = normalize(frozen(queries), dim=1) @ normalize(frozen(gallery), dim=1).T
    cosine, index = near.topk(min(given.top, len(gallery)), dim=1)
    lines, rows = [], []
    for q, name in enumerate(names):
        found = zip(index[q].tolist(), cosine[q].tolist(), strict=True)
        alike = [{"file": known[i], "cosine": round(c, 6)} for i, c in found]
        lines.append({"query": name, "nearest": alike})
        print(json.dumps(lines[-1]))
        pixels = [*queries.gather(np.array([q])), *gallery.gather(index[q].numpy())]
        rows.append([x.float() / 255 for x in pixels])
    heads = ["query", *(f"{c:.3f}" for c in cosine[0].tolist())] if len(rows) == 1 else ["query"]
    save_png(mosaic(rows, heads), out)
    print(f"{out}: a row a query, then its nearest", file=sys.stderr)
    return lines


def main(argv: list[str] | None = None) -> list[dict]:
    """Run from the command line."""
    arguments = parser(__doc__)
    arguments.add_argument("--query", nargs="+", required=True, help="image files or folders")
    arguments.add_argument("--gallery", nargs="+", required=True, help="image files or folders")
    arguments.add_argument("--top", type=int, default=8, help="how many of the gallery [8]")
    arguments.add_argument("--out", default="alike.png", help="the picture [alike.png]")
    return command(run, arguments, argv)


if __name__ == "__main__":
    main()

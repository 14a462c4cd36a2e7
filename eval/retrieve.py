"""Find the nearest images of a gallery by an encoder's features: a picture, and JSON on stdout.

python -m eval.retrieve --ckpt runs/byol-mine --query image.jpg --gallery DIR --out alike.png
"""

import json
import sys

import numpy as np
from torch.nn.functional import normalize

from core.files import new_file
from data.preview import mosaic, save_png
from eval.trained import command, load_frozen, parser, read_images


def run(args) -> list[dict]:
    """For each query, print a JSON object and draw a row: the query, then its nearest by cosine."""
    out = new_file(args.out)
    frozen = load_frozen(args.ckpt, args.device)
    queries, names = read_images(args.query, frozen.transform.stored)
    gallery, gallery_names = read_images(args.gallery, frozen.transform.stored)
    cosines = normalize(frozen(queries), dim=1) @ normalize(frozen(gallery), dim=1).T
    lines, rows = [], []
    for number, name in enumerate(names):
        nearest, index = cosines[number].topk(min(args.top, len(gallery)))
        pairs = zip(nearest.tolist(), index.tolist(), strict=True)
        alike = [{"file": gallery_names[i], "cosine": round(cosine, 6)} for cosine, i in pairs]
        lines.append({"query": name, "nearest": alike})
        print(json.dumps(lines[-1]))
        pixels = [*queries.take(np.array([number])), *gallery.take(index.numpy())]
        rows.append([x.float() / 255 for x in pixels])
    save_png(mosaic(rows, ["query", "nearest"]), out)
    print(f"{out}: a row for each query", file=sys.stderr)
    return lines


def main(argv: list[str] | None = None) -> list[dict]:
    """Run from the command line."""
    arguments = parser(__doc__)
    arguments.add_argument("--query", nargs="+", required=True, help="image files or folders")
    arguments.add_argument("--gallery", nargs="+", required=True, help="image files or folders")
    arguments.add_argument("--top", type=int, default=8, help="nearest images shown per query [8]")
    arguments.add_argument("--out", default="alike.png", help="picture to write [alike.png]")
    return command(run, arguments, argv)


if __name__ == "__main__":
    main()

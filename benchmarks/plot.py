"""Draw the rows of benchmarks' JSON files as bars.

    python benchmarks/plot.py FILE.json [FILE.json ...] --output PICTURE.png [--unit ms]

Each row with this unit becomes a bar; the bars are grouped by file. The default is the unit of the first row.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#3b6fb6", "#c9682f", "#4f9a5b", "#8a5aa8")
LINE, MARGIN, NAMES, BARS = 24, 16, 430, 420


def main() -> None:
    """Read the files, draw the bars and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of benchmarks")
    parser.add_argument("--output", type=Path, required=True, help="file of the picture")
    parser.add_argument("--unit", help="unit of the rows (default: that of the first row)")
    args = parser.parse_args()
    tables = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in args.files}
    unit = args.unit or next(iter(tables.values()))[0]["unit"]
    groups = {name: [row for row in rows if row["unit"] == unit] for name, rows in tables.items()}
    if not any(groups.values()):
        units = {row["unit"] for rows in tables.values() for row in rows}
        raise SystemExit(f"no row is in {unit!r}; units: {', '.join(sorted(units))}")
    draw_bars(groups, unit).save(args.output)


def draw_bars(groups: dict[str, list[dict]], unit: str) -> Image.Image:
    """Draw one bar per row and one colour per file. The longest bar is the largest value."""
    font = ImageFont.load_default(13)
    count = sum(len(rows) + 1 for rows in groups.values())
    picture = Image.new("RGB", (NAMES + BARS + 110 + 2 * MARGIN, count * LINE + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    longest = max(row["value"] for rows in groups.values() for row in rows)
    top = MARGIN
    for number, (title, rows) in enumerate(groups.items()):
        draw.text((MARGIN, top + 4), f"{title} ({unit})", fill="black", font=font)
        top += LINE
        for row in rows:
            width = max(1, round(BARS * row["value"] / longest))
            draw.text((MARGIN, top + 4), row["name"], fill="#333333", font=font)
            left = MARGIN + NAMES
            draw.rectangle((left, top + 3, left + width, top + LINE - 5), fill=COLOURS[number % len(COLOURS)])
            draw.text((left + width + 6, top + 4), f"{row['value']:.4g}", fill="black", font=font)
            top += LINE
    return picture


if __name__ == "__main__":
    main()

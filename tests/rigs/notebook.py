"""Runs a notebook's cells in order and keeps what they show; Jupyter is not needed. After run_toy.sh:

    python -m tests.rigs.notebook docs/walkthrough.ipynb
"""
import argparse
import ast
import base64
import contextlib
import io
import json
from pathlib import Path

from PIL import Image

from plumbing import files, guard


def run_cells(cells):
    """Executes the code cells in one namespace; each cell's outputs become what it prints and its last value,
    an image or text."""
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        body = ast.parse("".join(cell["source"])).body
        last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
        stdout, value = io.StringIO(), None
        with contextlib.redirect_stdout(stdout):
            exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
            if last:
                value = eval(compile(last, f"cell {number}", "eval"), names)
        cell["execution_count"], cell["outputs"] = number + 1, []
        if printed := lines(stdout.getvalue()):
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": printed})
        if value is not None:
            cell["outputs"].append({"output_type": "execute_result", "execution_count": number + 1,
                                    "metadata": {}, "data": shown(value)})
    return names


def shown(value):
    """What a notebook holds of a cell's value."""
    if not isinstance(value, Image.Image):
        return {"text/plain": lines(repr(value))}
    png = io.BytesIO()
    value.quantize(256).save(png, "PNG", optimize=True)
    size = f"image, {value.width} x {value.height}"
    return {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": [size]}


def lines(text):
    return text.splitlines(keepends=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebook", type=Path)
    path = p.parse_args().notebook
    content = files.read_json(path)
    run_cells(content["cells"])
    with files.atomic(path) as beside:
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"{path}: {len(content['cells'])} cells")


if __name__ == "__main__":
    guard.run(main)

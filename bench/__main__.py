"""Lists the benchmarks, a line each: python -m bench"""
import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    source = path.read_text()
    if "def main()" in source:
        first = ast.get_docstring(ast.parse(source)).split("\n\n")[0]
        print(f"python -m bench.{path.stem:11} {' '.join(first.split())}")

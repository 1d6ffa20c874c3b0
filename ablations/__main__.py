"""Lists what is here, a line each: python -m ablations"""
import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    first = ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0]
    print(f"python -m ablations.{path.stem:12} {' '.join(first.split())}")

"""Lists what is here, a line each: python -m ablations"""
import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    text = path.read_text()
    if "\ndef main" in text:                                  # pairs.py is shared and runs nothing
        print(f"python -m ablations.{path.stem:12} {ast.get_docstring(ast.parse(text)).splitlines()[0]}")

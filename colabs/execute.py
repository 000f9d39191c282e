"""Executes the tutorials: `python colabs/execute.py [DIRECTORY]`.

Writes each notebook with its outputs back to its place, or into DIRECTORY.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(source: Path, target: Path) -> None:
    """Runs all cells of a notebook in a fresh kernel; a cell that fails raises."""
    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=900,
        resources={"metadata": {"path": target.parent}},
        coalesce_streams=True,
        record_timing=False,  # times of day, another at every run
    )
    client.execute()
    nbformat.write(notebook, target)


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for path in sorted(HERE.glob("*.ipynb")):
        print(path.name, flush=True)
        execute(path, directory / path.name)

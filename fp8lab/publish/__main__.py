"""``python -m fp8lab.publish``: execute the stale chapters of the book in the working directory.

`pre_render` calls this before Quarto renders. The folder of records is the environment's
FP8LAB_RECORDS_DIR, or what ``_quarto.yml`` says under ``fp8lab: records-dir``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fp8lab.errors import UserError
from fp8lab.publish import execute_stale_chapters, read_book


def main() -> int:
    root = Path.cwd()
    try:
        book = read_book(root)
        records_dir = Path(os.environ.get("FP8LAB_RECORDS_DIR", root / book.records_dir))
        execute_stale_chapters(root, records_dir.resolve())
    except UserError as error:
        print(f"fp8lab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Results as the workbook stores them: with the command, the date, the device and the versions."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "data" / "results"


def version(name: str) -> str | None:
    """Of an installed package; None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def provenance(command: str, device: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """Where a result comes from: no model and no corpus has a part in it."""
    versions = {name: found for name in packages if (found := version(name))}
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "versions": {"python": platform.python_version()} | versions,
        "sha256": {},
        "complete": True,
    }


def write(result: dict[str, Any], path: Path) -> None:
    """The file, a line for each row of a table."""
    rows = [json.dumps(row, separators=(",", ":")) for row in result["data"].get("table", [])]
    about = {**result, "data": {k: v for k, v in result["data"].items() if k != "table"}}
    text = json.dumps(about, indent=1)
    if rows:
        head = text.removesuffix("\n }\n}")
        text = f'{head},\n  "table": [\n   ' + ",\n   ".join(rows) + "\n  ]\n }\n}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")

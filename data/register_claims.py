"""Register the parts of claims in `data/claims.json`, before they are measured.

    python data/register_claims.py S-I3 C-3    # after editing their parts: today's date, new digest

A verdict says so when a part was measured before its registration. So register first, commit, and
measure then; a claim whose parts were measured already needs its sweep again.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime

from effnb.lab._files import data_folder
from effnb.lab.claims import claims_from, digest_of


def main() -> None:
    """Date and sign the parts of the claims named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("claims", nargs="+", help="ids of claims, such as S-I3")
    path = data_folder() / "claims.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in parser.parse_args().claims:
        if not content["claims"].get(name, {}).get("parts"):
            parser.error(f"the ledger has no parts for {name!r}; write them first.")
        row = content["claims"][name]
        row["digest"] = digest_of(row["parts"])
        row["registered"] = datetime.now(UTC).date().isoformat()
    claims_from(content)  # refuses what could not be judged
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

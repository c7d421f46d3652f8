"""Is a run at its end? It exports its network last, and says at which step; one that is started over removes that."""

from __future__ import annotations

import json
from pathlib import Path

from ghostmask.engine.atomic import read_small


def is_finished(run: Path) -> bool:
    """Whether the export in a run's folder is that of its last step, and not one that `ghostmask export` made before.

    A summary that cannot be read counts as one: whoever reads it next says so.
    """
    try:
        exported = json.loads(read_small(run / "export" / "summary.json"))["run"]
        return bool(exported["step"] == exported["steps"])
    except OSError:
        return False
    except (ValueError, KeyError, TypeError):  # also one of an older version
        return True

"""Is a package there that only looking at runs needs?"""

from __future__ import annotations

from importlib.util import find_spec

from ghostmask.engine.errors import InputError


def require(*packages: str) -> None:
    """Raise InputError, with the command that installs them, where one of the packages is absent."""
    absent = [name for name in packages if find_spec(name) is None]
    if absent:
        raise InputError(f"{' and '.join(absent)}: not installed here; pip install 'ghostmask[report]'")

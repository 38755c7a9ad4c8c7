"""Say what is installed here, what this machine has, which provider runs each op and why, and what is missing.

python -m bilevel_fast.doctor

Exit code 0 if the mini preset can run here, else 1.
"""

from dataclasses import dataclass
from typing import Any

from bilevel_fast.base import errors, flags


@dataclass(frozen=True)
class Settings:
    """It has none."""


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return {"": Settings}


def main() -> None:
    flags.parse(Settings, "bilevel_fast.doctor", __doc__)
    from bilevel_fast.runs.doctor import examine

    report = examine()
    print(report.text)
    if report.refused:
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))

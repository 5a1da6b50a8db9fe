"""The table of scripts/faults.sh: what was done to a run, in how many ways, and how often it held.

python -m tests.fault_table RESULTS.xml, which pytest wrote (--junitxml).
"""

import importlib
import inspect
import sys
import xml.etree.ElementTree as ET

from sa_jax.text import table_row


def table(results: str) -> str:
    """Markdown, a row for each test function, in the order in which they ran."""
    cases: dict[tuple[str, str], list[ET.Element]] = {}
    for case in ET.fromstring(results).iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        cases.setdefault((case.get("classname", ""), name), []).append(case)
    lines = [table_row(["what", "held", "seconds"]), "|---|---|---|"]
    for (module, name), group in cases.items():
        held = sum(len(case) == 0 for case in group)  # no failure, error or skipped inside
        seconds = sum(float(case.get("time", "0")) for case in group)
        lines.append(table_row([title(module, name), f"{held} of {len(group)}", f"{seconds:.0f}"]))
    return "\n".join(lines)


def title(module: str, name: str) -> str:
    """The first line of a test's docstring, or its name."""
    text = inspect.getdoc(getattr(importlib.import_module(module), name))
    return (text or name).splitlines()[0].rstrip(".")


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(table(file.read()))

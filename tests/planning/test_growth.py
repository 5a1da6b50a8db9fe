"""The benchmark of plans keeps what it has measured, and tries again what failed."""

import json
import runpy
import sys

from tests.zygote import ROOT


def test_a_failed_row_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script
    growth = runpy.run_path(str(ROOT / "benchmarks/growth.py"))
    main, asked = growth["main"], []
    first, second, third = growth["TABLES"]["growth"][:3]
    good = {"gib": {"arguments": 1, "temporaries": 1, "needed": 2}, "clock": None}
    good |= {"roofline_s": 1.0, "compile_s": 1.0, "libtpu": "0"}
    main.__globals__["measure"] = lambda name: asked.append(name) or good
    main.__globals__["TABLES"] = {"growth": [first, second, third]}
    out = tmp_path / "growth.json"
    out.write_text(json.dumps({first: good, second: {"error": "it crashed"}}))
    monkeypatch.setattr(sys, "argv", ["growth.py", "--tables=growth", f"--out={out}"])
    main()
    assert asked == [second, third]
    assert json.loads(out.read_text()) == dict.fromkeys((first, second, third), good)

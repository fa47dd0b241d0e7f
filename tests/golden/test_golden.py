"""Every golden case through its adapter, at the case's tolerance."""

import json
from pathlib import Path

import numpy as np
import pytest
from adapters import OPS

CASES = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_case(case):
    found = OPS[case["op"]](case["inputs"], case["params"])
    for name, want in case["expected"].items():
        if want is None or isinstance(want, str | bool):
            assert found[name] == want, name
        else:
            got = np.asarray(found[name], dtype=np.float64)
            np.testing.assert_allclose(got, np.asarray(want, dtype=np.float64), err_msg=name, **case["tol"])

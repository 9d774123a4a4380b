"""The host waits for the device at most twice a round: for the drafts, and for what the target says of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    "_setup_privateuseone_for_python_backend" not in vars(backend_registration),
    reason="this torch has no such devices",
)
SCRIPT = Path(__file__).parents[1] / "pretended.py"
NUM_WAITS = {"no drafts": 1, "lookup": 1, "lookup, a processor of one's own": 1}
CALLS = [
    "lookup, a processor of one's own",
    "no drafts",
    "lookup",
    "sampled drafts, top-k",
    "sampled drafts, penalty",
    "adaptive drafts",
    "draft head",
]


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("call", [*CALLS, "batch, penalty"])
def test_no_round_waits_for_the_device_more_than_twice(found, call):
    (num_first, waits_first, _), (rounds, waits, _) = found[call]["counts"]
    assert rounds > num_first + 1
    assert call in NUM_WAITS or found[call]["drafts"] > 0
    # an answer of one token has no drafts: what it waits besides once a round is before the first one
    in_rounds = waits - (waits_first - num_first)
    # transformers looks at the padding of prompts once, those that the draft reads included
    is_padded = call.startswith("batch")
    assert in_rounds <= NUM_WAITS.get(call, 2) * rounds + 2 * is_padded, found[call]["waits"]


@pytest.mark.parametrize("call", CALLS)
def test_little_is_sent_to_the_device_in_a_round(found, call):
    (rounds_before, _, sent_before), (rounds, _, sent) = found[call]["counts"]
    # tokens and positions of each forward (one, and up to six of the draft), weights of the pooling, shares
    assert sent - sent_before <= 18 * (rounds - rounds_before), found[call]["sent"]

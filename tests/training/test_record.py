import pytest

from safespec_hf import HeadFileError
from safespec_hf.training.record import read_record, update_record


def test_parts_are_added_and_replaced(tmp_path):
    update_record(tmp_path, seed=1, width=32)
    update_record(tmp_path, seed=2)
    assert read_record(tmp_path) == {"seed": 2, "width": 32}


DAMAGED = ["", "{", "[1]", "null", "[" * 9999, '{"calibration": [1]}', '{"sweep": "roses"}', '{"data": [null]}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_record_that_is_none_is_named(content, tmp_path):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(HeadFileError, match=r"training\.json"):
        read_record(tmp_path)

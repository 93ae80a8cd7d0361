"""``causal_conv1d_cp`` with Gloo: the bits of one process on 2, 4 and 8 ranks."""

import distributed_cases as cases
import distributed_scan_cases as scans
import pytest
from distributed_run import check


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_random_cases(ranks, tmp_path):
    """500 in all; each rank compares its shard with that of the whole."""
    seeds = {2: range(180), 4: range(1000, 1180), 8: range(2000, 2140)}[ranks]
    check(cases.random_cases, ranks, tmp_path, seeds)


@pytest.mark.parametrize("ranks", [2, 4])
def test_random_scans(ranks, tmp_path):
    check(scans.random_cases, ranks, tmp_path, range(100 * ranks, 100 * ranks + 60))

"""The marks that decide whether a test runs on this machine."""

from __future__ import annotations

import pytest

from .conftest import devices_needed

pytest_plugins = "pytester"


def test_a_gpu_mark_on_a_parameter_counts_next_to_that_of_the_function(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers = gpu(count)")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        @pytest.mark.parametrize("strategy", ["single", pytest.param("ddp", marks=pytest.mark.gpu(2))])
        def test_it(strategy): ...

        @pytest.mark.gpu(count=2)
        def test_two(): ...

        def test_none(): ...
        """
    )
    items, _ = pytester.inline_genitems()
    assert [devices_needed(item) for item in items] == [1, 2, 2, 0]


def test_the_tests_of_a_file_stay_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist shows a group that it respects in the test's name. With a pytest that it does not know, it ignores
    all groups in silence, and every worker makes the runs that tests share."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not run as `make test` runs it: -n 3 --dist loadgroup")
    assert request.node.nodeid.endswith("@test_marks.py")

"""The definitions of the figures of a run."""

from __future__ import annotations

from distft.runs.figures import FIGURES, SUMMARY_KEYS


def test_every_key_is_defined_once() -> None:
    keys = [figure.key for figure in FIGURES]
    assert len(keys) == len(set(keys))


def test_a_figure_outside_the_summary_says_where_it_comes_from() -> None:
    derived = [figure for figure in FIGURES if not figure.in_summary]
    assert derived and all(figure.path or figure.task or figure.logged or figure.until_loss for figure in derived)
    assert all(figure.path[0] in SUMMARY_KEYS for figure in derived if figure.path)
    assert not {figure.key for figure in derived} & set(SUMMARY_KEYS)


def test_a_figure_that_is_compared_has_a_label_a_format_and_a_direction() -> None:
    for figure in FIGURES:
        if figure.compared:
            assert figure.label and figure.format and figure.higher_is_better is not None, figure.key


def test_a_title_is_the_label_with_its_unit() -> None:
    titles = {figure.key: figure.title for figure in FIGURES}
    assert (titles["peak_memory_gib"], titles["samples_per_second"]) == ("peak memory, GiB", "samples/s")

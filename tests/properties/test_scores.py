"""Answers and their normalisation, by hand."""

from __future__ import annotations

import pytest

from anabranch.evaluate import _until, normalise, token_f1


@pytest.mark.parametrize("option", ["A", "B", "C", "The", "an"])
def test_an_option_is_itself_with_and_without_a_dot(option):
    assert normalise(option) == normalise(f"{option}.") == normalise(f" {option.lower()} ")


def test_normalise_keeps_words_and_drops_articles():
    assert normalise("The  Cat, sat!") == ["cat", "sat"]
    assert normalise("?!") == ["?!"] and normalise("") == []


def test_f1_by_hand():
    assert token_f1("the red cat", "red cat") == 1.0
    assert token_f1("red dog", "red cat") == pytest.approx(0.5)
    assert token_f1("dog", "cat") == 0.0
    assert token_f1("red red", "red") == pytest.approx(2 / 3)


def test_an_answer_ends_at_the_first_end():
    assert _until([5, 6, 2, 7, 1], {1, 2}) == [5, 6] and _until([5, 6], {1}) == [5, 6]

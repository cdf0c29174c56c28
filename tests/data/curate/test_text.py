"""Numbers about texts."""

import numpy as np
import pytest

from mmpt.data.curate.text import annotate_text, grams, hash_words, words_of


def annotated(text: str) -> dict:
    words = words_of(text)
    return annotate_text(text, words, hash_words(words))


def test_one_spelling_for_case_punctuation_width_and_spaces():
    assert words_of("The  \uff23\uff21\uff34,\n sat!") == ["the", "cat", "sat"]
    assert annotated("The cat sat")["text_hash"] == annotated("the  CAT... sat")["text_hash"]
    assert annotated("the cat")["text_hash"] != annotated("thecat")["text_hash"]
    assert annotated("?!")["text_hash"] != annotated("...")["text_hash"]


def test_unspaced_scripts_have_a_word_a_character():
    assert words_of("GPU是显卡") == ["gpu", "是", "显", "卡"]


def test_runs_are_equal_where_their_words_are():
    hashes = hash_words(list("abcabcba"))
    runs = grams(hashes, 3)
    assert len(runs) == 6
    assert len(np.unique(runs)) == 5
    assert runs[0] == runs[3]
    assert len(grams(hashes, 9)) == 0


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The weather is fine today and we go to the sea.", "en"),
        ("Das Wetter ist heute schön,\nund wir gehen ans Meer.", "de"),
    ],
)
def test_languages(text, language):
    found = annotated(text)
    assert found["language"] == language
    assert 0.5 < found["language_score"] <= 1


def test_a_text_without_letters_has_no_language():
    assert "language" not in annotated("12 + 3 = 15")


def test_repetition():
    found = annotated("one two three four five. one two three four five. six seven")
    letters = len("onetwothreefourfive")
    assert found["repeated_5grams"] == pytest.approx(2 * letters / (2 * letters + len("sixseven")))
    assert found["repeated_10grams"] == 0
    assert annotated("spam spam spam spam")["top_2gram"] == 1
    assert annotated("all of these words differ")["top_2gram"] == 0
    assert annotated("short")["top_2gram"] is None


def test_lines_and_symbols():
    found = annotated("- one thing\n- two things\nA sentence.\nMore...\nMore\u2026\nMore...\n")
    assert found["bullets"] == pytest.approx(2 / 6)
    assert found["cut_lines"] == pytest.approx(3 / 6)
    assert found["ended_lines"] == pytest.approx(4 / 6)
    assert found["repeated_lines"] == pytest.approx(1 / 6)
    assert found["symbols"] == pytest.approx(3 / 9)
    assert annotated("to be or not to be")["stop_words"] == 2


def test_copies_that_differ_little_have_nearly_equal_sketches():
    words = [f"w{i}" for i in range(200)]
    one, near = annotated(" ".join(words)), annotated(" ".join([*words[:-1], "x"]))
    far = annotated(" ".join(f"v{i}" for i in range(200)))
    sketches = [np.array(each["text_minhash"]) for each in (one, near, far)]
    assert (sketches[0] == sketches[1]).mean() > 0.9
    assert (sketches[0] == sketches[2]).mean() < 0.1

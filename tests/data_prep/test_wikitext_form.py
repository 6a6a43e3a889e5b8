"""Ordinary text as WikiText writes it: pairs by hand, each in a form that its articles have."""

import pytest

from data_prep.wikitext_form import in_wikitext_form, is_in_wikitext_form

PAIRS = [
    (
        "Homarus gammarus, known as the European lobster, is blue.",
        "Homarus gammarus , known as the European lobster , is blue .",
    ),
    (
        "It weighs 0.7–2.2 kg (1.5–4.9 lb).",
        "It weighs 0 @.@ 7 – 2 @.@ 2 kg ( 1 @.@ 5 – 4 @.@ 9 lb ) .",
    ),
    ("1,234,567 people", "1 @,@ 234 @,@ 567 people"),
    ("a state-of-the-art claw", "a state @-@ of @-@ the @-@ art claw"),
    ('only becoming "lobster red" on cooking.', 'only becoming " lobster red " on cooking .'),
    ("“Don’t know”, he said", '" Don \'t know " , he said'),
    ("the RAAF's first, the crews' last", "the RAAF 's first , the crews ' last"),
    ("the 'anti' party", "the ' anti ' party"),
    ("H. americanus of the U.S. Navy", "H. americanus of the U.S. Navy"),
    ("Mr. Smith and Dr. Who met. They left.", "Mr. Smith and Dr. Who met . They left ."),
    ("He moved to the U.S.", "He moved to the U.S ."),
    ("Wait... what?!", "Wait ... what ? !"),
    ("and/or $5, 79% at 20°", "and / or $ 5 , 79 % at 20 °"),
    ("the <unk>, a <br>", "the <unk> , a < br >"),
    ("He said: no; yes!", "He said : no ; yes !"),
    ("(It was so.)", "( It was so . )"),
    ("Größe über Île-de-France.", "Größe über Île @-@ de @-@ France ."),
]


@pytest.mark.parametrize(("ordinary", "form"), PAIRS)
def test_as_wikitext_writes_it(ordinary, form):
    assert in_wikitext_form(ordinary) == form + "\n"


def test_text_in_this_form_stays_as_it_is():
    text = " \n = Homarus gammarus = \n \n It is blue , and 23 – 38 cm long . \n It may grow . \n"
    assert is_in_wikitext_form(text)
    assert in_wikitext_form(text) == text
    for ordinary, _ in PAIRS:
        form = in_wikitext_form(f"{ordinary} So it is, and so it was.")
        assert in_wikitext_form(form) == form


def test_wrapped_lines_become_a_paragraph_where_blank_lines_part_them():
    wrapped = "The lobster\nis blue,\nmostly.\n\nIt may  grow.\n \n\nIt does.\n"
    assert in_wikitext_form(wrapped) == "The lobster is blue , mostly .\nIt may grow .\nIt does .\n"
    assert in_wikitext_form("a poem,\nof two lines\n") == "a poem ,\nof two lines\n"


def test_words_are_neither_lost_nor_made():
    text = "".join(f"{ordinary} " for ordinary, _ in PAIRS)
    letters = [c for c in text if c.isalnum()]
    assert [c for c in in_wikitext_form(text) if c.isalnum()] == letters
    assert in_wikitext_form("\0 odd \0c\0 text, here.").endswith("text , here .\n")

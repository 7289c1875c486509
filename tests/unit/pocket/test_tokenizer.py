"""The shipped tokenizer: ids with roles, any text there and back. Test process."""

import pytest

from pocket.tokenizer import TOKENIZER_CONFIG, VOCAB_SIZE, load_tokenizer
from pocket.train import WEIGHTS_FOLDER

TOKENIZER = load_tokenizer(WEIGHTS_FOLDER / "tokenizer.json")


@pytest.mark.parametrize(
    "text",
    ["what color is the circle?", " red circle", "HOW MANY", "ça, 日本 🙂 \x00\n", "<|endoftext|>", ""],
)
def test_any_text_goes_there_and_back(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(16 < i < VOCAB_SIZE for i in ids), "a role's id from user text"


def test_ids_with_roles_are_moondreams() -> None:
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE
    names = {
        0: "endoftext",
        3: "answer",
        4: "thinking",
        5: "coord",
        6: "size",
        7: "start_ground",
        9: "end_ground",
    }
    assert {i: TOKENIZER.id_to_token(i) for i in names} == {i: f"<|{name}|>" for i, name in names.items()}
    templates = TOKENIZER_CONFIG["templates"]
    assert templates["query"]["suffix"] == [3]
    assert all(i <= 16 for length in templates["caption"].values() for i in length)


def test_common_words_are_one_token() -> None:
    for word in (" red", " circle", " circles", "yes", "no", "3", " left", " bottom", "what", " many"):
        assert len(TOKENIZER.encode(word).ids) == 1, word

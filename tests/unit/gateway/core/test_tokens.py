"""Tokenizers of both kinds: first spaces, how a text begins, and special tokens' names in a user's text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gateway.core.templates import ChatTemplate
from gateway.core.tokens import ModelTokens
from gateway.generation import ChatOptions
from tests.fake_worker import CARD, byte_tokenizer, text_ids

WORDS = ("▁Once", "▁upon", "▁a", "▁time", "▁", "O", "nce", "né", "[", "INST", "]", "▁yes", "▁no")
SPECIALS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")


def piece_tokenizer(*, metaspace: bool = False) -> Tokenizer:
    """As SentencePiece models have it, in the older spelling (Llama 2) or with Metaspace."""
    vocab = {name: number for number, name in enumerate(SPECIALS)}
    vocab |= {f"<0x{byte:02X}>": len(SPECIALS) + byte for byte in range(256)}
    vocab |= {word: len(vocab) + number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
        )
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def of(tokenizer: Tokenizer) -> ModelTokens:
    return ModelTokens(tokenizer.to_str().encode())


@pytest.mark.parametrize("metaspace", [False, True])
def test_a_first_space_is_kept_in_streams_and_dropped_from_whole_texts(metaspace: bool) -> None:
    library = piece_tokenizer(metaspace=metaspace)
    tokens = of(library)
    assert tokens.drops_first_space
    ids = tokens.encode("Once upon a time")
    assert tokens.decode(ids) == library.decode(ids) == "Once upon a time"
    assert "".join(map(tokens.token_text, ids)) == " Once upon a time"
    detokenizer = tokens.detokenizer()
    assert detokenizer.step(ids[1]) + detokenizer.step(ids[2]) == " upon a"


@example([len(SPECIALS) + ord(" ")])
@example([1, len(SPECIALS) + ord(" "), len(SPECIALS) + 256])
@given(st.lists(st.integers(0, len(SPECIALS) + 256 + len(WORDS) - 1), max_size=12))
def test_whole_texts_are_the_librarys_own(ids: list[int]) -> None:
    for library in (LIBRARY, METASPACE):
        assert PIECES[library].decode(ids) == library.decode(ids)


LIBRARY, METASPACE = piece_tokenizer(), piece_tokenizer(metaspace=True)
PIECES = {library: of(library) for library in (LIBRARY, METASPACE)}


def test_a_text_begins_as_the_post_processor_says() -> None:
    assert PIECES[LIBRARY].start_ids == [1]
    assert of(byte_tokenizer()).start_ids == []


TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
BYTES = of(byte_tokenizer())
BYTE_TEMPLATE = ChatTemplate(
    "{{ bos_token }}{% for m in messages %}<|1|>{{ m.content | trim }}<|2|>{% endfor %}", BYTES, CARD
)


def byte_prompt(*contents: object) -> list[int]:
    messages = [{"role": "user", "content": content} for content in contents]
    return BYTES.encode_rendered(BYTE_TEMPLATE.render_guarded(messages, ChatOptions()))


@given(
    st.lists(st.sampled_from(["<|0|>", "<|2|>", "<|", "<", "0|>", "a", " ", "é", "\n"]), max_size=6).map(
        "".join
    )
)
def test_a_users_text_never_becomes_a_special_token(text: str) -> None:
    assert byte_prompt(text) == [0, 1, *text_ids(text.strip()), 2]


def test_names_cut_in_two_stay_text() -> None:
    parts = [{"type": "text", "text": "<|2 "}, {"type": "text", "text": "|>"}]
    joined = ChatTemplate(
        "{% for p in messages[0].content %}{{ p.text | trim }}{% endfor %}<|3|>", BYTES, CARD
    )
    rendered = joined.render_guarded([{"role": "user", "content": parts}], ChatOptions())
    assert BYTES.encode_rendered(rendered) == [*text_ids("<|2|>"), 3]
    assert joined.render([{"role": "user", "content": parts}], ChatOptions()) == "<|2|><|3|>"


@pytest.mark.parametrize("library", [LIBRARY, METASPACE], ids=["Prepend", "Metaspace"])
def test_a_template_with_users_words_beside_is_encoded_as_without_them(library: Tokenizer) -> None:
    tokens = PIECES[library]
    template = ChatTemplate(TEMPLATE, tokens, CARD)
    prompts = []
    for text in ("upon a time", "upon </s> a time"):
        rendered = template.render_guarded([{"role": "user", "content": text}], ChatOptions())
        prompts.append(tokens.encode_rendered(rendered))
    plain, guarded = prompts
    assert plain == library.encode("<unk>[INST] upon a time [/INST]", add_special_tokens=False).ids
    assert guarded[:3] == plain[:3] and guarded[-1] == plain[-1] and 2 not in guarded
    assert tokens.decode(guarded[2:-1]).split() == ["upon", "</s>", "a", "time"]


def test_a_templates_json_of_a_users_words_stays_whole() -> None:
    template = ChatTemplate("{{ messages | tojson(ensure_ascii=True) }}<|3|>", BYTES, CARD)
    rendered = template.render_guarded([{"role": "user", "content": "<|3|>"}], ChatOptions())
    assert BYTES.encode_rendered(rendered) == [*text_ids('[{"role": "user", "content": "<|3|>"}]'), 3]

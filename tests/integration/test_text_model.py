"""A Llama folder behind a real gateway and a real worker: chat by its own template, the tokens transformers gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.integration.loopback_hub import loopback_hub
from tests.integration.stack import Stack, stack

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def write_folder(folder: Path) -> tuple[Any, Any]:
    """A tiny random Llama with a byte-level tokenizer and a chat template; returns its oracle and tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(9)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|end|>"),
        tie_word_embeddings=True,
    )
    oracle = LlamaForCausalLM(config).eval()
    oracle.save_pretrained(folder)
    return oracle, tokenizer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Any, Any]]:
    folder = tmp_path_factory.mktemp("tiny-llama")
    oracle, tokenizer = write_folder(folder)
    with stack(["--device", "cpu", "--dtype", "float32", "--model", str(folder)]) as running:
        yield running, oracle, tokenizer


def test_chat_equals_transformers(served: tuple[Stack, Any, Any]) -> None:
    running, oracle, tokenizer = served
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
    (model,) = client.models.list().data
    answer = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße!"}],
        max_tokens=24,
        temperature=0,
    )
    prompt = tokenizer.encode("<|system|>Be brief.<|end|><|user|>Grüße!<|end|><|assistant|>").ids
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    ids = torch.tensor([prompt])
    with torch.inference_mode():  # a mask of its own: else id 0, here a letter, is taken for padding
        out = oracle.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    expected = tokenizer.decode(out[0, len(prompt) :].tolist())
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_an_echo_scores_the_prompt_as_transformers(served: tuple[Stack, Any, Any]) -> None:
    running, oracle, tokenizer = served
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
    (model,) = client.models.list().data
    prompt = "Grüße an alle!"
    for _ in range(2):  # its pages are cached the second time
        (choice,) = client.completions.create(
            model=model.id, prompt=prompt, echo=True, logprobs=2, max_tokens=3, temperature=0
        ).choices
    ids = tokenizer.encode(prompt).ids
    with torch.inference_mode():
        wanted = oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
    told = choice.logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs
    assert choice.text.startswith(prompt) and len(told.tokens) == len(ids) + 3
    scores: list[Any] = list(told.token_logprobs)
    assert scores[0] is None
    for place, token_id in enumerate(ids[1:]):
        assert abs(scores[place + 1] - float(wanted[place, token_id])) <= 1e-4
    assert "".join(told.tokens[: len(ids)]) == prompt


def test_a_picture_is_refused(served: tuple[Stack, Any, Any]) -> None:
    running, _, _ = served
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data
    url = "data:image/png;base64,iVBORw0KGgo="
    content: list[Any] = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.APIStatusError, match="takes no pictures"):
        client.chat.completions.create(model=model.id, messages=[{"role": "user", "content": content}])


def test_a_hubs_model_is_fetched_and_called_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub itself, against a hub on a loopback port; a second start finds the model in the cache."""
    pytest.importorskip("huggingface_hub")
    (tmp_path / "tiny").mkdir()
    write_folder(tmp_path / "tiny")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    flags = ["--device", "cpu", "--model", "org/tiny"]
    with loopback_hub(tmp_path / "tiny", pause_s=0.05) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with stack(flags) as running:
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
            assert [model.id for model in client.models.list()] == ["org/tiny"]
        (tmp_path / "again").mkdir()
        again = Stack(tmp_path / "again", flags, {})
        again.start_worker()
        try:
            probe = again.probe()
            assert probe.ready.model.model_id == "org/tiny"
            probe.close()
        finally:
            again.stop()
        assert len(hub.fetched) == 1


def test_a_base_model_completes_and_chats_once_it_is_given_a_template(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").rename(tmp_path / "given.txt")
    flags = ["--device", "cpu", "--dtype", "float32", "--model", str(tmp_path)]
    messages: list[Any] = [{"role": "user", "content": "Hello"}]
    for more in ([], ["--chat-template", str(tmp_path / "given.txt")]):
        with stack([*flags, *more]) as running:
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
            (model,) = client.models.list().data
            assert model.to_dict()["capabilities"] == ["chat", "completions"][0 if more else 1 :]
            assert client.completions.create(model=model.id, prompt="Hello", max_tokens=2).choices
            if more:
                answer = client.chat.completions.create(model=model.id, messages=messages, max_tokens=2)
                assert answer.usage is not None and answer.usage.prompt_tokens == len("Hello") + 3
            else:
                with pytest.raises(openai.BadRequestError, match="--chat-template FILE"):
                    client.chat.completions.create(model=model.id, messages=messages)

"""The one trained model in reach, as people have it: a GGUF file in Q4_1 answers what its dequantised weights answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.unit.worker.formats.smollm2 import smollm2
from tests.unit.worker.models.paged_driver import Driver, quiet
from worker.formats.locate import locate
from worker.formats.open_source import open_source
from worker.models.registry import load_model

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def render(template: str) -> str:
    jinja2 = pytest.importorskip("jinja2")
    text: str = jinja2.Template(template).render(
        messages=[{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    return text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_capital_of_france() -> None:
    file = smollm2()
    assert locate("smollm2") == file
    source = open_source(file)
    assert source.model_id == Path(file).stem and source.end_tokens() == [2]
    reader = Tokenizer.from_str(source.tokenizer().decode())
    ids = reader.encode(render(source.templates["default"]), add_special_tokens=False).ids
    assert ids.count(1) == 3, "<|im_start|> opens each of three turns"
    with torch.inference_mode():
        model = load_model(source, torch.device("cpu"), torch.float32, quiet)
        driver = Driver(model)
        row, hidden = driver.prefill(model.embed(torch.tensor(ids)), 0)
        answer: list[int] = []
        nothing = torch.zeros(1, 2), torch.zeros(1, dtype=torch.bool)
        while len(answer) < 20:
            token = model.logits(hidden[-1:]).argmax(-1)
            if int(token) in model.card.eos_ids:
                break
            answer.append(int(token))
            hidden = driver.step([(row, model.embed_next(token, *nothing))])
    assert reader.decode(answer) == ANSWER

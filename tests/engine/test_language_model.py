"""Generation against `transformers` on the same directory; limits, stops, seeds, conversations."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from moestro.config import Config
from moestro.data.template import encode_chat
from moestro.data.tokenizer import Tokenizer
from moestro.engine.conversation import Conversation
from moestro.engine.language_model import LanguageModel, find_model_directory, load
from moestro.errors import CheckpointError, ConfigError
from moestro.model.attention import AttentionBatch
from moestro.model.transformer import Transformer, init_weights
from moestro.training.checkpoint import write_model_directory
from moestro.training.evaluate import score_source

Make = Callable[..., Config]
GROUPED = ["model.q_lora_rank=12", "model.num_groups=4", "model.top_k_groups=2"]


def random_model(config: Config, seed: int = 0) -> Transformer:
    model = Transformer(config.model)
    init_weights(model, seed)
    for _, router in model.routers():
        router.bias.copy_(torch.randn(8, generator=torch.Generator().manual_seed(7)) * 0.2 - 0.5)
    return model.eval()


@pytest.mark.parametrize("overrides", [["model.mtp_depth=0"], ["model.mtp_depth=1"], ["model.mtp_depth=1", *GROUPED]])
def test_greedy_equals_transformers(
    make_config: Make, tokenizer: Tokenizer, tmp_path: Path, overrides: list[str]
) -> None:
    write_model_directory(tmp_path, random_model(make_config("model.init_std=0.2", *overrides)), tokenizer)
    ours = load(tmp_path)
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for text in ("the cat sat", "été 345 dog and a very long beginning of a text about rivers"):
        prompt = [ours.tokenizer.bos_id, *ours.tokenizer.encode(text)]
        tokens = torch.tensor([prompt])
        expected = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=24, pad_token_id=2
        )
        assert ours.generate(text, max_tokens=24).ids == expected[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def written(make_config: Make, tokenizer: Tokenizer) -> LanguageModel:
    return LanguageModel(random_model(make_config("model.init_std=0.2")), tokenizer, frozenset([tokenizer.eos_id]))


def test_greedy_equals_the_likeliest_token_of_the_whole_text(written: LanguageModel) -> None:
    ids = [0, 20, 30]
    for token in written.stream_ids([0, 20, 30], max_tokens=10):
        with torch.no_grad():
            logits = written.model(torch.tensor(ids), AttentionBatch.causal(1, len(ids)), logits=True).logits
        assert token == int(logits[-1].argmax())
        ids.append(token)


def test_seeds_repeat(written: LanguageModel) -> None:
    one, two, three = (written.generate([5, 6], max_tokens=20, temperature=1.0, seed=s).ids for s in (1, 1, 2))
    assert one == two != three


def test_two_streams_of_one_model_do_not_mix(written: LanguageModel) -> None:
    prompts = ([5, 6], [7, 8, 9])
    alone = [list(written.stream_ids(prompt, max_tokens=8)) for prompt in prompts]
    one, other = (written.stream_ids(prompt, max_tokens=8) for prompt in prompts)
    assert [list(ids) for ids in zip(*zip(one, other, strict=True), strict=True)] == alone
    left = written.stream_ids(prompts[0], max_tokens=8)
    assert next(left) == alone[0][0]
    assert list(written.stream_ids(prompts[1], max_tokens=8)) == alone[1]
    assert list(left) == alone[0][1:]
    streams = [written.stream_ids(prompt, max_tokens=8) for prompt in prompts]
    for stream in streams:
        next(stream)
    assert written.engine.stats().running == 2  # neither waits for the other's end
    for stream in streams:
        stream.close()


def test_a_stop_id_ends_the_text(written: LanguageModel) -> None:
    ids = written.generate([5, 6], max_tokens=10).ids
    stopping = LanguageModel(written.model, written.tokenizer, frozenset([ids[3]]))
    end = ids.index(ids[3]) + 1
    result = stopping.generate([5, 6], max_tokens=10)
    assert (result.ids, result.finish_reason) == (ids[:end], "stop")
    assert result.text == written.tokenizer.decode(ids[: end - 1])
    assert written.generate([5, 6], max_tokens=10).finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "named"),
    [
        ([], 5, "empty"),
        ([1] * 120, 9, "128"),
        ([1], 0, "at least 1"),
        ([300], 5, "vocabulary"),
        ([-1], 5, "vocab"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    written: LanguageModel, prompt: list[int], max_tokens: int, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        written.generate(prompt, max_tokens=max_tokens)


def test_a_conversation_streams_its_replies_and_remembers_them(written: LanguageModel) -> None:
    conversation = Conversation(written, max_tokens=12, temperature=0.8, top_p=0.9, seed=3)
    pieces = list(conversation.reply("the cat"))
    assert len(pieces) > 2
    first = conversation.messages
    assert first == [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "".join(pieces)},
    ]
    prompt = encode_chat(first[:1], written.tokenizer)
    expected = written.generate(prompt, max_tokens=12, temperature=0.8, top_p=0.9, seed=3)
    assert "".join(pieces) == expected.text
    list(conversation.reply("and"))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    stopped = conversation.reply("never finished")
    half = next(stopped) + next(stopped)
    stopped.close()
    assert conversation.messages[4:] == [
        {"role": "user", "content": "never finished"},
        {"role": "assistant", "content": half},
    ]
    with pytest.raises(ConfigError, match="exceed"):
        list(conversation.reply("too long " * 200))
    assert len(conversation.messages) == 6


def test_a_run_a_checkpoint_and_a_copy_are_the_same_model(tiny_run: Path) -> None:
    newest = tiny_run / "checkpoints" / "step-00000012"
    assert find_model_directory(tiny_run) == newest == find_model_directory(newest)
    assert load(str(tiny_run)).generate("a dog", max_tokens=5) == load(newest).generate("a dog", max_tokens=5)


def test_places_without_a_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither a run"):
        load(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="without a checkpoint"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="fp16"):
        load(tmp_path, dtype="fp16")


def test_bits_per_byte_equal_the_slow_sum_over_every_token(tiny_run: Path, tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "été 12 dog dog ran over", "x"]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    language_model = load(tiny_run)
    model, tokenizer = language_model.model, language_model.tokenizer
    record = score_source(
        language_model, str(source), run=tiny_run, split="all", seq_len=64, max_tokens=None, scratch=tmp_path
    )
    bits, count = 0.0, 0
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for i in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor(ids[:i]), AttentionBatch.causal(1, i), logits=True).logits[-1]
                bits -= float(logits.log_softmax(-1)[ids[i]]) / math.log(2)
            count += 1
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (record["tokens"], record["bytes"]) == (count, num_bytes)
    # a document cut at the end of a row loses context there, so the rows here are longer than all of them
    assert record["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-5)


def test_a_long_conversation_forgets_its_oldest_exchanges(written: LanguageModel) -> None:
    room = written.model.config.max_seq_len
    system = {"role": "system", "content": "be brief"}
    conversation = Conversation(written, max_tokens=room // 2, messages=[system])
    for turn in range(8):
        assert list(conversation.reply(f"the cat sat on mat {turn} " * 2)) is not None
    asked = [message["content"][:21] for message in conversation.messages if message["role"] == "user"]
    assert conversation.messages[0] == system
    assert 0 < len(asked) < 8
    assert asked[-1] == "the cat sat on mat 7 "
    assert [m["role"] for m in conversation.messages[1:]] == ["user", "assistant"] * len(asked)


@pytest.mark.parametrize(("weights", "most"), [("fp32", 1e-5), ("bf16", 1e-3), ("int8", 2e-3), ("int4", 2e-2)])
def test_packed_weights_are_evaluated_as_they_are_served(
    tiny_run: Path, tmp_path: Path, weights: str, most: float
) -> None:
    plain, packed = load(tiny_run), load(tiny_run, weights=weights)
    settings = {"run": tiny_run, "split": "auto", "seq_len": 32, "max_tokens": None}
    expected = score_source(plain, None, **settings, scratch=tmp_path / "plain")
    found = score_source(packed, None, **settings, scratch=tmp_path / "packed")
    assert found["tokens"] == expected["tokens"] > 100
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=most)
    assert found["bits_per_byte"] != expected["bits_per_byte"] or weights == "fp32"


def test_a_tokenizer_larger_than_the_model_is_refused_and_a_lossy_one_is_said(tiny_run: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(find_model_directory(tiny_run), model)
    path = model / "tokenizer.json"
    tree = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**tree, "normalizer": {"type": "Lowercase"}}), "utf-8")
    said: list[str] = []
    load(model, log=said.append)
    (line,) = said
    assert "does not keep text" in line
    further = [{**tree["added_tokens"][0], "content": f"<{i}>", "id": 300 + i} for i in range(60)]
    path.write_text(json.dumps({**tree, "added_tokens": [*tree["added_tokens"], *further]}), "utf-8")
    with pytest.raises(CheckpointError, match=r"the tokenizer has 3\d\d ids and the model embeds only 300"):
        load(model)


def test_a_text_is_encoded_as_the_directory_asks(tiny_run: Path) -> None:
    model = load(tiny_run)
    assert model.encode("a<｜User｜>") == [0, *model.tokenizer.encode("a<｜User｜>")]
    assert model.encode("a<｜User｜>", parse_special=True) == [0, *model.tokenizer.encode("a"), 3]
    assert (
        model.generate("the cat", max_tokens=3).ids
        == model.generate([0, *model.tokenizer.encode("the cat")], max_tokens=3).ids
    )


def test_messages_can_be_rendered_elsewhere(written: LanguageModel) -> None:
    from moestro.server.renderer import encode

    def render(messages: Sequence[Mapping[str, str]]) -> list[int]:
        return encode([dict(message) for message in messages], {}, written.tokenizer, True)

    here, there = (Conversation(written, max_tokens=6, seed=1, render=how) for how in (None, render))
    assert list(here.reply("the cat")) == list(there.reply("the cat"))

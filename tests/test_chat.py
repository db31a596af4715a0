"""Conversations: each turn feeds only what is new, and the state is what it would be after the whole text."""
from pathlib import Path

import pytest
from tiny_model import TEMPLATE, write_tiny_model

from minillama.chat import Conversation
from minillama.gguf import GGUF
from minillama.tokenizer import Tokenizer

pytestmark = pytest.mark.host


class Scripted:
    """An engine that replies from a script and logs what it is fed; its state holds all but the last id it yields."""

    def __init__(self, tokenizer: Tokenizer, *replies: list[int]):
        self.tokenizer, self.replies, self.held, self.fed = tokenizer, list(replies), [], []

    position = property(lambda self: len(self.held))

    def clear(self):
        self.held = []

    def generate(self, ids, count, sampler):
        self.held, self.fed = self.held + ids, [*self.fed, ids]
        reply = self.replies.pop(0)[:count]
        for index, token in enumerate(reply):
            yield token
            if index + 1 < len(reply):
                self.held = [*self.held, token]


def conversation(tmp_path: Path, *replies: str, template: str = TEMPLATE) -> Conversation:
    write_tiny_model(tmp_path / "talk.gguf", metadata_overrides={"tokenizer.chat_template": template})
    tokenizer = Tokenizer.from_gguf(GGUF(tmp_path / "talk.gguf"))
    return Conversation(Scripted(tokenizer, *(tokenizer.encode(reply) for reply in replies)))


def talk(about: Conversation, said: str, count: int = 100) -> str:
    return "".join(about.say(said, count, None, lambda ids, fed: ids))


def turn(said: str) -> str:
    return f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"


def test_a_turn_feeds_only_what_is_new(tmp_path: Path):
    about = conversation(tmp_path, "in the end<|im_end|>", "on<|im_end|>", "er<|im_end|>")
    assert [talk(about, said) for said in ("hi", "more", "and")] == ["in the end", "on", "er"]
    fed = [about.tokenizer.decode(ids) for ids in about.engine.fed]
    assert fed == [turn("hi"), "<|im_end|>\n" + turn("more"), "<|im_end|>\n" + turn("and")]


def test_the_last_token_of_a_reply_that_was_cut_off_is_fed_before_the_next_turn(tmp_path: Path):
    about = conversation(tmp_path, "thing the end", "on<|im_end|>")
    cut = about.tokenizer.encode("thing the end")[:3]
    assert talk(about, "hi", 3) == about.tokenizer.decode(cut)
    talk(about, "more")
    assert about.engine.fed[1] == cut[2:] + about.tokenizer.encode("<|im_end|>\n" + turn("more"))
    whole = about.tokenizer.encode(turn("hi")) + cut + about.tokenizer.encode("<|im_end|>\n" + turn("more") + "on")
    assert about.engine.held == whole


def test_a_template_that_rewrites_the_past_starts_from_an_empty_state(tmp_path: Path):
    about = conversation(tmp_path, " in <|im_end|>", "on<|im_end|>", template=TEMPLATE.replace(
        "m['content']", "m['content'].strip()"))
    assert [talk(about, said) for said in ("hi", "more")] == [" in ", "on"]
    whole = turn("hi") + "in<|im_end|>\n" + turn("more")
    assert about.engine.fed[1] == about.tokenizer.encode(whole)
    assert about.engine.held == about.tokenizer.encode(whole + "on")

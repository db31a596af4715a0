"""The tokenizer against llama.cpp's and the `tokenizers` library's own answers, and against itself."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillama.gguf import GGUF, GGUFError
from minillama.tokenizer import BYTE_OF, ChatError, Tokenizer

HERE = Path(__file__).parent / "reference"
REFERENCE = Path(os.environ.get("MINILLAMA_REFERENCE", HERE))
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HELLO = [{"role": "user", "content": "Hi!"}]


def small_metadata(**changes) -> dict:
    """A vocabulary of 256 bytes, six merges, the ChatML specials and a user-defined token; None removes a key."""
    merges = ["Ġ Ġ", "ĠĠ ĠĠ", "d e", "de f", "Ġ de", "Ã ¤"]
    tokens = [*BYTE_OF, *(m.replace(" ", "") for m in merges), *CHATML, "<think>"]
    keys = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "merges": merges, "eos_token_id": 264,
            "token_type": [1] * (len(tokens) - 4) + [3, 3, 3, 4]} | changes
    template = {"tokenizer.chat_template": keys.pop("template", None)}
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | template
    return {key: value for key, value in named.items() if value is not None}


def small(**changes) -> Tokenizer:
    return Tokenizer.from_gguf(SimpleNamespace(path="small.gguf", metadata=small_metadata(**changes)))


SMALL = small()
SPECIALS = st.sampled_from([*CHATML, "<think>", "<|im_", "\r\n", "    ", "'RE", "e\u0301", "👩‍🚀"])


@given(st.lists(st.one_of(st.text(), SPECIALS)).map("".join), st.booleans())
@example("Ġ", True)
@example("ä<|im_end|>\x00", False)
@settings(max_examples=200, deadline=None)
def test_decoding_what_was_encoded_gives_the_text_back(text, special):
    ids = SMALL.encode(text, special=special)
    assert SMALL.decode(ids) == text
    assert "".join(SMALL.decode_stream(iter(ids))) == text


@given(st.lists(st.integers(0, SMALL.vocab_size - 1)))
@settings(max_examples=100, deadline=None)
def test_streaming_any_ids_gives_the_same_text_as_decoding_them_at_once(ids):
    assert "".join(SMALL.decode_stream(ids)) == SMALL.decode(ids)


def test_a_stream_never_yields_half_a_character():
    text = "naïve 你好 🙂!"
    ids = SMALL.encode(text)
    pieces = list(SMALL.decode_stream(ids))
    assert len(ids) > len(pieces) and "�" not in "".join(pieces)
    assert all(len(piece) == 1 for piece in pieces if not piece.isascii()), pieces
    cut = list(SMALL.decode_stream(ids[:-2]))  # the last character's final byte never comes
    assert cut[-1] == "�" and cut[:-1] == pieces[:-2]


def test_words_are_cut_as_qwen2_cuts_them():
    split = SMALL._bpe.pre_tokenizer.pre_tokenize_str
    words = [word for word, _ in split("if x:\n    return 123 # y'all DON'T\n\n  z")]
    assert words == ["if", "Ġx", ":Ċ", "ĠĠĠ", "Ġreturn", "Ġ", "1", "2", "3", "Ġ#", "Ġy", "'all", "ĠDON", "'T",
                     "ĊĊ", "Ġ", "Ġz"]


def test_special_tokens_are_one_id_unless_switched_off():
    assert SMALL.encode("<|im_start|>a<think>") == [263, 64, 265]
    plain = SMALL.encode("<|im_start|>a<think>", special=False)
    assert len(plain) == len("<|im_start|>") + 2 and plain[-1] == 265, "user-defined tokens are matched always"
    assert SMALL.encode("<|im_end|>") == [264], "the switch must not stick"


def test_stops_hold_the_end_of_text_and_the_end_of_turn():
    assert (SMALL.eos, SMALL.stops) == (264, {262, 264})
    assert small(eot_token_id=5, eos_token_id=None).stops == {5, 262, 264}


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_file_without_a_named_pre_tokenizer_is_read_as_qwen2(pre):
    assert small(pre=pre).encode("a 12") == SMALL.encode("a 12")


def test_combining_marks_belong_to_words_in_the_newer_pattern_only():
    count = {pre: len(small(pre=pre)._bpe.pre_tokenizer.pre_tokenize_str("क्षि")) for pre in ("qwen2", "qwen35")}
    assert count == {"qwen2": 3, "qwen35": 1}


@pytest.mark.parametrize("changes, says", [
    ({"model": "llama"}, "tokenizer model 'llama' is not supported"),
    ({"model": None}, "no vocabulary: tokenizer.ggml.model is missing"),
    ({"model": 7}, "tokenizer.ggml.model is not of type str"),
    ({"pre": "gpt-4o"}, "pre-tokenizer 'gpt-4o' is not supported"),
    ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    ({"tokens": [1, 2]}, "tokenizer.ggml.tokens holds something that is not of type str"),
    ({"token_type": [1]}, "1 token types for 266 tokens"),
    ({"tokens": ["a"] * 266}, "the vocabulary holds 265 tokens twice"),
    ({"merges": None}, "tokenizer.ggml.merges is missing"),
    ({"merges": ["a b c"]}, "merge 'a b c' is not a pair of tokens"),
    ({"merges": ["ab"]}, "merge 'ab' is not a pair of tokens"),
    ({"merges": ["x y"]}, "merge 'x y' needs a token that the vocabulary lacks"),
    ({"eos_token_id": 266}, "tokenizer.ggml.eos_token_id is 266, outside the vocabulary of 266"),
    ({"add_bos_token": True}, "add_bos_token is true"),
    ({"template": 3}, "tokenizer.chat_template is not of type str"),
])
def test_an_unusable_vocabulary_is_one_clear_line(changes, says):
    with pytest.raises(GGUFError) as caught:
        small(**changes)
    message = str(caught.value)
    assert message.startswith("small.gguf: ") and says in message and "\n" not in message, message


@pytest.mark.parametrize("token", [-1, 266])
def test_an_id_outside_the_vocabulary_is_an_error(token):
    with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 266"):
        SMALL.decode([token])


def test_text_that_is_not_unicode_is_an_error():
    with pytest.raises(ValueError, match="not valid Unicode"):
        SMALL.encode("a\udc80")


def test_the_files_own_template_renders_the_conversation():
    template = """{%- for m in messages %}
        {%- if m.role == "user" %}
[{{ m.content }}]
        {%- endif %}
    {%- endfor %}
    {% if add_generation_prompt %}
>{{ eos_token }}{{ mood | tojson }}
    {% endif %}"""
    ours = small(template=template)
    assert ours.render_chat(HELLO, mood={"é": 1}) == '[Hi!]><|im_end|>{"é": 1}\n'
    assert ours.render_chat(HELLO, add_generation_prompt=False) == "[Hi!]"
    dated = small(template="{{ strftime_now('%Y') }}")
    assert int(dated.render_chat([])) >= 2025


def test_a_file_without_a_template_speaks_chatml_where_it_has_the_tokens():
    assert SMALL.render_chat(HELLO) == "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(GGUFError, match=r"small.gguf: no chat template \(tokenizer.chat_template\), and no ChatML"):
        small(token_type=[1] * 266).render_chat(HELLO)


@pytest.mark.parametrize("template, error, says", [
    ("{% for m in messages %}", GGUFError, "the chat template is broken: Unexpected end of template"),
    ("{{ messages | shout }}", GGUFError, "the chat template is broken: No filter named 'shout'"),
    ("{{ raise_exception('no\nsystem') }}", ChatError, "the chat template failed: no system"),
    ("{{ messages[0].content.a.b }}", ChatError, "has no attribute 'a'"),
    ("{{ messages.append(1) }}", ChatError, "is unsafe"),
    ("{{ messages.__class__.__mro__ }}", ChatError, "is unsafe"),
    ("{{ 1 / 0 }}", ChatError, "division by zero"),
    ("{{ '{1}'.format('x') }}", ChatError, "out of range"),
    ("{{ 'a'.encode('nope') }}", ChatError, "unknown encoding"),
    ("{{ cycler().next() }}", ChatError, "at least one item"),
])
def test_a_bad_template_is_one_clear_line(template, error, says):
    with pytest.raises(error) as caught:
        small(template=template).render_chat(HELLO)
    message = str(caught.value)
    assert message.startswith("small.gguf: ") and says in message and "\n" not in message, message


def test_tokens_equal_the_reference_pairs():
    pairs = json.loads((HERE / "ref-a.json").read_text())["tokenizer"]
    tokenizer = Tokenizer.from_gguf(GGUF(next(HERE.glob("ref-a-*.gguf"))))
    for text, ids in pairs:
        assert tokenizer.encode(text) == ids, f"{text!r}: {tokenizer.encode(text)}, expected {ids}"
        assert tokenizer.decode(ids) == text


@pytest.mark.skipif("MINILLAMA_REFERENCE" not in os.environ, reason="needs MINILLAMA_REFERENCE")
def test_every_case_of_the_real_qwen_vocabulary_equals_llama_cpps_answer():
    stem = REFERENCE / "ggml-vocab-qwen2.gguf"
    texts = Path(f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    answers = Path(f"{stem}.out").read_text().split("\n")
    file = GGUF(stem)
    start = time.process_time()
    tokenizer = Tokenizer.from_gguf(file)
    seconds = time.process_time() - start
    assert len(texts) == len(answers) > 40 and tokenizer.vocab_size == 151936
    for text, answer in zip(texts, answers, strict=True):
        ids = tokenizer.encode(text)
        assert ids == [int(i) for i in answer.split()], f"{text!r}: {ids}, expected {answer}"
        assert tokenizer.decode(ids) == text
    assert seconds < 5, f"building took {seconds:.1f} s"

"""Text in, batches out: every expected value is written down or follows from the definition."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ref.data import (
    IGNORED_LABEL,
    MANY_DOCUMENTS,
    BatchOrder,
    Example,
    TokenSequence,
    collate,
    fingerprint,
    pack,
    read_examples,
    split_held_out,
    tokenize,
)

TOKENS = ["<unk>", "<end>", "<turn>", "user", "assistant", "a", "b", "c", "d", "e"]
UNK, END, TURN, USER, ASSISTANT, A, B, C, D, E = range(len(TOKENS))
# The shape of SmolLM2's: a role, a text and an end token per turn, a line break after each.
CHAT_TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['role'] }}\n{{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str | None = None, eos: str | None = "<end>") -> Any:
    """A transformers tokenizer of whole words: one id for each of TOKENS."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token=eos
    )
    tokenizer.chat_template = chat_template
    return tokenizer


class Characters:
    """The part of a tokenizer that tokenize needs, one id per character; `merge` is one more."""

    eos_token_id = 0
    eos_token = "\0"
    chat_template: str | None = None

    def __init__(self, before: list[int], after: list[int], merge: str | None = None) -> None:
        self.before, self.after, self.merge = before, after, merge

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        merged = text.replace(self.merge, "\U0001f517") if self.merge else text
        ids = [ord(letter) for letter in merged]
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---------------------------------------------------------------- read_examples


def test_a_plain_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "story.log", "Ärger,\nsaid the fox.\n")
    assert read_examples(path) == [Example(None, "Ärger,\nsaid the fox.\n")]
    assert read_examples(str(path)) == read_examples(path)


def test_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path: Path) -> None:
    path = write(tmp_path / "story.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_examples(path) == [Example(None, "one\ntwo\n")]


def test_jsonl_lines_are_pairs_or_documents(tmp_path: Path) -> None:
    lines = ['{"prompt": "p", "answer": "q", "id": 7}', "", '{"text": "a\u2028b"}']
    path = write(tmp_path / "data.jsonl", "\n".join(lines))
    assert read_examples(path) == [Example("p", "q"), Example(None, "a\u2028b")]


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "3",
        "[]",
        '{"prompt": "p"}',
        '{"answer": "q"}',
        '{"messages": []}',
        '{"prompt": "p", "answer": ""}',
        '{"prompt": null, "answer": "q"}',
        '{"prompt": "p", "answer": "q", "text": "t"}',
        '{"text": " "}',
        '{"text": "\\ud83d"}',  # half an emoji
    ],
)
def test_a_bad_jsonl_line_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "data.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"data\.jsonl:3: expected .*prompt.*answer.*text.* got "):
        read_examples(path)


def test_a_directory_is_read_in_sorted_order_whatever_its_depth(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "d.txt").mkdir()
    write(tmp_path / "c.md", "three")
    write(tmp_path / "b" / "z.jsonl", '{"text": "two"}')
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "a.bin", b"\xff")
    assert [example.text for example in read_examples(tmp_path)] == ["one", "two", "three"]


def test_a_directory_without_text_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", "text")
    with pytest.raises(ValueError, match=r"expected \.txt, \.md, \.jsonl files below .*got none"):
        read_examples(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt must be a readable file"):
        read_examples(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(ValueError, match=f"{name} must hold text, got an empty file"):
        read_examples(write(tmp_path / name, content))


def test_a_file_that_is_not_utf8_is_named_with_the_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"na\xefve")
    with pytest.raises(ValueError, match=r"a\.txt must be .* UTF-8 text, got: .*position 2"):
        read_examples(path)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)  # unreadable for every user, root too
    with pytest.raises(ValueError, match=r"loop\.txt must be a readable file"):
        read_examples(loop)


# ---------------------------------------------------------------- fingerprint


def test_fingerprint_is_the_sha256_of_one_json_line_per_example() -> None:
    expected = hashlib.sha256(b'["p", "\\u00e9"]\n[null, "t"]\n').hexdigest()
    assert fingerprint([Example("p", "é"), Example(None, "t")]) == expected


def test_fingerprint_tells_order_and_boundaries_apart() -> None:
    a, b, ab = Example(None, "a"), Example(None, "b"), Example(None, "ab")
    pair, newline = Example("a", "b"), Example(None, "a\nb")
    variants = [[a, b], [b, a], [ab], [pair], [newline], [a], []]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)


# ---------------------------------------------------------------- split_held_out


def make_examples(count: int, prompt: str | None = "p") -> list[Example]:
    return [Example(prompt, f"text {index}") for index in range(count)]


@pytest.mark.parametrize(("prompt", "count"), [("p", 20), (None, MANY_DOCUMENTS)])
def test_pairs_and_many_documents_are_held_out_whole(prompt: str | None, count: int) -> None:
    examples = make_examples(count, prompt)
    train, held_out = split_held_out(examples, 0.25, seed=3)
    assert len(held_out) == count // 4
    assert sorted(train + held_out, key=examples.index) == examples
    assert held_out != examples[-count // 4 :]  # drawn, not the end
    assert split_held_out(examples, 0.25, seed=3) == (train, held_out)
    assert split_held_out(examples, 0.25, seed=4) != (train, held_out)


def test_at_least_one_pair_is_held_out_and_one_is_kept() -> None:
    for fraction, expected in ((0.001, 1), (0.999, 2)):
        train, held_out = split_held_out(make_examples(3), fraction, seed=0)
        assert (len(train), len(held_out)) == (3 - expected, expected)


def test_copies_of_a_held_out_pair_are_not_trained_on() -> None:
    examples = make_examples(10) * 3
    train, held_out = split_held_out(examples, 0.3, seed=0)
    assert (len(train), len(held_out)) == (21, 3)
    assert not set(train) & set(held_out)


def test_a_document_is_cut_after_the_last_line_before_its_tail() -> None:
    text = "aaaa aaaa\nbbbb bbbb\ncccc cccc\ndddd dddd\neeee eeee"  # 49 characters
    # A tail of 14 would start after "dddd ", at 35; the line end at 30 is near enough.
    train, held_out = split_held_out([Example(None, text)], 0.28, seed=0)
    assert train == [Example(None, "aaaa aaaa\nbbbb bbbb\ncccc cccc\n")]
    assert held_out == [Example(None, "dddd dddd\neeee eeee")]


def test_a_document_without_lines_is_cut_after_a_space_and_without_spaces_anywhere() -> None:
    train, held_out = split_held_out([Example(None, "aaa bbb ccc ddd")], 0.4, seed=0)
    # A tail of 6 would start inside "ccc".
    assert (train[0].text, held_out[0].text) == ("aaa bbb ", "ccc ddd")
    train, held_out = split_held_out([Example(None, "0123456789")], 0.3, seed=0)
    assert (train[0].text, held_out[0].text) == ("0123456", "789")


@settings(max_examples=50, deadline=None)
@given(
    st.text(alphabet="ab \n", min_size=2, max_size=60).filter(lambda text: len(text.split()) > 1),
    st.floats(0.05, 0.95),
)
def test_the_parts_of_a_cut_document_make_up_the_document(text: str, fraction: float) -> None:
    other = Example(None, "0123456789" * 4)  # can always be cut
    train, held_out = split_held_out([other, Example(None, text)], fraction, seed=0)
    head, tail = train[1].text, "".join(part.text for part in held_out[1:])
    assert head + tail == text
    if tail:  # at most half as much again on either side, and the rounding to a character
        assert len(tail) <= 1.5 * fraction * len(text) + 2
        assert len(head) <= (1 - fraction) * len(text) + 1


def test_pairs_and_few_documents_are_split_side_by_side() -> None:
    document = Example(None, "one two three four")
    train, held_out = split_held_out([document, *make_examples(4)], 0.25, seed=0)
    assert (len(train), len(held_out)) == (3 + 1, 1 + 1)
    assert train[-1].text + held_out[-1].text == document.text


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_outside_0_to_1_is_an_error(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1"):
        split_held_out(make_examples(4), fraction, seed=0)


@pytest.mark.parametrize(
    "examples", [[], make_examples(1), make_examples(1) * 5, [Example(None, "a")]]
)
def test_too_little_text_to_split_is_an_error(examples: list[Example]) -> None:
    with pytest.raises(ValueError, match=r"cannot hold out 0\.5 of \d example"):
        split_held_out(examples, 0.5, seed=0)


# ---------------------------------------------------------------- tokenize


def test_a_document_is_learned_everywhere_and_closes_with_the_end_token() -> None:
    sequences = tokenize([Example(None, "a b c")], make_tokenizer(), max_length=8)
    assert sequences == [TokenSequence([A, B, C, END], [A, B, C, END])]


def test_a_document_stays_open_when_the_tokenizer_has_no_end_token() -> None:
    sequences = tokenize([Example(None, "a b c")], make_tokenizer(eos=None), max_length=8)
    assert sequences == [TokenSequence([A, B, C], [A, B, C])]


def test_an_end_token_that_the_tokenizer_adds_itself_is_not_doubled() -> None:
    tokenizer = Characters(before=[1], after=[0])
    (document, pair) = tokenize([Example(None, "a"), Example("p", "q")], tokenizer, max_length=8)
    assert document.ids == document.labels == [1, ord("a"), 0]
    assert pair.ids == [1, ord("p"), ord("\n"), ord("q"), 0]
    assert pair.labels == [IGNORED_LABEL] * 3 + [ord("q"), 0]


def test_a_long_document_is_cut_into_pieces() -> None:
    example = Example(None, "a b c d e")
    first, second = tokenize([example], make_tokenizer(), max_length=4)
    assert (first.ids, second.ids) == ([A, B, C, D], [E, END])
    # Six tokens are 5 and 1; alone, the end token has nothing before it to be predicted from.
    (only,) = tokenize([example], make_tokenizer(), max_length=5)
    assert only.ids == [A, B, C, D, E]


def test_without_a_chat_template_a_pair_is_prompt_line_break_answer() -> None:
    (sequence,) = tokenize([Example("a b", "c d")], make_tokenizer(), max_length=8)
    assert sequence.ids == [A, B, C, D, END]
    assert sequence.labels == [IGNORED_LABEL, IGNORED_LABEL, C, D, END]


def test_a_token_merged_across_prompt_and_answer_is_learned() -> None:
    tokenizer = Characters(before=[], after=[], merge="\nq")
    (sequence,) = tokenize([Example("p", "qr")], tokenizer, max_length=8)
    assert sequence.ids == [ord("p"), 0x1F517, ord("r"), 0]
    assert sequence.labels == [IGNORED_LABEL, 0x1F517, ord("r"), 0]


def test_a_chat_template_frames_the_pair_and_only_the_answer_is_learned() -> None:
    (sequence,) = tokenize([Example("a b", "c d")], make_tokenizer(CHAT_TEMPLATE), max_length=16)
    prompt = [TURN, USER, A, B, END, TURN, ASSISTANT]
    assert sequence.ids == [*prompt, C, D, END]
    assert sequence.labels == [IGNORED_LABEL] * len(prompt) + [C, D, END]


def test_nothing_after_the_end_token_of_the_answer_is_learned() -> None:
    class Chat(Characters):
        chat_template = "given"

        def apply_chat_template(
            self,
            messages: list[dict[str, str]],
            tokenize: bool,
            add_generation_prompt: bool = False,
        ) -> str:
            turns = "".join(f"{m['role'][0]}:{m['content']}\0\n" for m in messages)
            return turns + "a:" * add_generation_prompt

    # Specials before and after would be added twice: the template has written them.
    (sequence,) = tokenize([Example("x", "y")], Chat(before=[1], after=[0]), max_length=16)
    assert sequence.ids == [ord(letter) for letter in "u:x\0\na:y\0"]
    assert sequence.labels == [IGNORED_LABEL] * 7 + [ord("y"), 0]


def test_documents_pass_by_the_chat_template() -> None:
    (sequence,) = tokenize([Example(None, "a b")], make_tokenizer(CHAT_TEMPLATE), max_length=8)
    assert sequence.ids == [A, B, END]


def test_a_long_answer_is_truncated_to_one_sequence() -> None:
    (sequence,) = tokenize([Example("a", "b c d e")], make_tokenizer(), max_length=3)
    assert sequence == TokenSequence([A, B, C], [IGNORED_LABEL, B, C])


def test_a_prompt_that_leaves_no_room_is_dropped_with_a_warning() -> None:
    examples = [Example("a b c", "d"), Example("a b", "d")]
    with pytest.warns(UserWarning, match="max_length 3, got none in 1 of 2 example.*now dropped"):
        (sequence,) = tokenize(examples, make_tokenizer(), max_length=3)
    assert sequence == TokenSequence([A, B, D], [IGNORED_LABEL, IGNORED_LABEL, D])


def test_nothing_dropped_means_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize([Example("a b", "d")], make_tokenizer(), max_length=3)


def test_dropping_every_example_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"max_length 3, got none in 1 of 1 .*raise max_length"):
        tokenize([Example("a b c", "d")], make_tokenizer(), max_length=3)


@pytest.mark.parametrize("length", [1, 0, -1])
def test_lengths_below_2_are_an_error(length: int) -> None:
    for example in (Example(None, "a b"), Example("a", "b")):
        with pytest.raises(ValueError, match=f"length must be at least 2 .*got {length}"):
            tokenize([example], make_tokenizer(), max_length=length)
    with pytest.raises(ValueError, match=f"length must be at least 2 .*got {length}"):
        pack([TokenSequence([1, 2], [1, 2])], length)


# ---------------------------------------------------------------- all together


def test_a_file_becomes_batches_and_every_target_is_seen_once_an_epoch(tmp_path: Path) -> None:
    answers = ["a", "b c", "d e a", "b"]
    lines = [json.dumps({"prompt": "e", "answer": answer}) for answer in answers]
    path = write(tmp_path / "pairs.jsonl", "\n".join(lines))
    sequences = tokenize(read_examples(path), make_tokenizer(CHAT_TEMPLATE), max_length=16)
    order = BatchOrder([len(s.ids) for s in sequences], 3, seed=1, group_by_length=True)
    batches = [collate([sequences[i] for i in order.batch(k)], pad_id=UNK) for k in range(2)]
    targets = sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches)
    assert targets == (1 + 2 + 3 + 1) + 4  # the words of the answers, and an end token each

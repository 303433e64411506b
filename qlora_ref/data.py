"""Text in, batches out: what stands between a file of examples and the training loop.

    read_examples -> split_held_out -> tokenize -> pack (optional) -> BatchOrder + collate

Each step depends on its arguments alone and leaves global random state as it is, so a resumed run
sees the same batches. `tokenizer` is any transformers tokenizer. Read next: finetune.py.
"""

import hashlib
import json
import re
import reprlib
import warnings
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# The default ignore_index of torch.nn.functional.cross_entropy: no loss on this token.
IGNORED_LABEL = -100
# With fewer documents, a share of whole ones is too few to stand for the rest: each is cut instead.
MANY_DOCUMENTS = 100
# Batches sorted together: what transformers' group_by_length does, which QLoRA trained with.
BATCHES_PER_MEGA_BATCH = 50


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn, or (prompt is None) a document to learn."""

    prompt: str | None
    text: str


@dataclass(frozen=True)
class TokenSequence:
    """Token ids and a label for each: the same id (not shifted), or IGNORED_LABEL for no loss."""

    ids: list[int]
    labels: list[int]

    def count_targets(self) -> int:
        """Tokens with a loss. The first is never one: nothing comes before to predict it from."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])


def read_examples(path: str | Path) -> list[Example]:
    """Read a .jsonl file, a plain-text file, or every .txt, .md and .jsonl file below a directory.

    .jsonl     an object a line: {"prompt": ..., "answer": ...} or {"text": ...}; more keys ignored
    other      the whole UTF-8 file is one document
    directory  its files in sorted order, whatever order the file system lists them in

    Raises FileNotFoundError for a missing path; ValueError, naming the file (and the line), for one
    that is unreadable, empty or malformed, and for a directory without such files.
    """
    files, suffixes = [Path(path)], (".txt", ".md", ".jsonl")
    if Path(path).is_dir():
        below = sorted(Path(path).rglob("*"))
        files = [file for file in below if file.suffix in suffixes and file.is_file()]
    if not files:
        raise ValueError(f"expected {', '.join(suffixes)} files below {path}, got none; add one")
    return [example for file in files for example in _read_file(file)]


def _read_file(path: Path) -> list[Example]:
    try:
        # "-sig" drops the byte order mark that Windows editors put first.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{path} must be a readable file of UTF-8 text, got: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} must hold text, got an empty file; fill or remove it")
    if path.suffix != ".jsonl":
        return [Example(prompt=None, text=text)]
    # Not splitlines(): it also breaks at U+2028 and its like, which JSON strings may hold.
    lines = enumerate(text.split("\n"), start=1)
    return [_parse_line(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _parse_line(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = line
    keys = {"prompt", "answer", "text"} & record.keys() if isinstance(record, dict) else set()
    if keys in ({"prompt", "answer"}, {"text"}) and all(_is_text(record[key]) for key in keys):
        return Example(record.get("prompt"), record["answer" if "answer" in keys else "text"])
    raise ValueError(
        f'{where}: expected {{"prompt": ..., "answer": ...}} or {{"text": ...}} as a JSON object '
        f"with non-empty strings, got {reprlib.repr(record)}"
    )


def _is_text(text: object) -> bool:
    # JSON can spell half a surrogate pair (a cut emoji), which no tokenizer can take as UTF-8.
    return isinstance(text, str) and text.strip() != "" and not re.search("[\ud800-\udfff]", text)


def fingerprint(examples: list[Example]) -> str:
    """SHA-256 in hex of [prompt, text] as JSON, a line per example: does a resume read the same?"""
    lines = (json.dumps([example.prompt, example.text]) + "\n" for example in examples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def split_held_out(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Set `fraction` of the examples aside: (train, held_out), the same for the same arguments.

    Pairs, and documents if there are MANY_DOCUMENTS or more, are drawn whole; copies of a drawn one
    leave train too. Fewer documents are each cut once, near their last `fraction` of characters.
    Raises ValueError unless 0 < fraction < 1 and both parts hold something.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1 (0.1 is usual), got {fraction}")
    many = sum(example.prompt is None for example in examples) >= MANY_DOCUMENTS
    whole = [example for example in examples if many or example.prompt is not None]
    unique = list(dict.fromkeys(whole))
    count = min(max(1, round(fraction * len(unique))), max(0, len(unique) - 1))
    drawn = {unique[i] for i in _permutation(len(unique), seed, "held out")[:count]}
    train = [example for example in whole if example not in drawn]
    held_out = [example for example in unique if example in drawn]
    for document in [] if many else [example for example in examples if example.prompt is None]:
        head, tail = _cut_document(document.text, fraction)
        train.append(Example(None, head))
        held_out += [Example(None, tail)] if tail else []
    if not train or not held_out:
        raise ValueError(
            f"cannot hold out {fraction} of {len(examples)} example(s): one part is empty; add text"
        )
    return train, held_out


def _cut_document(text: str, fraction: float) -> tuple[str, str]:
    """Cut after a line if one ends near the wished place, else after a space, else right there."""
    wished = len(text) - max(1, round(fraction * len(text)))
    # Neither part may lose more than half of its wished size on the way to a boundary.
    slack = min(wished, len(text) - wished) // 2
    ends = (text.rfind(boundary, wished - slack, wished) + 1 for boundary in ("\n", " "))
    cut = next((end for end in ends if end > 0), wished)
    uncut = not text[:cut].strip() or not text[cut:].strip()
    return (text, "") if uncut else (text[:cut], text[cut:])


def tokenize(examples: list[Example], tokenizer: Any, max_length: int) -> list[TokenSequence]:
    """Turn examples into sequences of at most `max_length` tokens, each with at least one target.

    A pair becomes one sequence, cut off at max_length, through the tokenizer's chat template or, if
    it has none, as "prompt\\nanswer" and the end token; only answer and end token carry a loss.
    A document carries a loss everywhere, closes with the end token, and is cut into pieces.
    Warns of examples whose prompt leaves no room, dropped; ValueError if all are or max_length < 2.
    """
    encoded = (_encode_example(tokenizer, example, max_length) for example in examples)
    pieces = [_cut_tokens(sequence, max_length) for sequence in encoded]
    dropped = pieces.count([])
    problem = (
        f"expected a token to predict within max_length {max_length}, got none in {dropped} of "
        f"{len(examples)} example(s), now dropped; raise max_length or shorten the prompts"
    )
    if dropped == len(examples):
        raise ValueError(problem)
    if dropped:
        warnings.warn(problem, stacklevel=2)
    return list(chain.from_iterable(pieces))


def _encode_example(tokenizer: Any, example: Example, max_length: int) -> TokenSequence:
    """All tokens of a document, or the first max_length of a pair, with their labels."""
    is_chat = example.prompt is not None and tokenizer.chat_template is not None
    prompt = "" if example.prompt is None else f"{example.prompt}\n"
    whole = prompt + example.text
    if is_chat:
        prompt, whole = _render_chat(tokenizer, example)
    # A chat template writes the special tokens itself.
    prompt_ids = _encode(tokenizer, prompt, add_special_tokens=not is_chat) if prompt else []
    ids = _encode(tokenizer, whole, add_special_tokens=not is_chat)
    # Some tokenizers add the end token themselves, some models have none.
    if not is_chat and tokenizer.eos_token_id not in (None, *ids[-1:]):
        ids.append(tokenizer.eos_token_id)
    # What both start with is the prompt. Its own last token may be none of it: merged with the
    # first letters of the answer into another token, it is one to learn.
    start = [*(a == b for a, b in zip(prompt_ids, ids, strict=False)), False].index(False)
    stop = len(ids) if example.prompt is None else max_length
    return TokenSequence(ids[:stop], ([IGNORED_LABEL] * start + ids[start:])[:stop])


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    # verbose=False: no warning that a document is longer than the model's context; we cut it.
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _render_chat(tokenizer: Any, example: Example) -> tuple[str, str]:
    """The prompt, up to where the model is to write, and the conversation, up to its end token."""
    user = {"role": "user", "content": example.prompt}
    assistant = {"role": "assistant", "content": example.text}
    # Text, not tokens: what apply_chat_template(tokenize=True) returns differs between versions.
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    conversation = tokenizer.apply_chat_template([user, assistant], tokenize=False)
    # Many templates add a line break after the end token, which the model never gets to write.
    stripped = conversation.rstrip()
    ended = tokenizer.eos_token is not None and stripped.endswith(tokenizer.eos_token)
    return prompt, stripped if ended else conversation


def pack(sequences: list[TokenSequence], length: int) -> list[TokenSequence]:
    """Concatenate sequences and cut them into ones of exactly `length` tokens, to save padding.

    The remainder is a shorter last one. A cut without a target (all prompt, or a single token) is
    dropped: its mean loss would be 0 / 0. Attention is not masked between packed neighbours (one
    sees the text of the example before), nor do positions restart. Raises ValueError if length < 2.
    """
    ids = list(chain.from_iterable(sequence.ids for sequence in sequences))
    labels = list(chain.from_iterable(sequence.labels for sequence in sequences))
    return _cut_tokens(TokenSequence(ids, labels), length)


def _cut_tokens(sequence: TokenSequence, length: int) -> list[TokenSequence]:
    if length < 2:
        raise ValueError(f"length must be at least 2 (a token and the next one), got {length}")
    ids, labels = _chunks(sequence.ids, length), _chunks(sequence.labels, length)
    pieces = [TokenSequence(*piece) for piece in zip(ids, labels, strict=True)]
    return [piece for piece in pieces if piece.count_targets() > 0]


def calibration_batches(path: str | Path, tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """Token ids to calibrate on: up to `count` pieces of `length` tokens, evenly over a text.

    Of a text that is shorter than one piece, all of it.
    returns  int64 (at most 8, length) each
    Raises ValueError for count < 1, and what `read_examples` and `tokenize` raise.
    """
    if count < 1:
        raise ValueError(f"calibration needs at least 1 sequence, got {count}")
    pieces = pack(tokenize(read_examples(path), tokenizer, length), length)
    whole = [piece.ids for piece in pieces if len(piece.ids) == length] or [pieces[0].ids]
    chosen = whole[:: max(1, len(whole) // count)][:count]
    return [torch.tensor(chosen[i : i + 8]) for i in range(0, len(chosen), 8)]


class BatchOrder:
    """Which examples make up the k-th batch of training: a function of the arguments and k alone.

    lengths          tokens of each example
    batch_size       examples a batch; the smaller rest of an epoch is a batch too
    group_by_length  batches of similar lengths, to save padding; the largest batch of an epoch
                     comes first, so that too little memory shows in the first step

    To resume, go on at the same position. Raises ValueError for no lengths or batch_size < 1.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, group_by_length: bool):
        if not lengths or batch_size < 1:
            raise ValueError(f"need lengths and batch_size >= 1, got {len(lengths)}, {batch_size}")
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.group_by_length = group_by_length
        self.batches_per_epoch = -(-len(lengths) // batch_size)
        self._cached: tuple[int, list[list[int]]] = (-1, [])

    def batch(self, position: int) -> list[int]:
        """Indices of the examples in batch `position`, counted from 0 at the start of training."""
        if position < 0:
            raise ValueError(f"position counts batches from 0, got {position}")
        epoch, index = divmod(position, self.batches_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._order_epoch(epoch))
        return list(self._cached[1][index])

    def _order_epoch(self, epoch: int) -> list[list[int]]:
        order = _permutation(len(self.lengths), self.seed, f"examples of epoch {epoch}")
        if not self.group_by_length:
            return _chunks(order, self.batch_size)
        # Sorted as a whole, the same examples would meet in every epoch.
        mega_batches = _chunks(order, BATCHES_PER_MEGA_BATCH * self.batch_size)
        by_length = [sorted(mega, key=self.lengths.__getitem__)[::-1] for mega in mega_batches]
        batches = _chunks(list(chain.from_iterable(by_length)), self.batch_size)
        sizes = [len(batch) * max(self.lengths[i] for i in batch) for batch in batches]
        # Left in order, the loss curve would rise and fall with the lengths of each mega-batch.
        shuffled = _permutation(len(batches), self.seed, f"batches of epoch {epoch}")
        largest = sizes.index(max(sizes))
        return [batches[i] for i in sorted(shuffled, key=lambda i: i != largest)]


def _chunks(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _permutation(count: int, seed: int, purpose: str) -> list[int]:
    # Hashed, since seed + epoch would make epoch 1 of seed 0 repeat epoch 0 of seed 1.
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    # The device is named: a generator of the CPU fails under torch.set_default_device("cuda").
    order: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
    return order


def collate(sequences: list[TokenSequence], pad_id: int, multiple_of: int = 1) -> dict[str, Tensor]:
    """Stack sequences into one batch, padded on the right to the longest.

    multiple_of     round the width up to a multiple of this: libraries that prepare, and keep, code
                    for every shape that they meet (oneDNN in bfloat16) then meet few
    input_ids       int64 (batch, width)  pad_id where padded; any valid id does, as it is masked
    labels          int64 (batch, width)  IGNORED_LABEL where padded
    attention_mask  int64 (batch, width)  1 for tokens, 0 for padding
    """
    ids = [torch.tensor(sequence.ids, dtype=torch.int64) for sequence in sequences]
    labels = [torch.tensor(sequence.labels, dtype=torch.int64) for sequence in sequences]
    masks = [torch.ones_like(row) for row in ids]
    missing = -max(len(row) for row in ids) % multiple_of

    def stack(rows: list[Tensor], filler: int) -> Tensor:
        batch = pad_sequence(rows, batch_first=True, padding_value=filler)
        return torch.nn.functional.pad(batch, (0, missing), value=filler)

    return {
        "input_ids": stack(ids, pad_id),
        "labels": stack(labels, IGNORED_LABEL),
        "attention_mask": stack(masks, 0),
    }

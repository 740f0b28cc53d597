"""Each family of tokenizers has the letters as single tokens where the rows end, or the template is refused with the reason."""

from __future__ import annotations

import string

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmrec.config import Prompting
from llmrec.errors import UserError
from llmrec.prompting import PromptWriter
from llmrec.templates import Template, load_template

TITLES = ["", "Toy Story (1995)", "Heat (1995)", "Casino (1995)", "The Matrix (1999)", "A (1998)"]
# How the published tokenizers cut text before they merge: digits by three (Llama 3) or one by one (Qwen), punctuation with its newlines.
CUTS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
TEXT = [load_template(name).layout for name in ("llamarec", "paper")] * 5 + [" ".join(["Answer:", *string.ascii_uppercase])] * 20


def cut_by(pattern: str, begin: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a pattern of its own; `begin` is put in front of every row."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", *([begin] if begin else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token="<|end|>", name_or_path="some/model")


@pytest.fixture(scope="module")
def llama3() -> PreTrainedTokenizerFast:
    return cut_by(CUTS["llama3"], "<|begin|>")


@pytest.fixture(scope="module")
def qwen() -> PreTrainedTokenizerFast:
    return cut_by(CUTS["qwen"], None)


@pytest.fixture(scope="module")
def byt5() -> PreTrainedTokenizerFast:
    """A byte's id is the byte plus three, after padding, end and unknown."""
    alphabet = [character for _, character in sorted((byte_of(character), character) for character in pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: at for at, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", name_or_path="bytes")


def byte_of(character: str) -> int:
    """GPT-2 writes bytes that do not print as characters from U+0100 on, in their order."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return ord(character) if ord(character) in printing else others[ord(character) - 256]


def writer(tokenizer, template="llamarec") -> PromptWriter:
    return PromptWriter(tokenizer, load_template(template), Prompting(candidates=20, budget=2000), TITLES)


@pytest.mark.parametrize(
    ("family", "template", "space"),
    [
        ("llama2", "llamarec", ""),  # a newline is in front: not the token of "A" at the beginning of a text
        ("llama2", "paper", "▁"),
        ("unigram", "paper", "▁"),
        ("gpt2", "llamarec", ""),
        ("gpt2", "paper", "Ġ"),
        ("llama3", "llamarec", ""),
        ("llama3", "paper", "Ġ"),
        ("qwen", "llamarec", ""),
        ("qwen", "paper", "Ġ"),
        ("byte", "llamarec", ""),
        ("byt5", "llamarec", ""),
    ],
)
def test_letters_are_the_tokens_that_rows_end_with(family, template, space, request):
    tokenizer = request.getfixturevalue(family)
    found = writer(tokenizer, template)
    assert tokenizer.convert_ids_to_tokens(found.labels) == [space + letter for letter in string.ascii_uppercase[:20]]
    prompt = found.write([1, 2], [3, 4, 5])
    for answer, label in zip(found.answers, found.labels, strict=True):
        assert found.encode(prompt.text + answer) == [*prompt.ids, label]


def test_the_begin_token_stands_once_and_no_end_token_does(llama3, byt5):
    begun = writer(llama3).write([1], [2, 3]).ids
    assert [token for token in begun if token in llama3.all_special_ids] == [llama3.bos_token_id] == begun[:1]
    assert byt5("A").input_ids[-1] == byt5.eos_token_id
    assert byt5.eos_token_id not in writer(byt5).write([1], [2, 3]).ids


def test_newlines_merge_with_what_is_in_front_and_not_with_the_letter(llama3):
    """The pattern keeps ":" and "\\n" together; cut otherwise, the newline would be the row's last token before the letter."""
    ids = writer(llama3).write([1], [2, 3]).ids
    assert llama3.convert_ids_to_tokens(ids[-1]) == ":Ċ"


@pytest.mark.parametrize("family", ["byte", "byt5"])
def test_bytes_have_no_token_for_a_space_and_a_letter(family, request):
    tokenizer = request.getfixturevalue(family)
    expected = rf"template paper: the answer ' A' is not one token .* tokenizer '{tokenizer.name_or_path}' makes 2 tokens of it; choose"
    with pytest.raises(UserError, match=expected):
        writer(tokenizer, "paper")


def test_a_space_at_the_end_of_the_prompt_merges_with_the_letter(llama3):
    template = Template(
        "mine", "Go.", "{instruction}{history}{candidates} Answer: ", "{number}{title}", "{letter} {title}", " ", "{letter}"
    )
    with pytest.raises(
        UserError, match=r"template mine: the answer 'A' .* 'some/model' merges it with the end of the prompt; .* ends with a"
    ):
        PromptWriter(llama3, template, Prompting(), TITLES)


def test_a_tokenizer_that_does_not_know_the_letters_is_refused():
    small = Tokenizer(models.WordLevel({"<unk>": 0, "A": 1, "B": 2}, unk_token="<unk>"))
    small.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small, unk_token="<unk>", name_or_path="some/words")
    with pytest.raises(UserError, match=r"the answer 'D' .* 'some/words' makes the token of it that 'C' has"):
        writer(tokenizer)

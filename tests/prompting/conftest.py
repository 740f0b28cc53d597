"""Small tokenizers of the three families that the rankers use, built here so that nothing is downloaded."""

from __future__ import annotations

import json
import string

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmrec.templates import load_template

CORPUS = [
    load_template("llamarec").layout,
    load_template("llamarec").instruction,
    load_template("paper").layout,
    *["Answer: A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"] * 20,  # " A" is one token wherever there are merges
    *[f"\n({letter}) Toy Story Heat Casino The Matrix, The Lord of the Rings: {n}" for n, letter in enumerate(string.ascii_uppercase)],
]


def byte_level(vocab_size: int) -> Tokenizer:
    """Byte-level BPE as in GPT-2 and SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def gpt2() -> PreTrainedTokenizerFast:
    """One token is beginning, end and unknown; a chat token is added without the flag "special", as in Qwen."""
    tokenizer = byte_level(500)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end, additional_special_tokens=["<|im_start|>"]
    )


@pytest.fixture(scope="session")
def byte() -> PreTrainedTokenizerFast:
    """One token a byte: no merges at all."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(257), eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def llama2() -> PreTrainedTokenizerFast:
    """Sentencepiece-like BPE as in Llama-2: spaces are U+2581, one is put in front, bytes fall back, BOS is added."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in model["vocab"] if token not in tokens and "\n" not in token]
    merges = [tuple(merge) for merge in model["merges"] if "\n" not in "".join(merge)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokens.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def unigram() -> PreTrainedTokenizerFast:
    """Sentencepiece Unigram, whose vocabulary has "</s>" as a piece that plain text can match; emoji are unknown."""
    pieces = ["▁", "\n", *string.punctuation, *string.digits, *string.ascii_letters]
    pieces += [f"▁{letter}" for letter in string.ascii_uppercase] + ["▁Toy", "▁Story", "▁the"]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -float(len(pieces)) / len(piece)) for piece in pieces)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(params=["gpt2", "byte", "llama2", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each of the tokenizers in turn."""
    return request.getfixturevalue(request.param)
